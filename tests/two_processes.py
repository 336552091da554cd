"""Runs `finetune/run.py` in two CPU processes under an accelerate configuration of the project, FSDP included.

`accelerate launch` imports all anew in each process, which takes longer than a tiny run. Here they are forked from one
that has imported it (`drills`), with the environment that `accelerate launch` would give them.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import drills
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

ACCELERATE = drills.ROOT / "finetune" / "configs" / "accelerate"


def run_in_two(
    configuration: str, arguments: list[str], folder: Path, harm: Callable[[], None] | None = None, **settings: str
) -> tuple[list[int], str]:
    """The exit codes of two processes, and what the first one printed.

    Args:
        configuration: a file of `finetune/configs/accelerate`.
        folder: for what they print.
        harm: called in both first; must be importable.
        settings: other values of the configuration: `mixed_precision="no"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [environment(configuration, rank, settings) for rank in range(2)]
    places[1]["MASTER_PORT"] = places[0]["MASTER_PORT"]
    printed = [folder / f"printed_{rank}" for rank in range(2)]
    for file in printed:
        file.unlink(missing_ok=True)
    processes = [
        drills.start(arguments, file, partial(join, place, harm)) for place, file in zip(places, printed, strict=True)
    ]
    for process in processes:
        process.join(120)
        if process.exitcode is None:  # one that waits for the other, which has failed
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in processes], "\n".join(file.read_text() for file in printed)


def environment(configuration: str, rank: int, settings: dict[str, str]) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of one of two processes."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = ["--config_file", str(ACCELERATE / configuration), "--num_processes", "2", "--main_process_port", "0"]
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args([*command, *flags, "finetune/run.py"]))
    added = {name: value for name, value in prepare_multi_gpu_env(launch).items() if os.environ.get(name) != value}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.master_port}
    return added | {name: str(value) for name, value in (place | address).items()}


def join(place: dict[str, str], harm: Callable[[], None] | None) -> None:
    """Makes this process one of two. Accelerate has FSDP for GPUs alone: it is told that these are some."""
    os.environ.update(place)
    if place.get("ACCELERATE_USE_FSDP") == "true":
        start = PartialState.__init__

        def start_as_gpu(self: PartialState, *args, **settings) -> None:
            first = not PartialState._shared_state
            start(self, *args, **settings)
            if first:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

        PartialState.__init__ = start_as_gpu
    if harm is not None:
        harm()
