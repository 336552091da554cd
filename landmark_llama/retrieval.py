"""Landmark scores -> chosen blocks -> their distances.

Shapes: `batch`, `kv_heads`, `group` (query heads that share a KV head), `groups` of `queries` that stand together,
`head_dim`. Each group of queries has `candidates`, the complete blocks 0 .. n - 1 before the blocks that it reads directly.

Distances are counted in blocks from the first direct block backwards (the paper's stingy positions, `docs/positions.md`):
of `n` candidates the last `k' = min(k, n)` are scored at their true distances 1 .. k', all older ones at `k' + 1`; the
chosen ones are read at distances that keep their order and need no more room than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable

SCORES_AT_ONCE = 1 << 22  # scores held while choosing: queries of few enough groups at a time to stay near the cores


class Choice(NamedTuple):
    """Blocks that each query reads.

    `block`: (batch, kv_heads or 1, group or 1, groups, queries or 1, k), ascending; -1 stands first where fewer than k exist.
    `distance`: the same shape: blocks from the first direct block back to the slot that the block is read at.
    """

    block: Tensor
    distance: Tensor


def choose_blocks(
    query: Tensor,
    landmarks: Tensor,
    candidates: Tensor,
    position: Tensor,
    valid: Tensor,
    *,
    num_blocks: int,
    granularity: str,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    landmarks_tie: bool,
) -> Choice:
    """Chooses `num_blocks` blocks for each query by the scores of their landmarks; ties go to the later block.

    Args:
        query: (batch, kv_heads, group, groups, queries, head_dim), not rotated.
        landmarks: (batch, kv_heads, blocks, head_dim), rotated by their offset in the block; all candidates, at least one.
        candidates: (batch, groups): number of candidates n of each group.
        position: (batch, groups, queries): positions from the group's first direct block to the query.
        valid: (batch, groups, queries): False for padding, which has no say in a shared choice.
        granularity: `"token_and_head"`, `"head"` (softmax over the candidates, then the maximum over the group's queries)
            or `"token"` (the same, maximum over heads).
        landmarks_tie: all landmark keys are one and the same (layer 0): equal up to rounding noise, which must not decide.
    """
    step = max(1, SCORES_AT_ONCE // (query[:, :, :, 0, :, 0].numel() * (landmarks.shape[2] + num_blocks)))
    parts = []
    for first in range(0, query.shape[3], step):
        part = slice(first, first + step)
        parts.append(
            _choose(
                query[:, :, :, part],
                landmarks,
                candidates[:, part],
                position[:, part],
                valid[:, part],
                _Settings(num_blocks, granularity, block_size, rotary, scale, landmarks_tie),
            )
        )
    block = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
    return Choice(block, _distance(block, candidates, num_blocks))


class _Settings(NamedTuple):
    num_blocks: int
    granularity: str
    block_size: int
    rotary: RotaryTable
    scale: float
    landmarks_tie: bool


def _choose(
    query: Tensor, landmarks: Tensor, candidates: Tensor, position: Tensor, valid: Tensor, settings: _Settings
) -> Tensor:
    """The `block` of `Choice` for a few groups."""
    k = settings.num_blocks
    n = candidates[:, None, None, :, None, None]
    older, recent = _scores(query, landmarks, candidates, position, settings)
    scores = torch.cat([older, recent], dim=-1)
    # columns ascend with the blocks: first the older candidates, then the last k
    first_older = n - 2 * k if settings.landmarks_tie else torch.zeros_like(n)
    if settings.granularity != "token_and_head":
        weight = torch.ones_like(n)
        if settings.landmarks_tie:  # one column of the k shown stands for its share of the n - k that tie
            weight = (n - k).clamp_min(1) / (n - k).clamp(1, k)
        scores = _share(scores, older.shape[-1], weight, valid, settings.granularity)
    value, column = top_latest(scores, k)
    block = torch.where(column < older.shape[-1], first_older + column, n - k + column - older.shape[-1])
    return block.masked_fill_(value == -torch.inf, -1).sort(-1).values


def _scores(
    query: Tensor, landmarks: Tensor, candidates: Tensor, position: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Scores of the older candidates, all at one distance, and of the last k, each at its own; -inf where there is none.

    Returns (..., queries, older) and (..., queries, k), fp32. Older are all blocks by number; where landmarks tie, they are
    the k blocks before the last k, the only ones that can be chosen.
    """
    k, block_size, rotary = settings.num_blocks, settings.block_size, settings.rotary
    query = query.float()
    position = position[:, None, None]
    at_most = rotary.rotate(query, position + (k + 1) * block_size) * settings.scale
    back = torch.arange(-k, 0, device=query.device)  # the last k candidates, from the farthest to the next
    recent_block = candidates.unsqueeze(-1) + back  # (batch, groups, k)
    at_distance = rotary.rotate(query.unsqueeze(-2), position.unsqueeze(-1) - back * block_size) * settings.scale
    if settings.landmarks_tie:
        landmark = landmarks[:, :, 0].float()
        older = torch.einsum("bhagqd,bhd->bhagq", at_most, landmark).unsqueeze(-1).expand(*query.shape[:-1], k)
        recent = torch.einsum("bhagqkd,bhd->bhagqk", at_distance, landmark)
        older = older.masked_fill((recent_block - k < 0)[:, None, None, :, None], -torch.inf)
    else:
        older = at_most.flatten(2, 4) @ landmarks.float().transpose(-1, -2)
        older = older.unflatten(2, query.shape[2:-1])
        edge = max(0, int(candidates.min()) - k)
        block = torch.arange(edge, landmarks.shape[2], device=query.device)
        too_late = block >= (candidates.unsqueeze(-1) - k)  # (batch, groups, blocks)
        older[..., edge:].masked_fill_(too_late[:, None, None, :, None], -torch.inf)
        row = torch.arange(len(landmarks), device=query.device)[:, None, None]
        key = landmarks[row, :, recent_block.clamp_min(0)].float()  # (batch, groups, k, kv_heads, head_dim)
        recent = torch.einsum("bhagqkd,bgkhd->bhagqk", at_distance, key)
    return older, recent.masked_fill((recent_block < 0)[:, None, None, :, None], -torch.inf)


def _share(scores: Tensor, older: int, weight: Tensor, valid: Tensor, granularity: str) -> Tensor:
    """Log of the softmax over candidates, maximum over those that share the choice. `weight`: candidates an older column stands for."""
    norm = torch.logaddexp(
        scores[..., :older].logsumexp(-1, keepdim=True) + weight.log(), scores[..., older:].logsumexp(-1, keepdim=True)
    )
    scores = scores.sub_(norm.masked_fill_(norm == -torch.inf, 0.0))
    if granularity == "token":
        return scores.amax(dim=(1, 2), keepdim=True)
    if not valid.all():
        scores.masked_fill_(~valid[:, None, None, ..., None], -torch.inf)
    return scores.amax(dim=4, keepdim=True)


def top_latest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (..., k) of the k highest scores (..., n), n > k; among equal ones the later indices win."""
    values, indices = scores.topk(k + 1, dim=-1)
    tied = (values[..., k - 1] == values[..., k]) & (values[..., k] > -torch.inf)
    values, indices = values[..., :k], indices[..., :k]
    if tied.any():
        # sorting stably from the last index to the first leaves the later of two equal scores in front
        value, index = scores[tied].flip(-1).sort(dim=-1, descending=True, stable=True)
        values[tied] = value[:, :k]
        indices[tied] = scores.shape[-1] - 1 - index[:, :k]
    return values, indices


def _distance(block: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Slots of the chosen blocks, as distances: rank r of k' stands k' + 1 - r back, one less if among the last k'."""
    rank = torch.arange(k, device=block.device)
    recent = block >= (candidates - k)[:, None, None, :, None, None]
    return k + 1 - rank - recent.long()
