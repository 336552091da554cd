"""Training on texts longer than the window: one segment after the other, with what was read before in a cache.

A segment reads its own blocks directly, as a call without a cache does, and retrieves from those of earlier calls, as
chunked reading does. Gradients reach the segment's own keys and values alone: those in the cache are numbers
(truncated back-propagation). See `docs/training_through_memory.md`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from landmark_llama.attention.blockwise import attend_sequence
from landmark_llama.attention.retrieved import attend_chosen
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.cache import LandmarkCache
from landmark_llama.layout import Layout
from landmark_llama.retrieval import choose_blocks, rotate_to_distances
from landmark_llama.storage import BlockStorage


class Segment(NamedTuple):
    """Where a call in training stands in its rows' texts.

    cache: what earlier calls read; this one is added to it.
    start: (batch,): landmarked position of each row's first column, the first of a block.
    candidates: (batch,): blocks before it.
    most_candidates, stop: the largest of the rows, and the largest position after the call's columns.
    num_retrieved_blocks: how many of them each query retrieves at most.
    """

    cache: LandmarkCache
    start: Tensor
    candidates: Tensor
    most_candidates: int
    stop: int
    num_retrieved_blocks: int

    @classmethod
    def of(cls, layout: Layout, cache: LandmarkCache, num_retrieved_blocks: int) -> Segment:
        device, candidates = layout.source.device, layout.start // cache.block_size
        stop = int(layout.start.max()) + layout.source.shape[1]
        most = int(candidates.max())
        return cls(cache, layout.start.to(device), candidates.to(device), most, stop, num_retrieved_blocks)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer_idx: int, rotary: RotaryTable, scale: float
    ) -> Tensor:
        """Attention of the segment's queries in one layer; its keys and values go to the cache.

        Args:
            query: (batch, columns, heads, head_dim), not rotated, as `key` and `value`, which have fewer heads.

        Returns:
            (batch, columns, heads, head_dim), in the dtype of `query`.
        """
        block_size, columns = self.cache.block_size, query.shape[1]
        position = torch.arange(columns, device=query.device)
        column = position.unsqueeze(-1)
        # precision is the attention's own business, as in the fused kernels: fp32 throughout, whatever autocast says
        with torch.autocast(query.device.type, enabled=False):
            # a layer that is recomputed for its gradients writes the same once more
            offset = (position % block_size).unsqueeze(-1)
            storage = self.cache.layers[layer_idx].update(
                rotary.rotate(key.detach(), offset), value.detach(), self.start, self.stop
            )
            output, lse = attend_sequence(
                rotary.rotate(query, column).transpose(1, 2),
                rotary.rotate(key, column).transpose(1, 2),
                value.transpose(1, 2),
                block_size,
                scale,
            )
            if self.num_retrieved_blocks and self.most_candidates:
                grouped = query.transpose(1, 2).unflatten(1, (key.shape[2], -1))
                window = output.view(grouped.shape), lse.view(grouped.shape[:-1])
                settings = {"position": position, "rotary": rotary, "scale": scale}
                output = self._add_retrieved(grouped, window, storage, landmarks_tie=layer_idx == 0, **settings)
                output = output.flatten(1, 2)
        return output.transpose(1, 2).to(query.dtype)

    def _add_retrieved(
        self,
        query: Tensor,
        window: tuple[Tensor, Tensor],
        storage: BlockStorage,
        *,
        position: Tensor,
        rotary: RotaryTable,
        scale: float,
        landmarks_tie: bool,
    ) -> Tensor:
        """`attend_chosen` over the blocks of earlier calls, for `query` (batch, kv_heads, group, columns, head_dim).

        What that needs is gathered again for the backward: it is several times what the queries themselves take.
        """
        block_size = self.cache.block_size
        with torch.no_grad():
            # all queries are one group of those that `choose_blocks` knows
            grouped, group_position = (query * scale).unsqueeze(3), position.expand(len(query), 1, -1)
            choice = choose_blocks(
                rotate_to_distances(grouped, group_position, self.num_retrieved_blocks, block_size, rotary),
                storage.landmarks(self.most_candidates),
                self.candidates.unsqueeze(1),
                torch.ones_like(group_position, dtype=torch.bool),
                granularity="token_and_head",
                landmarks_tie=landmarks_tie,
            )
            block, distance = choice.block.squeeze(3), choice.distance().squeeze(3) * block_size
            earlier = torch.arange(self.most_candidates, device=query.device).expand(len(query), 1, -1)

        def attend(query: Tensor, output: Tensor, lse: Tensor) -> Tensor:
            # in full precision, as in reading
            rotated = rotary.rotate(query.to(output.dtype) * scale, position).unsqueeze(-2)
            return attend_chosen(rotary.rotate(rotated, distance), *storage.gather(earlier), block, (output, lse))

        return _recomputed(attend, query, *window)


def _recomputed(function: Any, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, which is called again in the backward in place of keeping what it made."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
