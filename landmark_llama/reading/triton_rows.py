"""What the inference kernels share: where the queries of a tile stand, their rotation, and which shapes are supported.

A program works on a tile of queries of one group (`streaming.QueryGroups`) and one query head. A head's dimensions are
kept as two halves, which is how rotary embedding pairs them: rotating is then a sum of products, and a score is the sum
of the halves' scores. Halves are padded to a power of two.

Names as in the other kernels: `p_` pointer, `b_` data of a tile, `i_` an index, `o_` offsets, `m_` a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634  # the kernels' exponentials are powers of two


class QueryRows(NamedTuple):
    """Where the queries of one call stand. The fields of `streaming.QueryGroups` that the kernels read.

    column: (batch, groups, queries): which column of the call each query is.
    valid: (batch, groups, queries), boolean: False for padding, for which nothing is written.
    position: (batch, groups, queries): positions from the start of `first_block` to the query.
    first_block: (batch, groups): the first block read directly; the blocks before it are the candidates.
    """

    column: Tensor
    valid: Tensor
    position: Tensor
    first_block: Tensor

    def contiguous(self) -> QueryRows:
        """The same with rows that lie as the kernels count them, without a copy where they do already."""
        return QueryRows(*(x.contiguous() for x in self))


def padded(size: int) -> int:
    """The power of two, at least 16 (the smallest that tensor cores take), that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; that of the smallest supported chip where there is none."""
    if device.type != "cuda":
        return 163 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def load_halves(p_row, o_half, m_row, HALF: tl.constexpr):
    """Both halves [rows, padded half] of the vectors at `p_row` [rows], zero where padded."""
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    b_first = tl.load(p_row[:, None] + o_half[None, :], mask=m_half, other=0.0)
    b_second = tl.load(p_row[:, None] + HALF + o_half[None, :], mask=m_half, other=0.0)
    return b_first, b_second


@triton.jit
def turn(b_first, b_second, p_cos, p_sin, b_position, o_half, HALF: tl.constexpr):
    """Halves [rows, padded half], fp32, rotated by the angles of `b_position` [rows]."""
    m_half = (o_half < HALF)[None, :]
    o_table = b_position[:, None] * HALF + o_half[None, :]
    b_cos = tl.load(p_cos + o_table, mask=m_half, other=0.0)
    b_sin = tl.load(p_sin + o_table, mask=m_half, other=0.0)
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def load_queries(
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
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Scaled queries, rotated by their offset in their own block: halves [rows, padded half] in fp32.

    Also the column [rows] of each query, its block counted from the group's first direct block, and its offset there.
    """
    b_column = tl.load(p_column + o_row, mask=m_row, other=0)
    b_position = tl.load(p_position + o_row, mask=m_row, other=0).to(tl.int32)
    b_own, b_offset = b_position // BLOCK_SIZE, b_position % BLOCK_SIZE
    p_row = p_query + i_batch * stride_batch + b_column * stride_column + i_head * stride_head
    b_first, b_second = load_halves(p_row, o_half, m_row, HALF)
    b_first, b_second = b_first.to(tl.float32) * scale, b_second.to(tl.float32) * scale
    b_first, b_second = turn(b_first, b_second, p_cos, p_sin, b_offset, o_half, HALF)
    return b_first, b_second, b_column, b_own, b_offset
