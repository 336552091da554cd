"""Choosing blocks on a GPU: landmark scores and the running best k, never a score for each query and landmark.

The definition is `retrieval.choose_blocks`; the kernels choose what it chooses, ties included. Of a group's `n`
candidates the last k are scored at their own distances, all older ones at distance k + 1:

1. `_score_recent_kernel` rotates each query to distance k + 1 and scores the last k candidates.
2. `_choose_kernel` walks over the older candidates' landmarks and keeps the best k of each query. In a decoding step
   several programs share the walk, and `_merge_kernel` keeps the best of what they kept.
3. Where the queries of a group share a choice (`"head"`), `_normalise_kernel` walks first, for the logsumexp of each
   query's scores, and `_choose_shared_kernel` keeps the best of max over queries (score - logsumexp).

A candidate and its score are one int64: the score in the upper half, mapped to an integer of the same order, and the
block number in the lower. The larger of two such keys is the better candidate, among equal scores the later block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.triton_rows import LOG2_E, QueryRows, load_halves, load_queries, padded, turn

LANDMARKS = 64  # landmarks scored at once
PROGRAMS = 256  # a walk is split until there are about so many programs: two for each multiprocessor of a large chip
MOST_SPLITS = 32

NONE = tl.constexpr(-(2**63))  # the key of what is no candidate: below every kept one
FULL = tl.constexpr(2**63 - 1)  # fills a list of k up to a power of two; nothing takes its place
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _key(b_score, b_block):
    """Keys int64 of scores fp32 and blocks, in the order of (score, block)."""
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: of the two zeros none is the larger
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_order.to(tl.int64) << 32) | b_block.to(tl.int64)


@triton.jit
def _empty_list(ROWS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):
    """Lists [rows, k padded] of k empty places, no two alike, so that one candidate fills one place."""
    o_place = tl.arange(0, K_PAD)
    b_place = tl.where(o_place < K, NONE + 1 + o_place.to(tl.int64), FULL)
    return tl.zeros([ROWS, K_PAD], tl.int64) + b_place[None, :]


@triton.jit
def _keep(b_list, b_key):
    """Lists [rows, k padded] after the candidates `b_key` [rows, columns]; no more rounds than places change."""
    b_best, b_least = tl.max(b_key, 1), tl.min(b_list, 1)
    while tl.max((b_best > b_least).to(tl.int32), 0) > 0:
        m_place = (b_best > b_least)[:, None] & (b_list == b_least[:, None])
        b_list = tl.where(m_place, b_best[:, None], b_list)
        b_key = tl.where(b_key == b_best[:, None], NONE, b_key)
        b_best, b_least = tl.max(b_key, 1), tl.min(b_list, 1)
    return b_list


@triton.jit
def _store_list(p_block, b_list, m_row, K: tl.constexpr, K_PAD: tl.constexpr):
    """Writes the blocks of lists [rows, k padded] in ascending order to `p_block` [rows], -1 for empty places."""
    o_place = tl.arange(0, K_PAD)[None, :]
    b_block = tl.where(b_list > NONE + K_PAD, (b_list & 0xFFFFFFFF).to(tl.int32), o_place - K_PAD)
    b_block = tl.where(o_place < K, b_block, LAST)
    for rank in range(K):
        b_next = tl.min(b_block, 1)
        tl.store(p_block + rank, tl.maximum(b_next, -1), mask=m_row)
        b_block = tl.where(b_block == b_next[:, None], LAST, b_block)


@triton.jit
def _score_recent_kernel(
    p_query,
    p_column,
    p_position,
    p_first_block,
    p_landmark,
    p_cos,
    p_sin,
    p_far,
    p_recent,
    scale,
    stride_batch,
    stride_column,
    stride_head,
    groups,
    queries,
    tiles,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    TIE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Queries rotated to distance k + 1, and the scores of the last k candidates (entry `i`: block n - 1 - i).

    p_far: (batch, heads, groups, queries, head_dim); p_recent: (batch, heads, groups, queries, k padded), fp32, -inf
    where there are fewer candidates.
    """
    i_group, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * heads + head
    i_batch, i_head = i_sequence // HEADS, i_sequence % HEADS
    o_query = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_query < queries
    o_half = tl.arange(0, HALF_PAD)
    o_row = (i_batch * groups + i_group) * queries + o_query
    b_first, b_second, _, b_own, _ = load_queries(
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
    n = tl.load(p_first_block + i_batch * groups + i_group).to(tl.int32)
    o_out = (i_sequence * groups + i_group) * queries + o_query
    dtype: tl.constexpr = p_far.dtype.element_ty

    b_far_first, b_far_second = turn(b_first, b_second, p_cos, p_sin, (b_own + K + 1) * BLOCK_SIZE, o_half, HALF)
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    p_out = p_far + o_out[:, None] * (2 * HALF) + o_half[None, :]
    tl.store(p_out, b_far_first.to(dtype), mask=m_half)
    tl.store(p_out + HALF, b_far_second.to(dtype), mask=m_half)

    b_recent = tl.full([ROWS, K_PAD], -float("inf"), tl.float32)
    p_landmarks = p_landmark + (i_batch * (HEADS // GROUP) + i_head // GROUP) * capacity * (2 * HALF)
    for distance in range(1, tl.minimum(n, K) + 1):
        i_block = 0 if TIE else n - distance
        p_key = p_landmarks + i_block * (2 * HALF) + o_half
        b_key_first = tl.load(p_key, mask=o_half < HALF, other=0.0).to(tl.float32)
        b_key_second = tl.load(p_key + HALF, mask=o_half < HALF, other=0.0).to(tl.float32)
        b_at_first, b_at_second = turn(b_first, b_second, p_cos, p_sin, (b_own + distance) * BLOCK_SIZE, o_half, HALF)
        # rounded as the older candidates' queries are, so that the scores of both compare
        b_score = tl.sum(b_at_first.to(dtype).to(tl.float32) * b_key_first[None, :], 1)
        b_score += tl.sum(b_at_second.to(dtype).to(tl.float32) * b_key_second[None, :], 1)
        b_recent = tl.where(tl.arange(0, K_PAD)[None, :] == distance - 1, b_score[:, None], b_recent)
    tl.store(p_recent + o_out[:, None] * K_PAD + tl.arange(0, K_PAD)[None, :], b_recent, mask=m_row[:, None])


@triton.jit
def _score_older(b_first, b_second, p_landmarks, i_start, stop, o_half, HALF: tl.constexpr, COLUMNS: tl.constexpr):
    """Scores [rows, columns] of blocks `i_start` .., -inf from `stop` on, and the blocks [columns]."""
    o_block = i_start + tl.arange(0, COLUMNS)
    p_key = p_landmarks + o_block[None, :] * (2 * HALF) + o_half[:, None]
    m_key = (o_block < stop)[None, :] & (o_half < HALF)[:, None]
    b_score = tl.dot(b_first, tl.load(p_key, mask=m_key, other=0.0), input_precision="ieee")
    b_score = tl.dot(b_second, tl.load(p_key + HALF, mask=m_key, other=0.0), b_score, input_precision="ieee")
    return tl.where((o_block < stop)[None, :], b_score, -float("inf")), o_block


@triton.jit
def _score_tied(b_first, b_second, p_landmarks, o_half, HALF: tl.constexpr):
    """The one score [rows] that all older candidates have where landmarks tie."""
    m_half = o_half < HALF
    b_key_first = tl.load(p_landmarks + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_key_second = tl.load(p_landmarks + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_score = tl.sum(b_first.to(tl.float32) * b_key_first[None, :], 1)
    return b_score + tl.sum(b_second.to(tl.float32) * b_key_second[None, :], 1)


@triton.jit
def _choose_kernel(
    p_far,
    p_recent,
    p_first_block,
    p_landmark,
    p_choice,
    p_kept,
    groups,
    queries,
    tiles,
    capacity,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    TIE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The best k blocks of each query; the query heads that share a KV head stand one after the other in the rows.

    p_choice: (batch, heads, groups, queries, k), int32, unless SPLIT: then the lists of each part of the candidates go
    to p_kept: (batch, heads, groups, queries, splits, k padded), int64.
    """
    i_group, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * kv_heads + kv_head
    i_split = tl.program_id(2)
    i_batch = i_sequence // (HEADS // GROUP)
    o_place = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_place < GROUP * queries
    o_out = ((i_sequence * GROUP + o_place // queries) * groups + i_group) * queries + o_place % queries
    o_half = tl.arange(0, HALF_PAD)
    n = tl.load(p_first_block + i_batch * groups + i_group).to(tl.int32)
    older = tl.maximum(n - K, 0)
    p_landmarks = p_landmark + i_sequence * capacity * (2 * HALF)

    b_list = _empty_list(ROWS, K, K_PAD)
    if i_split == 0:
        o_recent = tl.arange(0, K_PAD)
        p_score = p_recent + o_out[:, None] * K_PAD + o_recent[None, :]
        b_score = tl.load(p_score, mask=m_row[:, None], other=0.0)
        b_block = n - 1 - o_recent
        m_recent = m_row[:, None] & ((o_recent < K) & (b_block >= 0))[None, :]
        b_key = tl.where(m_recent, _key(b_score, tl.maximum(b_block, 0)[None, :]), NONE)
        b_list = _keep(b_list, b_key)
    if older > 0:
        b_first, b_second = load_halves(p_far + o_out * (2 * HALF), o_half, m_row, HALF)
        if TIE:
            b_score = _score_tied(b_first, b_second, p_landmarks, o_half, HALF)
            b_block = older - 1 - tl.arange(0, K_PAD)  # only the last of equals can be chosen
            m_older = m_row[:, None] & ((tl.arange(0, K_PAD) < K) & (b_block >= 0))[None, :]
            b_key = _key(b_score[:, None], tl.maximum(b_block, 0)[None, :])
            b_list = _keep(b_list, tl.where(m_older, b_key, NONE))
        else:
            part = tl.cdiv(tl.cdiv(older, COLUMNS), splits) * COLUMNS
            stop = tl.minimum(older, (i_split + 1) * part)
            for i_start in range(i_split * part, stop, COLUMNS):
                b_score, o_block = _score_older(b_first, b_second, p_landmarks, i_start, stop, o_half, HALF, COLUMNS)
                # rows that fill up the tile would take the later block in every round, as all of their scores are equal
                m_older = m_row[:, None] & (o_block < stop)[None, :]
                b_key = tl.where(m_older, _key(b_score, o_block[None, :]), NONE)
                b_list = _keep(b_list, b_key)
    if SPLIT:
        o_list = tl.arange(0, K_PAD)
        p_list = p_kept + (o_out[:, None] * splits + i_split) * K_PAD + o_list[None, :]
        m_kept = (b_list > NONE + K_PAD) & (o_list < K)[None, :]
        tl.store(p_list, tl.where(m_kept, b_list, NONE), mask=m_row[:, None])
    else:
        _store_list(p_choice + o_out * K, b_list, m_row, K, K_PAD)


@triton.jit
def _merge_kernel(p_kept, p_choice, rows, splits, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr):
    """The best k blocks of each of the `rows` queries, from its lists (rows, splits, k padded) of `_choose_kernel`."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_list = _empty_list(ROWS, K, K_PAD)
    for i_split in range(splits):
        p_list = p_kept + (o_row[:, None] * splits + i_split) * K_PAD + tl.arange(0, K_PAD)[None, :]
        b_list = _keep(b_list, tl.load(p_list, mask=m_row[:, None], other=NONE))
    _store_list(p_choice + o_row * K, b_list, m_row, K, K_PAD)


@triton.jit
def _normalise_kernel(
    p_far,
    p_recent,
    p_first_block,
    p_valid,
    p_landmark,
    p_norm,
    groups,
    queries,
    tiles,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    TIE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p_norm (batch, heads, groups, queries): base-2 logsumexp over the candidates; inf for padding: no say."""
    i_group, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * heads + head
    i_batch = i_sequence // HEADS
    o_query = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_query < queries
    o_out = (i_sequence * groups + i_group) * queries + o_query
    o_half = tl.arange(0, HALF_PAD)
    n = tl.load(p_first_block + i_batch * groups + i_group).to(tl.int32)
    older = tl.maximum(n - K, 0)
    m_valid = tl.load(p_valid + (i_batch * groups + i_group) * queries + o_query, mask=m_row, other=0) != 0
    m_valid = m_valid & (n > 0)

    p_score = p_recent + o_out[:, None] * K_PAD + tl.arange(0, K_PAD)[None, :]
    b_score = tl.load(p_score, mask=m_valid[:, None], other=0.0)
    b_peak = tl.max(b_score, 1)
    b_total = tl.sum(tl.exp2(b_score - b_peak[:, None]), 1)
    if older > 0:
        p_landmarks = p_landmark + (i_sequence // GROUP) * capacity * (2 * HALF)
        b_first, b_second = load_halves(p_far + o_out * (2 * HALF), o_half, m_row, HALF)
        if TIE:
            b_tied = _score_tied(b_first, b_second, p_landmarks, o_half, HALF)
            b_new = tl.maximum(b_peak, b_tied)
            b_total = b_total * tl.exp2(b_peak - b_new) + older * tl.exp2(b_tied - b_new)
            b_peak = b_new
        else:
            for i_start in range(0, older, COLUMNS):
                b_older, _ = _score_older(b_first, b_second, p_landmarks, i_start, older, o_half, HALF, COLUMNS)
                b_new = tl.maximum(b_peak, tl.max(b_older, 1))
                b_total = b_total * tl.exp2(b_peak - b_new) + tl.sum(tl.exp2(b_older - b_new[:, None]), 1)
                b_peak = b_new
    tl.store(p_norm + o_out, tl.where(m_valid, b_peak + tl.log2(b_total), float("inf")), mask=m_row)


@triton.jit
def _choose_shared_kernel(
    p_far,
    p_recent,
    p_norm,
    p_first_block,
    p_landmark,
    p_choice,
    groups,
    queries,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    TIE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p_choice (batch, heads, groups, 1, k): the best k blocks by max over the group's queries (score - norm)."""
    i_group = tl.program_id(0)
    i_sequence = tl.program_id(1).to(tl.int64)  # batch * heads + head
    i_batch = i_sequence // HEADS
    o_half = tl.arange(0, HALF_PAD)
    n = tl.load(p_first_block + i_batch * groups + i_group).to(tl.int32)
    older = tl.maximum(n - K, 0)
    p_landmarks = p_landmark + (i_sequence // GROUP) * capacity * (2 * HALF)
    o_first = (i_sequence * groups + i_group) * queries
    o_recent = tl.arange(0, K_PAD)

    b_worth = tl.full([K_PAD], -float("inf"), tl.float32)
    b_tied = tl.full([1], -float("inf"), tl.float32)
    for i_query in range(0, queries, ROWS):
        o_query = i_query + tl.arange(0, ROWS)
        m_row = o_query < queries
        b_norm = tl.load(p_norm + o_first + o_query, mask=m_row, other=float("inf"))
        p_score = p_recent + (o_first + o_query)[:, None] * K_PAD + o_recent[None, :]
        b_score = tl.load(p_score, mask=m_row[:, None], other=-float("inf"))
        b_worth = tl.maximum(b_worth, tl.max(b_score - b_norm[:, None], 0))
        if TIE:
            b_first, b_second = load_halves(p_far + (o_first + o_query) * (2 * HALF), o_half, m_row, HALF)
            b_score = _score_tied(b_first, b_second, p_landmarks, o_half, HALF)
            b_tied = tl.maximum(b_tied, tl.max(b_score - b_norm, 0))
    b_block = n - 1 - o_recent
    m_recent = (o_recent < K) & (b_block >= 0) & (b_worth > -float("inf"))
    b_key = tl.where(m_recent, _key(b_worth, tl.maximum(b_block, 0)), NONE)
    b_list = _keep(_empty_list(1, K, K_PAD), b_key[None, :])

    if TIE:
        b_block = older - 1 - o_recent
        m_older = (o_recent < K) & (b_block >= 0) & (b_tied > -float("inf"))
        b_key = tl.where(m_older, _key(b_tied, tl.maximum(b_block, 0)), NONE)
        b_list = _keep(b_list, b_key[None, :])
    else:
        for i_start in range(0, older, COLUMNS):
            b_best = tl.full([COLUMNS], -float("inf"), tl.float32)
            for i_query in range(0, queries, ROWS):
                o_query = i_query + tl.arange(0, ROWS)
                m_row = o_query < queries
                b_norm = tl.load(p_norm + o_first + o_query, mask=m_row, other=float("inf"))
                b_first, b_second = load_halves(p_far + (o_first + o_query) * (2 * HALF), o_half, m_row, HALF)
                b_older, _ = _score_older(b_first, b_second, p_landmarks, i_start, older, o_half, HALF, COLUMNS)
                b_best = tl.maximum(b_best, tl.max(b_older - b_norm[:, None], 0))
            o_block = i_start + tl.arange(0, COLUMNS)
            m_best = (o_block < older) & (b_best > -float("inf"))
            b_list = _keep(b_list, tl.where(m_best, _key(b_best, o_block), NONE)[None, :])
    p_block = p_choice + (i_sequence * groups + i_group) * K + tl.zeros([1], tl.int64)
    _store_list(p_block, b_list, tl.full([1], True, tl.int1), K, K_PAD)


def select_blocks(
    query: Tensor,
    landmark: Tensor,
    rows: QueryRows,
    *,
    k: int,
    share: bool,
    landmarks_tie: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> Tensor:
    """Chooses k blocks for each query and head, as `choose_blocks` does.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        landmark: (batch, kv_heads, capacity, head_dim), contiguous, in the dtype of `query`: landmark keys rotated by
            their offset in the block; those of each group's candidates are read.
        k: blocks to choose, at least 1.
        share: the queries of a group share a choice (`"head"`), otherwise none do (`"token_and_head"`).
        landmarks_tie: as in `choose_blocks`.
        rotary: fp32.

    Returns:
        (batch, kv_heads, group, groups, 1 if `share` else queries, k), int32, ascending; -1 stands first where fewer
        than k exist. What is chosen for padding is not defined.
    """
    batch, _, kv_heads, group, head_dim = query.shape
    groups, queries = rows.position.shape[1:]
    share = share and queries > 1  # one query's best scores are its best weights
    heads, half, capacity, k_pad = kv_heads * group, head_dim // 2, landmark.shape[2], triton.next_power_of_2(k)
    shape = {"HEADS": heads, "GROUP": group, "HALF": half, "HALF_PAD": padded(half), "K": k, "K_PAD": k_pad}
    far = query.new_empty(batch, heads, groups, queries, head_dim)
    recent = query.new_empty(batch, heads, groups, queries, k_pad, dtype=torch.float32)
    choice = query.new_empty(batch, kv_heads, group, groups, 1 if share else queries, k, dtype=torch.int32)

    tile = min(64, padded(queries))
    tiles = triton.cdiv(queries, tile)
    _score_recent_kernel[(groups * tiles, batch * heads)](
        query,
        rows.column,
        rows.position,
        rows.first_block,
        landmark,
        rotary.cos,
        rotary.sin,
        far,
        recent,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        query.stride(3),
        groups,
        queries,
        tiles,
        capacity,
        **shape,
        BLOCK_SIZE=block_size,
        TIE=landmarks_tie,
        ROWS=tile,
    )
    walk = {"TIE": landmarks_tie, "ROWS": tile, "COLUMNS": LANDMARKS, **shape}
    if share:
        norm = query.new_empty(batch, heads, groups, queries, dtype=torch.float32)
        _normalise_kernel[(groups * tiles, batch * heads)](
            far, recent, rows.first_block, rows.valid, landmark, norm, groups, queries, tiles, capacity, **walk
        )
        _choose_shared_kernel[(groups, batch * heads)](
            far, recent, norm, rows.first_block, landmark, choice, groups, queries, capacity, **walk
        )
        return choice
    walk["ROWS"] = tile = min(64, padded(group * queries))
    tiles = triton.cdiv(group * queries, tile)
    splits = _splits(groups * tiles * batch * kv_heads, capacity, landmarks_tie)
    kept = query.new_empty(batch, heads, groups, queries, splits, k_pad, dtype=torch.int64) if splits > 1 else choice
    _choose_kernel[(groups * tiles, batch * kv_heads, splits)](
        far,
        recent,
        rows.first_block,
        landmark,
        choice,
        kept,
        groups,
        queries,
        tiles,
        capacity,
        splits,
        **walk,
        SPLIT=splits > 1,
    )
    if splits > 1:
        lists = batch * heads * groups * queries
        _merge_kernel[(triton.cdiv(lists, 4),)](kept, choice, lists, splits, K=k, K_PAD=k_pad, ROWS=4)
    return choice


def _splits(programs: int, capacity: int, landmarks_tie: bool) -> int:
    """Programs that share the walk over the landmarks: from shapes alone, so that a captured step stays valid."""
    if landmarks_tie:
        return 1
    return max(1, min(PROGRAMS // programs, MOST_SPLITS, capacity // (2 * LANDMARKS)))
