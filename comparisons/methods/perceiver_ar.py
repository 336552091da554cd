"""Perceiver AR: a few latents look once at a long input, and all further layers work on the latents alone.

Hawthorne et al., "General-purpose, long-context autoregressive modeling with Perceiver AR", arXiv 2202.07765. The
last tokens of the input are the latents. In the first layer they attend to all of the input before them, causally;
the other layers are ordinary ones over the latents. Here the `segment` tokens of a call are the latents, the model's
first layer is the cross attention, and `context` tokens are the input, the latents among them. Gradients reach all of
a row's inputs.

Invariant: with one segment for the whole text it is the dense model; else the second layer sees the segment alone.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from comparisons.layers import Rotary, attend_causally, through_layers
from comparisons.reader import Reader

Inputs = tuple[Tensor, Tensor]  # the first layer's keys, not rotated, and values (B, H, tokens, D)


class PerceiverReader(Reader):
    """The memory is what latents look at: the first layer's keys and values, of embeddings alone."""

    def __init__(self, base: LlamaForCausalLM, segment: int, context: int):
        super().__init__(base, segment)
        if context < segment:
            raise ValueError(f"context={context}: the input holds the latents, {segment} of them; give no less")
        self.context, self.rotary = context, Rotary(base.model.rotary_emb)

    def read(self, input_ids: Tensor, memory: Inputs | None) -> tuple[Tensor, Inputs]:
        seen: list[Inputs] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if layer == 0:
                if memory is not None:
                    key, value = (torch.cat([old, new], 2) for old, new in zip(memory, (key, value), strict=True))
                key, value = (x[:, :, -self.context :] for x in (key, value))
                seen.append((key, value))
            position = torch.arange(key.shape[2], device=key.device)
            query = self.rotary(query, position[key.shape[2] - query.shape[2] :])
            return attend_causally(query, self.rotary(key, position), value)

        states = through_layers(self.base.model, self.base.model.embed_tokens(input_ids), attend)
        return states, seen[0]

    def between(self, memory: Inputs, segment: int) -> Inputs:
        return memory  # inputs learn from all latents of the row


def build(base: LlamaForCausalLM, segment: int = 256, context: int = 2048) -> Reader:
    """`segment` latents that look at `context` tokens, themselves among them."""
    return PerceiverReader(base, segment, context)
