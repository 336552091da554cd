"""The highest of many scores: exact, ties to the later index, in few passes over what a core's cache holds.

In two levels. The keys are cut into segments of `SEGMENT`. A first pass makes all scores, a tile at a time, and leaves
the highest of each segment. The k highest scores, the later of equal ones, lie in the k segments with the highest
maxima, the later of equal ones: any other segment has k scores before each of its own. A second pass scores these
segments alone. Where the softmax of the scores is wanted, the first pass also sums their exponentials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 16
TILE = 2048  # keys scored at once
TILE_QUERIES = 128  # by so many queries: 1 MB of scores, to stay in a core's cache
FOLDED_FROM = 2048  # scores of a row from which on `top_latest` folds them


def top_latest(scores: Tensor, k: int, nothing: float = -torch.inf) -> tuple[Tensor, Tensor]:
    """Values and indices (..., k) of the k highest scores (..., n), n > k; among equal ones the later indices win.

    A score that is `nothing` is none: its value is -inf, and its index any.
    """
    if not k:
        return scores[..., :0], torch.zeros_like(scores[..., :0], dtype=torch.long)
    # values, indices: (..., k + 1)
    values, indices = _top_folded(scores, k + 1) if scores.shape[-1] >= FOLDED_FROM else scores.topk(k + 1, dim=-1)
    tied = values[..., k - 1] == values[..., k]
    if tied.any():
        tied &= values[..., k] > nothing
    values, indices = values[..., :k], indices[..., :k]
    if tied.any():
        indices[tied] = _latest_of_equal(scores[tied], values[tied], indices[tied])
    return values.masked_fill(values == nothing, -torch.inf), indices


def _latest_of_equal(scores: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Indices (rows, k) of the highest scores (rows, n), of which `value`, `index` (rows, k) name any: the latest ones.

    Of those above the lowest of `value` none is missing; only which of its equals are taken is open.
    """
    k, least = value.shape[-1], value[:, -1:]
    column = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    equal = torch.where(scores == least, column, -1)
    latest = (_top_folded if scores.shape[-1] >= FOLDED_FROM else torch.topk)(equal, k)[0].long()
    # those above the tie stay in front
    above = (value > least).sum(-1, keepdim=True)
    place = torch.arange(k, device=scores.device)
    return torch.where(place < above, index, latest.gather(-1, (place - above).clamp_min(0)))


def _top_folded(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """As `topk`, many times faster on a CPU for rows of thousands.

    A row is laid out as a table. Its highest entries lie in the columns with the highest maxima.
    """
    # as many rows as make the table's columns and the entries of the chosen ones about equally many
    folds = 1 << round(math.log2(scores.shape[-1] / number) / 2)
    width = scores.shape[-1] // folds
    table, rest = scores[..., : folds * width].unflatten(-1, (folds, width)), scores[..., folds * width :]
    column = table.amax(-2).topk(number, dim=-1, sorted=False).indices
    found = table.gather(-1, column.unsqueeze(-2).expand(*column.shape[:-1], folds, number)).flatten(-2)
    place = column.unsqueeze(-2) + torch.arange(0, folds * width, width, device=scores.device).unsqueeze(-1)
    behind = torch.arange(folds * width, scores.shape[-1], device=scores.device).expand_as(rest)
    values, index = torch.cat([found, rest], dim=-1).topk(number, dim=-1)
    return values, torch.cat([place.flatten(-2), behind], dim=-1).gather(-1, index)


class Highest(NamedTuple):
    """The k highest of a row of scores, or of the shares of all queries of a row, the later of equal ones.

    value, index: (..., k).
    total: (..., 1): the sums of the exponentials of each query's scores, where they share a choice.
    """

    value: Tensor
    index: Tensor
    total: Tensor | None


class Sharing(NamedTuple):
    """Queries that share a choice: it goes by the highest of their shares, exponentials over their sum.

    total: (batch, choices, queries, 1): sums of the exponentials of scores that are not among those asked for.
    valid: (batch, choices, queries), boolean: False for a query that has no say.
    """

    total: Tensor
    valid: Tensor

    def part(self, choices: slice) -> Sharing:
        """Some of the choices."""
        return Sharing(self.total[:, choices], self.valid[:, choices])

    def of_all(self, exponentials: Tensor, total: Tensor) -> Tensor:
        """The highest share of valid queries, (batch, choices, n), of exponentials (batch, choices, queries, n).

        Overwrites them. total: (batch, choices, queries, 1).
        """
        weight = torch.where(self.valid.unsqueeze(-1), total.reciprocal(), 0)
        return exponentials.mul_(weight).amax(-2)


def in_tiles(key: Tensor) -> list[Tensor]:
    """Keys (batch, keys, head_dim) as `highest_of_many` reads them: tiles (batch, head_dim, TILE or fewer).

    Keys beyond the last whole segment are left out. Segments lie across: the keys of one stand as far apart as a tile
    has segments, so that a vector holds keys of many of them.
    """
    whole = key[:, : key.shape[1] // SEGMENT * SEGMENT]
    return [x.unflatten(1, (-1, SEGMENT)).permute(0, 3, 2, 1).flatten(2) for x in whole.split(TILE, dim=1)]


def highest_of_many(
    query: Tensor,
    key: Tensor,
    tiles: list[Tensor],
    bias: Tensor | None,
    k: int,
    sharing: Sharing | None,
    first: int = 0,
) -> Highest:
    """The highest products of each query with the keys in `tiles`, or of those that share a choice.

    Args:
        query: (batch, choices, queries, head_dim).
        key: (batch, keys, head_dim), contiguous.
        tiles: the first of them, from `in_tiles`.
        bias: (batch, keys), added to the products.
        sharing: of the queries; None: each has a choice of its own. Totals that do not fit fp32 are 0 or infinite.
        first: the index of the first key.

    Returns:
        Values and indices (batch, choices, queries, k), or (batch, choices, k) of a shared choice.
    """
    at_once = max(1, TILE_QUERIES // query.shape[2])
    chosen, totals = [], []
    for begin in range(0, query.shape[1], at_once):
        part = slice(begin, begin + at_once)
        maxima, total = _maxima(query[:, part], tiles, bias, exponentials=sharing is not None)
        if sharing is not None:
            own = sharing.part(part)
            total += own.total
            maxima = own.of_all(maxima, total)
            totals.append(total)
        chosen.append(top_latest(maxima, k)[1])
    many, total = maxima.shape[-1] * SEGMENT, torch.cat(totals, dim=1) if totals else None
    segment = torch.cat(chosen, dim=1).sort(-1).values
    index = (segment.unsqueeze(-1) * SEGMENT + torch.arange(SEGMENT, device=query.device)).flatten(-2)
    # as one matrix a choice: the chosen segments' keys
    segments = key[:, :many].unflatten(1, (-1, SEGMENT)).flatten(2)
    row = torch.arange(len(key), device=query.device).view(-1, *(1,) * (index.dim() - 1))
    place = (segment + row * segments.shape[1]).flatten()
    chosen = segments.flatten(0, 1).index_select(0, place).view(*index.shape, -1)
    if sharing is None:
        value = (chosen @ query.unsqueeze(-1)).squeeze(-1)
        value = value if bias is None else value + bias[row, index]
    else:
        value = query @ chosen.transpose(-1, -2)
        value = value if bias is None else value + bias[row, index].unsqueeze(-2)
        value = sharing.of_all(value.exp_(), total)
    value, place = top_latest(value, k)
    return Highest(value, index.gather(-1, place) + first, total)


def _maxima(
    query: Tensor, tiles: list[Tensor], bias: Tensor | None, *, exponentials: bool
) -> tuple[Tensor, Tensor | None]:
    """Of each segment the highest score (batch, choices, queries, segments), or its exponential, and their sums."""
    shape, flat = query.shape[:-1], query.flatten(1, 2)
    segments = sum(tile.shape[-1] for tile in tiles) // SEGMENT
    maxima, total, first = flat.new_empty(*flat.shape[:2], segments), None, 0
    room = flat.new_empty(flat.shape[:2].numel() * TILE)
    for tile in tiles:
        stop = first + tile.shape[-1]
        scores = room[: flat.shape[:2].numel() * tile.shape[-1]].view(*flat.shape[:2], -1)
        torch.bmm(flat, tile, out=scores)
        if bias is not None:
            scores += bias[:, None, first:stop].unflatten(-1, (-1, SEGMENT)).transpose(-1, -2).flatten(-2)
        if exponentials:
            added = scores.exp_().sum(-1, keepdim=True)
            total = added if total is None else total.add_(added)
        torch.amax(scores.unflatten(-1, (SEGMENT, -1)), -2, out=maxima[..., first // SEGMENT : stop // SEGMENT])
        first = stop
    return maxima.view(*shape, -1), None if total is None else total.view(*shape, 1)


def merge(first: Highest, second: Highest) -> Highest:
    """The highest of two rows, of which all indices of the second are later."""
    k = first.value.shape[-1]
    value, index = (torch.cat([a, b], dim=-1) for a, b in ((first.value, second.value), (first.index, second.index)))
    # the later index in front, where a stable sort leaves it before its equals
    index, order = index.sort(dim=-1, descending=True)
    value, place = value.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return Highest(value[..., :k], index.gather(-1, place)[..., :k], first.total)
