"""A long call is streamed: chunk by chunk through all layers, with the cache between the chunks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from landmark_llama.configuration import RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.groups import cut_into_chunks
from landmark_llama.reading.table import Table
from landmark_llama.reading.trace import recorder
from landmark_llama.rows.layout import Rows


class StreamingMixin:
    """Streams calls through a model's layers; the model has `_embed`, `_through_layers`, `_rotary_table` and `norm`."""

    @torch.no_grad()
    def _stream(self, rows: Rows, output: Tensor, cache: LandmarkCache, settings: RetrievalSettings) -> Tensor:
        """States (batch, outputs, hidden_size) of the landmarked columns `output` (batch, outputs), through `cache`."""
        layout, device = rows.layout, rows.content.device
        kept, rotary = None, self._rotary_table(device)
        cache.expect(int((layout.start + layout.length).max()))
        if device.type == "cpu":
            keep_freed_memory()
        for chunk in cut_into_chunks(layout, settings, self.config):
            how = {"kernels": self.config.kernels, "pooled": self.config.landmark_key == "pooled"}
            table = Table(chunk.groups.to(device), cache.storages, chunk.settings, **how)
            begin = chunk.begin.to(device).unsqueeze(1)
            column = begin + torch.arange(table.groups.slot.shape[1], device=device)
            states = self._embed(rows.content, layout.source.gather(1, column.clamp_max(layout.source.shape[1] - 1)))
            local = output - begin
            row, place = ((local >= 0) & (local < chunk.length.to(device).unsqueeze(1))).nonzero(as_tuple=True)
            layers = functools.partial(self._through_layers, rotary=rotary)
            plain = cache.graphs is None or recorder() is not None or chunk.settings.num_reranked_blocks
            if plain or not len(row):
                # later calls read the last layer's keys and values, but its output is read only where it is kept
                states = layers(states, table, fill_cache_only=not len(row))
            else:
                states = cache.graphs.run(layers, states, table, rotary=rotary)
            if len(row):
                states = self.norm(states[row, local[row, place]])
                kept = states.new_zeros(*output.shape, states.shape[-1]) if kept is None else kept
                kept[row, place] = states
        cache.read_by(self, settings)
        return self.norm.weight.new_zeros(*output.shape, self.config.hidden_size) if kept is None else kept


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep what the tensors of a chunk leave, for those of the next one.

    glibc gives large blocks back to the system when they are freed; mapping their pages anew can take longer than what
    is computed on them. It stops doing so for blocks up to the size of the largest one that was freed, 32 MiB at most
    (mallopt(3), M_MMAP_THRESHOLD), so that freeing one is enough. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
