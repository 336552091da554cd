"""Triton kernels of landmark attention over whole sequences: forward, backward for queries, backward for keys.

The form is that of flash attention, with one more softmax. Keys come in tiles of whole landmark blocks, so that a
block's own softmax is a reduction inside the tile. The block then enters the running softmax as one key: its logit is
its landmark's score, its value the sum of its values, weighted by its own softmax (`docs/attention.md`). A query's own
block enters the same way; its logit is the logsumexp of what the query sees of it. The forward saves the logsumexp of
each row; the backward computes everything else again. No two programs add to the same number: results are the same to
the last bit.

Names, shapes and constants: `triton_blocks.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from landmark_llama.attention.triton_blocks import (
    at,
    block_columns,
    block_logits,
    block_parts,
    blocks,
    key_columns,
    landmark_logits,
    landmark_rows,
    load_keys,
    load_rows,
    nonzero,
    places,
    scores,
    statistics,
    store_rows,
    top,
)
from landmark_llama.attention.triton_tiles import padded


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_landmark, size, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of one query tile of one head."""
    i_query, i_batch, i_head, i_row = _query_tile(size, M)
    p_k, p_v = at(p_k, i_batch, i_head // size.heads_per_kv), at(p_v, i_batch, i_head // size.heads_per_kv)
    o_row, o_query = _row_offsets(i_query, size, M)
    # (M, D)
    b_q = load_rows(at(p_q, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    p_logit = landmark_rows(p_landmark, i_row + o_row, size, BLOCK)

    b_o = tl.zeros([M, padded(HEAD_DIM)], tl.float32)
    b_peak = tl.full([M], -float("inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    whole, stop = _visible_tiles(i_query, size, BLOCK, M, N)
    for i_tile in range(0, whole):
        b_o, b_peak, b_sum = _forward_tile(
            b_o, b_peak, b_sum, b_q, p_k, p_v, p_logit, i_tile, o_query, size.key_length, scale_log2,
            BLOCK, HEAD_DIM, N, EXACT, MASKED=False,
        )  # fmt: skip
    for i_tile in range(whole, stop):
        b_o, b_peak, b_sum = _forward_tile(
            b_o, b_peak, b_sum, b_q, p_k, p_v, p_logit, i_tile, o_query, size.key_length, scale_log2,
            BLOCK, HEAD_DIM, N, EXACT, MASKED=True,
        )  # fmt: skip

    b_o = b_o / b_sum[:, None]
    store_rows(at(p_o, i_batch, i_head), i_query, tl.arange(0, M), size.query_length, b_o, HEAD_DIM)
    tl.store(p_lse + i_row + o_row, b_peak + tl.log2(b_sum), mask=o_row < size.query_length)


@triton.jit
def query_gradient_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_delta, p_landmark, p_dlandmark, size, scale_log2, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradient of one query tile of one head, and `delta`, dO . O of its rows, for `key_gradient_kernel`.

    Where landmark logits are given, also theirs.
    """
    i_query, i_batch, i_head, i_row = _query_tile(size, M)
    p_k, p_v = at(p_k, i_batch, i_head // size.heads_per_kv), at(p_v, i_batch, i_head // size.heads_per_kv)
    o_row, o_query = _row_offsets(i_query, size, M)
    # (M, D)
    b_do = load_rows(at(p_do, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    # (M, D)
    b_o = load_rows(at(p_o, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + i_row + o_row, b_delta, mask=o_row < size.query_length)
    # (M, D)
    b_q = load_rows(at(p_q, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    # (M,)
    b_lse = tl.load(p_lse + i_row + o_row, mask=o_row < size.query_length, other=float("inf"))
    p_logit = landmark_rows(p_landmark, i_row + o_row, size, BLOCK)
    p_dlogit = landmark_rows(p_dlandmark, i_row + o_row, size, BLOCK)

    b_dq = tl.zeros([M, padded(HEAD_DIM)], tl.float32)
    whole, stop = _visible_tiles(i_query, size, BLOCK, M, N)
    for i_tile in range(0, whole):
        b_dq = _query_gradient_tile(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_logit, p_dlogit, i_tile, o_query, size.key_length, scale_log2,
            BLOCK, HEAD_DIM, N, EXACT, MASKED=False,
        )  # fmt: skip
    for i_tile in range(whole, stop):
        b_dq = _query_gradient_tile(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_logit, p_dlogit, i_tile, o_query, size.key_length, scale_log2,
            BLOCK, HEAD_DIM, N, EXACT, MASKED=True,
        )  # fmt: skip
    store_rows(at(p_dq, i_batch, i_head), i_query, tl.arange(0, M), size.query_length, b_dq * scale, HEAD_DIM)


@triton.jit
def key_gradient_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_delta, p_landmark, size, scale_log2, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one KV head, from all queries of the heads that share it."""
    PARTS: tl.constexpr = block_parts(BLOCK, N)
    span = BLOCK * (N // block_columns(BLOCK, N))  # positions of a key tile
    tiles = tl.cdiv(size.key_length, span) * PARTS
    i_tile, i_part = tl.program_id(0) % tiles // PARTS, tl.program_id(0) % tiles % PARTS
    kv_heads = size.heads // size.heads_per_kv
    i_batch, i_kv_head = tl.program_id(0) // tiles // kv_heads, tl.program_id(0) // tiles % kv_heads
    p_k, p_v = at(p_k, i_batch, i_kv_head), at(p_v, i_batch, i_kv_head)
    # (N, D)
    b_k = load_keys(p_k, i_tile, i_part, size.key_length, BLOCK, HEAD_DIM, N, MASKED=True)
    # (N, D)
    b_v = load_keys(p_v, i_tile, i_part, size.key_length, BLOCK, HEAD_DIM, N, MASKED=True)

    # transposed: the tensor cores then read weights and score gradients as they are, from shared memory
    b_dk = tl.zeros([padded(HEAD_DIM), N], tl.float32)
    b_dv = tl.zeros([padded(HEAD_DIM), N], tl.float32)
    first, whole, end = _seeing_tiles(i_tile * span, span, size, M)
    # one loop over the query tiles of all heads: loads stay ahead of the work, which a loop inside a loop would stop
    for i_step in range(0, size.heads_per_kv * (whole - first)):
        i_head = i_kv_head * size.heads_per_kv + i_step // (whole - first)
        b_dk, b_dv = _key_gradient_tile(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_landmark, p_k, p_v,
            i_batch, i_head, (first + i_step % (whole - first)) * M, i_tile, i_part, size, scale_log2,
            BLOCK, HEAD_DIM, M, N, EXACT, MASKED=True,
        )  # fmt: skip
    for i_step in range(0, size.heads_per_kv * (end - whole)):
        i_head = i_kv_head * size.heads_per_kv + i_step // (end - whole)
        b_dk, b_dv = _key_gradient_tile(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_landmark, p_k, p_v,
            i_batch, i_head, (whole + i_step % (end - whole)) * M, i_tile, i_part, size, scale_log2,
            BLOCK, HEAD_DIM, M, N, EXACT, MASKED=False,
        )  # fmt: skip

    o_position, o_place = key_columns(i_part, BLOCK, N)
    # columns that pad a block write nothing: they count as lying beyond the end
    o_position = tl.where(o_place < BLOCK, o_position, size.key_length)
    p_dk, p_dv = at(p_dk, i_batch, i_kv_head), at(p_dv, i_batch, i_kv_head)
    store_rows(p_dk, i_tile * span, o_position, size.key_length, tl.trans(b_dk * scale), HEAD_DIM)
    store_rows(p_dv, i_tile * span, o_position, size.key_length, tl.trans(b_dv), HEAD_DIM)


@triton.jit
def _query_tile(size, M: tl.constexpr):
    """First query, row of the batch, head, and first entry in (batch, heads, query_length) of a program's tile.

    The programs with the most keys to read come first.
    """
    tiles = tl.cdiv(size.query_length, M)
    i_query = (tiles - 1 - tl.program_id(0) % tiles) * M
    i_batch, i_head = tl.program_id(0) // tiles // size.heads, tl.program_id(0) // tiles % size.heads
    return i_query, i_batch, i_head, (i_batch * size.heads + i_head).to(tl.int64) * size.query_length


@triton.jit
def _row_offsets(i_query, size, M: tl.constexpr):
    """(M,) each: the rows of a query tile, and their positions among the keys."""
    o_row = i_query + tl.arange(0, M)
    return o_row, o_row + size.key_length - size.query_length


@triton.jit
def _visible_tiles(i_query, size, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """How many key tiles all queries of a tile see whole, and how many any of them sees."""
    C: tl.constexpr = N // block_columns(BLOCK, N)
    offset = size.key_length - size.query_length
    last = tl.minimum(i_query + M, size.query_length) - 1
    return (i_query + offset) // BLOCK // C, (last + offset) // BLOCK // C + 1


@triton.jit
def _seeing_tiles(i_first, span, size, M: tl.constexpr):
    """The query tiles that see a key tile: the first one, the first that sees it whole, and their end."""
    offset = size.key_length - size.query_length
    end = tl.cdiv(size.query_length, M)
    whole = tl.minimum(tl.cdiv(tl.maximum(i_first + span - offset, 0), M), end)
    return tl.maximum(i_first - offset, 0) // M, whole, end


@triton.jit
def _forward_tile(
    b_o, b_peak, b_sum, b_q, p_k, p_v, p_logit, i_tile, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the blocks of a key tile, or all tiles of one block, to the output (M, D) and its running softmax (M,)."""
    PARTS: tl.constexpr = block_parts(BLOCK, N)
    if PARTS == 1:
        # (N, D)
        b_k = load_keys(p_k, i_tile, 0, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
        b_s, b_landmark = scores(b_q, b_k, i_tile, 0, o_query, scale_log2, BLOCK, N, MASKED=MASKED)
        b_top = top(b_s, scale_log2, MASKED=MASKED)
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        b_total = tl.sum(b_p, 2)
    else:
        b_top, b_total, b_landmark, _ = statistics(
            b_q, b_q, p_k, p_v, i_tile, o_query, key_length, scale_log2,
            BLOCK, HEAD_DIM, N, MASKED=MASKED, GRADIENT=False,
        )  # fmt: skip
    b_landmark = landmark_logits(b_landmark, p_logit, i_tile, o_query, key_length, BLOCK, N, MASKED=MASKED)
    b_logit = block_logits(b_top, b_total, b_landmark, i_tile, o_query, BLOCK, N, EXACT, MASKED=MASKED)
    b_new = tl.maximum(b_peak, tl.max(b_logit, 1))
    b_shrink = tl.exp2(b_peak - b_new)
    b_weight = tl.exp2(b_logit - b_new[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
    b_weight = b_weight / nonzero(b_total, MASKED=MASKED)
    b_o = b_o * b_shrink[:, None]
    for i_part in range(PARTS):
        if PARTS > 1:
            # (N, D)
            b_k = load_keys(p_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
            b_s, _ = scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, N, MASKED=MASKED)
            b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        # (N, D)
        b_v = load_keys(p_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
        b_w = tl.reshape(b_p * b_weight[:, :, None], [b_p.shape[0], N])
        # (M, D)
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    return b_o, b_new, b_sum


@triton.jit
def _query_gradient_tile(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_logit, p_dlogit, i_tile, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what a key tile, or all tiles of one block, give to the gradient (M, D) of a query tile."""
    for i_part in range(block_parts(BLOCK, N)):
        # (N, D)
        b_k = load_keys(p_k, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
        # (N, D)
        b_v = load_keys(p_v, i_tile, i_part, key_length, BLOCK, HEAD_DIM, N, MASKED=MASKED)
        _, b_ds, b_dlogit = _score_gradients(
            b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, p_logit, i_tile, i_part, o_query, key_length, scale_log2,
            BLOCK, HEAD_DIM, N, EXACT, MASKED=MASKED,
        )  # fmt: skip
        if p_dlogit is not None:
            # the same for every part of a block
            o_block = blocks(i_tile, BLOCK, N)
            m_logit = (o_query < key_length)[:, None] & (o_block < key_length // BLOCK)[None, :]
            tl.store(p_dlogit[:, None] + o_block[None, :], b_dlogit, mask=m_logit)
        # (M, D)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _key_gradient_tile(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_landmark, p_k, p_v,
    i_batch, i_head, i_query, i_tile, i_part, size, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what a query tile of one head gives to the gradients (D, N) of a tile of keys and values."""
    o_row, o_query = _row_offsets(i_query, size, M)
    # (M, D)
    b_q = load_rows(at(p_q, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    # (M, D)
    b_do = load_rows(at(p_do, i_batch, i_head), i_query, size.query_length, M, HEAD_DIM)
    i_row = (i_batch * size.heads + i_head).to(tl.int64) * size.query_length
    # (M,): rows beyond the last get weight 0
    b_lse = tl.load(p_lse + i_row + o_row, mask=o_row < size.query_length, other=float("inf"))
    # (M,)
    b_delta = tl.load(p_delta + i_row + o_row, mask=o_row < size.query_length, other=0.0)
    p_logit = landmark_rows(p_landmark, i_row + o_row, size, BLOCK)
    b_p, b_ds, _ = _score_gradients(
        b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, p_logit, i_tile, i_part, o_query, size.key_length, scale_log2,
        BLOCK, HEAD_DIM, N, EXACT, MASKED=MASKED,
    )  # fmt: skip
    # (D, N)
    b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), b_dv, input_precision="ieee")
    # (D, N)
    b_dk = tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _score_gradients(
    b_q, b_do, b_k, b_v, b_lse, b_delta, p_k, p_v, p_logit, i_tile, i_part, o_query, key_length, scale_log2,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of the scores, both (M, N), of a query tile against a key tile; those of landmarks (M, C).

    With P the weights, dP their gradient, G the weight of a landmark, dG = sum(P dP) / G over its block and D the row's
    `delta`: dS = P (dP - dG) in earlier blocks, P (dP - D) in the own one, G (dG - D) at landmarks. Where the logits of
    landmarks are given, their keys have no part in the scores, and gradient 0. EXACT: all is as in the own block.
    """
    b_s, b_landmark = scores(b_q, b_k, i_tile, i_part, o_query, scale_log2, BLOCK, N, MASKED=MASKED)
    # (M, N) to (M, C, W)
    b_dp = tl.reshape(tl.dot(b_do, tl.trans(b_v), input_precision="ieee"), b_s.shape)
    if block_parts(BLOCK, N) == 1:
        b_top = top(b_s, scale_log2, MASKED=MASKED)
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
        b_total = tl.sum(b_p, 2)
        b_mean = tl.sum(b_p * b_dp, 2)
    else:
        b_top, b_total, b_landmark, b_mean = statistics(
            b_q, b_do, p_k, p_v, i_tile, o_query, key_length, scale_log2,
            BLOCK, HEAD_DIM, N, MASKED=MASKED, GRADIENT=True,
        )  # fmt: skip
        b_p = tl.exp2(b_s * scale_log2 - b_top[:, :, None])
    b_landmark = landmark_logits(b_landmark, p_logit, i_tile, o_query, key_length, BLOCK, N, MASKED=MASKED)
    b_logit = block_logits(b_top, b_total, b_landmark, i_tile, o_query, BLOCK, N, EXACT, MASKED=MASKED)
    # a weight is at most 1; rounding could exceed that where scores are large
    b_weight = tl.exp2(tl.minimum(b_logit - b_lse[:, None], 0.0))
    b_norm = 1.0 / nonzero(b_total, MASKED=MASKED)
    b_mean = b_mean * b_norm
    if EXACT:
        b_mean = b_mean * 0.0 + b_delta[:, None]
    elif MASKED:
        b_mean = tl.where(blocks(i_tile, BLOCK, N)[None, :] == (o_query // BLOCK)[:, None], b_delta[:, None], b_mean)
    b_p = b_p * (b_weight * b_norm)[:, :, None]
    # 0 at the landmark of the own block, where dG is D, and of later blocks, which have no weight
    b_at_landmark = b_weight * (b_mean - b_delta[:, None])
    b_ds = b_p * (b_dp - b_mean[:, :, None])  # 0 at landmarks
    if p_logit is None:
        m_landmark = (places(i_part, BLOCK, N) == BLOCK - 1)[None, None, :]
        b_ds = tl.where(m_landmark, b_at_landmark[:, :, None], b_ds)
    return tl.reshape(b_p, [b_p.shape[0], N]), tl.reshape(b_ds, [b_p.shape[0], N]), b_at_landmark
