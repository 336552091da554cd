"""A sliding window for a dense model, with attention sinks or without: what is kept, and what each token sees.

Sinks are the first tokens of the text, which every token goes on seeing (StreamingLLM, arXiv 2309.17453). They stand
right before the window, however far it has moved, so that no distance grows with the text: their keys are rotated on
with the window, by whole pieces. A piece is what is read in one call, so that a sink is at most a piece further away
than its place before a token's own window.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

SINK_PIECE = 256  # tokens read at once with sinks


class SinkWindowLayer(DynamicLayer):
    """Keys and values of one layer: `sinks` first tokens and the last `window - 1`, before a call adds its own.

    inverse_frequencies: (rotated_dim // 2,) of plain rotary positions, angles a position.
    """

    def __init__(self, window: int, sinks: int, inverse_frequencies: Tensor):
        super().__init__()
        self.window, self.sinks, self.inverse_frequencies = window, sinks, inverse_frequencies
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds a call's (batch, heads, tokens, head_dim), and returns all that its queries may see, sinks first."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        start, held = self.seen, self.keys.shape[-2]
        self.seen += key_states.shape[-2]
        keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        sinks = min(self.sinks, keys.shape[-2])
        moved = start - held  # the window has left so many tokens behind
        kept = max(sinks, keys.shape[-2] - self.window + 1)
        self.keys = torch.cat([keys[..., :sinks, :], keys[..., kept:, :]], dim=-2)
        self.values = torch.cat([values[..., :sinks, :], values[..., kept:, :]], dim=-2)
        return torch.cat([self._moved(keys[..., :sinks, :], moved), keys[..., sinks:, :]], dim=-2), values

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions are counted from."""
        return self.seen

    def _moved(self, keys: Tensor, positions: int) -> Tensor:
        """Keys as they would be so many positions later."""
        angle = (positions * self.inverse_frequencies.double()).repeat(2)
        rotated, rest = keys.split([len(angle), keys.shape[-1] - len(angle)], dim=-1)
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return torch.cat([rotated * angle.cos().to(keys) + turned * angle.sin().to(keys), rest], dim=-1)


def window_mask(start: int, stop: int, window: int, dtype: torch.dtype, device: torch.device, sinks: int = 0) -> Tensor:
    """(1, 1, queries, keys), added to scores: queries `start..stop-1`; keys the sinks, and from the first seen one."""
    query = torch.arange(start, stop, device=device).unsqueeze(1)
    first = min(sinks, stop)
    key = torch.cat([torch.arange(first), torch.arange(max(first, start - window + 1), stop)]).to(device)
    hidden = (key > query) | (key <= query - window) & (key >= sinks)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)[None, None]
