"""How fast a run is: tokens a second and model FLOPs utilisation, added to what the Trainer logs.

Only ordinary tokens count, no padding and no landmarks. `docs/distributed.md` has the formulas.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from landmark_llama.tokenization import landmarked_position

# Dense bf16 FLOP/s of one device, from the data sheets. The first name that the device's own name contains wins, so
# longer names come first.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "B100": 1750e12,
    "H200 NVL": 835e12, "H200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "A30": 165e12, "A40": 149.7e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090 Ti": 80e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """The bf16 FLOP/s that one device can reach at most, None where unknown (CPUs; a part of a GPU, as MIG makes)."""
    if "MIG" in device_name:
        return None
    words = f" {device_name} ".replace("-", " ")
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


@dataclass(frozen=True)
class Counts:
    """What one or more batches held: ordinary tokens, positions (with landmarks), and (query, key) pairs."""

    tokens: int
    positions: int
    pairs: int


def count(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    block_size: int,
    landmark_token_id: int | None,
) -> Tensor:
    """The three fields of `Counts` of one batch, shape (3,), on its device and without waiting for it.

    Args:
        input_ids: (batch, columns), plain; landmarks in their regular places are counted as the model's own.
        attention_mask: (batch, columns), 0 for padding, or None.
        position_ids: (batch, columns), from 0 for each document of a plain row; None: rows are one document each.
        block_size, landmark_token_id: None for a dense model.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if landmark_token_id is None:
        ordinary = real
        place = real.cumsum(1) - 1 if position_ids is None else position_ids
        follows = torch.zeros_like(real)
    else:
        ordinary = real & (input_ids != landmark_token_id)
        plain = ordinary.cumsum(1) - 1 if position_ids is None else position_ids
        place = landmarked_position(plain, block_size)
        follows = ordinary & ((plain + 1) % (block_size - 1) == 0)  # the token brings its block's landmark along
    tokens, landmarks = ordinary.sum(), follows.sum()
    # a landmark does not see itself: it sees what the token before it sees
    return torch.stack([tokens, tokens + landmarks, ((place + 1) * (ordinary.long() + follows)).sum()])


@dataclass(frozen=True)
class ModelFlops:
    """What a training step costs, by a model's matrices; recomputed activations are not counted.

    A matrix of `n` weights takes `2 n` FLOPs a position forward, as many for the gradient of its input and, if it is
    trained, for its own. A (query, key) pair takes `4 * heads * head_dim` a layer forward and twice that backward.
    """

    layer_weights: int
    trained_layer_weights: int
    head_weights: int
    trained_head_weights: int
    attention_width: int  # heads * head_dim * layers

    @classmethod
    def of(cls, model: nn.Module) -> "ModelFlops":
        """Of a LLaMA, dense or with landmarks, and with any adapter in it."""
        config = model.config
        head = model.get_output_embeddings().weight
        weights = trained = head_trained = 0
        for name, weight in model.named_parameters():
            if weight is head:
                head_trained = weight.requires_grad
            elif "layers." in name and (weight.dim() == 2 or hasattr(weight, "quant_state")):
                size = parameter_count(weight)
                weights += size
                trained += size * weight.requires_grad
        head_size = parameter_count(head)
        heads = config.num_attention_heads * head_dim(config)
        return cls(weights, trained, head_size, head_size * head_trained, heads * config.num_hidden_layers)

    def __call__(self, counts: Counts) -> float:
        """FLOPs of forward and backward over what `counts` says."""
        layers = (4 * self.layer_weights + 2 * self.trained_layer_weights) * counts.positions
        head = (4 * self.head_weights + 2 * self.trained_head_weights) * counts.tokens
        return float(layers + head + 12 * self.attention_width * counts.pairs)


def parameter_count(weight: Tensor) -> int:
    """Weights in `weight`, wherever they are: sharded by DeepSpeed, or two to a byte by bitsandbytes."""
    if hasattr(weight, "ds_numel"):
        return weight.ds_numel
    if hasattr(weight, "quant_state") and weight.quant_state is not None:
        return weight.quant_state.shape.numel()
    return weight.numel()


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Throughput(TrainerCallback):
    """Adds `tokens_per_second`, of all processes, and `mfu` to each logged loss; evaluating and saving do not count.

    It must be the first callback that sees the log, so that all others do, too. `mfu` is left out where the device's
    peak in bf16 is not known or the run computes in fp32.

    Args:
        block_size, landmark_token_id: of the model, None for a dense one.
        peak: FLOP/s of one device, or None.
    """

    def __init__(self, block_size: int, landmark_token_id: int | None, peak: float | None) -> None:
        self.block_size, self.landmark_token_id, self.peak = block_size, landmark_token_id, peak
        self.counts: list[Tensor] = []
        self.seconds, self.mark = 0.0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self.flops = ModelFlops.of(model)
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.counts.clear()
        self.seconds, self.mark = 0.0, time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.hook.remove()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._take_time()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.mark = time.monotonic()

    on_save = on_evaluate

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        if "loss" not in logs:
            self.mark = time.monotonic()  # evaluation was timed from the step before
            return
        self._take_time()  # the loss has been fetched from the device: all steps are done
        mine = [counts.to(args.device) for counts in self.counts]
        total = torch.stack(mine).sum(0) if mine else torch.zeros(3, dtype=torch.long, device=args.device)
        counts = Counts(*reduce(total, "sum").tolist())
        speed = {"tokens_per_second": round(counts.tokens / self.seconds, 1)}
        if self.peak is not None:
            devices = args.world_size * max(1, args.n_gpu)
            speed["mfu"] = round(self.flops(counts) / self.seconds / (self.peak * devices), 4)
        logs.update(speed)
        state.log_history[-1].update(speed)
        self.counts.clear()
        self.seconds = 0.0

    def _take_time(self) -> None:
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def _count(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training:
            ids, mask, position = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
            shard = kwargs.get("context_shard")
            if shard is not None:  # its tokens follow on those of other processes
                position = torch.arange(shard.start, shard.start + ids.shape[1], device=ids.device).expand_as(ids)
            self.counts.append(count(ids, mask, position, self.block_size, self.landmark_token_id))


def device_peak(args: TrainingArguments) -> float | None:
    """`peak_flops` of this process's device, for a run in 16 bits; None for any other."""
    if args.device.type != "cuda" or not (args.bf16 or args.fp16):
        return None
    return peak_flops(torch.cuda.get_device_name(args.device))
