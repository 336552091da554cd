"""Readers that keep keys and values of the whole text, as a dense model does, and differ in what a query looks at.

B rows, T tokens of a call, N tokens read so far with them, H heads, D their width.
"""

from typing import Any

import torch
from torch import Tensor

from comparisons.layers import Rotary, attend_causally, through_layers
from comparisons.reader import Reader

Kept = tuple[Tensor, ...]  # of one layer: keys rotated to their positions, values (B, H, N, D), and what a method adds


class CachedReader(Reader):
    """The memory: a list with the `Kept` of each layer. Calls may cut a text anywhere."""

    remembers_in_training = False

    def read(self, input_ids: Tensor, memory: list[Kept] | None) -> tuple[Tensor, list[Kept]]:
        rotary, layers = Rotary(self.base.model.rotary_emb), []
        seen = memory[0][0].shape[2] if memory else 0
        position = self.place(seen + torch.arange(input_ids.shape[1], device=input_ids.device))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            new = (rotary(key, position), value)
            layers.append(self.keep(memory[layer], *new) if memory else self.keep(None, *new))
            return self.attend(layer, rotary(query, position), layers[-1])

        return through_layers(self.base.model, self.base.model.embed_tokens(input_ids), attend), layers

    def place(self, position: Tensor) -> Tensor:
        """Where the tokens number `position` (T,) of a text stand."""
        return position

    def keep(self, kept: Kept | None, key: Tensor, value: Tensor) -> Kept:
        """What is kept of a layer when the new keys and values (B, H, T, D) come to it."""
        if kept is None:
            return key, value
        return torch.cat([kept[0], key], dim=2), torch.cat([kept[1], value], dim=2)

    def attend(self, layer: int, query: Tensor, kept: Kept) -> Tensor:
        """Output (B, H, T, D) of a layer's rotated queries, which are those of the last T keys."""
        return attend_causally(query, *kept[:2])

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        scores, (_, memory, _) = super().prefill(input_ids)
        return scores, memory

    @torch.no_grad()
    def decode(self, token: Tensor, state: list[Kept]) -> tuple[Tensor, list[Kept]]:
        states, memory = self.read(token, state)
        return self.logits(states[:, -1]), memory
