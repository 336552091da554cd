"""Transformer-VQ: softmax attention over a whole text in linear time, since keys are one of a few codes.

Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354. Keys are normalised and
replaced by the nearest of `codes` vectors (gradients pass straight through). Tokens with one code have one score, so
all of them enter the softmax together: by their number and the mean of their values. The current and the previous
segment are read token by token, with rotary positions; tokens further back by their codes, without positions. The
codes drift towards the mean of their keys while training, and a small loss (`commitment`) draws keys to their codes.

Invariant: reading in segments is softmax attention over all earlier tokens with quantised keys, computed one by one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot
from transformers import LlamaForCausalLM

from comparisons.layers import Rotary, through_layers
from comparisons.reader import Reader


class Kept(NamedTuple):
    """Of one layer: the previous segment's quantised keys and values (B, H, n, D), and its codes (B, H, n).

    count, mean: (B, H, codes) tokens before that segment, and (B, H, codes, D) the means of their values.
    distance: mean square of the distance from this segment's keys to their codes.
    """

    key: Tensor
    value: Tensor
    code: Tensor
    count: Tensor
    mean: Tensor
    distance: Tensor


class QuantisedReader(Reader):
    """Codebooks are buffers (layers, heads, codes, D); only training moves them."""

    def __init__(self, base: LlamaForCausalLM, segment: int, codes: int, commitment: float, decay: float):
        super().__init__(base, segment)
        self.commitment, self.decay, self.rotary = commitment, decay, Rotary(base.model.rotary_emb)
        shape = base.config.num_hidden_layers, base.config.num_attention_heads, codes, base.config.head_dim
        self.register_buffer("codebook", layer_norm(torch.randn(shape), shape[-1:]))

    def read(self, input_ids: Tensor, memory: list[Kept] | None) -> tuple[Tensor, list[Kept]]:
        layers: list[Kept] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (layer_norm(x, x.shape[-1:]) for x in (query, key))
            codebook = self.codebook[layer]
            code = nearest(key, codebook)
            chosen = codebook.expand(len(key), -1, -1, -1).gather(2, code.unsqueeze(-1).expand_as(key))
            quantised = key + (chosen - key).detach()
            kept = memory[layer] if memory else self._empty(key)
            output = self._attend(query, quantised, value, kept, codebook)
            count, mean = add(kept.count, kept.mean, kept.code, kept.value)
            layers.append(Kept(quantised, value, code, count, mean, (key - chosen.detach()).square().mean()))
            if self.training:
                self._move_codes(layer, key, code)
            return output

        return through_layers(self.base.model, self.base.model.embed_tokens(input_ids), attend), layers

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept, codebook: Tensor) -> Tensor:
        """One softmax over the codes of what is far back, the previous segment, and this one."""
        own = torch.arange(query.shape[2], device=query.device)
        place = torch.arange(-kept.key.shape[2], query.shape[2], device=query.device)
        near = self.rotary(query, own) @ self.rotary(torch.cat([kept.key, key], dim=2), place).transpose(-1, -2)
        near = near.masked_fill(place > own[:, None], -torch.inf)
        scale = query.shape[-1] ** -0.5
        far = (query @ codebook.transpose(-1, -2)) * scale + kept.count.log().unsqueeze(2)
        weight = torch.cat([far, near * scale], dim=-1).softmax(-1)
        of_far, of_near = weight.split([far.shape[-1], near.shape[-1]], dim=-1)
        return of_far @ kept.mean + of_near @ torch.cat([kept.value, value], dim=2)

    def _empty(self, key: Tensor) -> Kept:
        rows, heads, _, width = key.shape
        count = key.new_zeros(rows, heads, self.codebook.shape[2])
        none = key[:, :, :0]
        return Kept(none, none, none[..., 0].long(), count, count.unsqueeze(-1).expand(-1, -1, -1, width), count.sum())

    def auxiliary_loss(self, memory: list[Kept]) -> Tensor:
        return self.commitment * torch.stack([kept.distance for kept in memory]).mean()

    @torch.no_grad()
    def _move_codes(self, layer: int, key: Tensor, code: Tensor) -> None:
        """Towards the mean of their keys of this segment; those that have none stay."""
        assigned = one_hot(code, self.codebook.shape[2]).to(key)
        total, count = torch.einsum("bhtc,bhtd->hcd", assigned, key), assigned.sum((0, 2)).unsqueeze(-1)
        codebook = self.codebook.clone()  # the old one may be needed for gradients
        moved = torch.lerp(total / count.clamp(min=1), codebook[layer], self.decay)
        codebook[layer] = torch.where(count > 0, moved, codebook[layer])
        self.codebook = codebook


def nearest(key: Tensor, codebook: Tensor) -> Tensor:
    """Numbers (B, H, T) of the codes (H, codes, D) nearest to keys (B, H, T, D)."""
    return (2 * key @ codebook.transpose(-1, -2) - codebook.square().sum(-1).unsqueeze(1)).argmax(-1)


def add(count: Tensor, mean: Tensor, code: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (B, H, codes) and mean values (B, H, codes, D) once tokens with codes (B, H, n) have come to them."""
    assigned = one_hot(code, count.shape[-1]).to(value)
    new = count + assigned.sum(2)
    total = mean * count.unsqueeze(-1) + assigned.transpose(-1, -2) @ value
    return new, total / new.clamp(min=1).unsqueeze(-1)


def build(
    base: LlamaForCausalLM, segment: int = 256, codes: int = 128, commitment: float = 1e-4, decay: float = 0.99
) -> Reader:
    """`codes` for each head of each layer."""
    return QuantisedReader(base, segment, codes, commitment, decay)
