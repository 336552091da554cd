"""Saved memories: what was read is there again, for the model that read it and for no other; nothing is ever lost."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import edit, flip_bit
from memories import files, without_permission
from safetensors.torch import load_file
from tiny import LANDMARKS, ragged, random_ids, tiny_config, tiny_model

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage
from landmark_llama.saved.folder import read_manifest, writing

pytestmark = pytest.mark.usefixtures("poisoned_memory", "general_steps")

ways_to_weigh = pytest.mark.parametrize(
    "settings",
    [*LANDMARKS.values(), {"block_weight": "exact", "num_sink_blocks": 1}],
    ids=[*LANDMARKS, "exact_with_sinks"],
)


@torch.no_grad()
def having_read(model: LandmarkLlamaForCausalLM, ids: torch.Tensor, **inputs: torch.Tensor) -> LandmarkCache:
    cache = LandmarkCache(model.config)
    model(ids, past_key_values=cache, **inputs)
    return cache


@pytest.fixture
def saved(tmp_path: Path) -> tuple[LandmarkLlamaForCausalLM, Path]:
    """A model, and the folder of a memory of 50 tokens."""
    model = tiny_model()
    having_read(model, random_ids(1, 50)).save(tmp_path / "memory")
    return model, tmp_path / "memory"


@ways_to_weigh
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize("length", [2, 3, 50, 51, 53])
@torch.no_grad()
def test_a_memory_goes_on_bit_for_bit_as_the_cache_would(
    settings: dict, mapped: bool, length: int, tmp_path: Path
) -> None:
    model, ids = tiny_model(**settings), random_ids(1, length + 31)
    cache = having_read(model, ids[:, :length])
    cache.save(tmp_path / "memory")
    opened = LandmarkCache.load(tmp_path / "memory", model, mapped=mapped, verify=True)
    for part in ids[:, length:].split([20, *[1] * 11], dim=1):
        expected, logits = (model(part, past_key_values=x).logits for x in (cache, opened))
        assert torch.equal(expected, logits)


@torch.no_grad()
def test_generate_is_given_what_follows_the_text_and_nothing_of_the_text(saved: tuple) -> None:
    model, folder = saved
    ids, question = random_ids(1, 50), random_ids(1, 9, seed=1)
    everything = model.generate(torch.cat([ids, question], dim=1), max_new_tokens=12, do_sample=False)
    cache = LandmarkCache.load(folder, model)
    assert cache.get_seq_length() == 0
    answer = model.generate(question, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(answer[:, 9:], everything[:, 59:])


@torch.no_grad()
def test_after_a_crop_the_next_question_finds_the_memory_as_it_was(saved: tuple) -> None:
    model, folder = saved
    cache = LandmarkCache.load(folder, model)
    answers = []
    for seed in (1, 2, 1):
        question = random_ids(1, 9 + seed, seed=seed)
        answers.append(model.generate(question, past_key_values=cache, max_new_tokens=12, do_sample=False))
        cache.crop(-cache.get_seq_length())
    assert torch.equal(answers[0], answers[2])
    with pytest.raises(ValueError, match="the cache holds 0 columns only"):
        cache.crop(-1)  # into the memory


@torch.no_grad()
def test_two_that_go_on_from_one_memory_do_not_know_of_each_other(saved: tuple) -> None:
    model, folder = saved
    before = files(folder)
    first, second = (LandmarkCache.load(folder, model) for _ in range(2))
    alone = LandmarkCache.load(folder, model)
    ids = random_ids(1, 30, seed=3)
    model(random_ids(1, 40, seed=4), past_key_values=first)
    assert torch.equal(model(ids, past_key_values=second).logits, model(ids, past_key_values=alone).logits)
    assert files(folder) == before


@torch.no_grad()
def test_rows_of_different_lengths_are_saved_and_questions_go_in_batches(tmp_path: Path) -> None:
    model = tiny_model()
    batch = ragged([random_ids(47), random_ids(22, seed=1), random_ids(31, seed=2)])
    cache = having_read(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    cache.save(tmp_path / "memory")
    opened = LandmarkCache.load(tmp_path / "memory", model)
    more = random_ids(3, 17, seed=5)
    expected = model(more, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(more, past_key_values=opened).logits, expected)
    opened.crop(-17)
    # beams and batches: a row may go on several times
    rows = torch.tensor([2, 0, 0])
    opened.reorder_cache(rows)
    cache.reorder_cache(rows)
    assert torch.equal(model(more, past_key_values=opened).logits, model(more, past_key_values=cache).logits)


@pytest.mark.parametrize("kind", ["host", "file"])
@ways_to_weigh
@torch.no_grad()
def test_a_memory_does_not_depend_on_where_its_blocks_were(kind: str, settings: dict, tmp_path: Path) -> None:
    model, ids = tiny_model(**settings), random_ids(1, 100)
    storage = HostStorage(budget=0) if kind == "host" else FileStorage(tmp_path / "blocks", budget=0)
    cache = LandmarkCache(model.config, storage=storage)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "memory")
    having_read(model, ids).save(tmp_path / "expected")
    assert files(tmp_path / "memory") == files(tmp_path / "expected")


@pytest.mark.parametrize("budget", [0, 24 * 256, 1 << 20], ids="budget {}".format)
@pytest.mark.parametrize("kind", ["host", "file"])
@ways_to_weigh
@torch.no_grad()
def test_a_memory_opened_into_a_tier_goes_on_bit_for_bit(
    settings: dict, kind: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("landmark_llama.reading.saved.WRITTEN_AT_ONCE", 2048)  # in several parts
    model, batch = tiny_model(**settings), ragged([random_ids(97), random_ids(60, seed=1)])
    cache = having_read(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    cache.save(tmp_path / "memory")
    storage = HostStorage(budget=budget) if kind == "host" else FileStorage(tmp_path / "blocks", budget=budget)
    opened = LandmarkCache.load(tmp_path / "memory", model, storage=storage)
    assert all(len(layer.storage.held.content) == budget // 512 for layer in opened.layers)
    more = random_ids(2, 30, seed=5)
    for part in more.split([20, *[1] * 10], dim=1):
        expected, logits = (model(part, past_key_values=x).logits for x in (cache, opened))
        assert torch.equal(expected, logits)
    for x in (cache, opened):
        x.crop(-30)
        x.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(model(more, past_key_values=opened).logits, model(more, past_key_values=cache).logits)


def test_a_memory_is_either_read_from_its_file_or_copied(saved: tuple) -> None:
    model, folder = saved
    with pytest.raises(ValueError, match="mapped=True: leaves the blocks in their file"):
        LandmarkCache.load(folder, model, mapped=True, storage=HostStorage())


@torch.no_grad()
def test_one_memory_answers_several_questions_at_once(saved: tuple) -> None:
    model, folder = saved
    cache, questions = LandmarkCache.load(folder, model), random_ids(4, 9, seed=1)
    cache.batch_repeat_interleave(4)
    together = model(questions, past_key_values=cache).logits
    for row, question in enumerate(questions):
        alone = model(question[None], past_key_values=LandmarkCache.load(folder, model)).logits
        torch.testing.assert_close(together[row : row + 1], alone)


def test_opening_reads_no_block(saved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    path = folder / "blocks.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(len(content) - 4096))  # of the right length: no block can be read from it
    cache = LandmarkCache.load(folder, model)
    key, _ = cache.storages[1].gather(torch.zeros(1, 1, 1, dtype=torch.long))
    assert not key.any(), "the blocks were held elsewhere than in the file"


def test_its_files_are_plain_safetensors_that_any_program_reads(saved: tuple) -> None:
    model, folder = saved
    blocks, landmarks = (load_file(folder / f"{name}.safetensors")[name] for name in ("blocks", "landmarks"))
    config = model.config
    assert blocks.shape == (16, config.num_hidden_layers, 2, 1, config.num_key_value_heads, 4, config.head_dim)
    assert torch.equal(blocks[:, :, 0, :, :, -1], landmarks)
    assert json.loads((folder / "memory.json").read_text())["ordinary"] == [50]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_other_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny_model().to(dtype), random_ids(1, 70)
    cache = having_read(model, ids[:, :50])
    cache.save(tmp_path / "memory")
    opened = LandmarkCache.load(tmp_path / "memory", model)
    assert opened.storages[0].gather(torch.zeros(1, 1, 1, dtype=torch.long))[0].dtype == dtype
    assert torch.equal(
        model(ids[:, 50:], past_key_values=opened).logits, model(ids[:, 50:], past_key_values=cache).logits
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_size": 8, "num_retrieved_blocks": 1}, "block_size is 4 in the memory and 8 in the model"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 2 in the memory and 1 in the model"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2 in the memory and 4 in the model"),
        ({"landmark_key": "pooled"}, "landmark_key is 'token' in the memory and 'pooled' in the model"),
        ({"seed": 1}, "its weights are not those of the model"),
        ({"num_retrieved_blocks": 1}, "num_retrieved_blocks=2, not 1"),
        ({"num_local_blocks": 2}, "num_direct_blocks=4, not 2"),
        ({"local_attention": "chunked"}, "local_attention='sliding', not 'chunked'"),
        ({"block_weight": "exact"}, "exact_weights=False, not True"),
    ],
    ids=str,
)
def test_another_model_or_way_of_reading_is_refused_and_told_what_differs(
    settings: dict, said: str, saved: tuple
) -> None:
    with pytest.raises(ValueError) as error:
        LandmarkCache.load(saved[1], tiny_model(**settings))
    assert said in str(error.value) and str(saved[1]) in str(error.value)


def test_another_dtype_is_refused(saved: tuple) -> None:
    with pytest.raises(ValueError, match="dtype is 'float32' in the memory and 'bfloat16' in the model"):
        LandmarkCache.load(saved[1], tiny_model().bfloat16())


@pytest.mark.parametrize("name", [name for name, _ in tiny_model().model.named_parameters()])
def test_no_weight_may_have_changed_in_a_single_number(name: str, saved: tuple) -> None:
    model, folder = saved
    LandmarkCache.load(folder, model)
    weight = dict(model.model.named_parameters())[name].data.view(-1)
    weight[len(weight) // 2 + 1] += 1e-3
    with pytest.raises(ValueError, match="its weights are not those of the model"):
        LandmarkCache.load(folder, model)


def test_what_is_not_there_or_damaged_is_named(saved: tuple, tmp_path: Path) -> None:
    model, folder = saved
    blocks, manifest = folder / "blocks.safetensors", folder / "memory.json"
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        LandmarkCache.load(tmp_path / "nowhere", model)
    with pytest.raises(FileNotFoundError, match="holds no memory.json"):
        LandmarkCache.load(tmp_path, model)
    whole = blocks.read_bytes()
    blocks.write_bytes(whole[:-1])
    with pytest.raises(OSError, match="blocks.safetensors: holds .* bytes, and .* were written: the file was cut"):
        LandmarkCache.load(folder, model)
    blocks.write_bytes(whole)
    flip_bit(blocks, -100)
    LandmarkCache.load(folder, model)  # at once, so nobody looks
    with pytest.raises(OSError, match="blocks.safetensors: was changed after it was written"):
        LandmarkCache.load(folder, model, verify=True)
    blocks.unlink()
    with pytest.raises(OSError, match="holds no blocks.safetensors"):
        LandmarkCache.load(folder, model)
    blocks.write_bytes(whole)
    next(folder.glob("tail-*")).write_bytes(b"nothing")
    with pytest.raises(OSError, match="tail-50.safetensors: missing or damaged"):
        LandmarkCache.load(folder, model)
    edit(manifest, landmark_memory=99)
    with pytest.raises(ValueError, match="format 99"):
        LandmarkCache.load(folder, model)
    manifest.write_text("{")
    with pytest.raises(OSError, match="memory.json: damaged"):
        LandmarkCache.load(folder, model)


def test_no_pickle_is_in_a_memory(saved: tuple) -> None:
    assert {path.suffix for path in saved[1].iterdir()} == {".json", ".safetensors", ".lock"}


def test_a_folder_that_holds_something_is_not_written_to(saved: tuple, tmp_path: Path) -> None:
    model, folder = saved
    cache, before = having_read(model, random_ids(1, 20)), files(folder)
    with pytest.raises(FileExistsError, match="holds a memory already"):
        cache.save(folder)
    assert files(folder) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("\\begin{document}")
    with pytest.raises(FileExistsError, match="holds thesis.tex and no memory"):
        cache.save(tmp_path / "other")


def test_a_cache_that_nothing_was_read_into_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model has read into this cache"):
        LandmarkCache(tiny_config()).save(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_second_writer_is_refused_and_readers_are_not(saved: tuple) -> None:
    model, folder = saved
    with writing(folder):
        with pytest.raises(BlockingIOError, match="another process is writing to this memory"), writing(folder):
            pass
        LandmarkCache.load(folder, model)
    with writing(folder) as writer:
        assert writer.manifest == read_manifest(folder)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_who_may_not_write_can_read_and_is_told(public_folder: Path) -> None:
    model, memory = tiny_model(), public_folder / "memory"
    cache = having_read(model, random_ids(1, 50))
    cache.save(memory)
    assert without_permission(memory, lambda: LandmarkCache.load(memory, model)) == "fine"
    assert "PermissionError" in without_permission(public_folder, lambda: cache.save(public_folder / "other"))
