"""The memory that a run takes on each device, estimated before it starts. `docs/distributed.md` has the formulas."""

import os
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PretrainedConfig

from finetune.arguments import RunArguments
from finetune.distributed import fsdp_settings, is_zero3, recomputes_activations
from finetune.optimisers import optimiser_bytes
from finetune.throughput import head_dim, parameter_count

GB = 1e9
ADAM_BYTES = 8  # two moments in fp32


@dataclass(frozen=True)
class Weights:
    """Weights by what becomes of them. Counts, and the bytes that all of them take as they are held."""

    trained: int
    trained_bytes: int
    frozen_bytes: int
    largest_layer: int  # weights of one decoder layer
    embeddings: int  # weights of input and output embedding, which stay gathered together

    @classmethod
    def of(cls, model: nn.Module) -> "Weights":
        trained = trained_bytes = frozen_bytes = embeddings = 0
        layers: dict[str, int] = {}
        for name, weight in model.named_parameters():
            size = parameter_count(weight)
            held = weight.numel() * weight.element_size() if not hasattr(weight, "ds_numel") else 4 * size
            if weight.requires_grad:
                trained, trained_bytes = trained + size, trained_bytes + held
            else:
                frozen_bytes += held
            if "layers." in name:
                number = name.partition("layers.")[2].partition(".")[0]
                layers[number] = layers.get(number, 0) + size
            else:
                embeddings += size
        return cls(trained, trained_bytes, frozen_bytes, max(layers.values()), embeddings)


@dataclass(frozen=True)
class Batch:
    """What one process works on at a time."""

    rows: int
    positions: int  # of a row, landmarks included
    tokens: int  # ordinary tokens of a row


@dataclass(frozen=True)
class Plan:
    """How weights, gradients and optimiser are spread, and what is kept for the backward pass.

    Args:
        devices: processes, one device each.
        sharding: `none`, `fsdp` or `zero3`; `none` on several devices is DDP.
        compute_bytes: of a value in the matrix products: 2 for bf16, 4 for fp32.
        residual_bytes: of a value between layers: that of the embeddings' weights.
        checkpointing: recompute each layer's activations instead of keeping them.
        whole_gradients: FSDP accumulates gradients, in fp32, over several batches before it spreads them.
    """

    devices: int = 1
    sharding: str = "none"
    compute_bytes: int = 2
    residual_bytes: int = 4
    checkpointing: bool = False
    whole_gradients: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, by what they are for."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    gathered: int  # FSDP and ZeRO: what is put together for the layers at work

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def describe(self, capacity: int | None) -> str:
        """One line: the total, the device's own memory, and what the total is made of."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        listed = ", ".join(f"{name} {in_gb(size)}" for name, size in parts if size)
        of = f" of {in_gb(capacity)}" if capacity else ""
        return f"memory of each device, estimated: {in_gb(self.total)} GB{of} ({listed})"


def in_gb(size: int) -> str:
    """Bytes as GB with three digits, without the unit."""
    return f"{size / GB:.3g}"


def layer_activations(config: PretrainedConfig, batch: Batch, compute_bytes: int, residual_bytes: int) -> int:
    """Bytes that one decoder layer keeps for the backward pass.

    Per position: around each of the two norms the residual stream and its normalised form (in fp32, `residual_bytes`
    at least) and the input of the matrices behind it; the rotated queries and keys, the values, the attention's output
    and the input of the output projection; of the MLP four values of the intermediate width. For each query head and
    block of the row, two fp32 numbers a position.
    """
    hidden, width = config.hidden_size, config.num_attention_heads * head_dim(config)
    kv_width = config.num_key_value_heads * head_dim(config)
    norms = 2 * hidden * (residual_bytes + 4 + compute_bytes)
    attention = compute_bytes * (3 * width + 2 * kv_width)
    mlp = 4 * compute_bytes * config.intermediate_size
    if (
        residual_bytes > compute_bytes
    ):  # autocast makes a copy of its input for each of five matrices, not for each norm
        norms += 3 * hidden * compute_bytes
    blocks = batch.positions // (getattr(config, "block_size", None) or batch.positions) / 2
    statistics = 8 * config.num_attention_heads * blocks
    return round(batch.rows * batch.positions * (norms + attention + mlp + statistics))


def activations(config: PretrainedConfig, batch: Batch, plan: Plan) -> int:
    """Bytes of activations at their peak: those of all layers, or of one beside the inputs of all, and the logits.

    The logits of ordinary tokens are there in `compute_bytes` twice (the result's and the loss's), in fp32, and as the
    gradient of each of the loss's two.
    """
    layer = layer_activations(config, batch, plan.compute_bytes, plan.residual_bytes)
    if plan.checkpointing:
        inputs = batch.rows * batch.positions * config.hidden_size * plan.residual_bytes
        kept = config.num_hidden_layers * inputs
    else:
        kept, layer = config.num_hidden_layers * layer, 0
    logits = batch.rows * batch.tokens * config.vocab_size * (3 * plan.compute_bytes + 8)
    return kept + max(layer, logits)  # with checkpointing the logits are gone when the first layer is recomputed


def estimate(
    config: PretrainedConfig, weights: Weights, batch: Batch, plan: Plan, optimiser: int | None = None
) -> Estimate:
    """Bytes on each device while training. `optimiser`: bytes of all its state; None: AdamW's two moments in fp32.

    One device and DDP hold everything; DDP's buckets are a second copy of the gradients. FSDP spreads weights,
    gradients and moments evenly and gathers two layers at a time (one at work, one on its way) and the embeddings in
    `compute_bytes`, with one layer's whole gradient. ZeRO-3 does the same with 2 bytes of weights and of gradients
    beside fp32 weights (16 bytes a trained weight, as in its paper).
    """
    trained, frozen = weights.trained_bytes, weights.frozen_bytes
    optimiser = ADAM_BYTES * weights.trained if optimiser is None else optimiser
    gradients, gathered = weights.trained_bytes, 0
    if plan.sharding == "none":
        gradients *= 2 if plan.devices > 1 else 1
    else:
        compute = plan.compute_bytes
        if plan.sharding == "zero3":
            trained, gradients = (4 + compute) * weights.trained, compute * weights.trained
        trained, frozen, optimiser = (-(-size // plan.devices) for size in (trained, frozen, optimiser))
        gathered = compute * (2 * weights.largest_layer + weights.embeddings)
        if weights.trained_bytes > weights.frozen_bytes:
            gathered += compute * weights.largest_layer
        gradients = 4 * weights.trained if plan.whole_gradients else -(-gradients // plan.devices)
    return Estimate(trained + frozen, gradients, optimiser, activations(config, batch, plan), gathered)


def memory_lines(model: nn.Module, run: RunArguments, positions: int, tokens: int) -> list[str]:
    """What a run of `model` will take of each device, in one line; another one where that will probably not fit.

    Args:
        model: loaded, not yet moved to its device.
        positions, tokens: of a row, with and without landmarks.
    """
    held = model.get_input_embeddings().weight.dtype
    compute_bytes = 2 if run.bf16 or run.fp16 else held.itemsize
    plan = plan_of(run, compute_bytes, held.itemsize)
    batch = Batch(run.per_device_train_batch_size, positions, tokens)
    # DeepSpeed has moments of its own in fp32
    optimiser = None if plan.sharding == "zero3" else optimiser_bytes(model, run.optim, run.optim_args)
    size, capacity = estimate(model.config, Weights.of(model), batch, plan, optimiser), device_memory(run)
    return [line for line in (size.describe(capacity), warning(size, capacity, plan)) if line]


def plan_of(run: RunArguments, compute_bytes: int, held_bytes: int) -> Plan:
    """What `accelerate launch` and the run's own flags ask for; `held_bytes` of an embedding's weight."""
    sharding, checkpointing, whole = "zero3" if is_zero3(run) else "none", recomputes_activations(run), False
    fsdp = fsdp_settings(run)
    if fsdp is not None:
        sharding, checkpointing = "fsdp", checkpointing or fsdp.activation_checkpointing
        accumulation = run.accelerator_config.to_dict().get("gradient_accumulation_kwargs") or {}
        whole = run.gradient_accumulation_steps > 1 and not accumulation.get("sync_each_batch", False)
    # DDP leaves the stream between layers in the embedding's dtype, the others hold the embedding in 16 bits at work
    residual_bytes = held_bytes if sharding == "none" else compute_bytes
    return Plan(max(1, run.world_size), sharding, compute_bytes, residual_bytes, checkpointing, whole)


def device_memory(run: RunArguments) -> int | None:
    """Bytes of this process's device; on a CPU its share of the machine's memory, None where that cannot be asked."""
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return machine // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size)))


def warning(size: Estimate, capacity: int | None, plan: Plan) -> str | None:
    """What to do where `size` is more than nine tenths of the device, else None."""
    if capacity is None or size.total <= 0.9 * capacity:
        return None
    remedies = []
    if plan.whole_gradients:
        remedies.append("sync_each_batch (docs/distributed.md)")
    if not plan.checkpointing:
        remedies.append("--gradient_checkpointing true")
    if size.activations > size.total / 4:
        remedies.append("a smaller --per_device_train_batch_size and more --gradient_accumulation_steps")
    if plan.sharding == "none":
        remedies.append("FSDP on several devices")
    else:
        remedies.append("more devices")
    remedies.append("--lora_rank")
    return f"warning: this will probably not fit; {', '.join(remedies)} would help"
