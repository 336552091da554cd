"""Landmark scores -> chosen blocks -> their distances.

Shapes: `batch`, `kv_heads`, `group` (query heads that share a KV head), `groups` of `queries` that stand together,
`head_dim`. Each group of queries has `candidates`, the complete blocks 0 .. n - 1 before the blocks that it reads
directly.

Distances are counted in blocks from the first direct block backwards (the paper's stingy positions,
`docs/positions.md`): of `n` candidates the last `k' = min(k, n)` are scored at their true distances 1 .. k', all
older ones at `k' + 1`; the chosen ones are read at distances that keep their order and need no more room than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable

SCORES_AT_ONCE = 1 << 19  # scores held while choosing: few enough groups at a time to stay in the cores' caches


class Choice(NamedTuple):
    """Blocks that each query reads.

    block: (batch, kv_heads or 1, group or 1, groups, queries or 1, k), ascending; -1 stands first where fewer than k
        exist.
    recent: the same shape, boolean: whether the block is among the last k candidates.
    """

    block: Tensor
    recent: Tensor

    def distance(self) -> Tensor:
        """Blocks from the first direct block back to the slot that each chosen block is read at, `block`'s shape.

        The chosen one of rank r (0 .. k' - 1) stands k' + 1 - r back, one less if it is among the last k' candidates.
        """
        k = self.block.shape[-1]
        return torch.arange(k + 1, 1, -1, device=self.block.device) - self.recent.long()

    def at_their_distances(self, rotated: Tensor) -> Tensor:
        """Queries (..., queries, k, head_dim), each rotated to its chosen blocks, from `rotate_to_distances`."""
        # rank r takes distance k + 1 - r, which is entry r, or the next if recent
        return torch.where(self.recent.unsqueeze(-1), rotated[..., 1:, :], rotated[..., :-1, :])


def rotate_to_distances(query: Tensor, position: Tensor, k: int, block_size: int, rotary: RotaryTable) -> Tensor:
    """Queries rotated to blocks k + 1 .. 1 before their first direct block.

    Args:
        query: (batch, kv_heads, group, groups, queries, head_dim), not rotated.
        position: (batch, groups, queries): positions from the group's first direct block to the query.

    Returns:
        (batch, kv_heads, group, groups, queries, k + 1, head_dim), the farthest first.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    distance = torch.arange(k + 1, 0, -1, device=query.device)
    # rotating twice spares one row of the table a query and distance
    return rotary.rotate(rotary.rotate(query, position[:, None, None]).unsqueeze(-2), distance * block_size)


def choose_blocks(
    rotated: Tensor,
    landmarks: Tensor,
    candidates: Tensor,
    valid: Tensor,
    *,
    granularity: str,
    landmarks_tie: bool,
) -> Choice:
    """Chooses k blocks for each query by the scores of their landmarks; ties go to the later block.

    Args:
        rotated: (batch, kv_heads, group, groups, queries, k + 1, head_dim), from `rotate_to_distances`, scaled.
        landmarks: (batch, kv_heads, blocks, head_dim), rotated by their offset in the block; all candidates, at
            least one.
        candidates: (batch, groups): number of candidates n of each group.
        valid: (batch, groups, queries): False for padding, which has no say in a shared choice.
        granularity: `"token_and_head"`, `"head"` (softmax over the candidates, then the maximum over the group's
            queries) or `"token"` (the same, maximum over heads).
        landmarks_tie: all landmark keys are one and the same (layer 0): equal up to rounding noise, which must not
            decide.
    """
    landmarks = landmarks.to(rotated.dtype)
    shown = 1 if landmarks_tie else landmarks.shape[2]
    step = max(1, SCORES_AT_ONCE // (rotated[:, :, :, 0, :, 0, 0].numel() * shown))
    parts = []
    for first in range(0, rotated.shape[3], step):
        part = slice(first, first + step)
        scores = _Scores.of(rotated[:, :, :, part], landmarks, candidates[:, part], landmarks_tie)
        if granularity != "token_and_head":
            scores = scores.shared(valid[:, part], granularity)
        parts.append(scores.best())
    block = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
    return Choice(block, block >= (candidates - block.shape[-1])[:, None, None, :, None, None])


class _Scores(NamedTuple):
    """Landmark scores of some groups of queries, -inf where there is no candidate.

    older: (..., queries, blocks): the candidates before the last k, by block; where all landmarks tie, (...,
        queries, 1).
    recent: (..., queries, k): the last k candidates.
    n: (batch, 1, 1, groups, 1, 1): number of candidates.
    """

    older: Tensor
    recent: Tensor
    n: Tensor
    tie: bool

    @classmethod
    def of(cls, rotated: Tensor, landmarks: Tensor, candidates: Tensor, tie: bool) -> _Scores:
        """Older candidates are all scored at distance k + 1, the last k each at its own."""
        k = rotated.shape[-2] - 1
        recent_block = candidates.unsqueeze(-1) + torch.arange(-k, 0, device=rotated.device)  # (batch, groups, k)
        n = candidates[:, None, None, :, None, None]
        farthest, recent_query = rotated[..., 0, :], rotated[..., 1:, :]
        if tie:
            landmark = landmarks[:, :, None, None, None, 0]
            older = torch.linalg.vecdot(farthest, landmark).unsqueeze(-1).masked_fill(n <= k, -torch.inf)
            recent = torch.linalg.vecdot(recent_query, landmark.unsqueeze(-2))
        else:
            older = (farthest.flatten(2, 4) @ landmarks.transpose(-1, -2)).unflatten(2, farthest.shape[2:-1])
            edge = max(0, int(candidates.min()) - k)
            block = torch.arange(edge, landmarks.shape[2], device=rotated.device)
            older[..., edge:].masked_fill_(block >= n - k, -torch.inf)
            row = torch.arange(len(landmarks), device=rotated.device)[:, None, None]
            key = landmarks[row, :, recent_block.clamp_min(0)]  # (batch, groups, k, kv_heads, head_dim)
            recent = torch.linalg.vecdot(recent_query, key.permute(0, 3, 1, 2, 4)[:, :, None, :, None])
        return cls(older, recent.masked_fill((recent_block < 0)[:, None, None, :, None], -torch.inf), n, tie)

    def shared(self, valid: Tensor, granularity: str) -> _Scores:
        """Log of the softmax over the candidates, maximum over those that share a choice."""
        k = self.recent.shape[-1]
        older_norm = self.older.logsumexp(-1, keepdim=True)
        if self.tie:  # one column stands for all n - k
            older_norm = older_norm + (self.n - k).clamp_min(1).log()
        norm = torch.logaddexp(older_norm, self.recent.logsumexp(-1, keepdim=True))
        norm.masked_fill_(norm == -torch.inf, 0.0)
        if granularity == "head":
            norm.masked_fill_(~valid[:, None, None, ..., None], torch.inf)
        dim = (4,) if granularity == "head" else (1, 2)
        older, recent = ((x - norm).amax(dim, keepdim=True) for x in (self.older, self.recent))
        return _Scores(older, recent, self.n, self.tie)

    def best(self) -> Tensor:
        """The k best blocks (..., queries, k), ascending, -1 first where there are fewer."""
        k = self.recent.shape[-1]
        back = torch.arange(-k, 0, device=self.recent.device)
        if self.tie:
            older_block = self.n - k + back
            older = self.older.masked_fill(older_block < 0, -torch.inf).expand(*self.recent.shape)
        else:
            missing = max(0, k + 1 - self.older.shape[-1])
            older, older_block = top_latest(torch.nn.functional.pad(self.older, (missing, 0), value=-torch.inf), k)
            older_block, order = (older_block - missing).sort(-1)
            older = older.gather(-1, order)
        value, column = top_latest(torch.cat([older, self.recent], dim=-1), k)
        block = torch.cat([older_block.expand_as(older), (self.n + back).expand_as(self.recent)], dim=-1)
        return block.gather(-1, column).masked_fill(value == -torch.inf, -1).sort(-1).values


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
