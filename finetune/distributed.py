"""What running on several devices needs beyond accelerate and the Trainer: a check, and whole weights while loading."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune.arguments import RunArguments, UserError


def fsdp_settings(run: RunArguments) -> FullyShardedDataParallelPlugin | None:
    """What accelerate will do if the run is one with FSDP, by `accelerate launch` or the Trainer's own flags."""
    flags = getattr(run, "fsdp_plugin_args", None)
    asked = flags is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not asked or run.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        return None  # on CPUs accelerate takes DDP
    return FullyShardedDataParallelPlugin(**(flags or {}))


def is_zero3(run: RunArguments) -> bool:
    return run.deepspeed_plugin is not None and run.deepspeed_plugin.zero_stage == 3


def check_distribution(run: RunArguments, segments: int = 1) -> None:
    """Raises `UserError` for what would fail only when the trained model is saved, or in the first step."""
    if segments > 1 and run.deepspeed_plugin is not None:
        raise UserError(f"--segments {segments}: DeepSpeed has one backward a batch; use DDP")
    if segments > 1 and run.n_gpu > 1:
        raise UserError(f"--segments {segments}: needs a process for each GPU; start it with accelerate launch")
    fsdp = fsdp_settings(run)
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise UserError(
            f"fsdp_state_dict_type {str(fsdp.state_dict_type).rpartition('.')[2]}: the Trainer saves a model for "
            "FULL_STATE_DICT alone; set that in the accelerate configuration"
        )
    if run.deepspeed_plugin is not None and run.max_nan_steps:
        raise UserError(f"--max_nan_steps {run.max_nan_steps}: DeepSpeed can leave no step out; give 0")


@contextmanager
def whole_weights(run: RunArguments) -> Iterator[None]:
    """Inside, ZeRO-3 does not spread what is loaded: the landmark's row is made of all others."""
    if run.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        run.deepspeed_plugin.set_deepspeed_weakref()
