"""The Triton kernels of `table_triton.py`: the blocks that a tile of queries chose, and attention over them.

Names, shapes and constants: `triton_rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from landmark_llama.attention.triton_tiles import padded
from landmark_llama.reading.triton_rows import LOG2_E, load_queries, rotate, tile_of_program

LAST = tl.constexpr(2**31 - 1)  # above the number of every block


@triton.jit
def unite_kernel(
    p_choice, p_valid, p_union, p_count, size,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """p_union (batch, heads, groups, tiles, M * K): the blocks that a tile chose, ascending; p_count: how many."""
    i_batch, i_sequence, i_group, i_tile = tile_of_program(size, HEADS)
    o_query = i_tile * M + tl.arange(0, M)
    o_row = (i_batch * size.groups + i_group) * size.queries + o_query
    # (M,)
    m_valid = tl.load(p_valid + o_row, mask=o_query < size.queries, other=0) != 0
    # (M, K_PAD)
    b_block = _load_choice(p_choice, i_batch, i_sequence % HEADS, i_group, o_query, m_valid, HEADS_PER_KV, K)
    b_block = tl.where(b_block < 0, LAST, b_block)
    i_list = (i_sequence * size.groups + i_group) * size.tiles + i_tile
    count = 0
    i_block = tl.min(b_block)
    while i_block < LAST:
        tl.store(p_union + i_list * (M * K) + count, i_block)
        count += 1
        b_block = tl.where(b_block == i_block, LAST, b_block)
        i_block = tl.min(b_block)
    tl.store(p_count + i_list, count)


@triton.jit
def attend_kernel(
    p_query, p_scoring, p_blocks, p_bias, p_choice, p_lists, p_groups, p_rotary, p_output, size, columns, scale,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, ONE_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """p_output (batch, columns, heads, head_dim): attention of the valid queries; nothing is written for others.

    p_blocks: keys and values (batch, kv_heads, capacity, block_size, head_dim). p_lists: what `unite_kernel` wrote.
    p_scoring, p_bias: what scores landmarks in place of `p_query`, and what is added to the scores; or None.
    SHARED: the queries of a group share a choice, which is the list. ONE_BLOCK: they lie in one block. Where both hold,
    one rotation to a block serves all of them. EXACT: blocks weigh what their tokens do, whatever landmarks score.
    """
    i_batch, i_sequence, i_group, i_tile = tile_of_program(size, HEADS)
    i_head = i_sequence % HEADS
    o_query = i_tile * M + tl.arange(0, M)
    m_row = o_query < size.queries
    o_row = (i_batch * size.groups + i_group) * size.queries + o_query
    _, p_valid, _, p_first_block = p_groups
    # (M,)
    m_valid = tl.load(p_valid + o_row, mask=m_row, other=0) != 0
    if tl.max(m_valid.to(tl.int32), 0) == 0:
        return
    # 2 (M, H), and (M,) each
    b_query, b_column, b_own, b_offset = load_queries(
        p_query, p_groups, p_rotary, i_batch, i_head, o_row, m_row, scale, BLOCK, HEAD_DIM
    )
    b_scoring = p_scoring
    if p_scoring is not None:
        # 2 (M, H)
        b_scoring, _, _, _ = load_queries(
            p_scoring, p_groups, p_rotary, i_batch, i_head, o_row, m_row, scale, BLOCK, HEAD_DIM
        )
    b_own = tl.where(m_valid, b_own, 0)
    if ONE_BLOCK:
        b_own = tl.zeros([1], tl.int32) + tl.max(b_own, 0)
    first_block = tl.load(p_first_block + i_batch * size.groups + i_group).to(tl.int32)
    p_blocks = _first_block(p_blocks, p_bias, i_sequence // HEADS_PER_KV, size, BLOCK, HEAD_DIM)

    D: tl.constexpr = padded(HEAD_DIM)
    # (M,), (M,), (M, D): peak, total and output of the running softmax
    b_softmax = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
    if K > 0:
        o_choosing = tl.zeros([1], tl.int32) if SHARED else o_query
        m_choosing = o_choosing < size.queries
        # (M or 1, K_PAD)
        b_choice = _load_choice(p_choice, i_batch, i_head, i_group, o_choosing, m_choosing, HEADS_PER_KV, K)
        if SHARED:
            # numbers of blocks from the choice at hand: an address read from memory in the loop would stop its loads
            o_rank = tl.arange(0, triton.next_power_of_2(K))[None, :]
            for i_rank in range(tl.sum(tl.sum((b_choice < 0).to(tl.int32), 1), 0), K):
                i_block = tl.sum(tl.sum(tl.where(o_rank == i_rank, b_choice, 0), 1), 0)
                b_distance = b_own + K + 1 - i_rank - (i_block >= first_block - K).to(tl.int32)
                m_chosen = tl.full([1], True, tl.int1)
                b_softmax = _read_block(
                    b_softmax, b_query, b_scoring, p_rotary, b_distance, p_blocks, i_block, m_chosen, m_chosen & False,
                    b_offset, BLOCK, HEAD_DIM, EXACT,
                )  # fmt: skip
        else:
            i_list = (i_sequence * size.groups + i_group) * size.tiles + i_tile
            p_union, p_count = p_lists
            for i_entry in range(0, tl.load(p_count + i_list)):
                i_block = tl.load(p_union + i_list * (M * K) + i_entry)
                b_distance, m_chosen = _chosen_distance(b_choice, i_block, b_own, first_block, K)
                b_softmax = _read_block(
                    b_softmax, b_query, b_scoring, p_rotary, b_distance, p_blocks, i_block, m_chosen, m_chosen & False,
                    b_offset, BLOCK, HEAD_DIM, EXACT,
                )  # fmt: skip
    for i_direct in range(0, tl.max(b_own, 0) + 1):
        # padding may stand past the capacity; valid queries do not
        i_block = tl.minimum(first_block + i_direct, size.capacity - 1)
        b_softmax = _read_block(
            b_softmax, b_query, b_scoring, p_rotary, tl.maximum(b_own - i_direct, 0), p_blocks, i_block,
            i_direct <= b_own, i_direct == b_own, b_offset, BLOCK, HEAD_DIM, EXACT,
        )  # fmt: skip

    _, b_total, b_output = b_softmax
    b_output = b_output / b_total[:, None]
    o_dim = tl.arange(0, D)
    p_out = p_output + ((i_batch * columns + b_column) * HEADS + i_head)[:, None] * HEAD_DIM + o_dim[None, :]
    m_out = (m_row & m_valid)[:, None] & (o_dim < HEAD_DIM)[None, :]
    tl.store(p_out, b_output.to(p_output.dtype.element_ty), mask=m_out)


@triton.jit
def _first_block(p_blocks, p_bias, i_kv_sequence, size, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to block 0 of KV head `i_kv_sequence` of (batch, kv_heads): keys' first halves (H, N), values (N, D).

    And to the first half of its landmark's key (1, H), and to its bias, or None.
    """
    p_key, p_value = p_blocks
    o_head = i_kv_sequence * size.capacity * (BLOCK * HEAD_DIM)
    o_key, o_half = tl.arange(0, padded(BLOCK)), tl.arange(0, padded(HEAD_DIM // 2))
    p_keys = p_key + o_head + o_key[None, :] * HEAD_DIM + o_half[:, None]
    p_landmark = p_key + o_head + (BLOCK - 1) * HEAD_DIM + o_half[None, :]
    p_values = p_value + o_head + o_key[:, None] * HEAD_DIM + tl.arange(0, padded(HEAD_DIM))[None, :]
    if p_bias is not None:
        p_bias = p_bias + i_kv_sequence * size.capacity
    return p_keys, p_values, p_landmark, p_bias


@triton.jit
def _load_choice(
    p_choice, i_batch, i_head, i_group, o_query, m_query, HEADS_PER_KV: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """(queries, K_PAD): the blocks that queries chose, LAST where there is no query and where padded."""
    stride_batch, stride_kv_head, stride_head, stride_group, stride_query = p_choice.stride
    o_choice = tl.arange(0, triton.next_power_of_2(K))
    p_group = p_choice.p + i_batch * stride_batch + i_group * stride_group
    p_head = p_group + i_head // HEADS_PER_KV * stride_kv_head + i_head % HEADS_PER_KV * stride_head
    p_query = p_head + o_query[:, None] * stride_query + o_choice[None, :]
    # (queries, K_PAD)
    return tl.load(p_query, mask=m_query[:, None] & (o_choice < K)[None, :], other=LAST)


@triton.jit
def _chosen_distance(b_choice, i_block, b_own, first_block, K: tl.constexpr):
    """Distance in blocks at which each query reads a block of the list, and whether it chose the block."""
    b_rank = tl.sum((b_choice < i_block).to(tl.int32), 1)
    m_chosen = tl.max((b_choice == i_block).to(tl.int32), 1) > 0
    return b_own + K + 1 - b_rank - (i_block >= first_block - K).to(tl.int32), m_chosen


@triton.jit
def _read_block(
    b_softmax, b_query, b_scoring, p_rotary, b_distance, p_blocks, i_block, m_seen, m_own, b_offset,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The running softmax of each query (peak (M,), total (M,), output (M, D)) after one more block.

    b_query, b_scoring: 2 (M, H) each, the latter scores landmarks, or is None. b_distance: (M or 1,): how many blocks
    back each query reads the block. p_blocks: of `_first_block`. m_seen, m_own: (M or 1,): whether the query sees the
    block, and whether the block is its own, of which it sees the tokens up to `b_offset` (M,).
    """
    b_peak, b_total, b_output = b_softmax
    p_keys, p_values, p_landmark, p_bias = p_blocks
    dtype: tl.constexpr = p_keys.dtype.element_ty
    o_key = tl.arange(0, padded(BLOCK))
    b_turned = rotate(b_query, p_rotary, b_distance * BLOCK, HEAD_DIM)
    # (M, N)
    b_score = _block_scores(b_turned, p_keys + i_block * (BLOCK * HEAD_DIM), BLOCK, HEAD_DIM)
    if not EXACT:
        if b_scoring is None:
            b_landmark = tl.sum(tl.where((o_key == BLOCK - 1)[None, :], b_score, 0.0), 1)
        else:
            p_landmark += i_block * (BLOCK * HEAD_DIM)
            b_landmark = _landmark_scores(b_scoring, p_rotary, b_distance * BLOCK, p_landmark, HEAD_DIM)
        if p_bias is not None:
            b_landmark += tl.load(p_bias + i_block) * LOG2_E
    m_earlier = (m_own == 0)[:, None] | (o_key[None, :] <= b_offset[:, None])
    b_score = tl.where((o_key < BLOCK - 1)[None, :] & m_earlier, b_score, -float("inf"))
    b_inside = tl.max(b_score, 1)  # finite: every query sees the first token of a block
    b_score = tl.exp2(b_score - b_inside[:, None])
    b_sum = tl.sum(b_score, 1)
    b_logit = b_inside + tl.log2(b_sum)
    if not EXACT:
        b_logit = tl.where(m_own, b_logit, b_landmark)
    b_logit = tl.where(m_seen, b_logit, -float("inf"))

    b_new = tl.maximum(b_peak, b_logit)
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # -inf: the query has seen no block yet
    b_keep, b_weight = tl.exp2(b_peak - b_base), tl.exp2(b_logit - b_base)
    b_score = b_score * (b_weight / b_sum)[:, None]
    o_dim = tl.arange(0, padded(HEAD_DIM))
    m_value = (o_key < BLOCK - 1)[:, None] & (o_dim < HEAD_DIM)[None, :]
    # (N, D)
    b_value = tl.load(p_values + i_block * (BLOCK * HEAD_DIM), mask=m_value, other=0.0)
    # (M, D)
    b_output = tl.dot(b_score.to(dtype), b_value, b_output * b_keep[:, None], input_precision="ieee")
    return b_new, b_total * b_keep + b_weight, b_output


@triton.jit
def _landmark_scores(b_scoring, p_rotary, b_position, p_landmark, HEAD_DIM: tl.constexpr):
    """(M,): scores of the landmark at the pointers `p_landmark` (1, H) for queries 2 (M, H) at `b_position` (M or 1,).

    Turning the key back is turning the query on; where the position is one for all, it is one key.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    b_first, b_second = b_scoring
    m_half = (tl.arange(0, padded(HALF)) < HALF)[None, :]
    # (1, H)
    b_key_first = tl.load(p_landmark, mask=m_half, other=0.0).to(tl.float32)
    # (1, H)
    b_key_second = tl.load(p_landmark + HALF, mask=m_half, other=0.0).to(tl.float32)
    # 2 (M or 1, H)
    b_back, b_forth = rotate((b_key_first, -b_key_second), p_rotary, b_position, HEAD_DIM)
    return tl.sum(b_first * b_back - b_second * b_forth, 1)


@triton.jit
def _block_scores(b_query, p_keys, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(M, N): scores of queries 2 (M, H) and all keys of one block, its landmark included."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = p_keys.dtype.element_ty
    b_first, b_second = b_query
    o_key, o_half = tl.arange(0, padded(BLOCK)), tl.arange(0, padded(HALF))
    m_key = (o_key < BLOCK)[None, :] & (o_half < HALF)[:, None]
    # (H, N) to (M, N)
    b_score = tl.dot(b_first.to(dtype), tl.load(p_keys, mask=m_key, other=0.0), input_precision="ieee")
    # (H, N)
    b_key = tl.load(p_keys + HALF, mask=m_key, other=0.0)
    # (M, N)
    return tl.dot(b_second.to(dtype), b_key, b_score, input_precision="ieee")
