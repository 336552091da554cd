"""Rows that several processes hold together: each has a part of the columns, and attends for some of the heads.

Landmark attention is local to a head, so nothing but heads and columns has to change places: an all-to-all turns a
part of the columns of all heads into all columns of a part of the heads, and another one turns the output back
(sequence parallelism as in DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.whole_rows import WholeRows


@dataclass(frozen=True)
class ContextShard:
    """This process's part of rows that the processes of a group hold together.

    group: the processes, in the order of their parts.
    tokens: ordinary tokens of each part: whole blocks, except for the last one.
    """

    group: dist.ProcessGroup
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup, row_tokens: int, block_size: int) -> ContextShard:
        """Rows of `row_tokens` ordinary tokens, cut into parts of as many blocks as possible each.

        Raises:
            ValueError: there are fewer blocks than processes.
        """
        processes, blocks = group.size(), -(-row_tokens // (block_size - 1))
        if blocks < processes:
            raise ValueError(
                f"row_tokens={row_tokens}: a row of {blocks} blocks cannot be shared by {processes} processes; use "
                "longer rows or fewer processes"
            )
        ends = [blocks * i // processes * (block_size - 1) for i in range(1, processes)]
        return cls(group, tuple(b - a for a, b in zip([0, *ends], [*ends, row_tokens], strict=True)))

    @property
    def part(self) -> int:
        """The number of this process's part."""
        return self.group.rank()

    @property
    def start(self) -> int:
        """Ordinary tokens before this process's part."""
        return sum(self.tokens[: self.part])

    def cut(self, row: Tensor, more: int = 0) -> Tensor:
        """This process's columns of `row` (batch, row_tokens), and `more` columns behind them where there are any."""
        return row[:, self.start : self.start + self.tokens[self.part] + more]


@dataclass(frozen=True)
class HeadParallelRows:
    """The view of a call that brings a part of whole rows: this process attends for its share of the heads.

    whole: how whole rows attend.
    shard: who else holds parts of these rows.
    """

    whole: WholeRows
    shard: ContextShard

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
        """Attention of one layer over this process's columns; all processes of the group must call it.

        Args:
            query: (batch, columns, heads, head_dim), not rotated; the columns are those of this process's part.
            key, value: (batch, columns, kv_heads, head_dim), not rotated either.
            landmark_query: the shape of `query`, not rotated: what scores landmarks in its place.
            landmark_prior: the shape of `key`, not rotated: what blocks are pooled around.

        Returns:
            (batch, columns, heads, head_dim), in the dtype of `query`.

        Raises:
            ValueError: the heads cannot be shared by so many processes.
        """
        columns, copies = query.shape[1], self._copies(query.shape[2], key.shape[2])
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
            landmark_prior = None if landmark_prior is None else landmark_prior.repeat_interleave(copies, dim=2)
        settings = {"layer_idx": layer_idx, "rotary": rotary, "scale": scale}
        for name, x in (("landmark_query", landmark_query), ("landmark_prior", landmark_prior)):
            if x is not None:
                settings[name] = self._to_heads(x)
        output = self.whole.attend(*(self._to_heads(x) for x in (query, key, value)), **settings)
        return self._to_columns(output, columns)

    def _copies(self, heads: int, kv_heads: int) -> int:
        """How often each KV head is repeated, so that the processes can share them."""
        processes = self.shard.group.size()
        if heads % processes:
            raise ValueError(f"{heads} attention heads cannot be shared by {processes} processes: take a divisor")
        return math.lcm(kv_heads, processes) // kv_heads

    def _columns(self) -> list[int]:
        """Landmarked columns of each part. All but the last are whole blocks."""
        return [tokens + tokens // (self.whole.block_size - 1) for tokens in self.shard.tokens]

    def _to_heads(self, x: Tensor) -> Tensor:
        """(batch, columns of this part, heads, head_dim) to (batch, all columns, heads of this process, head_dim)."""
        processes, here = self.shard.group.size(), x.shape[1]
        by_process = x.unflatten(2, (processes, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        return _AllToAll.apply(by_process, [here] * processes, self._columns(), self.shard.group).transpose(0, 1)

    def _to_columns(self, x: Tensor, here: int) -> Tensor:
        """The inverse of `_to_heads`, for `here` columns."""
        processes = self.shard.group.size()
        by_process = _AllToAll.apply(x.transpose(0, 1), self._columns(), [here] * processes, self.shard.group)
        return by_process.unflatten(0, (processes, here)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Sends `sizes[i]` rows of `x` to process `i` and receives `received[i]` from it; gradients go back the same way.

    torch.distributed has such a function only in modules that are deprecated or private.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = received, sizes, group
        output = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), received, sizes, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None
