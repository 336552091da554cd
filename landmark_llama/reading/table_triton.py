"""Attention over the block table on a GPU: each query reads its direct blocks and the blocks that it chose.

The definition is `streaming.attend_through_table` in PyTorch. A program holds a tile of queries of one group and head:

1. `_unite_kernel` lists the blocks that any query of the tile chose.
2. `_attend_kernel` walks over that list, then over the direct blocks and the own one. A query that did not choose a
   block of the list gives it no weight. Keys are stored rotated by their offset in the block, so a query is rotated
   to its distance from the block: the same for no two queries that chose it at different ranks.

A block enters the running softmax of a query as one term: with the landmark's score as its logit, or for the own block
the logsumexp of its tokens, and the softmax inside the block over its values (`docs/attention.md`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.triton_tiles import launch_largest
from landmark_llama.reading.triton_rows import LOG2_E, QueryRows, load_queries, padded, shared_memory, turn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
LARGEST_BLOCK = 256

LAST = tl.constexpr(2**31 - 1)


class Tile(NamedTuple):
    """How `_attend_kernel` runs: queries of a tile, warps of a program, blocks of keys in flight."""

    rows: int
    warps: int
    stages: int

    @classmethod
    def choices(
        cls, queries: int, alike: bool, block_size: int, head_dim: int, itemsize: int, memory: int
    ) -> list[Tile]:
        """The tiles for `queries` of a group on a chip with `memory` bytes of shared memory, the best one first.

        alike: the queries share their choice and lie in one block. Otherwise a larger tile would read more blocks that
            few of its queries chose, and hold a rotation for each of them.
        """
        columns, half = padded(block_size), padded(head_dim // 2)
        most = min(64 if alike and itemsize == 2 else 32, padded(queries))
        block = columns * (2 * half + padded(head_dim)) * itemsize
        found = []
        for rows in (64, 32, 16):
            for stages in (3, 2, 1):
                # beside the keys and values: the queries' halves and the weights, as tensor cores read them
                needed = stages * block + rows * (2 * half + columns) * max(itemsize, 4)
                if rows <= most and needed <= memory:
                    found.append(cls(rows, 8 if rows * max(columns, head_dim) >= 64 * 128 else 4, stages))
        return found


def supported(dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device) -> bool:
    """Whether the inference kernels take queries of `dtype` and `head_dim` on `device`."""
    if dtype not in DTYPES or head_dim % 2 or head_dim > LARGEST_HEAD_DIM or block_size > LARGEST_BLOCK:
        return False
    return bool(Tile.choices(1, True, block_size, head_dim, dtype.itemsize, shared_memory(device)))


@triton.jit
def _unite_kernel(
    p_choice,
    p_valid,
    p_union,
    p_count,
    stride_batch,
    stride_kv_head,
    stride_head,
    stride_group,
    stride_query,
    groups,
    queries,
    tiles,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """p_union (batch, heads, groups, tiles, rows * k): the blocks that a tile chose, ascending; p_count: how many."""
    i_group, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * heads + head
    i_batch, i_head = i_sequence // HEADS, i_sequence % HEADS
    o_query = i_tile * ROWS + tl.arange(0, ROWS)
    m_valid = tl.load(p_valid + (i_batch * groups + i_group) * queries + o_query, mask=o_query < queries, other=0) != 0
    o_choice = tl.arange(0, K_PAD)
    p_chosen = p_choice + i_batch * stride_batch + i_head // GROUP * stride_kv_head + i_head % GROUP * stride_head
    p_chosen += i_group * stride_group + o_query[:, None] * stride_query + o_choice[None, :]
    b_block = tl.load(p_chosen, mask=m_valid[:, None] & (o_choice < K)[None, :], other=LAST)
    b_block = tl.where(b_block < 0, LAST, b_block)
    i_list = (i_sequence * groups + i_group) * tiles + i_tile
    count = 0
    i_block = tl.min(b_block)
    while i_block < LAST:
        tl.store(p_union + i_list * (ROWS * K) + count, i_block)
        count += 1
        b_block = tl.where(b_block == i_block, LAST, b_block)
        i_block = tl.min(b_block)
    tl.store(p_count + i_list, count)


@triton.jit
def _read_block(
    b_first,
    b_second,
    p_keys,
    p_values,
    m_key,
    m_value,
    m_seen,
    m_own,
    b_offset,
    b_peak,
    b_total,
    b_output,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):
    """The running softmax of each query (peak, total, output) after one more block.

    b_first, b_second: halves of the queries, rotated to the block. m_seen, m_own [rows or 1]: whether the block is seen
    by the query, whether it is the query's own, of which it sees the tokens up to `b_offset` [rows].
    """
    dtype: tl.constexpr = p_keys.dtype.element_ty
    o_key = tl.arange(0, BLOCK_PAD)
    b_score = tl.dot(b_first.to(dtype), tl.load(p_keys, mask=m_key, other=0.0), input_precision="ieee")
    b_key = tl.load(p_keys + HALF, mask=m_key, other=0.0)
    b_score = tl.dot(b_second.to(dtype), b_key, b_score, input_precision="ieee")

    b_landmark = tl.sum(tl.where((o_key == BLOCK_SIZE - 1)[None, :], b_score, 0.0), 1)
    m_earlier = (m_own == 0)[:, None] | (o_key[None, :] <= b_offset[:, None])
    b_score = tl.where((o_key < BLOCK_SIZE - 1)[None, :] & m_earlier, b_score, -float("inf"))
    b_inside = tl.max(b_score, 1)  # finite: every query sees the first token of a block
    b_score = tl.exp2(b_score - b_inside[:, None])
    b_sum = tl.sum(b_score, 1)
    b_logit = tl.where(m_own, b_inside + tl.log2(b_sum), b_landmark)
    b_logit = tl.where(m_seen, b_logit, -float("inf"))

    b_new = tl.maximum(b_peak, b_logit)
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # a query may see no block yet
    b_keep, b_weight = tl.exp2(b_peak - b_base), tl.exp2(b_logit - b_base)
    b_score = b_score * (b_weight / b_sum)[:, None]
    b_value = tl.load(p_values, mask=m_value, other=0.0)
    b_output = tl.dot(b_score.to(dtype), b_value, b_output * b_keep[:, None], input_precision="ieee")
    return b_new, b_total * b_keep + b_weight, b_output


@triton.jit
def _attend_kernel(
    p_query,
    p_key,
    p_value,
    p_choice,
    p_union,
    p_count,
    p_column,
    p_valid,
    p_position,
    p_first_block,
    p_cos,
    p_sin,
    p_output,
    scale,
    stride_batch,
    stride_column,
    stride_head,
    stride_choice_batch,
    stride_choice_kv_head,
    stride_choice_head,
    stride_choice_group,
    stride_choice_query,
    groups,
    queries,
    columns,
    tiles,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """p_output (batch, columns, heads, head_dim): attention of the valid queries; nothing is written for others.

    p_key, p_value: (batch, kv_heads, capacity, block_size, head_dim). SHARED: the queries of a group share a choice;
    ONE_BLOCK: they lie in one block. Either makes the rotation to a block the same for all of them.
    """
    i_group, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * heads + head
    i_batch, i_head = i_sequence // HEADS, i_sequence % HEADS
    o_query = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_query < queries
    o_row = (i_batch * groups + i_group) * queries + o_query
    m_valid = tl.load(p_valid + o_row, mask=m_row, other=0) != 0
    if tl.max(m_valid.to(tl.int32), 0) == 0:
        return

    o_half, o_dim, o_key = tl.arange(0, HALF_PAD), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK_PAD)
    b_first, b_second, b_column, b_own, b_offset = load_queries(
        p_query,
        p_column,
        p_position,
        p_cos,
        p_sin,
        i_batch,
        i_head,
        o_row,
        m_row,
        scale,
        stride_batch,
        stride_column,
        stride_head,
        o_half,
        HALF,
        BLOCK_SIZE,
    )
    b_own = tl.where(m_valid, b_own, 0)
    if ONE_BLOCK:
        b_own = tl.zeros([1], tl.int32) + tl.max(b_own, 0)
    first_block = tl.load(p_first_block + i_batch * groups + i_group).to(tl.int32)
    o_blocks = (i_sequence // GROUP) * capacity * (BLOCK_SIZE * 2 * HALF)
    p_keys = p_key + o_blocks + o_key[None, :] * (2 * HALF) + o_half[:, None]
    p_values = p_value + o_blocks + o_key[:, None] * (2 * HALF) + o_dim[None, :]
    m_key = (o_key < BLOCK_SIZE)[None, :] & (o_half < HALF)[:, None]
    m_value = (o_key < BLOCK_SIZE - 1)[:, None] & (o_dim < 2 * HALF)[None, :]
    i_list = (i_sequence * groups + i_group) * tiles + i_tile
    if K > 0:
        o_choice = tl.arange(0, K_PAD)
        o_choosing = tl.zeros([1], tl.int32) if SHARED else o_query
        p_chosen = p_choice + i_batch * stride_choice_batch + i_group * stride_choice_group
        p_chosen += i_head // GROUP * stride_choice_kv_head + i_head % GROUP * stride_choice_head
        p_places = p_chosen + o_choosing[:, None] * stride_choice_query + o_choice[None, :]
        # (rows or 1, k padded): what fills up is above every block
        b_choice = tl.load(p_places, mask=(o_choosing < queries)[:, None] & (o_choice < K)[None, :], other=LAST)

    b_peak = tl.full([ROWS], -float("inf"), tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_output = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if K > 0:
        for i_entry in range(0, tl.load(p_count + i_list)):
            i_block = tl.load(p_union + i_list * (ROWS * K) + i_entry)
            b_rank = tl.sum((b_choice < i_block).to(tl.int32), 1)
            m_chosen = tl.max((b_choice == i_block).to(tl.int32), 1) > 0
            b_distance = b_own + K + 1 - b_rank - (i_block >= first_block - K).to(tl.int32)
            b_at_first, b_at_second = turn(b_first, b_second, p_cos, p_sin, b_distance * BLOCK_SIZE, o_half, HALF)
            b_peak, b_total, b_output = _read_block(
                b_at_first,
                b_at_second,
                p_keys + i_block * (BLOCK_SIZE * 2 * HALF),
                p_values + i_block * (BLOCK_SIZE * 2 * HALF),
                m_key,
                m_value,
                m_chosen,
                m_chosen & False,
                b_offset,
                b_peak,
                b_total,
                b_output,
                HALF,
                BLOCK_SIZE,
                BLOCK_PAD,
            )
    for i_direct in range(0, tl.max(b_own, 0) + 1):
        b_distance = tl.maximum(b_own - i_direct, 0) * BLOCK_SIZE
        b_at_first, b_at_second = turn(b_first, b_second, p_cos, p_sin, b_distance, o_half, HALF)
        # no query that counts stands past the capacity, padding may
        i_block = tl.minimum(first_block + i_direct, capacity - 1)
        b_peak, b_total, b_output = _read_block(
            b_at_first,
            b_at_second,
            p_keys + i_block * (BLOCK_SIZE * 2 * HALF),
            p_values + i_block * (BLOCK_SIZE * 2 * HALF),
            m_key,
            m_value,
            i_direct <= b_own,
            i_direct == b_own,
            b_offset,
            b_peak,
            b_total,
            b_output,
            HALF,
            BLOCK_SIZE,
            BLOCK_PAD,
        )

    b_output = b_output / b_total[:, None]
    p_out = p_output + ((i_batch * columns + b_column) * HEADS + i_head)[:, None] * (2 * HALF) + o_dim[None, :]
    m_out = (m_row & m_valid)[:, None] & (o_dim < 2 * HALF)[None, :]
    tl.store(p_out, b_output.to(p_output.dtype.element_ty), mask=m_out)


def attend_table(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: QueryRows,
    choice: Tensor | None,
    *,
    one_block: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> Tensor:
    """Attention of the queries of one call over their direct blocks and the chosen ones.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        key, value: (batch, kv_heads, capacity, block_size, head_dim), contiguous, in the dtype of `query`; keys rotated
            by their offset in the block.
        choice: (batch, kv_heads or 1, group or 1, groups, queries or 1, k), int32, as in `retrieval.Choice`; None: no
            block is retrieved.
        one_block: the valid queries of a group all lie in one block.
        rotary: fp32.

    Returns:
        (batch, columns, kv_heads, group, head_dim), in the dtype of `query`; zero for padding.

    Raises:
        ValueError: if the chip has no room for the smallest tile (`supported` says so beforehand).
    """
    queries, memory = rows.position.shape[2], shared_memory(query.device)
    alike = one_block and (choice is None or choice.shape[4] == 1)
    settings = {"one_block": one_block, "block_size": block_size, "rotary": rotary, "scale": scale}
    return launch_largest(
        Tile.choices(queries, alike, block_size, query.shape[-1], query.element_size(), memory),
        lambda tile: _attend_in_tiles(tile, query, key, value, rows, choice, **settings),
        query,
        "attend_table",
        alike,
        block_size,
    )


def _attend_in_tiles(
    tile: Tile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: QueryRows,
    choice: Tensor | None,
    *,
    one_block: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> Tensor:
    """`attend_table` with tiles of one size."""
    batch, columns, kv_heads, group, head_dim = query.shape
    groups, queries = rows.position.shape[1:]
    heads, k = kv_heads * group, 0 if choice is None else choice.shape[-1]
    shared = choice is None or choice.shape[4] == 1
    tiles = triton.cdiv(queries, tile.rows)
    grid = (groups * tiles, batch * heads)
    shape = {"HEADS": heads, "GROUP": group, "K": k, "K_PAD": triton.next_power_of_2(max(k, 1)), "ROWS": tile.rows}
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    strides = (0,) * 5
    # without a choice nothing of these is read
    union = count = rows.first_block
    if choice is not None:
        choice = choice.expand(batch, kv_heads, group, groups, queries, k)
        strides = choice.stride()[:5]
        union = choice.new_empty(batch, heads, groups, tiles, tile.rows * k)
        count = choice.new_empty(batch, heads, groups, tiles)
        _unite_kernel[grid](choice, rows.valid, union, count, *strides, groups, queries, tiles, **shape)
    _attend_kernel[grid](
        query,
        key,
        value,
        union if choice is None else choice,
        union,
        count,
        rows.column,
        rows.valid,
        rows.position,
        rows.first_block,
        rotary.cos,
        rotary.sin,
        output,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        query.stride(3),
        *strides,
        groups,
        queries,
        columns,
        tiles,
        capacity=key.shape[2],
        **shape,
        HALF=head_dim // 2,
        HALF_PAD=padded(head_dim // 2),
        DIM_PAD=padded(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_PAD=padded(block_size),
        SHARED=shared,
        ONE_BLOCK=one_block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output
