"""Landmark attention of groups of queries over blocks laid out for them, in PyTorch: how a table of blocks is read.

- `attend_window`: each group over its own short window of consecutive blocks. Also returns the logsumexp.
- `attend_gathered`: the groups over the blocks gathered for them, merged with the result of `attend_window`.

Formulas: `docs/attention.md`. Everything is computed in fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark_llama.attention.blockwise import are_small, exponentials_, normalise_, upcast


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    first: Tensor,
    block_size: int,
    scale: float,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Landmark attention of groups of queries over their windows of consecutive blocks.

    Args:
        query: (..., queries, head_dim). The leading dimensions count the groups.
        key, value: (..., blocks * block_size, head_dim): the window of each group.
        position: (..., queries), integer, or broadcastable to that: where in its window each query stands. It sees the
            ordinary tokens of its own block up to there, and earlier blocks of the window through their landmarks.
        first: (..., queries): the first block of the window that each query sees.
        landmark_query: (..., queries, head_dim): what scores landmarks in place of `query`.
        landmark_bias: (..., blocks): added to the scores of the landmarks.
        exact_weights: earlier blocks weigh what their tokens do, whatever their landmarks score.

    Returns:
        The attention output (..., queries, head_dim), and the logsumexp (..., queries) of each query's own group, which
        `attend_gathered` needs. Both in the computing dtype.
    """
    query, key, value = upcast(query) * scale, upcast(key), upcast(value)
    scores = (query @ key.transpose(-1, -2)).unflatten(-1, (-1, block_size))
    if exact_weights:
        scores[..., -1] = scores[..., :-1].logsumexp(-1)
    elif landmark_query is not None:
        landmark = key[..., block_size - 1 :: block_size, :]
        scores[..., -1] = upcast(landmark_query) * scale @ landmark.transpose(-1, -2)
    if landmark_bias is not None and not exact_weights:
        scores[..., -1] += landmark_bias.unsqueeze(-2)
    block = torch.arange(scores.shape[-2], device=scores.device)
    weights, _, lse = normalise_(scores, position, block < first.unsqueeze(-1))
    return weights.flatten(-2) @ value, lse


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    window: tuple[Tensor, Tensor],
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
) -> Tensor:
    """Adds the blocks gathered for each group of queries to the attention over its window.

    `reading.segments.attend_chosen` computes the same from the blocks of a whole text, and is differentiable.

    Args:
        query: (..., blocks, queries, head_dim): the queries, scaled, rotated to their distance to each gathered block.
        key, value: (..., blocks, block_size, head_dim): the blocks that the group's queries chose.
        chosen: (..., blocks, 1), boolean: False where a group chose fewer blocks than `blocks`.
        window: output (..., queries, head_dim) and logsumexp (..., queries) of `attend_window` for the same queries.
        landmark_query: the shape of `query`: what scores landmarks in its place.
        landmark_bias: (..., blocks): added to the scores of the landmarks.
        exact_weights: blocks weigh what their tokens do, whatever their landmarks score.

    Returns:
        (..., queries, head_dim): attention over the window and the gathered blocks together.
    """
    query, key, value = upcast(query), upcast(key), upcast(value)
    window_output, window_lse = window
    scores = query @ key.transpose(-1, -2)  # (..., blocks, queries, block_size)
    if exact_weights:
        scores[..., -1] = scores[..., :-1].logsumexp(-1)
    elif landmark_query is not None:
        scores[..., -1] = torch.linalg.vecdot(upcast(landmark_query), key[..., -1:, :])
    if landmark_bias is not None and not exact_weights:
        scores[..., -1] += landmark_bias.unsqueeze(-1)
    landmark = scores[..., -1].masked_fill(~chosen, -torch.inf)  # (..., blocks, queries)
    small = are_small(scores)
    scores[..., -1] = -torch.inf
    lse = torch.logaddexp(window_lse, landmark.logsumexp(-2))
    total, _ = exponentials_(scores, small)
    scores.mul_(((landmark - lse.unsqueeze(-2)).exp() / total).unsqueeze(-1))
    gathered = scores.transpose(-3, -2).flatten(-2) @ value.flatten(-3, -2)
    return window_output * (window_lse - lse).exp().unsqueeze(-1) + gathered
