"""The Triton kernels of `choice_triton.py`: scores of landmarks, and the running best k of them.

A candidate and its score are one int64, its *rank*: the upper half is the score, mapped to an integer of the same
order, the lower half the number of the block. The larger rank is the better candidate, among equal scores the later
block.

Names, shapes and constants: `triton_rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from landmark_llama.attention.triton_tiles import padded
from landmark_llama.reading.triton_rows import LOG2_E, load_halves, load_queries, rotate, tile_of_program

NONE = tl.constexpr(-(2**63))  # the rank of what is no candidate: below every kept one
FULL = tl.constexpr(2**63 - 1)  # fills a list of k up to a power of two; no candidate replaces it
HIGHEST = tl.constexpr((2**31 - 1) << 32)  # the rank of block 0 with a score above all
LAST = tl.constexpr(2**31 - 1)  # above the number of every block


@triton.jit
def score_recent_kernel(
    p_query, p_landmark, p_bias, p_groups, p_rotary, p_far, p_recent, size, scale,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, SINKS: tl.constexpr, TIE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Queries rotated to distance k + 1, and the scores of the last k candidates (entry `i`: block n - 1 - i).

    p_far: (batch, heads, groups, queries, head_dim); p_recent: (batch, heads, groups, queries, K_PAD), fp32, -inf where
    there are fewer candidates.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    i_batch, i_sequence, i_group, i_tile = tile_of_program(size, HEADS)
    o_query = i_tile * M + tl.arange(0, M)
    m_row = o_query < size.queries
    o_row = (i_batch * size.groups + i_group) * size.queries + o_query
    # 2 (M, H), and (M,)
    b_query, _, b_own, _ = load_queries(
        p_query, p_groups, p_rotary, i_batch, i_sequence % HEADS, o_row, m_row, scale, BLOCK, HEAD_DIM
    )
    n = _candidates(p_groups, i_batch, i_group, size)
    o_out = (i_sequence * size.groups + i_group) * size.queries + o_query
    dtype: tl.constexpr = p_far.dtype.element_ty

    b_first, b_second = rotate(b_query, p_rotary, (b_own + K + 1) * BLOCK, HEAD_DIM)
    o_half = tl.arange(0, padded(HALF))
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    p_out = p_far + o_out[:, None] * HEAD_DIM + o_half[None, :]
    tl.store(p_out, b_first.to(dtype), mask=m_half)
    tl.store(p_out + HALF, b_second.to(dtype), mask=m_half)

    o_recent = tl.arange(0, triton.next_power_of_2(K))[None, :]
    b_recent = tl.full([M, triton.next_power_of_2(K)], -float("inf"), tl.float32)
    p_landmarks = _landmarks(p_landmark, p_bias, i_sequence // HEADS_PER_KV, size, HEAD_DIM)
    for distance in range(1, tl.minimum(n, K) + 1):
        b_first, b_second = rotate(b_query, p_rotary, (b_own + distance) * BLOCK, HEAD_DIM)
        # rounded as the older candidates' queries are, so that the scores of both compare
        # (M,)
        b_score = _score_one((b_first.to(dtype), b_second.to(dtype)), p_landmarks, 0 if TIE else n - distance, HEAD_DIM)
        m_recent = (o_recent == distance - 1) & (n - distance >= SINKS)
        b_recent = tl.where(m_recent, b_score[:, None], b_recent)
    tl.store(p_recent + o_out[:, None] * triton.next_power_of_2(K) + o_recent, b_recent, mask=m_row[:, None])


@triton.jit
def choose_kernel(
    p_far, p_recent, p_landmark, p_bias, p_groups, p_choice, p_kept, size, splits,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, K: tl.constexpr,
    SINKS: tl.constexpr, TIE: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The best k blocks of each query; the query heads that share a KV head stand one after the other in the rows.

    p_choice: (batch, heads, groups, queries, k), int32, unless SPLIT: then the lists of each part of the candidates go
    to p_kept: (batch, heads, groups, queries, splits, K_PAD), int64.
    """
    K_PAD: tl.constexpr = triton.next_power_of_2(K)
    i_batch, i_sequence, i_group, i_tile = tile_of_program(size, HEADS // HEADS_PER_KV)
    i_split = tl.program_id(2)
    o_row = i_tile * M + tl.arange(0, M)
    m_row = o_row < HEADS_PER_KV * size.queries
    i_head = i_sequence * HEADS_PER_KV + o_row // size.queries
    o_out = (i_head * size.groups + i_group) * size.queries + o_row % size.queries
    n = _candidates(p_groups, i_batch, i_group, size)
    older = tl.maximum(n - K, 0)
    p_landmarks = _landmarks(p_landmark, p_bias, i_sequence, size, HEAD_DIM)

    b_list = _empty_list(n if i_split == 0 else 0, M, K, SINKS)
    if i_split == 0:
        # (M, K_PAD)
        b_score = tl.load(_recent(p_recent, o_out, K), mask=m_row[:, None], other=0.0)
        b_list = _keep(b_list, _last_ranks(b_score, n, m_row[:, None], K, SINKS))
    if older > 0:
        # 2 (M, H)
        b_far = load_halves(p_far + o_out * HEAD_DIM, m_row, HEAD_DIM)
        if TIE:
            # (M,)
            b_score = _score_one(b_far, p_landmarks, 0, HEAD_DIM)
            b_list = _keep(b_list, _last_ranks(b_score[:, None], older, m_row[:, None], K, SINKS))
        else:
            part = tl.cdiv(tl.cdiv(older, N), splits) * N
            stop = tl.minimum(older, (i_split + 1) * part)
            for i_start in range(i_split * part, stop, N):
                # (M, N)
                b_score, o_block = _score_older(b_far, p_landmarks, i_start, stop, HEAD_DIM, N, SINKS)
                # mask padding rows: their scores are all equal, so each round would replace an entry
                m_older = m_row[:, None] & ((o_block >= SINKS) & (o_block < stop))[None, :]
                b_list = _keep(b_list, tl.where(m_older, _rank(b_score, o_block[None, :]), NONE))
    if SPLIT:
        o_list = tl.arange(0, K_PAD)
        p_list = p_kept + (o_out[:, None] * splits + i_split) * K_PAD + o_list[None, :]
        m_kept = (b_list > NONE + K_PAD) & (o_list < K)[None, :]
        tl.store(p_list, tl.where(m_kept, b_list, NONE), mask=m_row[:, None])
    else:
        _store_list(p_choice + o_out * K, b_list, m_row, K)


@triton.jit
def merge_kernel(p_kept, p_choice, rows, splits, K: tl.constexpr, M: tl.constexpr):
    """The best k blocks of each of the `rows` queries, from its lists (rows, splits, K_PAD) of `choose_kernel`."""
    K_PAD: tl.constexpr = triton.next_power_of_2(K)
    o_row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    m_row = o_row < rows
    b_list = _empty_list(0, M, K, 0)
    for i_split in range(splits):
        p_list = p_kept + (o_row[:, None] * splits + i_split) * K_PAD + tl.arange(0, K_PAD)[None, :]
        # (M, K_PAD)
        b_list = _keep(b_list, tl.load(p_list, mask=m_row[:, None], other=NONE))
    _store_list(p_choice + o_row * K, b_list, m_row, K)


@triton.jit
def normalise_kernel(
    p_far, p_recent, p_landmark, p_bias, p_groups, p_norm, size,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, K: tl.constexpr,
    SINKS: tl.constexpr, TIE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """p_norm (batch, heads, groups, queries): logsumexp over the candidates; inf for padding, so that it has no say."""
    i_batch, i_sequence, i_group, i_tile = tile_of_program(size, HEADS)
    o_query = i_tile * M + tl.arange(0, M)
    m_row = o_query < size.queries
    o_out = (i_sequence * size.groups + i_group) * size.queries + o_query
    n = _candidates(p_groups, i_batch, i_group, size)
    older = tl.maximum(n - K, 0)
    _, p_valid, _, _ = p_groups
    # (M,)
    m_valid = tl.load(p_valid + (i_batch * size.groups + i_group) * size.queries + o_query, mask=m_row, other=0) != 0
    m_valid = m_valid & (n > SINKS)

    # (M, K_PAD)
    b_score = tl.load(_recent(p_recent, o_out, K), mask=m_valid[:, None], other=0.0)
    b_peak = tl.max(b_score, 1)
    b_total = tl.sum(tl.exp2(b_score - b_peak[:, None]), 1)
    if older > 0:
        p_landmarks = _landmarks(p_landmark, p_bias, i_sequence // HEADS_PER_KV, size, HEAD_DIM)
        # 2 (M, H)
        b_far = load_halves(p_far + o_out * HEAD_DIM, m_row, HEAD_DIM)
        if TIE:
            # (M,)
            b_tied = _score_one(b_far, p_landmarks, 0, HEAD_DIM)
            b_new = tl.maximum(b_peak, b_tied)
            b_total = b_total * tl.exp2(b_peak - b_new) + tl.maximum(older - SINKS, 0) * tl.exp2(b_tied - b_new)
            b_peak = b_new
        else:
            for i_start in range(0, older, N):
                # (M, N)
                b_older, o_block = _score_older(b_far, p_landmarks, i_start, older, HEAD_DIM, N, SINKS)
                b_new = tl.maximum(b_peak, tl.max(b_older, 1))
                b_total = b_total * tl.exp2(b_peak - b_new) + tl.sum(tl.exp2(b_older - b_new[:, None]), 1)
                b_peak = b_new
    tl.store(p_norm + o_out, tl.where(m_valid, b_peak + tl.log2(b_total), float("inf")), mask=m_row)


@triton.jit
def choose_shared_kernel(
    p_far, p_recent, p_landmark, p_bias, p_groups, p_norm, p_choice, size,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, K: tl.constexpr,
    SINKS: tl.constexpr, TIE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """p_choice (batch, heads, groups, 1, k): the best k blocks by max over the group's queries (score - norm)."""
    i_group = tl.program_id(0)
    i_sequence = tl.program_id(1).to(tl.int64)
    n = _candidates(p_groups, i_sequence // HEADS, i_group, size)
    older = tl.maximum(n - K, 0)
    p_landmarks = _landmarks(p_landmark, p_bias, i_sequence // HEADS_PER_KV, size, HEAD_DIM)
    o_first = (i_sequence * size.groups + i_group) * size.queries

    b_worth = tl.full([triton.next_power_of_2(K)], -float("inf"), tl.float32)
    b_tied = tl.full([1], -float("inf"), tl.float32)
    for i_query in range(0, size.queries, M):
        b_norm, o_row, m_row = _load_norms(p_norm, o_first, i_query, size, M)
        # (M, K_PAD)
        b_score = tl.load(_recent(p_recent, o_row, K), mask=m_row[:, None], other=-float("inf"))
        b_worth = tl.maximum(b_worth, tl.max(b_score - b_norm[:, None], 0))
        if TIE:
            # 2 (M, H)
            b_far = load_halves(p_far + o_row * HEAD_DIM, m_row, HEAD_DIM)
            # (M,)
            b_score = _score_one(b_far, p_landmarks, 0, HEAD_DIM)
            b_tied = tl.maximum(b_tied, tl.max(b_score - b_norm, 0))
    b_worth = b_worth[None, :]
    b_list = _keep(_empty_list(n, 1, K, SINKS), _last_ranks(b_worth, n, b_worth > -float("inf"), K, SINKS))

    if TIE:
        b_tied = b_tied[None, :]
        b_list = _keep(b_list, _last_ranks(b_tied, older, b_tied > -float("inf"), K, SINKS))
    else:
        for i_start in range(0, older, N):
            b_best = tl.full([N], -float("inf"), tl.float32)
            for i_query in range(0, size.queries, M):
                b_norm, o_row, m_row = _load_norms(p_norm, o_first, i_query, size, M)
                # 2 (M, H)
                b_far = load_halves(p_far + o_row * HEAD_DIM, m_row, HEAD_DIM)
                # (M, N)
                b_older, _ = _score_older(b_far, p_landmarks, i_start, older, HEAD_DIM, N, SINKS)
                b_best = tl.maximum(b_best, tl.max(b_older - b_norm[:, None], 0))
            o_block = i_start + tl.arange(0, N)
            m_best = (o_block < older) & (b_best > -float("inf"))
            b_list = _keep(b_list, tl.where(m_best, _rank(b_best, o_block), NONE)[None, :])
    p_block = p_choice + (i_sequence * size.groups + i_group) * K + tl.zeros([1], tl.int64)
    _store_list(p_block, b_list, tl.full([1], True, tl.int1), K)


@triton.jit
def _candidates(p_groups, i_batch, i_group, size):
    """How many candidates a group has: the blocks before its first direct one."""
    _, _, _, p_first_block = p_groups
    return tl.load(p_first_block + i_batch * size.groups + i_group).to(tl.int32)


@triton.jit
def _landmarks(p_landmark, p_bias, i_kv_sequence, size, HEAD_DIM: tl.constexpr):
    """Pointers to the landmarks (capacity, head_dim) of one KV head, and to their biases (capacity,) or None.

    `i_kv_sequence`: in (batch, kv_heads).
    """
    if p_bias is not None:
        p_bias = p_bias + i_kv_sequence * size.capacity
    return p_landmark + i_kv_sequence * size.capacity * HEAD_DIM, p_bias


@triton.jit
def _recent(p_recent, o_out, K: tl.constexpr):
    """(M, K_PAD): pointers to the scores of the last k candidates."""
    K_PAD: tl.constexpr = triton.next_power_of_2(K)
    return p_recent + o_out[:, None] * K_PAD + tl.arange(0, K_PAD)[None, :]


@triton.jit
def _load_norms(p_norm, o_first, i_query, size, M: tl.constexpr):
    """(M,) each, for the queries of a group from `i_query` on: norms, inf beyond the last; offsets; which exist."""
    o_query = i_query + tl.arange(0, M)
    m_row = o_query < size.queries
    # (M,)
    b_norm = tl.load(p_norm + o_first + o_query, mask=m_row, other=float("inf"))
    return b_norm, o_first + o_query, m_row


@triton.jit
def _score_one(b_query, p_landmarks, i_block, HEAD_DIM: tl.constexpr):
    """(M,): scores of one block for queries 2 (M, H), computed in fp32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    b_first, b_second = b_query
    p_landmark, p_bias = p_landmarks
    o_half = tl.arange(0, padded(HALF))
    p_key = p_landmark + i_block * HEAD_DIM + o_half
    # (H,)
    b_key_first = tl.load(p_key, mask=o_half < HALF, other=0.0).to(tl.float32)
    # (H,)
    b_key_second = tl.load(p_key + HALF, mask=o_half < HALF, other=0.0).to(tl.float32)
    b_score = tl.sum(b_first.to(tl.float32) * b_key_first[None, :], 1)
    b_score += tl.sum(b_second.to(tl.float32) * b_key_second[None, :], 1)
    if p_bias is not None:
        b_score += tl.load(p_bias + i_block) * LOG2_E
    return b_score


@triton.jit
def _score_older(
    b_far, p_landmarks, i_start, stop, HEAD_DIM: tl.constexpr, N: tl.constexpr, SINKS: tl.constexpr
):  # fmt: skip
    """(M, N): scores of blocks `i_start` .. for queries 2 (M, H), -inf from `stop` on and for sinks; and the blocks."""
    HALF: tl.constexpr = HEAD_DIM // 2
    b_first, b_second = b_far
    p_landmark, p_bias = p_landmarks
    o_block, o_half = i_start + tl.arange(0, N), tl.arange(0, padded(HALF))
    p_key = p_landmark + o_block[None, :] * HEAD_DIM + o_half[:, None]
    m_key = (o_block < stop)[None, :] & (o_half < HALF)[:, None]
    # (H, N) to (M, N)
    b_score = tl.dot(b_first, tl.load(p_key, mask=m_key, other=0.0), input_precision="ieee")
    # (H, N) to (M, N)
    b_score = tl.dot(b_second, tl.load(p_key + HALF, mask=m_key, other=0.0), b_score, input_precision="ieee")
    if p_bias is not None:
        # (N,)
        b_score += (tl.load(p_bias + o_block, mask=o_block < stop, other=0.0) * LOG2_E)[None, :]
    return tl.where(((o_block >= SINKS) & (o_block < stop))[None, :], b_score, -float("inf")), o_block


@triton.jit
def _rank(b_score, b_block):
    """Ranks int64 of scores fp32 and blocks, in the order of (score, block)."""
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into +0.0, so that they tie
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_order.to(tl.int64) << 32) | b_block.to(tl.int64)


@triton.jit
def _last_ranks(b_score, stop, m_score, K: tl.constexpr, SINKS: tl.constexpr):
    """(rows, K_PAD): ranks of the last k blocks before `stop`, the latest first; NONE where there is none.

    b_score, m_score: (rows, K_PAD or 1), whether a score counts. Of blocks that tie only these can be chosen.
    """
    o_recent = tl.arange(0, triton.next_power_of_2(K))
    b_block = stop - 1 - o_recent
    m_block = m_score & ((o_recent < K) & (b_block >= SINKS))[None, :]
    return tl.where(m_block, _rank(b_score, tl.maximum(b_block, 0)[None, :]), NONE)


@triton.jit
def _empty_list(n, M: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr):
    """(M, K_PAD): lists of k empty places, no two alike, so that one candidate fills one place.

    Sinks, as far as they are among the `n` candidates, have their places, with ranks above those of scores.
    """
    o_place = tl.arange(0, triton.next_power_of_2(K))
    b_place = tl.where(o_place < K, NONE + 1 + o_place.to(tl.int64), FULL)
    b_place = tl.where((o_place < SINKS) & (o_place < n), HIGHEST + o_place.to(tl.int64), b_place)
    return tl.zeros([M, triton.next_power_of_2(K)], tl.int64) + b_place[None, :]


@triton.jit
def _keep(b_list, b_rank):
    """Lists (M, K_PAD) after the candidates of ranks (M, columns); one round for each entry replaced."""
    b_best, b_least = tl.max(b_rank, 1), tl.min(b_list, 1)
    while tl.max((b_best > b_least).to(tl.int32), 0) > 0:
        m_place = (b_best > b_least)[:, None] & (b_list == b_least[:, None])
        b_list = tl.where(m_place, b_best[:, None], b_list)
        b_rank = tl.where(b_rank == b_best[:, None], NONE, b_rank)
        b_best, b_least = tl.max(b_rank, 1), tl.min(b_list, 1)
    return b_list


@triton.jit
def _store_list(p_block, b_list, m_row, K: tl.constexpr):
    """Writes the blocks of lists (M, K_PAD) in ascending order to the pointers (M,), -1 for empty places."""
    K_PAD: tl.constexpr = triton.next_power_of_2(K)
    o_place = tl.arange(0, K_PAD)[None, :]
    b_block = tl.where(b_list > NONE + K_PAD, (b_list & 0xFFFFFFFF).to(tl.int32), o_place - K_PAD)
    b_block = tl.where(o_place < K, b_block, LAST)
    for i_place in range(K):
        b_next = tl.min(b_block, 1)
        tl.store(p_block + i_place, tl.maximum(b_next, -1), mask=m_row)
        b_block = tl.where(b_block == b_next[:, None], LAST, b_block)
