"""Attention over the block table on a GPU: each query reads its direct blocks and the blocks that it chose.

The definition is `table.attend_through_table` in PyTorch. A program holds a tile of queries of one group and head:

1. `unite_kernel` lists the blocks that any query of the tile chose, unless they share a choice, which is the list.
2. `attend_kernel` walks over that list, then over the direct blocks and the own one. A query gives no weight to a block
   of the list that it did not choose. Keys are stored rotated by their offset in the block, so a query is rotated to
   its distance from the block. Queries that chose a block at different ranks read it at different distances: each of
   them has its own rotation.

A block enters the running softmax of a query as one term. Its logit is the landmark's score, or for the own block the
logsumexp of its tokens; its value is the sum of its values, weighted by the softmax inside it (`docs/attention.md`).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from landmark_llama.attention.availability import unsupported_rows
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.triton_tiles import (
    LOG2_E,
    SMALLEST_CHIP,
    Strided,
    Tile,
    launch_largest,
    padded,
    shared_memory,
)
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.table_kernels import attend_kernel, unite_kernel
from landmark_llama.reading.triton_rows import Sizes, group_pointers, query_pointer

LARGEST_BLOCK = 256


def attend_table(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: QueryGroups,
    choice: Tensor | None,
    *,
    one_block: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    landmark_query: Tensor | None = None,
    bias: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Attention of the queries of one call over their direct blocks and the chosen ones.

    Args:
        query: (batch, columns, kv_heads, heads_per_kv, head_dim), contiguous, not rotated.
        key, value: (batch, kv_heads, capacity, block_size, head_dim), contiguous, in the dtype of `query`; keys rotated
            by their offset in the block.
        groups: where the queries stand.
        choice: (batch, kv_heads or 1, heads_per_kv or 1, groups, queries or 1, k), int32, as in `choice.Choice`; None:
            no block is retrieved.
        one_block: the valid queries of a group all lie in one block.
        rotary: fp32.
        landmark_query: as `query`: what scores landmarks in its place.
        bias: (batch, kv_heads, capacity), fp32, contiguous: added to the scores of landmarks.
        exact: blocks weigh what their tokens do, whatever their landmarks score.

    Returns:
        (batch, columns, kv_heads, heads_per_kv, head_dim), in the dtype of `query`; zero for padding.

    Raises:
        ValueError: if the chip has no room for the smallest tile (`supported` says so beforehand).
    """
    if exact:
        landmark_query = bias = None
    alike = one_block and (choice is None or choice.shape[4] == 1)
    memory = shared_memory(query.device)
    shape = (groups.position.shape[2], alike, block_size, query.shape[-1], query.element_size())
    possible = tiles(*shape, memory, plain=landmark_query is None)

    def launch(tile: Tile) -> Tensor:
        return _attend_in_tiles(
            tile,
            query,
            (key, value),
            groups,
            choice,
            block_size=block_size,
            one_block=one_block,
            rotary=rotary,
            scale=scale,
            landmark_query=landmark_query,
            bias=bias,
            exact=exact,
        )

    compiled_for = alike, block_size, landmark_query is None, bias is None, exact
    return launch_largest(possible, launch, query, "attend_table", *compiled_for)


def supported(dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device) -> bool:
    """Whether the kernels that read through the cache take queries of `dtype` and `head_dim` on `device`."""
    if unsupported_rows(dtype, head_dim) or head_dim % 2 or block_size > LARGEST_BLOCK:
        return False
    return bool(tiles(1, True, block_size, head_dim, dtype.itemsize, shared_memory(device)))


def tiles(
    queries: int, alike: bool, block_size: int, head_dim: int, itemsize: int, memory: int, plain: bool = True
) -> list[Tile]:
    """The tiles for `queries` of a group on a chip with `memory` bytes of shared memory, the best one first.

    alike: the queries share their choice and lie in one block. Otherwise a larger tile would read more blocks that few
        of its queries chose, and hold a rotation for each of them.
    plain: no other query scores landmarks, which would take registers.
    """
    columns, half = padded(block_size), padded(head_dim // 2)
    # such chips multiply 64 rows by groups of 4 warps: a second group would compute the same scores once more
    groups_of_warps = memory > SMALLEST_CHIP
    most = min(64 if alike and itemsize == 2 else 32, padded(queries))
    block = columns * (2 * half + padded(head_dim)) * itemsize
    found = []
    for rows in (64, 32, 16):
        work = rows * max(columns, head_dim)
        warps = 8 if work > 64 * 128 or work == 64 * 128 and not (groups_of_warps and plain) else 4
        for stages in (3, 2, 1):
            # beside the keys and values: the queries' halves and the weights, as tensor cores read them
            needed = stages * block + rows * (2 * half + columns) * max(itemsize, 4)
            if rows <= most and needed <= memory:
                found.append(Tile(rows, columns, warps, stages))
    return found


def _attend_in_tiles(
    tile: Tile,
    query: Tensor,
    blocks: tuple[Tensor, Tensor],
    groups: QueryGroups,
    choice: Tensor | None,
    *,
    block_size: int,
    one_block: bool,
    rotary: RotaryTable,
    scale: float,
    landmark_query: Tensor | None,
    bias: Tensor | None,
    exact: bool,
) -> Tensor:
    """`attend_table` with tiles of one size; `blocks`: keys and values."""
    batch, columns, kv_heads, heads_per_kv, head_dim = query.shape
    pointers = group_pointers(groups)
    num_groups, num_queries = groups.position.shape[1:]
    size = Sizes(num_groups, num_queries, triton.cdiv(num_queries, tile.queries), blocks[0].shape[2])
    heads, k = kv_heads * heads_per_kv, 0 if choice is None else choice.shape[-1]
    shape = {"HEADS": heads, "HEADS_PER_KV": heads_per_kv, "K": k, "M": tile.queries}
    grid = (size.groups * size.tiles, batch * heads)
    shared = choice is None or choice.shape[4] == 1
    union = count = groups.first_block  # which the kernel does not read in their place
    if choice is None:
        chosen = Strided(union, (0,) * 5)
    else:
        choice = choice.expand(batch, kv_heads, heads_per_kv, num_groups, num_queries, k)
        chosen = Strided(choice, choice.stride()[:5])
    if not shared:
        union = choice.new_empty(batch, heads, size.groups, size.tiles, tile.queries * k)
        count = choice.new_empty(batch, heads, size.groups, size.tiles)
        unite_kernel[grid](chosen, pointers[1], union, count, size, **shape)
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    attend_kernel[grid](
        query_pointer(query),
        None if landmark_query is None else query_pointer(landmark_query),
        blocks,
        bias,
        chosen,
        (union, count),
        pointers,
        (rotary.cos, rotary.sin),
        output,
        size,
        columns,
        scale * LOG2_E,
        **shape,
        HEAD_DIM=head_dim,
        BLOCK=block_size,
        SHARED=shared,
        ONE_BLOCK=one_block,
        EXACT=exact,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output
