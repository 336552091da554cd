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

from landmark_llama.attention.blockwise import products_are_small
from landmark_llama.attention.rotary import RotaryTable

# scores held while choosing: enough to be worth a call each, few enough to be fresh in the caches
SCORES_AT_ONCE = 1 << 21
# scores whose exponentials, and the shares made of them, stay far from the largest and the smallest number of fp32
LARGEST_SOFTMAX_SCORE = 30.0


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


@torch.no_grad()
def choose_blocks(
    rotated: Tensor,
    landmarks: Tensor,
    candidates: Tensor,
    valid: Tensor,
    *,
    granularity: str,
    landmarks_tie: bool,
    biases: Tensor | None = None,
    num_sink_blocks: int = 0,
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
        biases: (batch, kv_heads, blocks), added to the scores; not where landmarks tie.
        num_sink_blocks: of the k blocks, so many are the first ones of the candidates, whatever they score.
    """
    k = rotated.shape[-2] - 1
    landmarks = landmarks.to(rotated.dtype)
    if granularity == "head" and rotated.shape[4] == 1:
        granularity = "token_and_head"  # a query that shares its choice with no other, as in a decoding step
    small = False
    if granularity != "token_and_head" and not landmarks_tie:
        limit = LARGEST_SOFTMAX_SCORE if biases is None else LARGEST_SOFTMAX_SCORE - float(biases.abs().amax())
        small = products_are_small(rotated[..., 0, :], landmarks, limit)
    ends = candidates.amax(0).clamp_min(1).tolist()
    scores_per_landmark = rotated[:, :, :, 0, :, 0, 0].numel()
    parts = []
    first = 0
    while first < len(ends):
        columns = 2 * k if landmarks_tie else k + ends[first]
        part = slice(first, first + max(1, SCORES_AT_ONCE // (scores_per_landmark * columns)))
        last = max(ends[part])  # later ones are nobody's candidates
        shown = landmarks[:, :, :last], None if biases is None else biases[:, :, :last]
        parts.append(
            _choose(
                rotated[:, :, :, part],
                *shown,
                candidates[:, part],
                valid[:, part],
                granularity,
                landmarks_tie,
                small,
                num_sink_blocks,
            )
        )
        first = part.stop
    block = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
    return Choice(block, block >= (candidates - k)[:, None, None, :, None, None])


def _choose(
    rotated: Tensor,
    landmarks: Tensor,
    biases: Tensor | None,
    candidates: Tensor,
    valid: Tensor,
    granularity: str,
    tie: bool,
    small: bool,
    sinks: int,
) -> Tensor:
    """The blocks of `Choice` for some groups. `small`: no score exceeds `LARGEST_SOFTMAX_SCORE`, either way."""
    k = rotated.shape[-2] - 1
    n = candidates[:, None, None, :, None, None]
    if tie:
        scores, block_of_first = _tied_scores(rotated, landmarks, candidates)
    else:
        scores, block_of_first = _scores(rotated, landmarks, biases, candidates)
    if sinks:  # they have no part in the comparison
        block = torch.arange(scores.shape[-1], device=scores.device) + block_of_first
        scores.masked_fill_(block < sinks, -torch.inf)
    if granularity != "token_and_head":
        if small:
            # softmax ranks as log-softmax does, in fewer passes; masked entries are 0
            scores.exp_()
            scores.mul_(scores.sum(-1, keepdim=True).reciprocal_())
            nothing = 0.0
        else:
            # of the n - k older candidates, which tie, only k have a column: each column counts for (n - k) / k of them
            weight = ((n - k).clamp_min(1) / (n - k).clamp(1, k)).log() if tie else None
            if tie:
                scores[..., :k] += weight
            scores = scores.log_softmax(-1)
            if tie:
                scores[..., :k] -= weight
            nothing = -torch.inf
        if granularity == "head" and not valid.all():
            scores.masked_fill_(~valid[:, None, None, ..., None], nothing)
        scores = scores.amax((4,) if granularity == "head" else (1, 2), keepdim=True)
        scores.masked_fill_((scores == nothing) | (n <= sinks), -torch.inf)
    value, column = top_latest(scores, k - sinks)
    block = (column + block_of_first).masked_fill(value == -torch.inf, -1)
    return (with_sinks(block, sinks, n) if sinks else block).sort(-1).values


def with_sinks(block: Tensor, sinks: int, candidates: Tensor) -> Tensor:
    """Puts the first `sinks` candidates before the blocks (..., k - sinks) that were chosen among the others; -1 for
    one that is no candidate.

    candidates: broadcastable to (..., 1): how many there are.
    """
    sink = torch.arange(sinks, device=block.device)
    return torch.cat([torch.where(sink < candidates, sink, -1).expand(*block.shape[:-1], sinks), block], dim=-1)


def _scores(rotated: Tensor, landmarks: Tensor, biases: Tensor | None, candidates: Tensor) -> tuple[Tensor, int]:
    """Scores (..., queries, columns) and the block of column 0; -inf where there is no candidate.

    Older candidates are all scored at distance k + 1, the last k each at its own.
    """
    k = rotated.shape[-2] - 1
    fewest = int(candidates.min())
    # left-pad, so that every group has k recent columns
    missing = max(0, k + 1 - fewest)
    if missing:
        landmarks = torch.nn.functional.pad(landmarks, (0, 0, missing, 0))
        biases = None if biases is None else torch.nn.functional.pad(biases, (missing, 0))
    farthest = rotated[..., 0, :]
    scores = (farthest.flatten(2, 4) @ landmarks.transpose(-1, -2)).unflatten(2, farthest.shape[2:-1])
    if biases is not None:
        scores += biases[:, :, None, None, None]
    scores[..., :missing] = -torch.inf
    edge = fewest + missing
    column = torch.arange(edge, scores.shape[-1], device=rotated.device)
    scores[..., edge:].masked_fill_(column >= candidates[:, None, None, :, None, None] + missing, -torch.inf)
    recent = candidates.unsqueeze(-1) + torch.arange(missing - k, missing, device=rotated.device)  # (batch, groups, k)
    row = torch.arange(len(landmarks), device=rotated.device)[:, None, None]
    key = landmarks[row, :, recent].permute(0, 3, 1, 2, 4)  # (batch, kv_heads, groups, k, head_dim)
    value = torch.linalg.vecdot(rotated[..., 1:, :], key[:, :, None, :, None])
    if biases is not None:
        value += biases[row, :, recent].permute(0, 3, 1, 2)[:, :, None, :, None]
    recent = recent[:, None, None, :, None]
    return scores.scatter_(-1, recent.expand_as(value), value.masked_fill(recent < missing, -torch.inf)), -missing


def _tied_scores(rotated: Tensor, landmarks: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scores` where all landmark keys are the same: of the older candidates only the last k can be chosen."""
    k = rotated.shape[-2] - 1
    scores = torch.linalg.vecdot(rotated, landmarks[:, :, None, None, None, 0, None])
    first = candidates[:, None, None, :, None, None] - 2 * k
    scores = torch.cat([scores[..., :1].expand(*scores.shape[:-1], k), scores[..., 1:]], dim=-1)
    return scores.masked_fill(first + torch.arange(2 * k, device=rotated.device) < 0, -torch.inf), first


def top_latest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (..., k) of the k highest scores (..., n), n > k; among equal ones the later indices win."""
    values, indices = scores.topk(k + 1, dim=-1)
    tied = values[..., k - 1] == values[..., k]
    if tied.any():
        tied &= values[..., k] > -torch.inf
    values, indices = values[..., :k], indices[..., :k]
    if tied.any():
        # sorting stably from the last index to the first leaves the later of two equal scores in front
        value, index = scores[tied].flip(-1).sort(dim=-1, descending=True, stable=True)
        values[tied] = value[:, :k]
        indices[tied] = scores.shape[-1] - 1 - index[:, :k]
    return values, indices
