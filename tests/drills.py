"""Runs `finetune/run.py` in processes that are killed or otherwise disturbed.

Importing takes seconds, so the processes are forked from multiprocessing's fork server, which has everything imported
and has run nothing yet. A child runs the script as Python would. Everything it prints goes to a file.
"""

import gc
import io
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(arguments: list[str], printed: Path, harm: Callable[[], None] | None = None) -> BaseProcess:
    """Starts a process that trains. It calls `harm` first, which must be importable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.run"])
    process = context.Process(target=_train, args=(arguments, printed, harm), daemon=True)
    process.start()
    return process


def run(arguments: list[str], printed: Path, harm: Callable[[], None] | None = None) -> tuple[int, str]:
    """Runs a training process to its end; returns the exit code and what it printed."""
    printed.unlink(missing_ok=True)
    process = start(arguments, printed, harm)
    process.join(120)
    return process.exitcode, printed.read_text()


def kill_at(process: BaseProcess, printed: Path, step: int, delay: float) -> int:
    """Kills the process `delay` seconds after it has printed that `step` is done. Returns the last step done."""

    def last_step() -> int:
        lines = printed.read_text() if printed.exists() else ""
        return max(map(int, re.findall(r"^step (\d+)/", lines, re.MULTILINE)), default=0)

    deadline = time.monotonic() + 60
    while last_step() < step and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return last_step()


def die_while_writing(file: str) -> None:
    """Makes this process kill itself in the middle of writing `file`, for example `checkpoint-4/optimizer.pt`."""
    import torch
    from transformers import Trainer

    torch_save, replace, save_optimizer = torch.save, os.replace, Trainer._save_optimizer_and_scheduler

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(content: object, target: object, *args, **settings) -> None:
        if str(target).endswith(file):
            whole = io.BytesIO()
            torch_save(content, whole)
            Path(target).write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        torch_save(content, target, *args, **settings)

    def rename(source: object, target: object) -> None:
        if str(target).endswith(file):
            die()
        replace(source, target)

    def save_after_the_weights(self: Trainer, folder: str) -> None:
        weights = Path(folder) / "model.safetensors"
        if str(weights).endswith(file):
            os.truncate(weights, weights.stat().st_size // 2)
            die()
        save_optimizer(self, folder)

    torch.save, os.replace, Trainer._save_optimizer_and_scheduler = save, rename, save_after_the_weights


def fill_disk_before_the_model_is_saved(filler: Path) -> None:
    from finetune.checkpoints import output

    save = output.save_finished_model

    def fill_and_save(*args) -> None:
        fill(filler)
        save(*args)

    output.save_finished_model = fill_and_save


def keep_tokens_in(folder: Path) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(folder)


def join_two_processes(rank: int, port: int, broken_step: int) -> None:
    """Makes this process one of two. The second one's loss is NaN at `broken_step`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if rank == 1:
        break_loss(lambda step, _: step == broken_step)


def break_loss(when: Callable[[int, dict], bool], amount: float = float("nan")) -> None:
    """Adds a constant to the training loss whenever `when(step, batch)` is true; the gradient is unchanged."""
    from transformers import Trainer

    compute_loss = Trainer.compute_loss

    def broken(self: Trainer, model, inputs: dict, *args, **settings):
        loss = compute_loss(self, model, inputs, *args, **settings)
        return loss + amount if model.training and when(self.state.global_step + 1, inputs) else loss

    Trainer.compute_loss = broken


def fill(filler: Path, leave: int = 0) -> None:
    """Writes a file that fills its disk up to `leave` free bytes."""
    status = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - leave))


def _train(arguments: list[str], printed: Path, harm: Callable[[], None] | None) -> None:
    with printed.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    gc.freeze()  # a garbage collection would touch all imported objects, and so copy the shared memory pages
    if harm:
        harm()
    sys.argv = ["finetune/run.py", *arguments]
    runpy.run_path(str(ROOT / "finetune" / "run.py"), run_name="__main__")
