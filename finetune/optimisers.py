"""What an optimiser keeps for each weight that it trains, by the name that `--optim` has for it."""

from dataclasses import dataclass

from torch import Tensor, nn

from finetune.throughput import parameter_count

SCALES = 4 / 256  # bytes a value: quantised states have a scale in fp32 for every 256
SMALL = 4096  # bitsandbytes keeps weights of fewer values in fp32


@dataclass(frozen=True)
class State:
    """`values` for each weight, of `bytes` each (None: of the weight's dtype); fp32 for `whole_embeddings`."""

    values: int
    bytes: float | None = None
    whole_embeddings: bool = False

    def of(self, weight: Tensor, is_embedding: bool) -> float:
        """Bytes that are kept for `weight`."""
        size = parameter_count(weight)
        if self.whole_embeddings and (is_embedding or size < SMALL):
            return 4 * self.values * size
        return (weight.element_size() if self.bytes is None else self.bytes) * self.values * size


ADAM = State(2)
EIGHT_BITS, FOUR_BITS = 1 + SCALES, 0.5 + 2 * SCALES
STATES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), ADAM),
    **dict.fromkeys(("sgd", "schedule_free_sgd"), State(0)),
    **dict.fromkeys(("adagrad", "rmsprop"), State(1)),
    "adamw_torch_8bit": State(2, EIGHT_BITS),
    "adamw_torch_4bit": State(2, FOUR_BITS),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), State(2, EIGHT_BITS, True)),
    "paged_adamw_32bit": State(2, 4),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), State(3, 4)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), State(3, EIGHT_BITS, True)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), State(1, 4)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), State(1, EIGHT_BITS, True)),
}
FACTORED = "adafactor"


def optimiser_bytes(model: nn.Module, optim: str, optim_args: str | None = None) -> int:
    """Bytes of all that `--optim` keeps for the trained weights of `model`; of an unknown one, what AdamW would.

    Adafactor keeps a row's and a column's means of each matrix, in fp32. SGD keeps one value with `momentum`.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    state = STATES.get(optim, ADAM)
    if optim == "sgd" and "momentum" in (optim_args or ""):
        state = State(1)
    total = 0.0
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        if optim == FACTORED and weight.dim() > 1:
            total += 4 * sum(weight.shape)
        elif optim == FACTORED:
            total += 4 * parameter_count(weight)
        else:
            total += state.of(weight, weight in embeddings)
    return round(total)
