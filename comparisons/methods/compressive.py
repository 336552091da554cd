"""Compressive Transformer: what Transformer-XL would forget is compressed and kept longer.

Rae et al., "Compressive Transformers for Long-Range Sequence Modelling", arXiv 1911.05507. The states that leave a
layer's memory are compressed, `ratio` to one, by a convolution (or their mean), and join a second memory in front of
the first. The convolution learns from the attention-reconstruction loss alone: attention of the present segment over
what left the memory and over what became of it, without positions, shall be the same. No gradient of that loss reaches
the model, and none of the prediction reaches the convolution.

Invariant: with `ratio` 1 and the mean it is Transformer-XL with both memories' length.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from transformers import LlamaForCausalLM

from comparisons.layers import project
from comparisons.methods.transformer_xl import XLReader
from comparisons.reader import Memory, Reader


class CompressiveReader(XLReader):
    """A layer remembers compressed inputs (B, at most `compressed`, C) and plain ones (B, at most `memory`, C)."""

    def __init__(self, base: LlamaForCausalLM, segment: int, memory: int, compressed: int, ratio: int, mean: bool):
        super().__init__(base, segment, memory)
        if segment % ratio:
            raise ValueError(f"ratio={ratio}: must divide segment={segment}, so that whole segments are compressed")
        self.compressed, self.ratio, self.convolutions = compressed, ratio, None
        self.reconstruction: list[Tensor] = []
        if not mean:
            width = base.config.hidden_size
            self.convolutions = nn.ModuleList(nn.Conv1d(width, width, ratio, ratio) for _ in base.model.layers)
            for convolution in self.convolutions:  # begins as the mean
                convolution.weight.data = torch.eye(width).unsqueeze(-1).expand(-1, -1, ratio) / ratio
                nn.init.zeros_(convolution.bias)

    def read(self, input_ids: Tensor, memory: list | None) -> tuple[Tensor, list]:
        self.reconstruction.clear()
        return super().read(input_ids, memory)

    def keep(self, number: int, past: tuple[Tensor, Tensor] | None, states: Tensor) -> tuple[Tensor, Tensor]:
        states = states.detach()
        compressed, plain = (states[:, :0],) * 2 if past is None else past
        plain = torch.cat([plain, states], dim=1)
        leaving = plain.shape[1] - self.remembered
        leaving -= leaving % self.ratio  # at the end of a text
        if leaving <= 0:
            return compressed, plain
        old, plain = plain[:, :leaving], plain[:, leaving:]
        new = self.compress(number, old)
        if self.training and self.convolutions is not None:
            self.reconstruction.append(self.reconstruct(number, states, old, new))
        compressed = torch.cat([compressed, new.detach()], dim=1)
        return compressed[:, max(0, compressed.shape[1] - self.compressed) :], plain

    def seen(self, past: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(past, dim=1)

    def compress(self, number: int, states: Tensor) -> Tensor:
        """(B, T / ratio, C) of (B, T, C)."""
        if self.convolutions is None:
            return states.unflatten(1, (-1, self.ratio)).mean(dim=2)
        return self.convolutions[number](states.transpose(1, 2)).transpose(1, 2)

    def reconstruct(self, number: int, states: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """How far attention over compressed states is from attention over those that they replace."""
        layer = self.base.model.layers[number]
        with without_gradient(layer):
            query, _, _ = project(layer.self_attn, layer.input_layernorm(states))
            before, after = (
                scaled_dot_product_attention(query, *project(layer.self_attn, layer.input_layernorm(inputs))[1:])
                for inputs in (old, new)
            )
        return mse_loss(after, before)

    def auxiliary_loss(self, memory: Memory) -> Tensor | float:
        return sum(self.reconstruction)


@contextmanager
def without_gradient(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives the module's weights no gradient."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def build(
    base: LlamaForCausalLM,
    segment: int = 256,
    memory: int = 256,
    compressed: int = 128,
    ratio: int = 4,
    mean: bool = False,
) -> Reader:
    """Segments of `segment` tokens that remember `memory` tokens and `compressed` states of `ratio` tokens each."""
    return CompressiveReader(base, segment, memory, compressed, ratio, mean)
