"""A sliding window with attention sinks: what a dense model reads without further training.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. A token sees the first
`sinks` tokens of the text and its nearest ones, `segment` in all. Positions are those inside what is kept: the nearest
tokens stand at their true distance, the sinks in front of them. The memory is keys and values of what the next token
may see, no more however long the text. (Deeper layers see further back than the window, through shallower ones.)

Invariant: a text of at most `segment` tokens is read as by the dense model, and calls may cut a text anywhere.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from comparisons.layers import Rotary, through_layers
from comparisons.reader import Reader


class WindowReader(Reader):
    """The memory: how many tokens were read, and (key, value) of each layer, not rotated, sinks first."""

    remembers_in_training = False

    def __init__(self, base: LlamaForCausalLM, segment: int, sinks: int):
        super().__init__(base, segment)
        self.sinks, self.rotary = sinks, Rotary(base.model.rotary_emb)

    def read(self, input_ids: Tensor, memory: tuple[int, list] | None) -> tuple[Tensor, tuple[int, list]]:
        seen, kept = memory or (0, None)
        layers: list[tuple[Tensor, Tensor]] = []
        position = seen + torch.arange(input_ids.shape[1], device=input_ids.device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if kept is not None:
                key, value = (torch.cat([old, new], 2) for old, new in zip(kept[layer], (key, value), strict=True))
            layers.append(tuple(self._keep(x) for x in (key, value)))
            return self._attend(query, key, value, position)

        states = through_layers(self.base.model, self.base.model.embed_tokens(input_ids), attend)
        return states, (seen + input_ids.shape[1], layers)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """Queries at `position` (T,) over what is kept and themselves, (B, H, N, D)."""
        end, count = int(position[-1]) + 1, key.shape[2]
        column = torch.arange(count, device=key.device)
        own = torch.where(column < self.sinks, column, column + end - count)  # the text's position of each key
        distance = position[:, None] - own
        sink = own < self.sinks
        seen = (distance >= 0) & (sink | (distance < self.segment - self.sinks))
        start = own[self.sinks] if count > self.sinks else 0
        scores = self.rotary(query, position - start) @ self.rotary(key, own - start).transpose(-1, -2)
        within = position.clamp(max=self.segment - 1)  # where the query stands for the sinks
        to_sinks = self.rotary(query, within) @ self.rotary(key[:, :, : self.sinks], own[: self.sinks]).transpose(
            -1, -2
        )
        scores = torch.cat([to_sinks, scores[..., self.sinks :]], dim=-1) * query.shape[-1] ** -0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value

    def _keep(self, x: Tensor) -> Tensor:
        """Of (B, H, N, D) what the next token may see."""
        if x.shape[2] < self.segment:
            return x
        return torch.cat([x[:, :, : self.sinks], x[:, :, x.shape[2] - (self.segment - self.sinks - 1) :]], dim=2)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, tuple]:
        scores, (_, memory, _) = super().prefill(input_ids)
        return scores, memory

    @torch.no_grad()
    def decode(self, token: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        states, memory = self.read(token, state)
        return self.logits(states[:, -1]), memory


def build(base: LlamaForCausalLM, segment: int = 512, sinks: int = 4) -> Reader:
    """A window of `segment` tokens, `sinks` of them the text's first."""
    return WindowReader(base, segment, sinks)
