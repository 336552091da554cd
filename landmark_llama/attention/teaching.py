"""How landmarks learn to choose where they weigh nothing: their scores are taught what blocks weigh in exact attention.

With `block_weight="exact"` no gradient of a language model's loss reaches the landmarks' scores: they only say which
blocks are read. What they should say is known in training, where every block is read. For a query `q` and candidate
blocks `c` with tokens `j`,

    g_c = logsumexp_j(scale q . k_j)                    what the block weighs (the target, without gradient)
    s_c = scale q' . k'_c + b'_c                        what its landmark scores
    loss = KL(softmax_c g_c || softmax_c s_c)

averaged over queries and heads with the weight that all candidates together have beside what is read directly: a head
that looks at its neighbourhood alone has nothing to learn from far away. Candidates stand where old blocks are scored
in reading (`docs/positions.md`). Blocks that are read in any case, the direct ones and sinks (`num_sink_blocks`), are
none. Those of the other rows of the batch are: a long text has many blocks that have nothing to do with a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.pooling import pool_block
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.whole_rows import WholeRows

SCORES_AT_ONCE = 1 << 23  # scores of a layer that are held for its loss: this decides how many queries are taught
MOST_QUERIES = 128  # of a row

_collected: ContextVar[list[Tensor] | None] = ContextVar("landmark_losses", default=None)


@contextmanager
def landmark_losses() -> Iterator[list[Tensor]]:
    """Collects the loss of each layer of the calls inside, also in evaluation, instead of adding it to the gradients.

    For training landmarks alone: no gradient passes through the attention of these calls, which saves its memory.
    """
    losses: list[Tensor] = []
    token = _collected.set(losses)
    try:
        yield losses
    finally:
        _collected.reset(token)


def are_collected() -> bool:
    """Whether a call stands inside `landmark_losses`."""
    return _collected.get() is not None


@dataclass(frozen=True)
class TaughtRows(WholeRows):
    """The view of whole rows in training with exact weights: as `WholeRows`, and each layer's landmarks learn.

    retrieved, direct: blocks that a query retrieves, and reads directly, when it reads long texts: they say how far
        away candidates stand.
    """

    retrieved: int = 0
    direct: int = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer_idx: int,
        rotary: RotaryTable,
        scale: float,
        landmark_query: Tensor | None = None,
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        """As `WholeRows.attend`; the gradients of the layer's loss are added to those of the output."""
        how = {"layer_idx": layer_idx, "rotary": rotary, "scale": scale, "landmark_query": landmark_query}
        losses = _collected.get()
        with torch.set_grad_enabled(losses is None and torch.is_grad_enabled()):
            output = super().attend(query, key, value, **how, landmark_prior=landmark_prior)
        if query.shape[1] < 2 * self.block_size:  # no query has a candidate
            return output
        with torch.autocast(query.device.type, enabled=False):
            loss = self._loss(query, key, rotary, scale, landmark_query, landmark_prior)
        if losses is None:
            return _WithLoss.apply(output, loss)
        losses.append(loss)
        return output

    def _loss(
        self,
        query: Tensor,
        key: Tensor,
        rotary: RotaryTable,
        scale: float,
        landmark_query: Tensor | None,
        landmark_prior: Tensor | None,
    ) -> Tensor:
        kv_heads, block_size, rows = key.shape[2], self.block_size, len(query)
        blocks = query.shape[1] // block_size
        tokens = rows * blocks * (block_size - 1)
        column = self._draw_queries(query, SCORES_AT_ONCE // (rows * query.shape[2] * tokens))

        wide = torch.promote_types(key.dtype, torch.float32)
        offset = torch.arange(block_size, device=key.device).unsqueeze(-1)
        by_block = key[:, : blocks * block_size].unflatten(1, (blocks, block_size))
        stored = rotary.rotate(by_block.to(wide), offset)
        block = stored[:, :, :-1].permute(0, 3, 1, 2, 4)  # (batch, kv_heads, blocks, block_size - 1, head_dim)
        landmark, bias = stored[:, :, -1].transpose(1, 2), None
        if self.pooled:
            prior = landmark_prior[:, block_size - 1 : blocks * block_size : block_size].to(wide)
            landmark, bias = pool_block(block, rotary.rotate(prior, offset[-1]).transpose(1, 2), scale)

        def drawn(x: Tensor, position: Tensor) -> Tensor:
            """The drawn ones of `x` (batch, columns, heads, head_dim), rotated: (batch, queries, heads, head_dim)."""
            x = x.to(wide)[torch.arange(rows, device=x.device).unsqueeze(1), column]
            return rotary.rotate(x, position.unsqueeze(-1))

        def by_head(x: Tensor) -> Tensor:
            """(batch, queries, heads, head_dim) to (batch, kv_heads, group * queries, head_dim), scaled."""
            return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * scale

        def far(x: Tensor) -> Tensor:
            """The drawn queries where old blocks are scored."""
            slot = torch.tensor((self.retrieved + 1) * block_size, device=x.device)
            return by_head(rotary.rotate(drawn(x, self.direct * block_size + column % block_size), slot))

        def across(x: Tensor) -> Tensor:
            """(batch, kv_heads, blocks, ...) to (kv_heads, batch * blocks, ...): blocks of all rows side by side."""
            return x.transpose(0, 1).flatten(1, 2)

        group = query.shape[2] // kv_heads
        candidate = self._candidates(column, rows, blocks).repeat(1, group, 1).unsqueeze(1)
        with torch.no_grad():
            mass = (far(query) @ across(block).flatten(1, 2).transpose(-1, -2)).unflatten(-1, (-1, block_size - 1))
            mass = mass.logsumexp(-1).masked_fill(~candidate, -torch.inf)
            direct = self._direct_mass(by_head(drawn(query, column)), key.to(wide), column.repeat(1, group), rotary)
            weight = (mass.logsumexp(-1) - direct).sigmoid()
            target = _log_shares(mass, candidate)
        scores = far(query if landmark_query is None else landmark_query) @ across(landmark).transpose(-1, -2)
        if bias is not None:
            scores = scores + across(bias).unsqueeze(1)
        difference = (target - _log_shares(scores, candidate)).masked_fill(~candidate, 0.0)
        divergence = (target.exp() * difference).sum(-1)
        return (weight * divergence).sum() / weight.sum().clamp_min(torch.finfo(wide).tiny)

    def _direct_mass(self, query: Tensor, key: Tensor, column: Tensor, rotary: RotaryTable) -> Tensor:
        """The logarithm of what queries give to all that they read directly and to sinks, where it stands in the row.

        Args:
            query: (batch, kv_heads, queries, head_dim), rotated and scaled.
            key: (batch, columns, kv_heads, head_dim), not rotated.
            column: (batch, queries) of the queries.
        """
        place = torch.arange(key.shape[1], device=key.device)
        scores = query @ rotary.rotate(key, place.unsqueeze(-1)).permute(0, 2, 3, 1)
        own, block = (column // self.block_size).unsqueeze(-1), place // self.block_size
        read = (block >= own - self.direct) | (block < self.num_sink_blocks)
        read &= (place <= column.unsqueeze(-1)) & (place % self.block_size != self.block_size - 1)
        return scores.masked_fill(~read.unsqueeze(1), -torch.inf).logsumexp(-1)

    def _draw_queries(self, query: Tensor, most: int) -> Tensor:
        """Columns (batch, queries) of ordinary tokens behind the first block, drawn for each row."""
        column = torch.arange(query.shape[1], device=query.device)
        draw = torch.rand(query.shape[:2], device=query.device)
        draw.masked_fill_((column < self.block_size) | (column % self.block_size == self.block_size - 1), -1.0)
        fewest = query.shape[1] - self.block_size - query.shape[1] // self.block_size + 1
        return draw.topk(max(1, min(MOST_QUERIES, most, fewest)), dim=1).indices

    def _candidates(self, column: Tensor, rows: int, blocks: int) -> Tensor:
        """Which blocks of all rows each drawn query is compared with: (batch, queries, rows * blocks), boolean.

        The complete blocks before those that it reads directly and those of other rows, sinks left out.
        """
        row = torch.arange(rows, device=column.device).repeat_interleave(blocks)
        block = torch.arange(blocks, device=column.device).repeat(rows)
        own = row == torch.arange(rows, device=column.device)[:, None, None]
        before = ~own | (block < (column // self.block_size - self.direct).unsqueeze(-1))
        return before & (block >= self.num_sink_blocks)


def _log_shares(scores: Tensor, candidate: Tensor) -> Tensor:
    """The logarithm of what each candidate gets, finite where there is none."""
    return scores.masked_fill(~candidate, torch.finfo(scores.dtype).min).log_softmax(-1)


class _WithLoss(torch.autograd.Function):
    """Returns `output`, and adds the gradients of `loss` where the output's flow back: also under checkpointing."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)
