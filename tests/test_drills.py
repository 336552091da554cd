"""Drills: real processes, really killed, on disks that are really full. What they leave is gone on from."""

import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import drills
import pytest
from test_finetune_run import base, data, flags  # noqa: F401
from transformers.trainer import TRAINER_STATE_NAME

from finetune.checkpoints.output import METRICS, checkpoints

STEPS = 21
EVERY_STEP = ("--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", "3")
STREAMED = ("--streaming", "true", "--shuffle_buffer", "16")


def logged(output: Path) -> list[tuple]:
    """Step, loss, gradient norm and learning rate of every step, unrounded, as the last checkpoint knows them."""
    state = json.loads((checkpoints(output)[-1] / TRAINER_STATE_NAME).read_text())
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[name] for name in names) for entry in state["log_history"] if "loss" in entry]


def same_run(first: Path, second: Path) -> bool:
    """Whether losses, metrics and weights are the same, bit for bit."""
    assert len(logged(first)) == STEPS
    files = [(folder / name).read_bytes() for name in ("model.safetensors", METRICS) for folder in (first, second)]
    return logged(first) == logged(second) and files[0] == files[1] and files[2] == files[3]


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is one: every checkpoint is flushed, which takes a disk its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(scratch: Path, base: Path, data: Path) -> Callable[..., Path]:  # noqa: F811
    """Gives the folder of a run with these flags that nothing happened to."""

    @cache
    def made(*more: str) -> Path:
        output = Path(tempfile.mkdtemp(dir=scratch))
        code, printed = drills.run(flags(base, data, output / "run", *EVERY_STEP, *more), output / "printed")
        assert code == 0, printed
        return output / "run"

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "more"), [(10, ()), (4, STREAMED)], ids=["stored", "streamed"])
def test_a_run_that_is_killed_again_and_again_has_the_losses_of_one_that_was_not(
    kills: int,
    more: tuple,
    undisturbed: Callable[..., Path],
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    scratch: Path,
) -> None:
    rng = random.Random(0)
    output = Path(tempfile.mkdtemp(dir=scratch))
    arguments = flags(base, data, output / "run", *EVERY_STEP, *more)
    for number, step in enumerate(sorted(rng.choices(range(1, STEPS - 3), k=kills))):
        printed = output / f"printed_{number}"
        process = drills.start(arguments, printed)
        reached = drills.kill_at(process, printed, step, rng.uniform(0, 0.02))
        assert process.exitcode == -signal.SIGKILL and reached >= step, printed.read_text()
        assert not (output / "run" / METRICS).exists()
    code, printed = drills.run(arguments, output / "printed")
    assert code == 0 and "going on from" in printed
    assert same_run(output / "run", undisturbed(*more))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "complete.json"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    file: str,
    undisturbed: Callable[..., Path],
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    scratch: Path,
) -> None:
    output = Path(tempfile.mkdtemp(dir=scratch))
    arguments = flags(base, data, output / "run", *EVERY_STEP)
    code, _ = drills.run(arguments, output / "printed", partial(drills.die_while_writing, f"checkpoint-6/{file}"))
    assert code == -signal.SIGKILL
    code, printed = drills.run(arguments, output / "printed")
    assert code == 0
    assert f"{output / 'run' / 'checkpoint-6'} was not saved completely: deleting it" in printed
    assert f"going on from {output / 'run' / 'checkpoint-3'}\n" in printed
    assert same_run(output / "run", undisturbed())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def full_disk_sentence(printed: str) -> str:
    """The one line that a run ends with."""
    assert "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("fitting", [1, 2])
def test_a_full_disk_ends_a_run_with_one_sentence_and_with_room_it_goes_on(
    fitting: int,
    undisturbed: Callable[..., Path],
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    small_disk: Path,
) -> None:
    drills.fill(small_disk / "filler", leave=int((fitting + 0.6) * size_of(checkpoints(undisturbed())[0])))
    arguments = flags(base, data, small_disk / "run", *EVERY_STEP)
    code, printed = drills.run(arguments, tmp_path / "printed")
    kept = small_disk / "run" / f"checkpoint-{3 * fitting}"
    assert code == 1
    assert full_disk_sentence(printed).startswith(f"error: the disk is full; {kept} is complete: make room and start")
    os.unlink(small_disk / "filler")
    code, printed = drills.run(arguments, tmp_path / "printed")
    assert code == 0 and f"going on from {kept}\n" in printed
    assert same_run(small_disk / "run", undisturbed())


def test_a_disk_that_is_full_at_the_end_costs_no_step(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    small_disk: Path,
) -> None:
    arguments = flags(base, data, small_disk / "run")
    harm = partial(drills.fill_disk_before_the_model_is_saved, small_disk / "filler")
    code, printed = drills.run(arguments, tmp_path / "printed", harm)
    assert code == 1 and "checkpoint-6 is complete: make room" in full_disk_sentence(printed)
    os.unlink(small_disk / "filler")
    code, printed = drills.run(arguments, tmp_path / "printed")
    assert code == 0 and "step 6/6" not in printed.replace("step 6/6  held-out", "")
    assert (small_disk / "run" / METRICS).exists()


def test_a_disk_too_small_for_the_data_is_one_sentence_that_names_it(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    small_disk: Path,
) -> None:
    drills.fill(small_disk / "filler", leave=20_000)
    harm = partial(drills.keep_tokens_in, small_disk)
    code, printed = drills.run(flags(base, data, tmp_path / "run"), tmp_path / "printed", harm)
    assert code == 1
    assert f"the tokens do not fit on the disk of {small_disk}: make room there" in full_disk_sentence(printed)
    arguments = flags(base, data, small_disk / "run", "--data", "embedded", "--corpus_documents", "100")
    code, printed = drills.run(arguments, tmp_path / "printed")
    assert code == 1
    assert "the disk is full; no checkpoint had been saved: make room" in full_disk_sentence(printed)
