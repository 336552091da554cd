"""What the kernels that read through the cache share: which queries a program works on, and their rotation.

A program works on a tile of queries of one group (`groups.QueryGroups`) and one query head. Rotary embedding pairs the
dimensions of a head's first half with those of its second, so the kernels keep the halves apart: a rotation is then a
sum of products, and a score the sum of the two halves' scores. A pair of halves is written `b_x: 2 (M, H)`.

Names in all kernels: `p_` pointer, `b_` block of data, `i_` index, `o_` offset, `m_` mask. A comment above each load
and dot gives the shape of its result. Exponentials and logarithms are to base 2.

    M             queries of a tile
    N             keys of a tile: the positions of a block, or a number of landmarks, padded to a power of two
    H             half of HEAD_DIM, padded to a power of two
    D             HEAD_DIM, padded to a power of two
    K, K_PAD      blocks that a query chooses; padded to a power of two
    SINKS         how many of these are the first ones, whatever they score
    BLOCK         positions of a landmark block
    HEADS         query heads; HEADS_PER_KV of them share a KV head
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from landmark_llama.attention import triton_tiles
from landmark_llama.attention.triton_tiles import Strided, padded
from landmark_llama.reading.groups import QueryGroups

LOG2_E = tl.constexpr(triton_tiles.LOG2_E)


class Sizes(NamedTuple):
    """What a call measures: groups of queries, queries of a group, their tiles, and the blocks there is room for."""

    groups: Any
    queries: Any
    tiles: Any
    capacity: Any


def query_pointer(query: Tensor) -> Strided:
    """`query` (batch, columns, kv_heads, heads_per_kv, head_dim), contiguous, with the strides that kernels need."""
    return Strided(query, (query.stride(0), query.stride(1), query.stride(3)))


def group_pointers(groups: QueryGroups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels read of `groups`: column, valid and position of each query, first direct block of each group.

    Contiguous, without a copy where they are already.
    """
    fields = (groups.column, groups.valid, groups.position, groups.first_block)
    return tuple(x.contiguous() for x in fields)


@triton.jit
def tile_of_program(size, SEQUENCES: tl.constexpr):
    """Row of the batch, sequence in (batch, SEQUENCES), group, and tile that a program works on."""
    i_group, i_tile = tl.program_id(0) // size.tiles, tl.program_id(0) % size.tiles
    i_sequence = tl.program_id(1).to(tl.int64)
    return i_sequence // SEQUENCES, i_sequence, i_group, i_tile


@triton.jit
def load_halves(p_row, m_row, HEAD_DIM: tl.constexpr):
    """2 (M, H): the vectors at the pointers `p_row` (M,), zero where padded."""
    HALF: tl.constexpr = HEAD_DIM // 2
    o_half = tl.arange(0, padded(HALF))
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    # (M, H)
    b_first = tl.load(p_row[:, None] + o_half[None, :], mask=m_half, other=0.0)
    # (M, H)
    b_second = tl.load(p_row[:, None] + HALF + o_half[None, :], mask=m_half, other=0.0)
    return b_first, b_second


@triton.jit
def rotate(b_x, p_rotary, b_position, HEAD_DIM: tl.constexpr):
    """2 (M, H): `b_x` 2 (M, H) in fp32, rotated by the angles of `b_position` (M,) or (1,)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    p_cos, p_sin = p_rotary
    b_first, b_second = b_x
    o_half = tl.arange(0, padded(HALF))
    m_half = (o_half < HALF)[None, :]
    o_angle = b_position[:, None] * HALF + o_half[None, :]
    # (M or 1, H)
    b_cos = tl.load(p_cos + o_angle, mask=m_half, other=0.0)
    # (M or 1, H)
    b_sin = tl.load(p_sin + o_angle, mask=m_half, other=0.0)
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def load_queries(
    p_query, p_groups, p_rotary, i_batch, i_head, o_row, m_row, scale, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """2 (M, H): scaled queries in fp32, rotated by their offset in their own block.

    Also, each (M,): the column of the query, its block counted from the group's first direct block, its offset there.
    """
    p_column, _, p_position, _ = p_groups
    stride_batch, stride_column, stride_head = p_query.stride
    # (M,)
    b_column = tl.load(p_column + o_row, mask=m_row, other=0)
    # (M,)
    b_position = tl.load(p_position + o_row, mask=m_row, other=0).to(tl.int32)
    b_own, b_offset = b_position // BLOCK, b_position % BLOCK
    p_row = p_query.p + i_batch * stride_batch + b_column * stride_column + i_head * stride_head
    # 2 (M, H)
    b_first, b_second = load_halves(p_row, m_row, HEAD_DIM)
    b_query = (b_first.to(tl.float32) * scale, b_second.to(tl.float32) * scale)
    return rotate(b_query, p_rotary, b_offset, HEAD_DIM), b_column, b_own, b_offset
