"""Landmark attention over one sequence in PyTorch, block by block: the fast path without a GPU kernel.

`blockwise_landmark_attention` has its own backward. It walks over tiles of queries, reads only the blocks that a tile
can see, and saves one number for each query and block for the backward. `attend_sequence` is the same and also returns
the logsumexp. What turns scores into weights serves `attention/windows.py`, too.

Formulas: `docs/attention.md`. Everything is computed in fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from landmark_llama.attention.reference import seen_blocks

# positions of a query tile, rounded to whole blocks: small, to skip most of what the causal mask hides
QUERY_TILE = 64
# Largest size of a score whose exponential is taken as it is, without subtracting its block's peak. Sums of such
# exponentials over a block stay far from the largest and the smallest number of fp32.
LARGEST_PLAIN_SCORE = 60.0


def blockwise_landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    retrieval: tuple[int, int, int] | None = None,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> Tensor:
    """Causal landmark attention; arguments and result as in `landmark_attention`.

    retrieval: its `num_retrieved_blocks`, `num_direct_blocks` and `num_sink_blocks`; None: queries see all blocks
        before their own.
    """
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
    """Causal landmark attention that can be merged with other blocks; arguments as in `landmark_attention`.

    Returns:
        The output (batch, heads, query_length, head_dim), and the logsumexp (batch, heads, query_length) of each
        query's own group, which the merge needs. Both in the computing dtype, both differentiable.
    """
    return _BlockwiseLandmarkAttention.apply(query, key, value, landmark_query, landmark_bias, block_size, scale, None)


class _BlockwiseLandmarkAttention(torch.autograd.Function):
    """Forward and backward over query tiles. Query heads that share a KV head stand together in a tile's queries."""

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
        retrieval: tuple[int, int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        tiles = _QueryTiles(query, key, value, landmark_query, landmark_bias, block_size, scale)
        output = torch.empty_like(tiles.query)
        lse = output.new_empty(output.shape[:-1])
        adjusts = []
        small = products_are_small(tiles.query, tiles.key, LARGEST_PLAIN_SCORE)
        for rows, blocks, position in tiles:
            scores = tiles.scores(rows, blocks)
            unseen = None
            if retrieval is not None and scores.shape[-2] > sum(retrieval[:2]) + 1:
                unseen = ~seen_blocks(scores[..., -1], position // block_size, *retrieval)
            weights, adjust, lse[..., rows] = normalise_(scores, position, unseen, small)
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
        tiles = _QueryTiles(query, key, value, landmark_query, landmark_bias, ctx.block_size, ctx.scale)
        grad = torch.zeros_like(output) if grad is None else tiles.fold(grad).contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (tiles.query, tiles.key, tiles.value))
        grad_landmark_query = None if landmark_query is None else torch.zeros_like(tiles.query)
        grad_bias = None if landmark_bias is None else torch.zeros_like(tiles.landmark_bias)
        mean = (grad * output).sum(-1, keepdim=True)  # D of the formulas
        if grad_lse is not None:
            mean -= tiles.fold(grad_lse.unsqueeze(-1))  # the logsumexp's derivatives are the own group's weights
        for (rows, blocks, position), adjust in zip(tiles, adjusts, strict=True):
            q, k, g = tiles.query[..., rows, :], tiles.key[..., blocks, :], grad[..., rows, :]
            scores = tiles.scores(rows, blocks)
            grad_weights = (g @ tiles.value[..., blocks, :].transpose(-1, -2)).unflatten(-1, (-1, ctx.block_size))
            weights, grad_scores = _grad_scores_(scores, grad_weights, adjust, mean[..., rows, :], position)
            grad_value[..., blocks, :] += weights.flatten(-2).transpose(-1, -2) @ g
            if grad_bias is not None:
                grad_bias[..., : grad_scores.shape[-2]] += grad_scores[..., -1].sum(-2)
            if grad_landmark_query is not None:
                grad_landmark = grad_scores[..., -1].clone()
                grad_scores[..., -1] = 0.0  # the query itself has no part in the landmarks' scores
                grad_landmark_query[..., rows, :] = grad_landmark @ tiles.landmarks(tiles.key, blocks)
                grad_landmark_key = grad_landmark.transpose(-1, -2) @ tiles.landmark_query[..., rows, :]
                tiles.landmarks(grad_key, blocks).add_(grad_landmark_key)
            grad_scores = grad_scores.flatten(-2)
            grad_query[..., rows, :] = grad_scores @ k
            grad_key[..., blocks, :] += grad_scores.transpose(-1, -2) @ q
        if grad_landmark_query is not None:
            grad_landmark_query = tiles.unfold(grad_landmark_query.mul_(ctx.scale)).to(query.dtype)
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


class _QueryTiles:
    """Query tiles of one attention call, with the key blocks that each can see.

    query: (batch, kv_heads, heads_per_kv * query_length, head_dim), scaled: tile after tile, and in each tile the
        queries of one head after those of another.
    key, value: (batch, kv_heads, length of whole blocks, head_dim).
    landmark_query: the layout of `query`, scaled, or None.
    landmark_bias: (batch, kv_heads, blocks), 0 for an incomplete last block, or None.
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
        self.heads_per_kv = query.shape[1] // key.shape[1]
        self.query_length, self.key_length = query.shape[-2], key.shape[-2]
        missing = -self.key_length % block_size
        # contiguous, or each tile's product would copy the part that it reads
        self.key, self.value = (
            (torch.nn.functional.pad(upcast(x), (0, 0, 0, missing)) if missing else upcast(x)).contiguous()
            for x in (key, value)
        )
        self.query = (self.fold(query) * scale).contiguous()
        self.landmark_query = self.landmark_bias = None
        if landmark_query is not None:
            self.landmark_query = (self.fold(landmark_query) * scale).contiguous()
        if landmark_bias is not None:
            incomplete = self.key.shape[-2] // block_size - landmark_bias.shape[-1]
            self.landmark_bias = torch.nn.functional.pad(upcast(landmark_bias), (0, incomplete))

    def scores(self, rows: slice, blocks: slice) -> Tensor:
        """Scores (batch, kv_heads, queries, blocks, block_size) of the queries `rows` and the positions `blocks`."""
        scores = self.query[..., rows, :] @ self.key[..., blocks, :].transpose(-1, -2)
        scores = scores.unflatten(-1, (-1, self.block_size))
        if self.landmark_query is not None:
            scores[..., -1] = self.landmark_query[..., rows, :] @ self.landmarks(self.key, blocks).transpose(-1, -2)
        if self.landmark_bias is not None:
            scores[..., -1] += self.landmark_bias[..., None, : scores.shape[-2]]
        return scores

    def landmarks(self, key: Tensor, blocks: slice) -> Tensor:
        """The landmarks' part (batch, kv_heads, blocks, head_dim) of `key` at the positions `blocks`; a view."""
        return key[..., blocks, :][..., self.block_size - 1 :: self.block_size, :]

    def bounds(self) -> list[tuple[int, int]]:
        """First query of each tile, and one past its last. Tiles end at block boundaries of the keys."""
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
            position = torch.arange(offset + first, offset + stop, device=self.query.device).repeat(self.heads_per_kv)
            yield slice(first * self.heads_per_kv, stop * self.heads_per_kv), slice(0, visible), position

    def fold(self, x: Tensor) -> Tensor:
        """(batch, heads, length, head_dim) to the layout of `query`."""
        x = upcast(x)
        if self.heads_per_kv == 1:
            return x
        x = x.unflatten(1, (-1, self.heads_per_kv))
        return torch.cat([x[..., first:stop, :].flatten(2, 3) for first, stop in self.bounds()], dim=2)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        if self.heads_per_kv == 1:
            return x
        tiles = [x[..., first * self.heads_per_kv : stop * self.heads_per_kv, :] for first, stop in self.bounds()]
        return torch.cat([tile.unflatten(2, (self.heads_per_kv, -1)) for tile in tiles], dim=3).flatten(1, 2)


def normalise_(
    scores: Tensor, position: Tensor, unseen: Tensor | None = None, small: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns scores into weights, in place.

    Args:
        scores: (..., queries, blocks, block_size), scaled; overwritten.
        position: (..., queries): position of each query among the blocks' positions.
        unseen: (..., queries, blocks), boolean: earlier blocks that a query does not see; None: it sees all.
        small: the scores are known to be small (`are_small`); otherwise this is checked.

    Returns:
        weights: the shape of `scores`.
        adjust: (..., queries, blocks): `exp(scores + adjust)` are the weights of a block; -inf for unseen blocks.
        lse: (..., queries): the logsumexp of the own group.
    """
    own = (position // scores.shape[-1]).unsqueeze(-1)
    block = torch.arange(scores.shape[-2], device=scores.device)
    unseen = block > own if unseen is None else (block > own) | unseen
    small = small or are_small(scores)
    landmark = scores[..., -1].clone()
    _hide_(scores, position)
    total, inside = exponentials_(scores, small)
    share = torch.where(block == own, inside, landmark).masked_fill_(unseen, -torch.inf)
    lse = share.logsumexp(-1)
    share -= lse.unsqueeze(-1)
    scores.mul_((share.exp() / total).unsqueeze(-1))
    return scores, share - inside, lse


def are_small(scores: Tensor) -> bool:
    """Whether all scores are small enough to take their exponentials as they are, much faster than over each peak."""
    if not scores.numel():
        return True
    lowest, highest = scores.aminmax()
    return bool((lowest > -LARGEST_PLAIN_SCORE) & (highest < LARGEST_PLAIN_SCORE))


def products_are_small(query: Tensor, key: Tensor, limit: float) -> bool:
    """Whether the norms of `query` and `key` (..., head_dim) show that every score lies between -limit and limit."""
    if not query.numel() or not key.numel():
        return True
    return bool(query.norm(dim=-1).amax() * key.norm(dim=-1).amax() < limit)


def exponentials_(scores: Tensor, small: bool) -> tuple[Tensor, Tensor]:
    """Exponentials of `scores` (..., block_size), in place. Returns their sums and the logsumexps, each (...).

    Unless all scores are `small`, each block's peak is subtracted from its scores first.
    """
    if small:
        total = _sum(scores.exp_())
        return total, total.log()
    peak = scores.amax(-1)
    total = _sum(scores.sub_(peak.unsqueeze(-1)).exp_())
    return total, total.log().add_(peak)


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, which is short: a matrix product takes half the time of `sum`."""
    return x @ x.new_ones(x.shape[-1])


def _hide_(scores: Tensor, position: Tensor) -> None:
    """Sets landmarks and the later part of each query's own block to -inf, in place.

    Blocks after a query's own keep their finite scores: `normalise_` gives them weight 0.
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
    """Weights and the gradient of the scores, written into `scores` and `grad_weights`; `adjust`: of `normalise_`.

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


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
