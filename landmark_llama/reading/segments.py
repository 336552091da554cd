"""Training on texts longer than the window: one segment after the other, with what was read before in a cache.

A segment reads its own blocks directly, as a call without a cache does, and retrieves from those of earlier calls, as
chunked reading does. Gradients reach the segment's own keys and values alone: those in the cache are numbers
(truncated back-propagation). See `docs/training_through_memory.md`.

`attend_chosen` sorts the pairs of a query and a block that it chose by block, into tiles that read their block once.
Reading gathers keys and values for each query instead. A backward would have to keep them or gather them again, and
they take `block_size` times the memory of the query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from landmark_llama.attention.blockwise import attend_sequence
from landmark_llama.attention.exact import attend_exactly
from landmark_llama.attention.pooling import pool_rows
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.configuration import LandmarkConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.choice import choose_blocks, rotate_to_distances
from landmark_llama.reading.storage import BlockStorage, Prior
from landmark_llama.rows.layout import Layout

TILE_PAIRS = 16  # queries that read a block together: enough for a matrix product, few enough to fill


@dataclass(frozen=True)
class Segment:
    """The view of a call in training with a cache: where it stands in its rows' texts, and what it retrieves.

    cache: what earlier calls read; this one is added to it.
    start: (batch,): landmarked position of each row's first column, the first of a block.
    candidates: (batch,): blocks before it.
    most_candidates: the largest number of candidates in the batch.
    stop: the largest landmarked position after the call's columns.
    settings: how many of them each query retrieves at most, and what they weigh.
    pooled: whether landmark keys are pooled of their blocks' keys.
    """

    cache: LandmarkCache
    start: Tensor
    candidates: Tensor
    most_candidates: int
    stop: int
    settings: RetrievalSettings
    pooled: bool = False

    @classmethod
    def of(cls, layout: Layout, cache: LandmarkCache, settings: RetrievalSettings, pooled: bool = False) -> Segment:
        device, candidates = layout.source.device, layout.start // cache.block_size
        stop = int(layout.start.max()) + layout.source.shape[1]
        most = int(candidates.max())
        return cls(cache, layout.start.to(device), candidates.to(device), most, stop, settings, pooled)

    def to(self, device: torch.device, non_blocking: bool = False) -> Segment:
        """The same segment on `device` (the signature that accelerate's device hooks call)."""
        start, candidates = (x.to(device, non_blocking=non_blocking) for x in (self.start, self.candidates))
        return replace(self, start=start, candidates=candidates)

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
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        """Attention of the segment's queries in one layer; its keys and values go to the cache.

        Args:
            query: (batch, columns, heads, head_dim), not rotated, as `key` and `value`, which have fewer heads.
            landmark_query: the shape of `query`: what scores landmarks in its place.
            landmark_prior: the shape of `key`: as in `View.attend`.

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
            prior = Prior.of(landmark_prior, offset, rotary, scale)
            storage = self.cache.layers[layer_idx].update(
                rotary.rotate(key.detach(), offset), value.detach(), self.start, self.stop, prior
            )
            rotated, rotated_key = (rotary.rotate(x, column).transpose(1, 2) for x in (query, key))
            scoring = None if landmark_query is None else rotary.rotate(landmark_query, column).transpose(1, 2)
            bias = None
            if self.pooled:
                rotated_prior = rotary.rotate(landmark_prior, column).transpose(1, 2)
                rotated_key, bias = pool_rows(rotated_key, rotated_prior, block_size, scale)
            own = rotated, rotated_key, value.transpose(1, 2)
            if self.settings.exact_weights:
                output, lse = attend_exactly(*own, block_size, scale)
            else:
                output, lse = attend_sequence(*own, block_size, scale, scoring, bias)
            if self.settings.num_retrieved_blocks and self.most_candidates:
                grouped, scoring = (
                    None if x is None else x.transpose(1, 2).unflatten(1, (key.shape[2], -1))
                    for x in (query, landmark_query)
                )
                window = output.view(grouped.shape), lse.view(grouped.shape[:-1])
                settings = {"position": position, "rotary": rotary, "scale": scale}
                tie = layer_idx == 0 and not self.pooled
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

        `landmark_query`, likewise, scores the landmarks in its place. What that needs is gathered again for the
        backward: it is several times what the queries themselves take.
        """
        block_size = self.cache.block_size
        with torch.no_grad():
            # all queries are one group of those that `choose_blocks` knows
            scoring = query if landmark_query is None else landmark_query
            grouped, group_position = (scoring * scale).unsqueeze(3), position.expand(len(query), 1, -1)
            choice = choose_blocks(
                rotate_to_distances(grouped, group_position, self.settings.num_retrieved_blocks, block_size, rotary),
                storage.landmarks(self.most_candidates),
                self.candidates.unsqueeze(1),
                torch.ones_like(group_position, dtype=torch.bool),
                granularity="token_and_head",
                landmarks_tie=landmarks_tie,
                biases=storage.biases(self.most_candidates),
                num_sink_blocks=self.settings.num_sink_blocks,
            )
            block, distance = choice.block.squeeze(3), choice.distance().squeeze(3) * block_size
            earlier = torch.arange(self.most_candidates, device=query.device).expand(len(query), 1, -1)

        def attend(query: Tensor, landmark_query: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
            # in full precision, as in reading
            query, scoring = (
                None if x is None else rotary.rotate(x.to(output.dtype) * scale, position).unsqueeze(-2)
                for x in (query, landmark_query)
            )
            query, scoring = (None if x is None else rotary.rotate(x, distance) for x in (query, scoring))
            landmarks = scoring, storage.gather_biases(earlier)
            exact = self.settings.exact_weights
            return attend_chosen(query, *storage.gather(earlier), block, (output, lse), *landmarks, exact)

        return _recomputed(attend, query, landmark_query, *window)


def _recomputed(function: Any, *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)` under activation checkpointing: the backward calls it again."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def check_segment(
    config: LandmarkConfig,
    layout: Layout,
    num_retrieved_blocks: int | None,
    num_local_blocks: int | None,
    local_attention: str | None,
    retrieval_granularity: str | None,
) -> RetrievalSettings:
    """How a call with a cache is trained on, given what the call asks for; raises a ValueError if it cannot be."""
    settings = config.segment_retrieval(num_retrieved_blocks)
    for name, value, only in (
        ("num_local_blocks", num_local_blocks, None),
        ("local_attention", local_attention, settings.local_attention),
        ("retrieval_granularity", retrieval_granularity, settings.granularity),
    ):
        if value not in (None, only):
            raise ValueError(
                f"{name}={value!r} in training with a cache: a query reads the blocks of its own call directly and "
                "chooses its own among those of earlier calls; leave it unset, or call model.eval() to read"
            )
    inside = (layout.start % config.block_size > 0) & (layout.ordinary > 0)
    if inside.any():
        row = int(inside.nonzero()[0])
        raise ValueError(
            f"row {row} goes on inside a block, at landmarked position {int(layout.start[row])}: in training, each "
            f"call that a cache is given to begins with a block, after a multiple of {config.block_size - 1} tokens "
            f"(block_size={config.block_size}); to read or generate, call model.eval()"
        )
    goes_on = bool(layout.start.any())
    room = settings.chunk_blocks * config.block_size if goes_on else config.train_context_length
    if layout.length.max() > room:
        raise ValueError(
            f"a row takes {int(layout.length.max())} landmarked positions in training with a cache; at most {room} fit "
            f"train_context_length={config.train_context_length}"
            + (f" beside {settings.num_retrieved_blocks} retrieved blocks" if goes_on else "")
            + ": cut the text into more segments"
        )
    return settings


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Tensor,
    window: tuple[Tensor, Tensor],
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
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
        exact_weights: blocks weigh what their tokens do, whatever their landmarks score.

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
    landmark = scores[:, :-1].logsumexp(1) if exact_weights else scores[:, -1]  # (tiles, TILE_PAIRS)
    if landmark_query is not None and not exact_weights:
        landmark_key = key[..., -1, :].flatten(0, 2).index_select(0, tiles.block).unsqueeze(1)
        landmark = torch.linalg.vecdot(tiles.gather(landmark_query.to(output.dtype)), landmark_key)
    if landmark_bias is not None and not exact_weights:
        landmark = landmark + landmark_bias.to(output.dtype).flatten()[tiles.block].unsqueeze(-1)
    landmark = tiles.scatter(landmark.flatten(), block.shape).masked_fill(block < 0, -torch.inf)
    # the window is one more block: its logsumexp stands for a landmark, its output for what the block holds
    share = torch.cat([lse.unsqueeze(-1), landmark], dim=-1).softmax(-1)
    weights = inside * tiles.gather(share[..., 1:].unsqueeze(-1)).transpose(-1, -2)
    read = weights.transpose(-1, -2) @ value[..., :-1, :].flatten(0, 2).index_select(0, tiles.block)
    return share[..., :1] * output + tiles.scatter(read.flatten(0, 1), block.shape).sum(-2)


class PairTiles(NamedTuple):
    """Pairs of a query and a block, sorted by block into tiles of `TILE_PAIRS`.

    block: (tiles,): which of the `batch * kv_heads * blocks` blocks each tile reads.
    pair: (tiles * TILE_PAIRS,): the pair in each slot; arbitrary where a block's last tile is not full.
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
