"""Weight differences: recovered bit by bit, whatever the dtypes; what does not belong or is damaged is named."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_memory import CLEAR_REFS, peaks
from checkpoints import edit, flip_bit, names, refusal, to_bin, truncate
from safetensors.torch import load_file, save_file
from test_tokenization import word_tokenizer
from tiny import sharpen, tiny_llama
from torch import Tensor

from landmark_llama import LandmarkLlamaForCausalLM, weight_difference
from landmark_llama.weight_difference import MANIFEST, exclusive_or

KINDS = {
    "one dtype": (torch.bfloat16, torch.bfloat16, {}),
    "a base in fp32": (torch.float16, torch.float32, {}),
    "a base in fp16": (torch.float32, torch.float16, {}),
    "tied": (torch.bfloat16, torch.float16, {"tie_word_embeddings": True}),
}


def save_pair(folder: Path, tuned: torch.dtype = torch.bfloat16, base: torch.dtype = torch.float16, **settings) -> None:
    """`folder`/base, a LLaMA of 5 tokens in several shards, and `folder`/tuned, made of it with one token more."""
    dense, tokenizer = tiny_llama(vocab_size=5, **settings), word_tokenizer()
    dense.to(base).save_pretrained(folder / "base", max_shard_size="20KB")
    model = LandmarkLlamaForCausalLM.from_llama(dense, tokenizer, block_size=4, num_retrieved_blocks=1)
    sharpen(model, seed=1)
    norm = model.model.norm.weight.data = model.model.norm.weight.data.to(tuned)
    norm[:3] = torch.tensor([-0.0, float("nan"), float("inf")])  # what subtracting and adding would lose
    model.to(tuned).save_pretrained(folder / "tuned", max_shard_size="20KB")
    tokenizer.save_pretrained(folder / "tuned")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}


def make(folder: Path) -> Path:
    weight_difference.main(["make", *(str(folder / name) for name in ("tuned", "base", "difference"))])
    return folder / "difference"


def recover(folder: Path, *flags: str) -> Path:
    weight_difference.main(["recover", *(str(folder / name) for name in ("difference", "base", "recovered")), *flags])
    return folder / "recovered"


def refused(folder: Path, command: str = "recover", **others: Path) -> str:
    """The sentence with which a command refuses `folder`, having written nothing."""
    before, first = names(folder), {"make": "tuned", "recover": "difference"}[command]
    places = {name: folder / name for name in (first, "base")} | {"output": folder / "output"} | others
    message = refusal(weight_difference.main, command, *places.values())
    assert names(folder) == before
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pair(tmp_path)
    make(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recovered_is_bitwise_the_tuned_model(kind: str, tmp_path: Path) -> None:
    tuned, base, settings = KINDS[kind]
    save_pair(tmp_path, tuned, base, **settings)
    make(tmp_path)
    expected, found = weights(tmp_path / "tuned"), weights(recover(tmp_path, "--no_self_test"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype == tuned
        assert torch.equal(found[name].view(torch.uint8), weight.view(torch.uint8))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "recovered" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()
    LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "recovered")


def test_a_difference_holds_the_rows_of_added_tokens_and_neither_model(folder: Path) -> None:
    stored, tuned = weights(folder / "difference"), weights(folder / "tuned")
    rows = stored["model.embed_tokens.weight"]
    assert torch.equal(rows[5:].view(torch.bfloat16), tuned["model.embed_tokens.weight"][5:])
    assert not any(torch.equal(stored[name], tuned[name].view(torch.int16)) for name in tuned)
    norm = tuned["model.norm.weight"]
    assert not exclusive_or(norm, norm).any()


def test_a_tied_base_gives_its_embedding_for_the_output(tmp_path: Path) -> None:
    save_pair(tmp_path)
    tied = tiny_llama(vocab_size=5, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("model-*"):
        path.unlink()
    (tmp_path / "base/model.safetensors.index.json").unlink()
    make(tmp_path)
    assert weights(recover(tmp_path, "--no_self_test")).keys() == weights(tmp_path / "tuned").keys()


def test_the_same_base_in_bin_files_and_another_precision_will_do(folder: Path) -> None:
    for path in (folder / "base").glob("*.safetensors"):
        wider = {name: weight.float() for name, weight in load_file(path).items()}
        wider["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(wider, path)
    to_bin(folder / "base")
    found, expected = weights(recover(folder, "--no_self_test")), weights(folder / "tuned")
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)


def test_a_base_that_was_rounded_is_a_wrong_one(tmp_path: Path) -> None:
    save_pair(tmp_path, tuned=torch.float32, base=torch.float16)
    make(tmp_path)
    for path in (tmp_path / "base").glob("*.safetensors"):
        save_file({name: weight.bfloat16() for name, weight in load_file(path).items()}, path)
    assert "is the first tensor that differs (SHA-256, as float32)" in refused(tmp_path)


def test_a_wrong_base_is_named_with_the_first_tensor_that_differs(folder: Path, tmp_path: Path) -> None:
    path = next(path for path in (folder / "base").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    changed = load_file(path)
    changed["model.norm.weight"][7] += 0.01
    save_file(changed, path)
    message = refused(folder)
    assert f"{folder / 'base'}: not the base of this difference: model.norm.weight is the first tensor" in message
    changed["model.norm.weight"] = torch.ones(3)
    save_file(changed, path)
    assert "model.norm.weight is of shape (3,), not (32,)" in refused(folder)
    del changed["model.norm.weight"]
    save_file(changed, path)
    assert "model.norm.weight is missing" in refused(folder)


def test_a_flipped_bit_is_named_wherever_it_is(folder: Path) -> None:
    difference, shards = folder / "difference", 0
    for path in sorted(difference.iterdir()):
        for at in (40, path.stat().st_size // 2, -1):
            flip_bit(path, at)
            if path.name != "model.safetensors" or at != 40:
                assert path.name in refused(folder)
            flip_bit(path, at)
        shards += path.suffix == ".safetensors"
    assert shards == 1
    recover(folder, "--no_self_test")


def test_a_flipped_bit_in_any_tensor_is_named_with_it(folder: Path) -> None:
    path = folder / "difference/model.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    start = path.stat().st_size - max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry)
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        flip_bit(path, start + header[name]["data_offsets"][0])
        assert f"model.safetensors: {name} is damaged" in refused(folder)
        flip_bit(path, start + header[name]["data_offsets"][0])


def test_what_is_missing_or_truncated_is_one_sentence(folder: Path) -> None:
    difference = folder / "difference"
    truncate(difference / "model.safetensors")
    assert "model.safetensors: truncated or damaged" in refused(folder)
    (difference / "model.safetensors").unlink()
    assert "holds no weights" in refused(folder)
    (difference / "tokenizer.json").unlink()
    assert "tokenizer.json: missing or damaged" in refused(folder)
    edit(difference / MANIFEST, format=2)
    assert "format 2; this version reads format 1" in refused(folder)
    (difference / MANIFEST).unlink()
    assert f"holds no {MANIFEST}" in refused(folder)
    assert "nowhere: there is no such folder" in refused(folder, difference=folder / "nowhere")
    assert "is not empty; give a folder that does not exist yet" in refused(folder, output=folder / "tuned")


def test_no_difference_is_made_of_what_does_not_belong_together(tmp_path: Path) -> None:
    save_pair(tmp_path)
    tiny_llama(vocab_size=7).save_pretrained(tmp_path / "larger")
    message = refused(tmp_path, "make", base=tmp_path / "larger")
    assert "larger: not the base of this model: its " in message
    assert "has the shape (7, 32), the tuned model's (6, 32)" in message
    tiny_llama(vocab_size=5, num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    assert "shallow: lacks model.layers.1" in refused(tmp_path, "make", base=tmp_path / "shallow")
    assert "model_type is 'llama', not 'landmark_llama'" in refused(tmp_path, "make", tuned=tmp_path / "base")
    shard = sorted((tmp_path / "tuned").glob("*.safetensors"))[1]
    truncate(shard)
    assert f"{shard.name}: truncated or damaged" in refused(tmp_path, "make")


def test_the_self_test_says_what_came_out_of_a_recovered_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    recover(folder)
    said = capsys.readouterr().out
    assert "all 21 tensors are bitwise those of the tuned model (SHA-256)" in said
    assert "self-test: the verdict: NOT found" in said


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason=f"peaks are measured by {CLEAR_REFS}, which Linux has")
def test_memory_holds_a_shard_and_a_few_tensors_however_large_the_model(tmp_path: Path) -> None:
    peaks(tmp_path / "small", 64, 1, 100, "4MB")  # what libraries take for themselves
    found = peaks(tmp_path / "large", 512, 8, 1000, "4MB")
    model = found.pop("weights")  # 53 MB; the largest tensor takes 1.4 MB
    assert found.keys() == {"import", "make", "recover"}
    assert max(found.values()) < model / 2
