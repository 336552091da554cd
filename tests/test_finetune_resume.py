"""What a run refuses to go on from: checkpoints of another run, damaged ones, and whatever would be unpickled."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune_run import Interruption, base, data, flags, interrupt_at_save, same_weights  # noqa: F401
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoTokenizer, LlamaForCausalLM

from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS, checkpoints
from finetune.checkpoints.resume import COMPLETE, SETTINGS, file_sizes, refuse_damage
from finetune.run import main
from landmark_llama import LandmarkLlamaForCausalLM


@pytest.fixture(scope="module")
def cut(tmp_path_factory, base: Path, data: Path) -> Path:  # noqa: F811
    """A folder that holds `base`, `data`, and `run`: six steps of it, interrupted after the fourth was saved."""
    folder = tmp_path_factory.mktemp("cut")
    for source, name in ((base, "base"), (data, "data")):
        shutil.copytree(source, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_save(patch, 3, Interruption())
        with pytest.raises(Interruption):
            main(flags(folder / "base", folder / "data", folder / "run"))
    shutil.rmtree(folder / "run" / "checkpoint-6")
    return folder


@pytest.fixture
def copy(cut: Path, tmp_path: Path) -> Path:
    """The run of `cut`, to be tampered with."""
    return Path(shutil.copytree(cut / "run", tmp_path / "run"))


@pytest.fixture
def restored(cut: Path, tmp_path: Path):
    """Puts base model and data back, times of change included."""
    for name in ("base", "data"):
        shutil.copytree(cut / name, tmp_path / "kept" / name)
    yield
    for name in ("base", "data"):
        shutil.rmtree(cut / name)
        shutil.copytree(tmp_path / "kept" / name, cut / name)


def other_tokenizer(cut: Path) -> None:
    file = cut / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]  # the same tokens, found in another order
    file.write_text(json.dumps(content))


def other_weights(cut: Path) -> None:
    file = cut / "base" / "model.safetensors"
    save_file({name: weight + 1e-3 for name, weight in load_file(file).items()}, file, {"format": "pt"})


def other_data(cut: Path) -> None:
    with (cut / "data" / "train.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


def data_of_the_same_size(cut: Path) -> None:
    file = cut / "data" / "train.jsonl"
    file.write_text(file.read_text().replace(" the ", " THE "))


@pytest.mark.parametrize("asked", [(), ("--resume_from_checkpoint", "true")], ids=["again", "asked"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_tokenizer, r"tokenizer's content=\S+ 2 \w+, not "),
        (other_weights, "base model's weights="),
        (other_data, r"data files=2 of [\d,]+ bytes, last changed .*, not 2 of [\d,]+ bytes"),
        (data_of_the_same_size, "data_fingerprint="),
    ],
)
def test_other_content_under_the_same_name_is_refused(
    change: Callable[[Path], None], named: str, asked: tuple, cut: Path, copy: Path, restored
) -> None:
    change(cut)
    with pytest.raises(UserError, match=named):
        main(flags(cut / "base", cut / "data", copy, *asked))
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("asked", ["", "true", "path"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--mixture", "train=1", "heldout=1"), r"mixture=\[\], not \['train=1', 'heldout=1'\]"),
        (("--block_size", "16"), "block_size=8, not 16"),
        (("--context_length", "32", "--seed", "3"), "context_length=64, not 32; seed=42, not 3"),
        (("--learning_rate", "2e-2"), "learning_rate=0.01, not 0.02"),
        (("--per_device_train_batch_size", "4"), "(rows of a step|per_device_train_batch_size)=2, not 4"),
        (("--streaming", "true"), "streaming=False, not True"),
    ],
)
def test_other_settings_are_refused_and_named_one_by_one(
    change: tuple, named: str, asked: str, cut: Path, copy: Path, tmp_path: Path
) -> None:
    output = tmp_path / "elsewhere" if asked == "path" else copy
    where = {"": (), "true": ("--resume_from_checkpoint", "true")}
    more = where.get(asked, ("--resume_from_checkpoint", str(copy / "checkpoint-4")))
    with pytest.raises(UserError, match=named):
        main(flags(cut / "base", cut / "data", output, *change, *more))


def test_a_run_may_be_made_longer_and_its_steps_cut_smaller_where_that_is_asked_for(
    cut: Path, copy: Path, tmp_path: Path
) -> None:
    more = ("--max_steps", "8", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    arguments = flags(cut / "base", cut / "data", copy, *more)
    with pytest.raises(UserError, match="max_steps=6, not 8; .*gradient_accumulation_steps=1, not 2"):
        main(arguments)
    main([*arguments, "--resume_from_checkpoint", str(copy / "checkpoint-4")])
    assert json.loads((copy / METRICS).read_text())["steps"] == 8
    moved = shutil.copytree(copy / "checkpoint-8", tmp_path / "moved" / "checkpoint-8")
    with pytest.raises(UserError, match=f"moved/{SETTINGS}: cannot be read, and alone says what checkpoint-8 was"):
        main(flags(cut / "base", cut / "data", tmp_path / "new", "--resume_from_checkpoint", str(moved)))


def test_what_does_not_change_the_result_may_change(cut: Path, copy: Path) -> None:
    main(flags(cut / "base", cut / "data", copy, "--skip_bad_rows", "true", "--max_nan_steps", "2"))
    assert json.loads((copy / METRICS).read_text())["steps"] == 6


def test_the_embedded_corpus_is_the_same_data_wherever_and_whenever_it_is_written(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"text": f"several words stand here {i}\n" * 9, "meta": {"source": f"{i}"}} for i in range(60)]
    monkeypatch.setattr("finetune.demo.corpus.prose_documents", lambda: list(texts))  # in place of Python's own
    more = ("--data", "embedded", "--corpus_documents", "150")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_save(patch, 2, Interruption())
        with pytest.raises(Interruption):
            main(flags(cut / "base", cut, tmp_path / "run", *more))
    (tmp_path / "run").rename(tmp_path / "renamed")
    main(flags(cut / "base", cut, tmp_path / "renamed", *more))
    assert (tmp_path / "renamed" / METRICS).exists()
    before = (tmp_path / "renamed" / "corpus" / "train.jsonl").stat().st_mtime_ns
    main(flags(cut / "base", cut, tmp_path / "renamed", *more, "--resume_from_checkpoint", "true"))
    assert (tmp_path / "renamed" / "corpus" / "train.jsonl").stat().st_mtime_ns == before


CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize(
    ("name", "harm"),
    [(COMPLETE, "shorter")]
    + [(name, harm) for name in CHECKPOINT_FILES for harm in ("shorter", "listed as it is", "gone")],
)
def test_a_damaged_file_of_a_checkpoint_is_named(name: str, harm: str, cut: Path, copy: Path) -> None:
    checkpoint = copy / "checkpoint-4"
    file = checkpoint / name
    os.truncate(file, file.stat().st_size // 2)
    if harm == "listed as it is":
        (checkpoint / COMPLETE).write_text(json.dumps({"step": 4, "files": file_sizes(checkpoint)}))
    if harm == "gone":
        file.unlink()
    what = {"shorter": "bytes in place of" if name != COMPLETE else "not JSON", "gone": "missing"}.get(harm, "")
    with pytest.raises(
        UserError, match=rf"{file}: is damaged \(.*{what}.*\); delete {checkpoint}, and the same command goes on"
    ):
        main(flags(cut / "base", cut / "data", copy))
    shutil.rmtree(checkpoint)
    if name == "rng_state.pth" and harm == "gone":
        main(flags(cut / "base", cut / "data", copy))
        assert json.loads((copy / METRICS).read_text())["steps"] == 6


class Poison:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return open, (str(self.file), "w")


def pickled_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls what `name`, which may have dots, is in `module`."""
    words = [pickle.BINUNICODE + len(word).to_bytes(4, "little") + word.encode() for word in (module, name, argument)]
    found = pickle.PROTO + b"\x04" + words[0] + words[1] + pickle.STACK_GLOBAL
    return found + words[2] + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def in_a_zip(pickled: bytes, original: Path) -> bytes:
    """`original`, a file of torch.save, with `pickled` in place of its own pickle."""
    written = io.BytesIO()
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return written.getvalue()


def test_the_poison_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Poison(tmp_path / "poisoned"), protocol=2)).close()
    assert (tmp_path / "poisoned").exists()
    pickle.loads(pickled_call(FileSystemReader.__module__, "os.system", f"touch {tmp_path / 'called'}"))
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin"]
)
def test_a_poisoned_checkpoint_is_refused_and_its_pickle_never_runs(
    name: str, form: str, cut: Path, copy: Path, tmp_path: Path
) -> None:
    checkpoint = copy / "checkpoint-4"
    poison = pickle.dumps(Poison(tmp_path / "poisoned"), protocol=2)
    (checkpoint / name).write_bytes(poison if form == "pickle" else in_a_zip(poison, checkpoint / "optimizer.pt"))
    # Whoever can swap a file can write its size, too.
    (checkpoint / COMPLETE).write_text(json.dumps({"step": 4, "files": file_sizes(checkpoint)}))
    with pytest.raises(UserError, match=f"{name}: is damaged"):
        main(flags(cut / "base", cut / "data", copy))
    assert not (tmp_path / "poisoned").exists()


def test_the_table_of_a_sharded_checkpoint_is_read_and_a_poisoned_one_never_runs(
    cut: Path, copy: Path, tmp_path: Path
) -> None:
    checkpoint = copy / "checkpoint-4"
    shards = checkpoint / "pytorch_model_fsdp_0"
    weights = {"model": {"one": torch.ones(3), "other": torch.ones(2, dtype=torch.bfloat16)}, "step": 4}
    distributed_checkpoint.save(weights, checkpoint_id=shards, no_dist=True)
    (checkpoint / COMPLETE).write_text(json.dumps({"step": 4, "files": file_sizes(checkpoint)}))
    refuse_damage(checkpoint)
    touch = f"touch {tmp_path / 'poisoned'}"
    # the second by way of what torch's own reader has imported
    for module, name in (("os", "system"), (FileSystemReader.__module__, "os.system")):
        (shards / ".metadata").write_bytes(pickled_call(module, name, touch))
        (checkpoint / COMPLETE).write_text(json.dumps({"step": 4, "files": file_sizes(checkpoint)}))
        with pytest.raises(UserError, match=f"pytorch_model_fsdp_0/.metadata: is damaged .it asks for {module}.{name}"):
            main(flags(cut / "base", cut / "data", copy))
        assert not (tmp_path / "poisoned").exists()


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_model_in_a_poisoned_pickle_is_refused_and_the_pickle_never_runs(
    form: str, cut: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(cut / "base", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    os.unlink(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    LandmarkLlamaForCausalLM.from_llama(folder, tokenizer, block_size=8)  # tensors alone are fine
    poison = pickle.dumps(Poison(tmp_path / "poisoned"), protocol=2)
    file = folder / "pytorch_model.bin"
    file.write_bytes(poison if form == "pickle" else in_a_zip(poison, file))
    with pytest.raises(UserError, match="no checkpoint could be loaded"):
        main(flags(folder, cut / "data", tmp_path / "run"))
    for load in (LlamaForCausalLM, LandmarkLlamaForCausalLM):
        with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError, ValueError)):
            load.from_pretrained(folder)
    assert not (tmp_path / "poisoned").exists()
