"""Training on texts longer than the window: one segment after the other, with what was read before in a cache.

A segment reads its own blocks directly, as a call without a cache does, and retrieves from those of earlier calls, as
chunked reading does. Gradients reach the segment's own keys and values alone: those in the cache are numbers
(truncated back-propagation). See `docs/training_through_memory.md`.

Reading gathers the keys and values of each query's blocks, which is `block_size` times what a query takes, and a
backward would have to keep or gather them again. Here the pairs of a query and a chosen block are sorted by block into
tiles, each of which reads its block once (`attend_chosen`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from landmark_llama.attention.blockwise import attend_sequence
from landmark_llama.attention.pooling import pool_rows, prior_of_heads
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.choice import choose_blocks, rotate_to_distances
from landmark_llama.reading.storage import BlockStorage, Prior
from landmark_llama.rows.layout import Layout

TILE_PAIRS = 16  # queries that read a block together: enough for a matrix product, few enough to fill


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer_idx: int,
        rotary: RotaryTable,
        scale: float,
        landmark_query: Tensor | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """Attention of the segment's queries in one layer; its keys and values go to the cache.

        Args:
            query: (batch, columns, heads, head_dim), not rotated, as `key` and `value`, which have fewer heads.
            landmark_query: the shape of `query`: what scores landmarks in its place.
            pooled: whether landmark keys are pooled.

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
            prior = None
            if pooled:
                own = prior_of_heads(query.detach().transpose(1, 2), key.shape[2]).transpose(1, 2)
                prior = Prior(rotary.rotate(own, offset), scale)
            storage = self.cache.layers[layer_idx].update(
                rotary.rotate(key.detach(), offset), value.detach(), self.start, self.stop, prior
            )
            turned, turned_key = (rotary.rotate(x, column).transpose(1, 2) for x in (query, key))
            scoring = None if landmark_query is None else rotary.rotate(landmark_query, column).transpose(1, 2)
            bias = None
            if pooled:
                turned_key, bias = pool_rows(turned_key, turned, block_size, scale)
            output, lse = attend_sequence(turned, turned_key, value.transpose(1, 2), block_size, scale, scoring, bias)
            if self.num_retrieved_blocks and self.most_candidates:
                grouped, scoring = (
                    None if x is None else x.transpose(1, 2).unflatten(1, (key.shape[2], -1))
                    for x in (query, landmark_query)
                )
                window = output.view(grouped.shape), lse.view(grouped.shape[:-1])
                settings = {"position": position, "rotary": rotary, "scale": scale}
                tie = layer_idx == 0 and not pooled
                output = self._add_retrieved(grouped, scoring, window, storage, landmarks_tie=tie, **settings)
                output = output.flatten(1, 2)
        return output.transpose(1, 2).to(query.dtype)

    def _add_retrieved(
        self,
        query: Tensor,
        landmark_query: Tensor | None,
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
            scoring = query if landmark_query is None else landmark_query
            grouped, group_position = (scoring * scale).unsqueeze(3), position.expand(len(query), 1, -1)
            choice = choose_blocks(
                rotate_to_distances(grouped, group_position, self.num_retrieved_blocks, block_size, rotary),
                storage.landmarks(self.most_candidates),
                self.candidates.unsqueeze(1),
                torch.ones_like(group_position, dtype=torch.bool),
                granularity="token_and_head",
                landmarks_tie=landmarks_tie,
                biases=storage.biases(self.most_candidates),
            )
            block, distance = choice.block.squeeze(3), choice.distance().squeeze(3) * block_size
            earlier = torch.arange(self.most_candidates, device=query.device).expand(len(query), 1, -1)

        def attend(query: Tensor, landmark_query: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
            def placed(x: Tensor) -> Tensor:  # in full precision, as in reading
                return rotary.rotate(rotary.rotate(x.to(output.dtype) * scale, position).unsqueeze(-2), distance)

            scoring = None if landmark_query is None else placed(landmark_query)
            key, value = storage.gather(earlier)
            bias = storage.gather_biases(earlier)
            return attend_chosen(placed(query), key, value, block, (output, lse), scoring, bias)

        return _recomputed(attend, query, landmark_query, *window)


def _recomputed(function: Any, *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)`, which is called again in the backward in place of keeping what it made."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Tensor,
    window: tuple[Tensor, Tensor],
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> Tensor:
    """Adds retrieved blocks to the attention over a window; differentiable in all tensors of real numbers.

    Args:
        query: (batch, kv_heads, ..., k, head_dim): the queries, scaled, rotated to their distance to each chosen block.
        key, value: (batch, kv_heads, blocks, block_size, head_dim), from which they chose.
        block: (batch, kv_heads, ..., k): the chosen blocks; negative where a query has fewer than k.
        window: attention output (batch, kv_heads, ..., head_dim) and logsumexp (batch, kv_heads, ...) of the same
            queries over what they read directly.
        landmark_query: the shape of `query`: what scores landmarks in its place.
        landmark_bias: (batch, kv_heads, blocks): added to the scores of the landmarks.

    Returns:
        (batch, kv_heads, ..., head_dim): attention over the window and the chosen blocks together, in the dtype of the
        window's.
    """
    output, lse = window
    query, key, value = (x.to(output.dtype) for x in (query, key, value))
    tiles = PairTiles.of(block, key.shape[2])
    # (tiles, block_size, TILE_PAIRS): a softmax over what is not the last dimension is the faster one
    scores = key.flatten(0, 2).index_select(0, tiles.block) @ tiles.gather(query).transpose(-1, -2)
    inside = scores[:, :-1].softmax(1)
    landmark_scores = scores[:, -1]  # (tiles, TILE_PAIRS)
    if landmark_query is not None:
        landmark_key = key[..., -1, :].flatten(0, 2).index_select(0, tiles.block).unsqueeze(1)
        landmark_scores = torch.linalg.vecdot(tiles.gather(landmark_query.to(output.dtype)), landmark_key)
    if landmark_bias is not None:
        landmark_scores = landmark_scores + landmark_bias.to(output.dtype).flatten()[tiles.block].unsqueeze(-1)
    landmark = tiles.scatter(landmark_scores.flatten(), block.shape).masked_fill(block < 0, -torch.inf)
    # the window is one more block: its logsumexp stands for a landmark, its output for what the block holds
    share = torch.cat([lse.unsqueeze(-1), landmark], dim=-1).softmax(-1)
    weights = inside * tiles.gather(share[..., 1:].unsqueeze(-1)).transpose(-1, -2)
    read = weights.transpose(-1, -2) @ value[..., :-1, :].flatten(0, 2).index_select(0, tiles.block)
    return share[..., :1] * output + tiles.scatter(read.flatten(0, 1), block.shape).sum(-2)


class PairTiles(NamedTuple):
    """Pairs of a query and a block, sorted by block into tiles of `TILE_PAIRS`.

    block: (tiles,): which of the `batch * kv_heads * blocks` blocks each tile reads.
    pair: (tiles * TILE_PAIRS,): the pair in each slot; any where a block has no pairs left to fill its last tile.
    slot: (pairs,): where each pair went.
    """

    block: Tensor
    pair: Tensor
    slot: Tensor

    @classmethod
    def of(cls, block: Tensor, blocks: int) -> PairTiles:
        owner = torch.arange(block.shape[0] * block.shape[1], device=block.device)
        owner = owner.view(*block.shape[:2], *(1,) * (block.dim() - 2))
        number = (owner * blocks + block.clamp_min(0)).flatten()
        number, order = number.sort()
        count = number.bincount(minlength=owner.numel() * blocks)
        tiles = -(-count // TILE_PAIRS)
        # from a pair's place among the sorted ones to its slot: each block before its own was filled up to whole tiles
        filled = (tiles * TILE_PAIRS - count).cumsum(0) - (tiles * TILE_PAIRS - count)
        place = torch.arange(len(order), device=block.device) + filled[number]
        block_of_tile = torch.arange(len(tiles), device=block.device).repeat_interleave(tiles)
        pair = torch.zeros(len(block_of_tile) * TILE_PAIRS, dtype=torch.long, device=block.device)
        pair[place] = order
        slot = torch.empty_like(order)
        slot[order] = place
        return cls(block_of_tile, pair, slot)

    def gather(self, x: Tensor) -> Tensor:
        """(..., size) of all pairs to (tiles, TILE_PAIRS, size)."""
        return x.flatten(0, -2).index_select(0, self.pair).unflatten(0, (-1, TILE_PAIRS))

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(tiles * TILE_PAIRS, ...) of all slots to (*shape, ...), where `shape` is that of the pairs."""
        return x.index_select(0, self.slot).unflatten(0, shape)
