"""Triton kernels of landmark attention over whole sequences: forward, backward for queries, backward for keys.

The form is flash attention's, with one softmax more. Keys come in tiles of whole landmark blocks, so that a block's own
softmax is a reduction inside the tile, and the block then enters the running softmax as one key: its logit is its
landmark's score, its value what its softmax makes of its values (`docs/attention.md`). A query's own block enters the
same way, with the logsumexp of what the query sees of it for a logit. The forward leaves the logsumexp of each row; the
backward forms everything else again. Nothing is added up across programs: results are the same to the last bit.

Names: `p_` pointer, `b_` block of data, `i_` index, `o_` offset, `m_` mask. Exponentials and logarithms are to base 2.
Shapes and constants:
    M      queries of a tile
    N      columns of a key tile: C * W
    C      landmark blocks of a key tile, each padded to W columns, a power of two
    PARTS  key tiles of a block that is wider than one (C = 1): its statistics take a pass of their own
    D      HEAD_DIM, padded to a power of two
    BLOCK  positions of a landmark block
    MASKED whether a tile may hold something that a query does not see: its own block, later ones
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, stride_q, stride_k, stride_v, stride_o,
    heads, group, query_length, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of one query tile of one head; programs with the most keys to read come first."""
    tiles = tl.cdiv(query_length, M)
    i_query = (tiles - 1 - tl.program_id(0) % tiles) * M
    i_batch, i_head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    p_q = _at(p_q, stride_q, i_batch, i_head)
    p_k = _at(p_k, stride_k, i_batch, i_head // group)
    p_v = _at(p_v, stride_v, i_batch, i_head // group)
    offset = key_length - query_length
    o_row = i_query + tl.arange(0, M)
    b_q = _load_rows(p_q, stride_q, i_query, query_length, M, HEAD_DIM, D)

    b_o = tl.zeros([M, D], tl.float32)
    b_peak = tl.full([M], -float("inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    whole = (i_query + offset) // BLOCK // C  # tiles before the one with the first query's own block
    last = (tl.minimum(i_query + M, query_length) - 1 + offset) // BLOCK // C
    for i_tile in range(0, whole):
        b_o, b_peak, b_sum = _forward_tile(
            b_o, b_peak, b_sum, b_q, p_k, p_v, stride_k, stride_v, i_tile, o_row + offset, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, N, C, PARTS, False,
        )  # fmt: skip
    for i_tile in range(whole, last + 1):
        b_o, b_peak, b_sum = _forward_tile(
            b_o, b_peak, b_sum, b_q, p_k, p_v, stride_k, stride_v, i_tile, o_row + offset, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, N, C, PARTS, True,
        )  # fmt: skip

    b_o = b_o / b_sum[:, None]
    _store_rows(_at(p_o, stride_o, i_batch, i_head), stride_o, i_query, tl.arange(0, M), query_length, b_o, HEAD_DIM, D)
    p_lse += (i_batch * heads + i_head).to(tl.int64) * query_length
    tl.store(p_lse + o_row, b_peak + tl.log2(b_sum), mask=o_row < query_length)


@triton.jit
def query_gradient_kernel(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
    stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq,
    heads, group, query_length, key_length, scale, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of one query tile of one head, and `delta`, dO . O of its rows, for `key_gradient_kernel`."""
    tiles = tl.cdiv(query_length, M)
    i_query = (tiles - 1 - tl.program_id(0) % tiles) * M
    i_batch, i_head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    p_k = _at(p_k, stride_k, i_batch, i_head // group)
    p_v = _at(p_v, stride_v, i_batch, i_head // group)
    i_rows = (i_batch * heads + i_head).to(tl.int64) * query_length
    offset = key_length - query_length
    o_row = i_query + tl.arange(0, M)
    b_do = _load_rows(_at(p_do, stride_do, i_batch, i_head), stride_do, i_query, query_length, M, HEAD_DIM, D)
    b_o = _load_rows(_at(p_o, stride_o, i_batch, i_head), stride_o, i_query, query_length, M, HEAD_DIM, D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + i_rows + o_row, b_delta, mask=o_row < query_length)
    b_q = _load_rows(_at(p_q, stride_q, i_batch, i_head), stride_q, i_query, query_length, M, HEAD_DIM, D)
    b_lse = tl.load(p_lse + i_rows + o_row, mask=o_row < query_length, other=float("inf"))

    b_dq = tl.zeros([M, D], tl.float32)
    whole = (i_query + offset) // BLOCK // C
    last = (tl.minimum(i_query + M, query_length) - 1 + offset) // BLOCK // C
    for i_tile in range(0, whole):
        for i_part in range(PARTS):
            b_k = _load_keys(p_k, stride_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, False)
            b_v = _load_keys(p_v, stride_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, False)
            _, b_ds = _score_gradients(
                b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, stride_k, stride_v, i_tile, i_part, o_row + offset,
                key_length, scale_log2, BLOCK, HEAD_DIM, D, N, C, PARTS, False,
            )  # fmt: skip
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    for i_tile in range(whole, last + 1):
        for i_part in range(PARTS):
            b_k = _load_keys(p_k, stride_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, True)
            b_v = _load_keys(p_v, stride_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, True)
            _, b_ds = _score_gradients(
                b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, stride_k, stride_v, i_tile, i_part, o_row + offset,
                key_length, scale_log2, BLOCK, HEAD_DIM, D, N, C, PARTS, True,
            )  # fmt: skip
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    p_dq = _at(p_dq, stride_dq, i_batch, i_head)
    _store_rows(p_dq, stride_dq, i_query, tl.arange(0, M), query_length, b_dq * scale, HEAD_DIM, D)


@triton.jit
def key_gradient_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv,
    heads, group, query_length, key_length, scale, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one KV head, from all queries of its `group` query heads."""
    tiles = tl.cdiv(key_length, BLOCK * C) * PARTS
    i_tile, i_part = tl.program_id(0) % tiles // PARTS, tl.program_id(0) % tiles % PARTS
    kv_heads = heads // group
    i_batch, i_kv_head = tl.program_id(0) // tiles // kv_heads, tl.program_id(0) // tiles % kv_heads
    p_k = _at(p_k, stride_k, i_batch, i_kv_head)
    p_v = _at(p_v, stride_v, i_batch, i_kv_head)
    offset = key_length - query_length
    b_k = _load_keys(p_k, stride_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, True)
    b_v = _load_keys(p_v, stride_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, True)

    # transposed: the tensor cores then read weights and score gradients as they are, from shared memory
    b_dk = tl.zeros([D, N], tl.float32)
    b_dv = tl.zeros([D, N], tl.float32)
    end = tl.cdiv(query_length, M)
    first = tl.maximum(i_tile * C * BLOCK - offset, 0) // M  # query tile in which this one is first seen
    whole = tl.minimum(tl.cdiv(tl.maximum((i_tile + 1) * C * BLOCK - offset, 0), M), end)  # and first seen whole
    # one loop over the heads' query tiles, rather than one in another, keeps loads ahead of the work all the time
    for i_step in range(0, group * (whole - first)):
        i_head, i_query = i_kv_head * group + i_step // (whole - first), (first + i_step % (whole - first)) * M
        b_dk, b_dv = _key_gradient_tile(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_k, p_v, stride_q, stride_do, stride_k, stride_v,
            heads, i_batch, i_head, i_query, i_tile, i_part, query_length, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, M, N, C, PARTS, True,
        )  # fmt: skip
    for i_step in range(0, group * (end - whole)):
        i_head, i_query = i_kv_head * group + i_step // (end - whole), (whole + i_step % (end - whole)) * M
        b_dk, b_dv = _key_gradient_tile(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_k, p_v, stride_q, stride_do, stride_k, stride_v,
            heads, i_batch, i_head, i_query, i_tile, i_part, query_length, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, M, N, C, PARTS, False,
        )  # fmt: skip

    p_dk, p_dv = _at(p_dk, stride_dk, i_batch, i_kv_head), _at(p_dv, stride_dv, i_batch, i_kv_head)
    o_position, o_place = _key_columns(0, i_part, BLOCK, N, C)
    # columns that pad a block write nothing: they count as lying beyond the end
    o_position = tl.where(o_place < BLOCK, o_position, key_length)
    _store_rows(p_dk, stride_dk, i_tile * C * BLOCK, o_position, key_length, tl.trans(b_dk * scale), HEAD_DIM, D)
    _store_rows(p_dv, stride_dv, i_tile * C * BLOCK, o_position, key_length, tl.trans(b_dv), HEAD_DIM, D)


@triton.jit
def _forward_tile(
    b_o, b_peak, b_sum, b_q, p_k, p_v, stride_k, stride_v, i_tile, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the blocks of a key tile, or all tiles of one block, to the output (M, D) and its running softmax (M,)."""
    if PARTS == 1:
        b_k = _load_keys(p_k, stride_k, i_tile, 0, key_length, BLOCK, HEAD_DIM, D, N, C, MASKED)
        b_s, b_landmark = _scores(b_q, b_k, i_tile, 0, o_query, scale_log2, BLOCK, C, MASKED)
        b_top = _top(b_s, scale_log2, MASKED)
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        b_total = tl.sum(b_p, 2)
    else:
        b_top, b_total, b_landmark, _ = _statistics(
            b_q, b_q, p_k, p_v, stride_k, stride_v, i_tile, o_query, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, N, C, PARTS, MASKED, False,
        )  # fmt: skip
    b_share = _shares(b_top, b_total, b_landmark, i_tile, o_query, BLOCK, C, MASKED)
    b_new = tl.maximum(b_peak, tl.max(b_share, 1))
    b_shrink = tl.exp2(b_peak - b_new)
    b_weight = tl.exp2(b_share - b_new[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
    b_weight = b_weight / _nonzero(b_total, MASKED)
    b_o = b_o * b_shrink[:, None]
    for i_part in range(PARTS):
        if PARTS > 1:
            b_k = _load_keys(p_k, stride_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, MASKED)
            b_s, _ = _scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, C, MASKED)
            b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        b_v = _load_keys(p_v, stride_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, MASKED)
        b_w = tl.reshape(b_p * b_weight[:, :, None], [b_p.shape[0], N])
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    return b_o, b_new, b_sum


@triton.jit
def _key_gradient_tile(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_k, p_v, stride_q, stride_do, stride_k, stride_v,
    heads, i_batch, i_head, i_query, i_tile, i_part, query_length, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what a query tile of one head gives to the gradients (D, N) of a tile of keys and values."""
    o_row = i_query + tl.arange(0, M)
    b_q = _load_rows(_at(p_q, stride_q, i_batch, i_head), stride_q, i_query, query_length, M, HEAD_DIM, D)
    b_do = _load_rows(_at(p_do, stride_do, i_batch, i_head), stride_do, i_query, query_length, M, HEAD_DIM, D)
    i_rows = (i_batch * heads + i_head).to(tl.int64) * query_length
    # rows beyond the last get weight 0
    b_lse = tl.load(p_lse + i_rows + o_row, mask=o_row < query_length, other=float("inf"))
    b_delta = tl.load(p_delta + i_rows + o_row, mask=o_row < query_length, other=0.0)
    b_p, b_ds = _score_gradients(
        b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, stride_k, stride_v, i_tile, i_part,
        o_row + key_length - query_length, key_length, scale_log2, BLOCK, HEAD_DIM, D, N, C, PARTS, MASKED,
    )  # fmt: skip
    b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), b_dv, input_precision="ieee")
    b_dk = tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _score_gradients(
    b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, stride_k, stride_v, i_tile, i_part, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of the scores, both (M, N), of a query tile against a key tile.

    With P the weights, dP their gradient, G the weight of a landmark, dG = sum(P dP) / G over its block and D the row's
    `delta`: dS = P (dP - dG) in earlier blocks, P (dP - D) in the own one, G (dG - D) at landmarks.
    """
    b_s, b_landmark = _scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, C, MASKED)
    b_dp = tl.reshape(tl.dot(b_do, tl.trans(b_v), input_precision="ieee"), b_s.shape)
    if PARTS == 1:
        b_top = _top(b_s, scale_log2, MASKED)
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        b_total = tl.sum(b_p, 2)
        b_mean = tl.sum(b_p * b_dp, 2)
    else:
        b_top, b_total, b_landmark, b_mean = _statistics(
            b_q, b_do, p_k, p_v, stride_k, stride_v, i_tile, o_query, key_length, scale_log2,
            BLOCK, HEAD_DIM, D, N, C, PARTS, MASKED, True,
        )  # fmt: skip
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
    b_share = _shares(b_top, b_total, b_landmark, i_tile, o_query, BLOCK, C, MASKED)
    # no weight exceeds 1, also where scores are so large that their rounding would say so
    b_weight = tl.exp2(tl.minimum(b_share - b_lse[:, None], 0.0))
    b_norm = 1.0 / _nonzero(b_total, MASKED)
    b_mean = b_mean * b_norm
    if MASKED:
        b_mean = tl.where(_blocks(i_tile, C)[None, :] == (o_query // BLOCK)[:, None], b_delta[:, None], b_mean)
    b_p = b_p * (b_weight * b_norm)[:, :, None]
    # at the landmark of the own block dG is D, and those of later blocks have no weight: 0, as it should be
    b_at_landmark = (b_weight * (b_mean - b_delta[:, None]))[:, :, None]
    m_landmark = (_places(i_part, N, C) == BLOCK - 1)[None, None, :]
    b_ds = tl.where(m_landmark, b_at_landmark, b_p * (b_dp - b_mean[:, :, None]))
    return tl.reshape(b_p, [b_p.shape[0], N]), tl.reshape(b_ds, [b_p.shape[0], N])


@triton.jit
def _statistics(
    b_q, b_do, p_k, p_v, stride_k, stride_v, i_tile, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Of a block in several tiles, each (M, 1): largest score, sum of exponentials over it, landmark's score.

    With `GRADIENT` also the sum of the exponentials times the gradients of the weights, else 0.
    """
    b_raw = tl.full([b_q.shape[0], 1], -float("inf"), tl.float32)
    b_total = tl.zeros([b_q.shape[0], 1], tl.float32)
    b_landmark = tl.zeros([b_q.shape[0], 1], tl.float32)
    b_mean = tl.zeros([b_q.shape[0], 1], tl.float32)
    for i_part in range(PARTS):
        b_k = _load_keys(p_k, stride_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, MASKED)
        b_s, b_at_landmark = _scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, C, MASKED)
        b_new = tl.maximum(b_raw, tl.max(b_s, 2))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_shrink = tl.exp2((b_raw - b_base) * scale_log2)
        b_p = tl.exp2((b_s - b_base[:, :, None]) * scale_log2)
        b_total = b_total * b_shrink + tl.sum(b_p, 2)
        b_landmark += b_at_landmark
        if GRADIENT:
            b_v = _load_keys(p_v, stride_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, D, N, C, MASKED)
            b_dp = tl.reshape(tl.dot(b_do, tl.trans(b_v), input_precision="ieee"), b_s.shape)
            b_mean = b_mean * b_shrink + tl.sum(b_p * b_dp, 2)
        b_raw = b_new
    return tl.where(b_raw == -float("inf"), 0.0, b_raw * scale_log2), b_total, b_landmark, b_mean


@triton.jit
def _scores(
    b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Unscaled scores (M, C, W), -inf but for ordinary tokens that a query sees, and scaled ones of landmarks (M, C).

    Landmarks in another part of their block count as 0.
    """
    M: tl.constexpr = b_q.shape[0]
    N: tl.constexpr = b_k.shape[0]
    b_s = tl.reshape(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), [M, C, N // C])
    o_place = _places(i_part, N, C)
    b_landmark = tl.sum(tl.where((o_place == BLOCK - 1)[None, None, :], b_s, 0.0), 2) * scale_log2
    m_seen = (o_place < BLOCK - 1)[None, None, :]
    if MASKED:
        o_position = _blocks(i_tile, C)[:, None] * BLOCK + o_place[None, :]
        m_seen = m_seen & (o_position[None, :, :] <= o_query[:, None, None])
    return tl.where(m_seen, b_s, -float("inf")), b_landmark


@triton.jit
def _top(b_s, scale_log2, MASKED: tl.constexpr):
    """Largest scaled score (M, C) of each block; 0 where nothing of it is seen."""
    b_top = tl.max(b_s, 2)
    if MASKED:
        b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
    return b_top * scale_log2


@triton.jit
def _shares(b_top, b_total, b_landmark, i_tile, o_query, BLOCK: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """Logit (M, C) with which each block enters the row's softmax."""
    if MASKED:
        o_block = _blocks(i_tile, C)[None, :]
        o_own = (o_query // BLOCK)[:, None]
        b_landmark = tl.where(o_block < o_own, b_landmark, -float("inf"))
        b_landmark = tl.where(o_block == o_own, b_top + tl.log2(b_total), b_landmark)
    return b_landmark


@triton.jit
def _nonzero(b_total, MASKED: tl.constexpr):
    """Sums to divide by: 1 for blocks of which nothing is seen."""
    if MASKED:
        b_total = tl.where(b_total == 0.0, 1.0, b_total)
    return b_total


@triton.jit
def _blocks(i_tile, C: tl.constexpr):
    """(C,): blocks of a key tile."""
    return i_tile * C + tl.arange(0, C)


@triton.jit
def _places(i_part, N: tl.constexpr, C: tl.constexpr):
    """(W,): places inside its block of the columns of a key tile."""
    return i_part * (N // C) + tl.arange(0, N // C)


@triton.jit
def _key_columns(i_tile, i_part, BLOCK: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """(N,): position in the sequence and place inside its block of each column of a key tile."""
    o_column = tl.arange(0, N)
    o_place = i_part * (N // C) + o_column % (N // C)
    return (i_tile * C + o_column // (N // C)) * BLOCK + o_place, o_place


@triton.jit
def _at(p_x, stride, i_batch, i_head):
    """Pointer to the rows of one head; `stride`: of batch, head, row, dimension."""
    return p_x + i_batch.to(tl.int64) * stride[0] + i_head.to(tl.int64) * stride[1]


@triton.jit
def _pointers(p_x, stride, i_first, o_row, D: tl.constexpr):
    """(rows, D) pointers to rows `i_first + o_row`; 64 bits, for they may lie any number of elements apart."""
    p_x += tl.cast(i_first, tl.int64) * stride[2]
    return p_x + o_row.to(tl.int64)[:, None] * stride[2] + tl.arange(0, D).to(tl.int64)[None, :] * stride[3]


@triton.jit
def _load_rows(p_x, stride, i_first, length, M: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """(M, D): rows of a head from `i_first` on, zero beyond its length and beyond HEAD_DIM."""
    o_row = tl.arange(0, M)
    m_x = (o_row < length - i_first)[:, None]
    if HEAD_DIM != D:
        m_x = m_x & (tl.arange(0, D) < HEAD_DIM)[None, :]
    return tl.load(_pointers(p_x, stride, i_first, o_row, D), mask=m_x, other=0.0)


@triton.jit
def _load_keys(
    p_x, stride, i_tile, i_part, length,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(N, D): a key tile, zero beyond the length, in padding columns and beyond HEAD_DIM."""
    o_position, o_place = _key_columns(0, i_part, BLOCK, N, C)
    i_first = i_tile * (C * BLOCK)
    p_x = _pointers(p_x, stride, i_first, o_position, D)
    if not MASKED and BLOCK % (N // C) == 0 and HEAD_DIM == D:
        return tl.load(p_x)
    m_x = (o_place < BLOCK) & (o_position < length - i_first)
    return tl.load(p_x, mask=m_x[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(p_x, stride, i_first, o_row, length, b_x, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Writes (rows, D) to the rows `i_first + o_row` of a head, those within its length."""
    m_x = (o_row < length - i_first)[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :]
    tl.store(_pointers(p_x, stride, i_first, o_row, D), b_x.to(p_x.dtype.element_ty), mask=m_x)
