"""Transformer-XL: each segment also sees the states that the segment before it left in every layer.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv 1901.02860. The memory is
the last `memory` inputs of each layer, kept without gradient; their keys and values are computed with the present
weights, which so learn to be remembered by. Positions are relative: rotary ones here, where the paper has sinusoids of
its own. A token sees its segment and the memory, and through every further layer as much again.

Invariant: reading in two segments equals one pass over both in which a token of the second sees the memory and its own
segment; without memory it is the dense model that reads each segment by itself.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from comparisons.layers import Rotary, attend_causally, project, through_layer
from comparisons.reader import Reader


class XLReader(Reader):
    """The memory: a list of what each layer remembers, its last inputs (B, at most `memory`, C).

    A subclass that remembers more replaces `keep`, `seen` or `layer`. `past` is what they remember, None at the start.
    """

    def __init__(self, base: LlamaForCausalLM, segment: int, memory: int):
        super().__init__(base, segment)
        self.remembered, self.rotary = memory, Rotary(base.model.rotary_emb)

    def read(self, input_ids: Tensor, memory: list | None) -> tuple[Tensor, list]:
        model, kept = self.base.model, []
        states = model.embed_tokens(input_ids)
        for number in range(len(model.layers)):
            past = None if memory is None else memory[number]
            kept.append(self.keep(number, past, states))
            states = self.layer(number, past, states)
        return model.norm(states), kept

    def keep(self, number: int, past: Any, states: Tensor) -> Any:
        """What the layer remembers after a segment whose inputs were `states` (B, T, C)."""
        together = states.detach() if past is None else torch.cat([past, states.detach()], dim=1)
        return together[:, max(0, together.shape[1] - self.remembered) :]

    def seen(self, past: Any) -> Tensor:
        """Of what a layer remembers, the inputs (B, M, C) that its tokens attend to."""
        return past

    def layer(self, number: int, past: Any, states: Tensor) -> Tensor:
        """The layer's states (B, T, C)."""
        layer = self.base.model.layers[number]
        return through_layer(layer, states, lambda *qkv: self.attend(number, past, *qkv))

    def attend(self, number: int, past: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (B, H, T, D) of a segment's queries over what the layer remembers and the segment itself."""
        layer, before = self.base.model.layers[number], 0
        if past is not None:
            seen = self.seen(past)
            _, past_key, past_value = project(layer.self_attn, layer.input_layernorm(seen))
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
            before = seen.shape[1]
        position = torch.arange(key.shape[2], device=key.device)
        return attend_causally(self.rotary(query, position[before:]), self.rotary(key, position), value)


def build(base: LlamaForCausalLM, segment: int = 256, memory: int = 256) -> Reader:
    """Segments of `segment` tokens that remember `memory` tokens."""
    return XLReader(base, segment, memory)
