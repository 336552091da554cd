"""Tiles of whole landmark blocks, for the training kernels: loading them, and the softmax inside each block.

Names in all kernels: `p_` pointer, `b_` block of data, `i_` index, `o_` offset, `m_` mask. A comment above each load
and dot gives the shape of its result. Exponentials and logarithms are to base 2.

    M         queries of a tile
    N         columns of a key tile: C * W
    W         columns of one landmark block: BLOCK, padded to a power of two, or N if that is less
    C         landmark blocks of a key tile
    PARTS     key tiles of a block that is wider than one (then C = 1): its statistics take a pass of their own
    D         HEAD_DIM, padded to a power of two
    BLOCK     positions of a landmark block
    EXACT     whether blocks weigh what their tokens do; else their landmarks say what
    MASKED    whether a query may not see all of the tile: it reaches the query's own block or goes beyond it
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from landmark_llama.attention import triton_tiles
from landmark_llama.attention.triton_tiles import Strided, padded

LOG2_E = tl.constexpr(triton_tiles.LOG2_E)


class Sizes(NamedTuple):
    """What a call measures: query heads, query heads of each KV head, and the lengths in positions."""

    heads: Any
    heads_per_kv: Any
    query_length: Any
    key_length: Any


@triton.constexpr_function
def block_columns(block: int, keys: int) -> int:
    """W: columns that one of `block` positions has in a tile of `keys` columns."""
    return min(keys, triton.next_power_of_2(block))


@triton.constexpr_function
def block_parts(block: int, keys: int) -> int:
    """PARTS: tiles of `keys` columns that a block takes, at least 1."""
    return max(1, triton.next_power_of_2(block) // keys)


@triton.jit
def at(p_x, i_batch, i_head):
    """The rows of one head of a tensor with strides (batch, head, row, dimension)."""
    return Strided(p_x.p + i_batch.to(tl.int64) * p_x.stride[0] + i_head.to(tl.int64) * p_x.stride[1], p_x.stride)


@triton.jit
def _pointers(p_x, i_first, o_row, D: tl.constexpr):
    """(rows, D): pointers to rows `i_first + o_row`, in 64 bits: they may lie any number of elements apart."""
    p_row = p_x.p + tl.cast(i_first, tl.int64) * p_x.stride[2]
    return p_row + o_row.to(tl.int64)[:, None] * p_x.stride[2] + tl.arange(0, D).to(tl.int64)[None, :] * p_x.stride[3]


@triton.jit
def load_rows(p_x, i_first, length, M: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(M, D): rows of a head from `i_first` on, zero beyond its length and beyond HEAD_DIM."""
    D: tl.constexpr = padded(HEAD_DIM)
    o_row = tl.arange(0, M)
    m_x = (o_row < length - i_first)[:, None]
    if HEAD_DIM != D:
        m_x = m_x & (tl.arange(0, D) < HEAD_DIM)[None, :]
    # (M, D)
    return tl.load(_pointers(p_x, i_first, o_row, D), mask=m_x, other=0.0)


@triton.jit
def load_keys(
    p_x, i_tile, i_part, length,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(N, D): a key tile, zero beyond the length, in padding columns and beyond HEAD_DIM."""
    D: tl.constexpr = padded(HEAD_DIM)
    W: tl.constexpr = block_columns(BLOCK, N)
    o_position, o_place = key_columns(i_part, BLOCK, N)
    i_first = i_tile * (N // W * BLOCK)
    p_key = _pointers(p_x, i_first, o_position, D)
    if not MASKED and BLOCK % W == 0 and HEAD_DIM == D:
        # (N, D)
        return tl.load(p_key)
    m_x = (o_place < BLOCK) & (o_position < length - i_first)
    # (N, D)
    return tl.load(p_key, mask=m_x[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, i_first, o_row, length, b_x, HEAD_DIM: tl.constexpr):
    """Writes (rows, D) to the rows `i_first + o_row` of a head, those within its length."""
    D: tl.constexpr = padded(HEAD_DIM)
    m_x = (o_row < length - i_first)[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :]
    tl.store(_pointers(p_x, i_first, o_row, D), b_x.to(p_x.p.dtype.element_ty), mask=m_x)


@triton.jit
def key_columns(i_part, BLOCK: tl.constexpr, N: tl.constexpr):
    """(N,): of each column of a key tile, its position from the start of the tile, and its place inside its block."""
    W: tl.constexpr = block_columns(BLOCK, N)
    o_column = tl.arange(0, N)
    o_place = i_part * W + o_column % W
    return o_column // W * BLOCK + o_place, o_place


@triton.jit
def places(i_part, BLOCK: tl.constexpr, N: tl.constexpr):
    """(W,): places inside their block of the columns of a key tile."""
    W: tl.constexpr = block_columns(BLOCK, N)
    return i_part * W + tl.arange(0, W)


@triton.jit
def blocks(i_tile, BLOCK: tl.constexpr, N: tl.constexpr):
    """(C,): blocks of a key tile."""
    C: tl.constexpr = N // block_columns(BLOCK, N)
    return i_tile * C + tl.arange(0, C)


@triton.jit
def scores(
    b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Scores (M, C, W), not scaled, and the scaled scores (M, C) of landmarks.

    Scores are -inf except at ordinary tokens that the query sees. A landmark in another part of its block scores 0.
    """
    W: tl.constexpr = block_columns(BLOCK, N)
    # (M, N) to (M, C, W)
    b_s = tl.reshape(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), [b_q.shape[0], N // W, W])
    o_place = places(i_part, BLOCK, N)
    b_landmark = tl.sum(tl.where((o_place == BLOCK - 1)[None, None, :], b_s, 0.0), 2) * scale_log2
    m_seen = (o_place < BLOCK - 1)[None, None, :]
    if MASKED:
        o_position = blocks(i_tile, BLOCK, N)[:, None] * BLOCK + o_place[None, :]
        m_seen = m_seen & (o_position[None, :, :] <= o_query[:, None, None])
    return tl.where(m_seen, b_s, -float("inf")), b_landmark


@triton.jit
def top(b_s, scale_log2, MASKED: tl.constexpr):
    """(M, C): the largest scaled score of each block; 0 where the query sees nothing of it."""
    b_top = tl.max(b_s, 2)
    if MASKED:
        b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
    return b_top * scale_log2


@triton.jit
def block_logits(
    b_top, b_total, b_landmark, i_tile, o_query,
    BLOCK: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(M, C): logit of each block in the row's softmax: its landmark's score, for the own block its logsumexp.

    EXACT: its logsumexp for every block; it is -inf for what the query does not see.
    """
    if EXACT:
        b_landmark = b_top + tl.log2(b_total)
    elif MASKED:
        o_block = blocks(i_tile, BLOCK, N)[None, :]
        o_own = (o_query // BLOCK)[:, None]
        b_landmark = tl.where(o_block < o_own, b_landmark, -float("inf"))
        b_landmark = tl.where(o_block == o_own, b_top + tl.log2(b_total), b_landmark)
    return b_landmark


@triton.jit
def landmark_rows(p_landmark, o_row, size, BLOCK: tl.constexpr):
    """(M,): pointers to rows of landmark logits (batch, heads, query_length, complete blocks); None if not given."""
    if p_landmark is not None:
        p_landmark = p_landmark + o_row * (size.key_length // BLOCK)
    return p_landmark


@triton.jit
def landmark_logits(
    b_landmark, p_logit, i_tile, o_query, key_length, BLOCK: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """(M, C): the landmark logits of a tile, to base 2: those given at the pointers `p_logit` (M,), or `b_landmark`."""
    if p_logit is not None:
        o_block = blocks(i_tile, BLOCK, N)
        m_logit = (o_query < key_length)[:, None] & (o_block < key_length // BLOCK)[None, :]
        # (M, C)
        b_landmark = tl.load(p_logit[:, None] + o_block[None, :], mask=m_logit, other=0.0) * LOG2_E
    return b_landmark


@triton.jit
def nonzero(b_total, MASKED: tl.constexpr):
    """Sums to divide by: 1 for blocks of which the query sees nothing."""
    if MASKED:
        b_total = tl.where(b_total == 0.0, 1.0, b_total)
    return b_total


@triton.jit
def statistics(
    b_q, b_do, p_k, p_v, i_tile, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Of a block in several tiles, each (M, 1): largest score, sum of exponentials over it, landmark's score.

    With GRADIENT also the sum of the exponentials times the gradients of the weights, else 0.
    """
    b_raw = tl.full([b_q.shape[0], 1], -float("inf"), tl.float32)
    b_total = tl.zeros([b_q.shape[0], 1], tl.float32)
    b_landmark = tl.zeros([b_q.shape[0], 1], tl.float32)
    b_mean = tl.zeros([b_q.shape[0], 1], tl.float32)
    for i_part in range(block_parts(BLOCK, N)):
        # (N, D)
        b_k = load_keys(p_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
        b_s, b_at_landmark = scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, N, MASKED=MASKED)
        b_new = tl.maximum(b_raw, tl.max(b_s, 2))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_shrink = tl.exp2((b_raw - b_base) * scale_log2)
        b_p = tl.exp2((b_s - b_base[:, :, None]) * scale_log2)
        b_total = b_total * b_shrink + tl.sum(b_p, 2)
        b_landmark += b_at_landmark
        if GRADIENT:
            # (N, D)
            b_v = load_keys(p_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
            # (M, N) to (M, 1, N)
            b_dp = tl.reshape(tl.dot(b_do, tl.trans(b_v), input_precision="ieee"), b_s.shape)
            b_mean = b_mean * b_shrink + tl.sum(b_p * b_dp, 2)
        b_raw = b_new
    return tl.where(b_raw == -float("inf"), 0.0, b_raw * scale_log2), b_total, b_landmark, b_mean
