"""LongLoRA and LongQLoRA: a dense model that is trained on longer rows, cheaply, and read as before.

Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv 2309.12307. In training a
row is cut into groups, a query sees its own group alone, and in half of the heads the groups lie half a group further
on, so that neighbouring groups share tokens (shifted sparse attention). Positions are interpolated (Chen et al., arXiv
2306.15595): divided by how many times longer the rows are than what the model knew. An adapter on the attention's
projections is trained, and with it embeddings and norms. Reading is dense attention over the whole text.
Yang, "LongQLoRA", arXiv 2311.04879, holds the weights under the adapter in 4 bits. Here they are rounded to 4 bits
(NF4) and back: the numbers are those of LongQLoRA, the memory is not.

Invariant: no token's state depends on a later token, shifted or not, and an untrained adapter with one group and no
interpolation is the dense model.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM

from comparisons.adapters import changed, linear_layers, new_change
from comparisons.cached import CachedReader, Kept
from comparisons.reader import Reader

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
FOUR_BIT = (*ADAPTED, "gate_proj", "up_proj", "down_proj")


class LongLoraReader(CachedReader):
    """Training rows are read by shifted sparse attention, texts densely."""

    def __init__(self, base: LlamaForCausalLM, segment: int, groups: int, rank: int, alpha: float, four_bits: bool):
        super().__init__(base, segment)
        self.groups, self.scale = groups, alpha / rank
        self.stretched = max(1.0, segment / base.config.max_position_embeddings)
        self.rounded = not four_bits
        for name, weight in base.named_parameters():
            weight.requires_grad_("embed_tokens" in name or "norm" in name)
        self.layers = linear_layers(base, ADAPTED)
        changes = {name: new_change(layer, rank) for name, layer in self.layers.items()}
        self.adapter = nn.ParameterDict(
            {f"{name}_{part}": x for name, change in changes.items() for part, x in zip("AB", change, strict=True)}
        )

    def read(self, input_ids: Tensor, memory: list[Kept] | None) -> tuple[Tensor, list[Kept]]:
        if not self.rounded:  # when the weights that it starts from have been loaded
            self._round()
        changes = {name: (self.adapter[f"{name}_A"], self.adapter[f"{name}_B"]) for name in self.layers}
        with changed(self.layers, changes, self.scale):
            return super().read(input_ids, memory)

    def place(self, position: Tensor) -> Tensor:
        return position / self.stretched

    def attend(self, layer: int, query: Tensor, kept: Kept) -> Tensor:
        if not self.training:
            return super().attend(layer, query, kept)
        length, heads = query.shape[2], query.shape[1]
        group = -(-length // self.groups)
        plain, shifted = (group_mask(length, group, shift, query.device) for shift in (0, group // 2))
        if self.groups == 1:
            shifted = plain
        # heads by turns, so that grouped queries do not decide which are shifted
        mask = torch.stack([shifted if head % 2 else plain for head in range(heads)])
        return scaled_dot_product_attention(query, *kept[:2], attn_mask=mask)

    def _round(self) -> None:
        """To 4 bits and back, where the adapter's base is held in 4 bits. Once more changes nothing."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for layer in linear_layers(self.base, FOUR_BIT).values():
            packed, state = quantize_4bit(layer.weight.data, quant_type="nf4")
            layer.weight.data.copy_(dequantize_4bit(packed, state))
        self.rounded = True


def group_mask(length: int, group: int, shift: int, device: torch.device) -> Tensor:
    """(length, length), True where a query sees a key: not a later one, and of its own group, which `shift` moves."""
    number = (torch.arange(length, device=device) + shift) // group
    return (number[:, None] == number).tril()


def build(
    base: LlamaForCausalLM,
    segment: int = 2048,
    groups: int = 4,
    rank: int = 8,
    alpha: float = 16,
    four_bits: bool = False,
) -> Reader:
    """Trained on rows of `segment` tokens in `groups` groups; give `weights`, or the adapter changes random ones."""
    return LongLoraReader(base, segment, groups, rank, alpha, four_bits)
