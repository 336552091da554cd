"""Landmark scores -> chosen blocks -> their distances.

Shapes: `batch`, `kv_heads`, `group` (query heads that share a KV head), `groups` of `queries` that stand together,
`head_dim`. Each group of queries has `candidates`, the complete blocks 0 .. n - 1 before the blocks that it reads
directly.

Distances are counted in blocks from the first direct block backwards (the paper's stingy positions,
`docs/positions.md`): of `n` candidates the last `k' = min(k, n)` are scored at their true distances 1 .. k', all
older ones at `k' + 1`; the chosen ones are read at distances that keep their order and need no more room than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.approximate import ApproximateLandmarks
from landmark_llama.reading.highest import (
    Highest,
    Sharing,
    highest_of_many,
    in_tiles,
    merge,
    top_latest,
)
from landmark_llama.reading.repeated import RepeatedLandmarks

# scores held while choosing: enough to be worth a call each, few enough to be fresh in the caches
SCORES_AT_ONCE = 1 << 21
# candidates, of a choice of its own and a shared one, and queries of a KV head, from which on landmarks are laid out in
# tiles (`highest.py`)
MANY_FROM, MANY_SHARED_FROM, TILED_FROM = 16384, 2048, 512
# sums of exponentials below, or above its inverse, are near the end of what fp32 can hold
SMALLEST_SOFTMAX_TOTAL = 1e-13


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


def landmarks_at_their_distances(
    landmarks: Tensor, candidates: Tensor, k: int, block_size: int, rotary: RotaryTable
) -> Tensor:
    """Landmarks (batch, kv_heads, groups, k, head_dim) of the last k candidates, the farthest first, rotated so that a
    query at distance k + 1 scores each at its own: k rotations of a key instead of k of every query.
    """
    recent = (candidates.unsqueeze(-1) + torch.arange(-k, 0, device=candidates.device)).clamp_min(0)
    key = landmarks[torch.arange(len(landmarks), device=recent.device)[:, None, None], :, recent]
    slot = torch.arange(1, k + 1, device=recent.device)
    return rotary.rotate(key.permute(0, 3, 1, 2, 4), slot * block_size)


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
    repeated: RepeatedLandmarks | ApproximateLandmarks | None = None,
    num_sink_blocks: int = 0,
    recent_landmarks: Tensor | None = None,
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
        repeated: finds the highest scores without comparing all: where many landmarks are equal, each is scored once;
            or approximately.
        num_sink_blocks: of the k blocks, so many are the first ones of the candidates, whatever they score.
        recent_landmarks: from `landmarks_at_their_distances`; then `rotated` has the farthest distance alone.
    """
    k = rotated.shape[-2] - 1 if recent_landmarks is None else recent_landmarks.shape[-2]
    if num_sink_blocks == k:  # nothing to compare
        whose = rotated.shape[:-2] if granularity == "token_and_head" else (*rotated.shape[:4], 1)
        whose = (whose[0], 1, 1, *rotated.shape[3:5]) if granularity == "token" else whose
        n = candidates[:, None, None, :, None, None]
        block = with_sinks(rotated.new_empty((*whose, 0), dtype=torch.long), k, n).sort(-1).values
        return Choice(block, block >= n - k)
    if granularity == "head" and rotated.shape[4] == 1:
        granularity = "token_and_head"  # a query that shares its choice with no other, as in a decoding step
    settings = {"granularity": granularity, "landmarks_tie": landmarks_tie, "num_sink_blocks": num_sink_blocks}
    fewest, highest, sinks = int(candidates.min()) - k, None, num_sink_blocks
    alike = not landmarks_tie and sinks < k and recent_landmarks is None  # candidates, all compared alike
    if granularity != "token" and alike and rotated.device.type == "cpu":
        found = repeated.search(landmarks[:, :, : max(fewest, 0)], biases, k - sinks, sinks) if repeated else None
        many_from = MANY_FROM if granularity == "token_and_head" else MANY_SHARED_FROM
        if found is not None:
            highest, near_from = found
        elif fewest - sinks >= many_from and rotated[0, 0, ..., 0, 0].numel() >= TILED_FROM:
            if rotated.shape[1] > 1:
                return _choose_head_by_head(rotated, landmarks, candidates, valid, biases, settings)
            key, bias = landmarks[:, 0, sinks:].to(rotated.dtype), None if biases is None else biases[:, 0, sinks:]
            found = {"key": key, "tiles": in_tiles(key[:, : fewest - sinks]), "bias": bias}
            highest = functools.partial(highest_of_many, **found, k=k - sinks, first=sinks)
            near_from = sinks + sum(tile.shape[-1] for tile in found["tiles"])
    landmarks, block = landmarks.to(rotated.dtype), None
    asked = rotated, landmarks, biases, candidates, valid
    if highest is not None:
        block = _choose_of_many(*asked, granularity, highest, near_from, sinks)
    if block is None:
        block = _choose_by_parts(*asked, settings, recent_landmarks)
    return Choice(block, block >= (candidates - k)[:, None, None, :, None, None])


def _choose_head_by_head(
    rotated: Tensor,
    landmarks: Tensor,
    candidates: Tensor,
    valid: Tensor,
    biases: Tensor | None,
    settings: dict[str, Any],
) -> Choice:
    """As `choose_blocks`, so that more queries meet the same landmarks at once."""
    choices = []
    for head in range(rotated.shape[1]):
        alone = slice(head, head + 1)
        bias = None if biases is None else biases[:, alone]
        choices.append(
            choose_blocks(rotated[:, alone], landmarks[:, alone], candidates, valid, biases=bias, **settings)
        )
    return Choice(*(torch.cat(parts, dim=1) for parts in zip(*choices, strict=True)))


def _choose_by_parts(
    rotated: Tensor,
    landmarks: Tensor,
    biases: Tensor | None,
    candidates: Tensor,
    valid: Tensor,
    settings: dict[str, Any],
    recent_landmarks: Tensor | None = None,
) -> Tensor:
    """The blocks of `Choice`, as many groups at once as `SCORES_AT_ONCE` lets."""
    k = rotated.shape[-2] - 1 if recent_landmarks is None else recent_landmarks.shape[-2]
    ends = candidates.amax(0).clamp_min(1).tolist()
    scores_per_landmark = rotated[:, :, :, 0, :, 0, 0].numel()
    parts = []
    first = 0
    while first < len(ends):
        columns = 2 * k if settings["landmarks_tie"] else k + ends[first]
        part = slice(first, first + max(1, SCORES_AT_ONCE // (scores_per_landmark * columns)))
        last = max(ends[part])  # later ones are nobody's candidates
        shown = landmarks[:, :, :last], None if biases is None else biases[:, :, :last]
        recent = None if recent_landmarks is None else recent_landmarks[:, :, part].to(rotated.dtype)
        whose = candidates[:, part], valid[:, part]
        parts.append(_choose(rotated[:, :, :, part], recent, *shown, *whose, k=k, **settings))
        first = part.stop
    return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]


def _choose(
    rotated: Tensor,
    recent_landmarks: Tensor | None,
    landmarks: Tensor,
    biases: Tensor | None,
    candidates: Tensor,
    valid: Tensor,
    k: int,
    granularity: str,
    landmarks_tie: bool,
    num_sink_blocks: int,
) -> Tensor:
    """The blocks of `Choice` for some groups."""
    n, sinks = candidates[:, None, None, :, None, None], num_sink_blocks
    number = k - sinks

    def score() -> tuple[Tensor, Tensor | int]:
        if landmarks_tie:
            scores, block_of_first = _tied_scores(rotated, landmarks, candidates)
        else:
            scores, block_of_first = _scores(rotated, recent_landmarks, landmarks, biases, candidates, k)
        if sinks:  # they have no part in the comparison
            block = torch.arange(scores.shape[-1], device=scores.device) + block_of_first
            scores.masked_fill_(block < sinks, -torch.inf)
        return scores, block_of_first

    scores, block_of_first = score()
    if granularity == "token_and_head":
        value, column = top_latest(scores, number)
    else:
        shares, nobody = None if landmarks_tie else _shares_(scores, n), n <= sinks
        if granularity == "head":
            nobody = nobody | ~valid.any(-1)[:, None, None, :, None, None]
        if shares is not None:
            value, column = top_latest(_of_all(shares, valid, granularity, nothing=0.0), number, nothing=0.0)
        # shares too small for fp32 may hide a candidate
        if shares is None or ((value == -torch.inf) & (n >= k) & ~nobody).any():
            logs = _log_shares(scores if landmarks_tie else score()[0], n, k, landmarks_tie)
            value, column = top_latest(_of_all(logs, valid, granularity, nothing=-torch.inf), number)
        value = value.masked_fill(nobody, -torch.inf)
    block = (column + block_of_first).masked_fill(value == -torch.inf, -1)
    return (with_sinks(block, sinks, n) if sinks else block).sort(-1).values


@torch.no_grad()
def scores_of_all(rotated: Tensor, landmarks: Tensor, candidates: Tensor, biases: Tensor | None = None) -> Tensor:
    """What single queries compare when they choose: the scores of all candidates, (batch, kv_heads, group, blocks).

    Args:
        rotated: (batch, kv_heads, group, k + 1, head_dim); landmarks, biases: as in `choose_blocks`.
        candidates: (batch,): number of candidates of each query. -inf stands behind the last one.
    """
    query, number = rotated[:, :, :, None, None], candidates.unsqueeze(1)
    scores, first = _scores(query, None, landmarks.to(rotated.dtype), biases, number, rotated.shape[-2] - 1)
    return scores[:, :, :, 0, 0, -first:]


def with_sinks(block: Tensor, sinks: int, candidates: Tensor) -> Tensor:
    """Puts the first `sinks` candidates before the blocks (..., k - sinks) that were chosen among the others; -1 for
    one that is no candidate.

    candidates: broadcastable to (..., 1): how many there are.
    """
    sink = torch.arange(sinks, device=block.device)
    return torch.cat([torch.where(sink < candidates, sink, -1).expand(*block.shape[:-1], sinks), block], dim=-1)


def _choose_of_many(
    rotated: Tensor,
    landmarks: Tensor,
    biases: Tensor | None,
    candidates: Tensor,
    valid: Tensor,
    granularity: str,
    highest: Callable[..., Highest],
    near_from: int,
    sinks: int,
) -> Tensor | None:
    """As `_choose`, where `highest` knows the highest scores of the candidates before `near_from`, all far ones.

    None where exponentials do not fit fp32.
    """
    k, near = rotated.shape[-2] - 1, slice(near_from, int(candidates.max()))
    near_landmarks, near_biases = landmarks[:, :, near], None if biases is None else biases[:, :, near]
    rest, block_of_first = _scores(rotated, None, near_landmarks, near_biases, candidates - near_from, k)
    rest, sharing, whose = rest.flatten(0, 1).flatten(1, 2), None, rotated.shape[:4]  # (batch, choices, queries, near)
    if granularity == "head":
        seen = valid[:, None, None].expand(rotated.shape[:-2]).flatten(0, 1).flatten(1, 2)
        sharing = Sharing(rest.exp_().sum(-1, keepdim=True), seen)
    far = highest(rotated[..., 0, :].flatten(0, 1).flatten(1, 2), sharing=sharing)
    if sharing is not None:
        total, seen = far.total.squeeze(-1), sharing.valid
        fitting = (total > SMALLEST_SOFTMAX_TOTAL) & (total < 1 / SMALLEST_SOFTMAX_TOTAL)
        if not (fitting | ~seen).all():
            return None
        rest = sharing.of_all(rest, far.total)
    value, column = top_latest(rest, k - sinks)
    value, block = merge(far, Highest(value, column + block_of_first + near_from, None))[:2]
    if sharing is not None:
        nobody = ~seen.any(-1, keepdim=True)
        if ((value == 0) & ~nobody).any():  # shares too small for fp32 may hide a candidate
            return None
        block = block.masked_fill(nobody, -1).unsqueeze(2)
    block = block.unflatten(1, whose[2:]).unflatten(0, whose[:2])
    return (with_sinks(block, sinks, candidates[:, None, None, :, None, None]) if sinks else block).sort(-1).values


def _shares_(scores: Tensor, n: Tensor) -> Tensor | None:
    """The softmax of `scores`, overwriting them, 0 where there is no candidate; None where it does not fit fp32.

    It ranks as log-softmax does, in fewer passes.
    """
    total = scores.exp_().sum(-1, keepdim=True)
    fitting = (total > SMALLEST_SOFTMAX_TOTAL) & (total < 1 / SMALLEST_SOFTMAX_TOTAL)
    if not (fitting | (n == 0)).all():
        return None
    return scores.mul_(total.clamp_min_(SMALLEST_SOFTMAX_TOTAL).reciprocal_())


def _log_shares(scores: Tensor, n: Tensor, k: int, tie: bool) -> Tensor:
    """The log-softmax of `scores`; -inf where there is no candidate."""
    if not tie:
        return scores.log_softmax(-1)
    # of the n - k older candidates, which tie, only k have a column: each column counts for (n - k) / k of them
    weight = ((n - k).clamp_min(1) / (n - k).clamp(1, k)).log()
    scores[..., :k] += weight
    scores = scores.log_softmax(-1)
    scores[..., :k] -= weight
    return scores


def _of_all(shares: Tensor, valid: Tensor, granularity: str, nothing: float) -> Tensor:
    """The largest of the shares of those who choose together. `nothing`: the share of padding, overwritten."""
    if granularity == "head" and not valid.all():
        shares.masked_fill_(~valid[:, None, None, ..., None], nothing)
    return shares.amax((4,) if granularity == "head" else (1, 2), keepdim=True)


def _scores(
    rotated: Tensor,
    recent_landmarks: Tensor | None,
    landmarks: Tensor,
    biases: Tensor | None,
    candidates: Tensor,
    k: int,
) -> tuple[Tensor, int]:
    """Scores (..., queries, columns) and the block of column 0; -inf where there is no candidate.

    Older candidates are all scored at distance k + 1, the last k each at its own.
    """
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
    if recent_landmarks is None:
        key = landmarks[row, :, recent].permute(0, 3, 1, 2, 4)  # (batch, kv_heads, groups, k, head_dim)
        value = torch.linalg.vecdot(rotated[..., 1:, :], key[:, :, None, :, None])
    else:
        value = farthest @ recent_landmarks.unsqueeze(2).transpose(-1, -2)
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
