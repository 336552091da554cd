"""Runs a function in several CPU processes that torch.distributed (gloo) joins, and returns what each of them returned.

As in `drills`, they are forked from a process that has everything imported and has run nothing yet.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_in(processes: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, which must be importable, returned in each process.

    Args:
        folder: an empty one, for what they tell each other and return.
    """
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.run"])
    place = [(rank, processes, folder, function, arguments) for rank in range(processes)]
    started = [context.Process(target=_join, args=each, daemon=True) for each in place]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    errors = [file.read_text() for file in sorted(folder.glob("error_*"))]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"returned_{rank}", weights_only=False) for rank in range(processes)]


def _join(rank: int, processes: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=processes)
    try:
        torch.save(function(*arguments), folder / f"returned_{rank}")
    except Exception:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
