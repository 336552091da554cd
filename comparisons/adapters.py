"""Low-rank changes of a model's linear layers that leave the names of its weights alone.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: `W x + (alpha / rank) B A x`, with
B zero at the start. Readers start from each other's weights by name, so the layers are not wrapped: a hook adds the
change to what they return.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Change = tuple[Tensor, Tensor]  # A (in, rank) and B (rank, out), or one for each row: (B, in, rank), (B, rank, out)


def linear_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers whose last names are among `names`, by their whole names with `_` for `.`."""
    found = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in names}
    return {name.replace(".", "_"): layer for name, layer in found.items()}


def new_change(layer: nn.Linear, rank: int, rows: int | None = None) -> Change:
    """A drawn as a linear layer's weight is, B of zeros; `rows` of the same."""
    bound = layer.in_features**-0.5
    down = torch.empty(layer.in_features, rank, device=layer.weight.device).uniform_(-bound, bound)
    up = torch.zeros(rank, layer.out_features, device=layer.weight.device)
    if rows is None:
        return down, up
    return down.expand(rows, -1, -1).clone(), up.expand(rows, -1, -1).clone()


@contextmanager
def changed(layers: dict[str, nn.Linear], changes: dict[str, Change], scale: float) -> Iterator[None]:
    """Inside, each of `layers` adds its change to its output (B, T, out)."""

    def hook_of(down: Tensor, up: Tensor):
        return lambda module, inputs, output: output + (inputs[0] @ down @ up) * scale

    hooks = [layer.register_forward_hook(hook_of(*changes[name])) for name, layer in layers.items() if name in changes]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
