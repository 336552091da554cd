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
from torch import Tensor

ENDED = 3
ACCELERATE = drills.ROOT / "finetune" / "configs" / "accelerate"


def run_in_two(
    configuration: str, arguments: list[str], folder: Path, harm: Callable[[], None] | None = None, **settings: str
) -> tuple[list[int], str]:
    """The exit codes of two processes, and what they printed, the first one first.

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


def observe(end_before_evaluation: bool = False, best_step: int | None = None) -> None:
    """From now on the process prints each dtype that it computes with, as `loss: torch.float32`, once.

    Args:
        end_before_evaluation: it ends, with code `ENDED`, when it has trained and would evaluate.
        best_step: the held-out loss is lowest after this step, whatever is trained.
    """
    from transformers import Trainer

    from landmark_llama.attention.rotary import RotaryTable

    compute_loss, evaluate, rotate, seen = Trainer.compute_loss, Trainer.evaluation_loop, RotaryTable.rotate, set()

    def see(name: str, tensor: Tensor) -> None:
        if (name, tensor.dtype) not in seen:
            seen.add((name, tensor.dtype))
            print(f"{name}: {tensor.dtype}", flush=True)

    def computed(self: Trainer, model, *args, **settings):
        result = compute_loss(self, model, *args, **settings)
        see("loss" if model.training else "held-out loss", result[0] if isinstance(result, tuple) else result)
        return result

    def rotated(self: RotaryTable, x: Tensor, *args):
        see("table", self.cos), see("rotated", x)
        return rotate(self, x, *args)

    def evaluated(self: Trainer, *args, **settings):
        if end_before_evaluation:
            raise SystemExit(ENDED)
        output = evaluate(self, *args, **settings)
        if best_step is not None:
            output.metrics["eval_loss"] = 1.0 + abs(self.state.global_step - best_step)
        return output

    Trainer.compute_loss, Trainer.evaluation_loop, RotaryTable.rotate = computed, evaluated, rotated
