"""Attention to retrieved blocks with a backward: queries are brought to the blocks that they chose.

Reading (`attend_retrieved` of `blockwise.py`) gathers the keys and values of each query's blocks, which is `block_size`
times what a query takes, and a backward would have to keep or gather them again. Here the pairs of a query and a
chosen block are sorted by block into tiles, each of which reads its block once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_PAIRS = 16  # queries that read a block together: enough for a matrix product, few enough to fill


def attend_chosen(query: Tensor, key: Tensor, value: Tensor, block: Tensor, window: tuple[Tensor, Tensor]) -> Tensor:
    """Adds retrieved blocks to the attention over a window; differentiable in all tensors of real numbers.

    Args:
        query: (batch, kv_heads, ..., k, head_dim): the queries, scaled, rotated to their distance to each chosen block.
        key, value: (batch, kv_heads, blocks, block_size, head_dim), from which they chose.
        block: (batch, kv_heads, ..., k): the chosen blocks; negative where a query has fewer than k.
        window: attention output (batch, kv_heads, ..., head_dim) and logsumexp (batch, kv_heads, ...) of the same
            queries over what they read directly.

    Returns:
        (batch, kv_heads, ..., head_dim): attention over the window and the chosen blocks together, in the dtype of the
        window's.
    """
    output, lse = window
    query, key, value = (x.to(output.dtype) for x in (query, key, value))
    tiles = _Tiles.of(block, key.shape[2])
    # (tiles, block_size, TILE_PAIRS): a softmax over what is not the last dimension is the faster one
    scores = key.flatten(0, 2).index_select(0, tiles.block) @ tiles.gather(query).transpose(-1, -2)
    inside = scores[:, :-1].softmax(1)
    landmark = tiles.scatter(scores[:, -1].flatten(), block.shape).masked_fill(block < 0, -torch.inf)
    # the window is one more block: its logsumexp stands for a landmark, its output for what the block holds
    share = torch.cat([lse.unsqueeze(-1), landmark], dim=-1).softmax(-1)
    weights = inside * tiles.gather(share[..., 1:].unsqueeze(-1)).transpose(-1, -2)
    read = weights.transpose(-1, -2) @ value[..., :-1, :].flatten(0, 2).index_select(0, tiles.block)
    return share[..., :1] * output + tiles.scatter(read.flatten(0, 1), block.shape).sum(-2)


class _Tiles(NamedTuple):
    """Pairs of a query and a block, sorted by block into tiles of `TILE_PAIRS`.

    block: (tiles,): which of the `batch * kv_heads * blocks` blocks each tile reads.
    pair: (tiles * TILE_PAIRS,): the pair in each slot; any where a block has no pairs left to fill its last tile.
    slot: (pairs,): where each pair went.
    """

    block: Tensor
    pair: Tensor
    slot: Tensor

    @classmethod
    def of(cls, block: Tensor, blocks: int) -> _Tiles:
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
