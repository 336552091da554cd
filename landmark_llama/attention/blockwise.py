"""Landmark attention in PyTorch, block by block: the fast path without a GPU kernel.

Four functions share one tile of work, a set of queries against whole blocks of keys:

- `blockwise_landmark_attention`: causal attention over one sequence, with a backward of its own. It walks over query
  tiles, reads only the blocks that a tile can see, and keeps one number a (query, block) for the backward.
  `attend_sequence` is the same, returning the logsumexp too.
- `attend_window`: each group of queries over its own short window of consecutive blocks, returning the logsumexp too.
- `attend_retrieved`: each group of queries over blocks that it chose, merged with the result of `attend_window`.

Formulas: `docs/attention.md`. Everything is computed in fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from landmark_llama.attention.reference import seen_blocks

# positions of a query tile, rounded to whole blocks: small enough to skip most of what causality zeroes
QUERY_TILE = 64
# scores whose exponentials, summed over a block, stay far from the largest and the smallest number of fp32
SMALL_SCORE = 60.0


def blockwise_landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    num_retrieved_blocks: int | None = None,
    num_direct_blocks: int = 0,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> Tensor:
    """Causal landmark attention; arguments and result as in `landmark_attention`."""
    retrieval = None if num_retrieved_blocks is None else (num_retrieved_blocks, num_direct_blocks)
    output, _ = _BlockwiseLandmarkAttention.apply(
        query, key, value, landmark_query, landmark_bias, block_size, scale, retrieval
    )
    return output.to(query.dtype)


def attend_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal landmark attention to which blocks from elsewhere can be added; arguments as in `landmark_attention`.

    Returns:
        The output (batch, heads, query_length, head_dim), and the logsumexp (batch, heads, query_length) of each
        query's own group. Both in the computing dtype, both differentiable.
    """
    return _BlockwiseLandmarkAttention.apply(query, key, value, landmark_query, landmark_bias, block_size, scale, None)


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
) -> tuple[Tensor, Tensor]:
    """Landmark attention of groups of queries over their windows of consecutive blocks.

    Args:
        query: (..., queries, head_dim), one group along each of the leading dimensions.
        key, value: (..., blocks * block_size, head_dim), the group's window.
        position: (..., queries), integer, or what broadcasts to it: where in its window each query stands. It sees the
            ordinary tokens of its own block up to there and earlier blocks of the window through their landmarks.
        first: (..., queries): the first block of the window that each query sees.
        landmark_query: (..., queries, head_dim): what scores landmarks in place of `query`.
        landmark_bias: (..., blocks): added to the scores of the landmarks.

    Returns:
        The attention output (..., queries, head_dim), and the logsumexp (..., queries) of each query's own group:
        what the window weighs when blocks from elsewhere are merged in. Both in the computing dtype.
    """
    query, key, value = _upcast(query) * scale, _upcast(key), _upcast(value)
    scores = (query @ key.transpose(-1, -2)).unflatten(-1, (-1, block_size))
    if landmark_query is not None:
        landmark_query = _upcast(landmark_query) * scale
    _score_landmarks_(scores, landmark_query, key[..., block_size - 1 :: block_size, :], landmark_bias)
    block = torch.arange(scores.shape[-2], device=scores.device)
    weights, _, lse = _normalise_(scores, position, block < first.unsqueeze(-1))
    return weights.flatten(-2) @ value, lse


def attend_retrieved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    window: tuple[Tensor, Tensor],
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> Tensor:
    """Adds retrieved blocks to the attention over a window.

    Args:
        query: (..., blocks, queries, head_dim): the queries, scaled, rotated to their distance to each retrieved block.
        key, value: (..., blocks, block_size, head_dim): the retrieved blocks.
        chosen: (..., blocks, 1), boolean: False where a query has fewer blocks to retrieve than there is room for.
        window: what `attend_window` gave for the same queries: (..., queries, head_dim) and (..., queries).
        landmark_query: the shape of `query`: what scores landmarks in its place.
        landmark_bias: (..., blocks): added to the scores of the landmarks.

    Returns:
        (..., queries, head_dim): attention over the window and the retrieved blocks together.
    """
    query, key, value = _upcast(query), _upcast(key), _upcast(value)
    window_output, window_lse = window
    scores = query @ key.transpose(-1, -2)  # (..., blocks, queries, block_size)
    if landmark_query is not None:
        scores[..., -1] = torch.linalg.vecdot(_upcast(landmark_query), key[..., -1:, :])
    if landmark_bias is not None:
        scores[..., -1] += landmark_bias.unsqueeze(-1)
    landmark = scores[..., -1].masked_fill(~chosen, -torch.inf)  # (..., blocks, queries)
    small = _are_small(scores)
    scores[..., -1] = -torch.inf
    lse = torch.logaddexp(window_lse, landmark.logsumexp(-2))
    total, _ = _exponentials_(scores, small)
    scores.mul_(((landmark - lse.unsqueeze(-2)).exp() / total).unsqueeze(-1))
    retrieved = scores.transpose(-3, -2).flatten(-2) @ value.flatten(-3, -2)
    return window_output * (window_lse - lse).exp().unsqueeze(-1) + retrieved


class _BlockwiseLandmarkAttention(torch.autograd.Function):
    """Forward and backward over query tiles; GQA by folding the query heads of a KV head into the tile's queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        landmark_query: Tensor | None,
        landmark_bias: Tensor | None,
        block_size: int,
        scale: float,
        retrieval: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(query, key, value, landmark_query, landmark_bias, block_size, scale)
        output = torch.empty_like(tiles.query)
        lse = output.new_empty(output.shape[:-1])
        adjusts = []
        small = tiles.scores_are_small()
        for rows, blocks, position in tiles:
            scores = tiles.scores(rows, blocks)
            unseen = None
            if retrieval is not None and scores.shape[-2] > sum(retrieval) + 1:
                unseen = ~seen_blocks(scores[..., -1], position // block_size, *retrieval)
            weights, adjust, lse[..., rows] = _normalise_(scores, position, unseen, small)
            output[..., rows, :] = weights.flatten(-2) @ tiles.value[..., blocks, :]
            adjusts.append(adjust)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, landmark_query, landmark_bias, output, *adjusts)
            ctx.block_size, ctx.scale = block_size, scale
        ctx.set_materialize_grads(False)
        return tiles.unfold(output), tiles.unfold(lse.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, landmark_query, landmark_bias, output, *adjusts = ctx.saved_tensors
        block_size = ctx.block_size
        tiles = _Tiles(query, key, value, landmark_query, landmark_bias, block_size, ctx.scale)
        grad = torch.zeros_like(output) if grad is None else tiles.fold(grad).contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (tiles.query, tiles.key, tiles.value))
        grad_landmark_query = None if landmark_query is None else torch.zeros_like(tiles.query)
        grad_bias = None if landmark_bias is None else torch.zeros_like(tiles.landmark_bias)
        mean = (grad * output).sum(-1, keepdim=True)  # D of the formulas
        if grad_lse is not None:
            mean -= tiles.fold(grad_lse.unsqueeze(-1))  # the own group's weights are the logsumexp's derivatives
        for (rows, blocks, position), adjust in zip(tiles, adjusts, strict=True):
            q, k, g = tiles.query[..., rows, :], tiles.key[..., blocks, :], grad[..., rows, :]
            scores = tiles.scores(rows, blocks)
            grad_weights = (g @ tiles.value[..., blocks, :].transpose(-1, -2)).unflatten(-1, (-1, block_size))
            weights, grad_scores = _grad_scores_(scores, grad_weights, adjust, mean[..., rows, :], position)
            grad_value[..., blocks, :] += weights.flatten(-2).transpose(-1, -2) @ g
            grad_landmark = grad_scores[..., -1].clone()
            if grad_bias is not None:
                grad_bias[..., : grad_landmark.shape[-1]] += grad_landmark.sum(-2)
            if grad_landmark_query is not None:
                grad_scores[..., -1] = 0.0  # the query itself has no part in the landmarks' scores
                grad_landmark_query[..., rows, :] = grad_landmark @ tiles.landmarks(blocks)
                grad_key[..., blocks, :][..., block_size - 1 :: block_size, :] += (
                    grad_landmark.transpose(-1, -2) @ tiles.landmark_query[..., rows, :]
                )
            grad_scores = grad_scores.flatten(-2)
            grad_query[..., rows, :] = grad_scores @ k
            grad_key[..., blocks, :] += grad_scores.transpose(-1, -2) @ q
        if grad_landmark_query is not None:
            grad_landmark_query = tiles.unfold(grad_landmark_query.mul_(ctx.scale)).to(landmark_query.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias[..., : landmark_bias.shape[-1]].to(landmark_bias.dtype)
        return (
            tiles.unfold(grad_query.mul_(ctx.scale)).to(query.dtype),
            grad_key[..., : key.shape[-2], :].to(key.dtype),
            grad_value[..., : value.shape[-2], :].to(value.dtype),
            grad_landmark_query,
            grad_bias,
            None,
            None,
            None,
        )


class _Tiles:
    """Query tiles of one attention call, with the key blocks that each can see.

    `query`, scaled: (batch, kv_heads, tiles of queries, head_dim), where the queries of the `group` query heads that
    share a KV head stand one after the other inside each tile, and `landmark_query` likewise, or None; `key`, `value`:
    (batch, kv_heads, whole blocks, head_dim); `landmark_bias`: (batch, kv_heads, blocks), or None.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        landmark_query: Tensor | None,
        landmark_bias: Tensor | None,
        block_size: int,
        scale: float,
    ) -> None:
        self.block_size = block_size
        self.group = query.shape[1] // key.shape[1]
        self.query_length, self.key_length = query.shape[-2], key.shape[-2]
        missing = -self.key_length % block_size
        # contiguous, or each tile's product would copy what it takes of them
        self.key, self.value = (
            (torch.nn.functional.pad(_upcast(x), (0, 0, 0, missing)) if missing else _upcast(x)).contiguous()
            for x in (key, value)
        )
        self.query = (self.fold(query) * scale).contiguous()
        self.landmark_query = self.landmark_bias = None
        if landmark_query is not None:
            self.landmark_query = (self.fold(landmark_query) * scale).contiguous()
        if landmark_bias is not None:
            # an incomplete last block has none
            blocks = self.key.shape[-2] // block_size
            bias = _upcast(landmark_bias)[..., :blocks]
            self.landmark_bias = torch.nn.functional.pad(bias, (0, blocks - bias.shape[-1]))

    def scores(self, rows: slice, blocks: slice) -> Tensor:
        """Scores (batch, kv_heads, queries, blocks, block_size) of the queries `rows` and the positions `blocks`."""
        scores = self.query[..., rows, :] @ self.key[..., blocks, :].transpose(-1, -2)
        scores = scores.unflatten(-1, (-1, self.block_size))
        query = None if self.landmark_query is None else self.landmark_query[..., rows, :]
        bias = None if self.landmark_bias is None else self.landmark_bias[..., : scores.shape[-2]]
        _score_landmarks_(scores, query, self.landmarks(blocks), bias)
        return scores

    def landmarks(self, blocks: slice) -> Tensor:
        """Landmark keys (batch, kv_heads, blocks, head_dim) of the positions `blocks`."""
        return self.key[..., blocks, :][..., self.block_size - 1 :: self.block_size, :]

    def scores_are_small(self) -> bool:
        """Whether the lengths of queries and keys alone say that no score exceeds `SMALL_SCORE`, either way."""
        limit = SMALL_SCORE
        if self.landmark_bias is not None and self.landmark_bias.numel():
            limit -= float(self.landmark_bias.abs().amax())
        queries = [self.query] if self.landmark_query is None else [self.query, self.landmark_query]
        return all(products_are_small(query, self.key, limit) for query in queries)

    def bounds(self) -> list[tuple[int, int]]:
        """First query of each tile, and one past its last; tiles end at block boundaries of the keys."""
        tile = max(1, QUERY_TILE // self.block_size) * self.block_size
        offset = self.key_length - self.query_length
        ends = range(offset - offset % tile + tile, self.key_length + tile, tile)
        stops = [min(end, self.key_length) - offset for end in ends]
        return list(zip([0, *stops], stops, strict=False))

    def __iter__(self) -> Any:
        """Yields (rows of `query`, positions of `key`, key position of each row) for each tile."""
        offset = self.key_length - self.query_length
        for first, stop in self.bounds():
            visible = -(-(offset + stop) // self.block_size) * self.block_size
            position = torch.arange(offset + first, offset + stop, device=self.query.device).repeat(self.group)
            yield slice(first * self.group, stop * self.group), slice(0, visible), position

    def fold(self, x: Tensor) -> Tensor:
        """(batch, heads, length, head_dim) to the layout of `query`."""
        x = _upcast(x)
        if self.group == 1:
            return x
        x = x.unflatten(1, (-1, self.group))
        return torch.cat([x[..., first:stop, :].flatten(2, 3) for first, stop in self.bounds()], dim=2)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        if self.group == 1:
            return x
        tiles = [x[..., first * self.group : stop * self.group, :] for first, stop in self.bounds()]
        return torch.cat([tile.unflatten(2, (self.group, -1)) for tile in tiles], dim=3).flatten(1, 2)


def _score_landmarks_(scores: Tensor, query: Tensor | None, landmark: Tensor, bias: Tensor | None) -> None:
    """Scores the landmarks of `scores` (..., queries, blocks, block_size) anew where anything but the query does so.

    `query`: (..., queries, head_dim), scaled; `landmark`: (..., blocks, head_dim); `bias`: (..., blocks).
    """
    if query is not None:
        scores[..., -1] = query @ landmark.transpose(-1, -2)
    if bias is not None:
        scores[..., -1] += bias.unsqueeze(-2)


def _normalise_(
    scores: Tensor, position: Tensor, unseen: Tensor | None = None, small: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns scores into weights, in place.

    Args:
        scores: (..., queries, blocks, block_size), scaled; overwritten.
        position: (..., queries): position of each query among the blocks' positions.
        unseen: (..., queries, blocks), boolean: earlier blocks that a query does not see; by default it sees all.
        small: whether the scores are known to be small (`_are_small`); otherwise they are looked at.

    Returns:
        weights, of the shape of `scores`; what to add to the scores of a block so that the exponential gives the
        weights, (..., queries, blocks), -inf for blocks that are not seen; the logsumexp of the own group, (...,
        queries).
    """
    own = (position // scores.shape[-1]).unsqueeze(-1)
    block = torch.arange(scores.shape[-2], device=scores.device)
    unseen = block > own if unseen is None else (block > own) | unseen
    small = small or _are_small(scores)
    landmark = scores[..., -1].clone()
    _hide_(scores, position)
    total, inside = _exponentials_(scores, small)
    share = torch.where(block == own, inside, landmark).masked_fill_(unseen, -torch.inf)
    lse = share.logsumexp(-1)
    share -= lse.unsqueeze(-1)
    scores.mul_((share.exp() / total).unsqueeze(-1))
    return scores, share - inside, lse


def _are_small(scores: Tensor) -> bool:
    """Whether the exponentials of all scores can be taken as they are: finding each block's peak takes much longer."""
    if not scores.numel():
        return True
    lowest, highest = scores.aminmax()
    return bool((lowest > -SMALL_SCORE) & (highest < SMALL_SCORE))


def products_are_small(query: Tensor, key: Tensor, limit: float) -> bool:
    """Whether no score of `query` and `key` (..., head_dim) can exceed `limit`, either way, by their lengths alone."""
    if not query.numel() or not key.numel():
        return True
    return bool(query.norm(dim=-1).amax() * key.norm(dim=-1).amax() < limit)


def _exponentials_(scores: Tensor, small: bool) -> tuple[Tensor, Tensor]:
    """Exponentials of `scores` (..., block_size), in place; their sums, and the logsumexps, (...).

    Unless all scores are `small`, exponentials and sums are over each block's own peak.
    """
    if small:
        total = _sum(scores.exp_())
        return total, total.log()
    peak = scores.amax(-1)
    total = _sum(scores.sub_(peak.unsqueeze(-1)).exp_())
    return total, total.log().add_(peak)


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, which is short: as a matrix product it takes half the time."""
    return x @ x.new_ones(x.shape[-1])


def _hide_(scores: Tensor, position: Tensor) -> None:
    """Sets landmarks and the later part of each query's own block to -inf.

    Blocks after a query's own keep their scores, finite as they are: `_normalise_` takes their share away.
    """
    block_size = scores.shape[-1]
    scores[..., -1] = -torch.inf
    first = int(position.min()) // block_size
    own = (
        torch.arange(first, scores.shape[-2], device=scores.device).unsqueeze(-1)
        == (position // block_size)[..., None, None]
    )
    later = torch.arange(block_size, device=scores.device) > (position % block_size)[..., None, None]
    scores[..., first:, :].masked_fill_(own & later, -torch.inf)


def _grad_scores_(
    scores: Tensor, grad_weights: Tensor, adjust: Tensor, mean: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and the gradient of the scores, in place of `scores` and `grad_weights`; the rest is from `_normalise_`.

    With `P` the weights, `dP` their gradient, `G` the own-group weight of a landmark, `D` the row's mean:
    `ds = P (dP - dG)` in an earlier block and `P (dP - D)` in the own one; `ds[landmark] = G (dG - D)`,
    `G dG = sum P dP`.
    """
    _hide_(scores, position)
    block = torch.arange(scores.shape[-2], device=scores.device)
    own = (position // scores.shape[-1]).unsqueeze(-1)
    weights = scores.add_(adjust.unsqueeze(-1)).exp_()
    share = _sum(weights)  # G at earlier blocks
    grad_scores = grad_weights.mul_(weights)
    share_grad = _sum(grad_scores)  # G dG
    block_mean = share_grad / share.clamp_min(torch.finfo(share.dtype).tiny)
    block_mean = torch.where(block == own, mean, block_mean)
    grad_scores.addcmul_(weights, block_mean.unsqueeze(-1), value=-1)
    grad_scores[..., -1] = torch.where(block < own, share_grad - share * mean, 0.0)
    return weights, grad_scores


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
