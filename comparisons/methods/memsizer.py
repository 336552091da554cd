"""MemSizer: attention over a memory of a few slots whose keys are learnt and whose values are written as the text is
read.

Zhang & Cai, "Linearizing Transformer with Key-Value Memory", arXiv 2203.12644. A head has `slots` slots. Their keys
are weights of the model. Each token writes its value into all of them, by shares that it computes itself; both are
normalised, and the sum is divided by the square root of the number of tokens. A query reads the slots by a softmax
over the keys. A text of any length takes the memory of the slots. Nothing in a slot says where it was written, so
sinusoidal positions are added to the embeddings, as in the first transformers.

Invariant: reading in segments is writing and reading token by token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import LlamaForCausalLM

from comparisons.layers import through_layers
from comparisons.reader import Reader


class Slots(NamedTuple):
    """The memory: tokens read so far, and of each layer the sums (B, H, slots, D) that they have written."""

    tokens: int
    written: list[Tensor]


class MemSizerReader(Reader):
    """No state is kept but the slots."""

    def __init__(self, base: LlamaForCausalLM, segment: int, slots: int):
        super().__init__(base, segment)
        layers, heads, width = base.config.num_hidden_layers, base.config.num_attention_heads, base.config.head_dim
        self.slot_key = nn.Parameter(torch.randn(layers, heads, slots, width) * width**-0.5)
        self.share = nn.Parameter(torch.randn(layers, heads, slots, width) * width**-0.5)
        self.position_scale = nn.Parameter(torch.tensor(base.config.initializer_range))

    def read(self, input_ids: Tensor, memory: Slots | None) -> tuple[Tensor, Slots]:
        written: list[Tensor] = []
        before = 0 if memory is None else memory.tokens
        position = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            weight = (query @ self.slot_key[layer].transpose(-1, -2)).softmax(-1)  # (B, H, T, slots)
            share = key @ self.share[layer].transpose(-1, -2)
            share, value = (layer_norm(x, x.shape[-1:]) for x in (share, value))
            old = 0.0 if memory is None else memory.written[layer]
            output = (weight @ share.transpose(-1, -2)).tril() @ value
            if memory is not None:
                output = output + weight @ old
            written.append(old + share.transpose(-1, -2) @ value)
            return output * (position + 1).to(value).rsqrt().unsqueeze(-1)

        embedded = self.base.model.embed_tokens(input_ids)
        embedded = embedded + self.position_scale * sinusoids(position, embedded.shape[-1])
        states = through_layers(self.base.model, embedded, attend)
        return states, Slots(before + input_ids.shape[1], written)


def sinusoids(position: Tensor, width: int) -> Tensor:
    """(T, width): sines, then cosines, of wavelengths from 2 pi to 10,000 times that."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=position.device) / width)
    angle = position.unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


def build(base: LlamaForCausalLM, segment: int = 256, slots: int = 32) -> Reader:
    """`slots` for each head of each layer; `segment` only says how many tokens are computed at once."""
    return MemSizerReader(base, segment, slots)
