"""Choosing blocks on a GPU: landmark scores and the running best k. The scores of older candidates are never stored.

The definition is `choice.choose_blocks`. The kernels choose what it chooses, ties included. Of a group's `n` candidates
the last k are scored at their own distances, all older ones at distance k + 1:

1. `score_recent_kernel` rotates each query to distance k + 1 and scores the last k candidates.
2. `choose_kernel` walks over the older candidates' landmarks and keeps the best k of each query. In a decoding step
   several programs share the walk, and `merge_kernel` keeps the best of what they kept.
3. Where the queries of a group share a choice (`"head"`), `normalise_kernel` walks first, for the logsumexp of each
   query's scores, and `choose_shared_kernel` keeps the best of max over queries (score - logsumexp).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.triton_tiles import LOG2_E, padded
from landmark_llama.reading.choice_kernels import (
    choose_kernel,
    choose_shared_kernel,
    merge_kernel,
    normalise_kernel,
    score_recent_kernel,
)
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.triton_rows import Sizes, group_pointers, query_pointer

LANDMARKS = 64  # landmarks scored at once
PROGRAMS = 256  # a walk is split until there are about so many programs: two for each multiprocessor of a large chip
MOST_SPLITS = 32
MOST_QUERIES = 64  # of a tile


class _Scored(NamedTuple):
    """What the kernels choose from.

    far: (batch, heads, groups, queries, head_dim): queries rotated to distance k + 1, as the older candidates see them.
    recent: (batch, heads, groups, queries, k padded): scores of the last k candidates, fp32.
    landmark: (batch, kv_heads, capacity, head_dim).
    bias: (batch, kv_heads, capacity), fp32, or None.
    groups: pointers of `group_pointers`.
    """

    far: Tensor
    recent: Tensor
    landmark: Tensor
    bias: Tensor | None
    groups: tuple[Tensor, ...]


def select_blocks(
    query: Tensor,
    landmark: Tensor,
    groups: QueryGroups,
    *,
    k: int,
    share: bool,
    landmarks_tie: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    bias: Tensor | None = None,
    num_sink_blocks: int = 0,
) -> Tensor:
    """Chooses k blocks for each query and head, as `choose_blocks` does.

    Args:
        query: (batch, columns, kv_heads, heads_per_kv, head_dim), contiguous, not rotated: what scores landmarks.
        landmark: (batch, kv_heads, capacity, head_dim), contiguous, in the dtype of `query`: landmark keys rotated by
            their offset in the block. Only those of each group's candidates are read.
        groups: where the queries stand.
        k: blocks to choose, at least 1.
        share: the queries of a group share a choice (`"head"`), otherwise none do (`"token_and_head"`).
        landmarks_tie, num_sink_blocks: as in `choose_blocks`.
        rotary: fp32.
        bias: (batch, kv_heads, capacity), fp32, contiguous: added to the scores; not where landmarks tie.

    Returns:
        (batch, kv_heads, heads_per_kv, groups, 1 if `share` else queries, k), int32, ascending; -1 stands first where
        fewer than k exist. What is chosen for padding is not defined.
    """
    batch, _, kv_heads, heads_per_kv, head_dim = query.shape
    num_groups, num_queries = groups.position.shape[1:]
    share = share and num_queries > 1  # one query's best scores are its best weights
    heads = kv_heads * heads_per_kv
    shape = {"HEADS": heads, "HEADS_PER_KV": heads_per_kv, "HEAD_DIM": head_dim, "K": k, "TIE": landmarks_tie}
    shape["SINKS"] = num_sink_blocks
    far = query.new_empty(batch, heads, num_groups, num_queries, head_dim)
    recent = query.new_empty(*far.shape[:-1], triton.next_power_of_2(k), dtype=torch.float32)
    scored = _Scored(far, recent, landmark, bias, group_pointers(groups))
    choices = 1 if share else num_queries
    choice = query.new_empty(batch, kv_heads, heads_per_kv, num_groups, choices, k, dtype=torch.int32)
    tile, size = _tiling(scored, num_queries)
    score_recent_kernel[size.groups * size.tiles, batch * heads](
        query_pointer(query),
        landmark,
        bias,
        scored.groups,
        (rotary.cos, rotary.sin),
        far,
        recent,
        size,
        scale * LOG2_E,
        **shape,
        BLOCK=block_size,
        M=tile,
    )
    (_choose_shared if share else _choose)(scored, choice, shape)
    return choice


def _choose(scored: _Scored, choice: Tensor, shape: dict[str, Any]) -> None:
    """Writes the best k blocks of each query to `choice`."""
    batch, kv_heads, heads_per_kv, _, num_queries, k = choice.shape
    tile, size = _tiling(scored, heads_per_kv * num_queries)
    programs = size.groups * size.tiles, batch * kv_heads
    splits = _splits(programs[0] * programs[1], size.capacity, shape["TIE"])
    rows = scored.recent.shape[:-1]
    kept = choice.new_empty(*rows, splits, scored.recent.shape[-1], dtype=torch.int64) if splits > 1 else choice
    choose_kernel[(*programs, splits)](
        *scored, choice, kept, size, splits, **shape, SPLIT=splits > 1, M=tile, N=LANDMARKS
    )
    if splits > 1:
        lists = rows.numel()
        merge_kernel[(triton.cdiv(lists, 4),)](kept, choice, lists, splits, K=k, M=4)


def _choose_shared(scored: _Scored, choice: Tensor, shape: dict[str, Any]) -> None:
    """Writes the best k blocks of each group of queries to `choice`."""
    batch, heads, num_groups, num_queries = scored.recent.shape[:-1]
    tile, size = _tiling(scored, num_queries)
    norm = scored.recent.new_empty(scored.recent.shape[:-1])
    normalise_kernel[num_groups * size.tiles, batch * heads](*scored, norm, size, **shape, M=tile, N=LANDMARKS)
    choose_shared_kernel[num_groups, batch * heads](*scored, norm, choice, size, **shape, M=tile, N=LANDMARKS)


def _tiling(scored: _Scored, rows: int) -> tuple[int, Sizes]:
    """Rows of a tile, where those of a group and head, or KV head, are `rows`; and the sizes of the call."""
    tile = min(MOST_QUERIES, padded(rows))
    num_groups, num_queries = scored.recent.shape[2:4]
    return tile, Sizes(num_groups, num_queries, triton.cdiv(rows, tile), scored.landmark.shape[2])


def _splits(programs: int, capacity: int, landmarks_tie: bool) -> int:
    """Programs that share a walk over the landmarks. Shapes alone decide, so that a recorded step stays valid."""
    if landmarks_tie:
        return 1
    return max(1, min(PROGRAMS // programs, MOST_SPLITS, capacity // (2 * LANDMARKS)))
