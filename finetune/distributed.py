"""What running on several devices needs beyond accelerate and the Trainer: checks, precision, whole weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune.arguments import RunArguments, UserError


def fsdp_settings(run: RunArguments) -> FullyShardedDataParallelPlugin | None:
    """What accelerate will do if the run is one with FSDP, by `accelerate launch` or the Trainer's own flags."""
    flags = getattr(run, "fsdp_plugin_args", None)
    asked = flags is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not asked or run.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        return None  # on CPUs accelerate takes DDP
    return FullyShardedDataParallelPlugin(**(flags or {}))


def saves_in_shards(accelerator: Accelerator) -> bool:
    """Whether each process saves its own part of the weights (FSDP's `SHARDED_STATE_DICT`)."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


def compute_losses_in_fp32(accelerator: Accelerator) -> None:
    """Has FSDP leave the dtype of what the model returns alone, and sum gradients in fp32, as DDP does.

    accelerate would have it round all three of its dtypes to 16 bits: weights at work, gradients while they are summed
    and accumulated, and the loss itself.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = None if plugin is None else plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def recomputes_activations(run: RunArguments) -> bool:
    """Whether the Trainer's own checkpointing of activations is asked for, under its newer or its older name."""
    return bool(run.gradient_checkpointing or getattr(run, "activation_checkpointing", None))


def is_zero3(run: RunArguments) -> bool:
    return run.deepspeed_plugin is not None and run.deepspeed_plugin.zero_stage == 3


def check_context_parallel(model: PreTrainedModel, size: int, context_length: int) -> None:
    """Raises `UserError` if `size` processes cannot hold rows of `context_length` positions together."""
    config, flag = model.config, f"--context_parallel_size {size}"
    if config.num_attention_heads % size:
        raise UserError(f"{flag}: the model has {config.num_attention_heads} attention heads; give a divisor")
    if context_length // config.block_size < size:
        raise UserError(f"{flag}: a row has {context_length // config.block_size} blocks; raise --context_length")
    if config.block_weight == "exact":
        raise UserError(f"{flag}: --block_weight exact teaches landmarks on whole rows; leave one of the two out")


def check_distribution(run: RunArguments, segments: int = 1) -> None:
    """Raises `UserError` for what would fail only when the trained model is saved, or in the first step."""
    if segments > 1 and run.deepspeed_plugin is not None:
        raise UserError(f"--segments {segments}: DeepSpeed has one backward a batch; use DDP")
    if segments > 1 and run.n_gpu > 1:
        raise UserError(f"--segments {segments}: needs a process for each GPU; start it with accelerate launch")
    if run.context_parallel_size > 1 and run.deepspeed_plugin is not None:
        raise UserError(
            f"--context_parallel_size {run.context_parallel_size}: DeepSpeed has one backward a batch; use FSDP"
        )
    fsdp = fsdp_settings(run)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise UserError(f"fsdp_version {fsdp.fsdp_version}: set fsdp_version: 2 in the accelerate configuration")
    if fsdp is not None and fsdp.activation_checkpointing and recomputes_activations(run):
        raise UserError(
            "--gradient_checkpointing and fsdp_activation_checkpointing: FSDP would gather each layer once more; leave "
            "the first one out"
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
