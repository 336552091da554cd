"""Attention of new queries through a table of blocks: retrieved ones, the direct ones before them, their own.

One forward call over a cache is cut into groups of queries that share a window of direct blocks (`QueryGroups`); each
layer then attends with `attend_through_table`. Nothing here depends on how the text was cut into calls, except that
chunked attention reads the blocks of the current chunk directly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.blockwise import attend_retrieved, attend_window
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.retrieval import choose_blocks
from landmark_llama.storage import BlockStorage


class QueryGroups(NamedTuple):
    """How the queries of one call are grouped. All tensors of integers unless said otherwise.

    column: (batch, groups, queries): which column of the call each query is.
    valid: (batch, groups, queries), boolean: False where a group has fewer queries.
    slot: (batch, columns): where each column went, `group * queries + query`.
    first_block: (batch, groups): the first block that the group reads directly; the blocks before it are its candidates.
    position: (batch, groups, queries): positions from the start of that block to the query.
    start: (batch,): landmarked position of each row's first column.
    window: blocks of the window, the own block included.
    """

    column: Tensor
    valid: Tensor
    slot: Tensor
    first_block: Tensor
    position: Tensor
    start: Tensor
    window: int

    @classmethod
    def of(
        cls, start: Tensor, length: Tensor, *, num_direct_blocks: int, chunked: bool, share: bool, block_size: int
    ) -> QueryGroups:
        """Groups for rows that stand at landmarked positions `start` (batch,) and bring `length` (batch,) new ones.

        chunked: all queries of the call are one group, which reads the blocks of the call directly.
        share: the queries of a block must stand in one group, however few they are.
        """
        columns = int(length.max())
        first = start // block_size
        offset = (start % block_size).unsqueeze(1)
        column = torch.arange(columns)
        if chunked:
            slots = column.view(1, 1, -1)
            block = first.unsqueeze(1)
        elif columns < block_size and not share:
            slots = column.view(1, -1, 1)
            block = (start.unsqueeze(1) + column) // block_size
        else:
            spanned = int(((start + length.clamp_min(1) - 1) // block_size - first).max()) + 1
            group = torch.arange(spanned)
            block = first.unsqueeze(1) + group
            if columns < block_size:
                slots = column.expand(1, spanned, -1)
            else:
                slots = (group.unsqueeze(1) * block_size + torch.arange(block_size)) - offset.unsqueeze(-1)
        slots = slots.expand(len(start), -1, -1)
        position = start[:, None, None] + slots
        valid = (slots >= 0) & (slots < length[:, None, None])
        first_block = block if chunked else (block - num_direct_blocks).clamp_min(0)
        window = int((length + start % block_size - 1).max()) // block_size + 1 if chunked else num_direct_blocks + 1
        if not chunked:
            valid &= position // block_size == block.unsqueeze(-1)
        position = (position - first_block.unsqueeze(-1) * block_size).clamp(0, window * block_size - 1)
        slot = _slots(column, offset, slots.shape, block_size, chunked or (columns < block_size and not share))
        return cls(slots.clamp(0, columns - 1), valid, slot.expand(len(start), -1), first_block, position, start, window)

    def to(self, device: torch.device, non_blocking: bool = False) -> QueryGroups:
        """The same groups on `device` (the signature that accelerate's device hooks call)."""
        return QueryGroups(*(x.to(device, non_blocking=non_blocking) for x in self[:-1]), self.window)

    def gather(self, x: Tensor) -> Tensor:
        """(batch, columns, ...) to (batch, groups, queries, ...)."""
        return x[torch.arange(len(x), device=x.device)[:, None, None], self.column]

    def scatter(self, x: Tensor) -> Tensor:
        """(batch, groups, queries, ...) back to (batch, columns, ...)."""
        return x.flatten(1, 2)[torch.arange(len(x), device=x.device)[:, None], self.slot]


def _slots(column: Tensor, offset: Tensor, shape: torch.Size, block_size: int, plain: bool) -> Tensor:
    if plain:
        return column.unsqueeze(0)
    if shape[2] == block_size:
        return column + offset
    return (column + offset) // block_size * shape[2] + column


def attend_through_table(
    query: Tensor,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    num_retrieved_blocks: int,
    granularity: str,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    landmarks_tie: bool,
) -> Tensor:
    """Attention of the queries of one call, whose own keys and values `storage` already holds.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        rotary: holds every position that a window can ask for.
        landmarks_tie: as in `choose_blocks`.

    Returns:
        (batch, columns, kv_heads, group, head_dim), in the dtype of `query`.
    """
    grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)  # (batch, kv_heads, group, groups, queries, head_dim)
    output, lse = _attend_direct(grouped, storage, groups, block_size, rotary, scale)
    candidates = int(groups.first_block.max())
    if num_retrieved_blocks and candidates:
        choice = choose_blocks(
            grouped,
            storage.landmarks(candidates),
            groups.first_block,
            groups.position,
            groups.valid,
            num_blocks=num_retrieved_blocks,
            granularity=granularity,
            block_size=block_size,
            rotary=rotary,
            scale=scale,
            landmarks_tie=landmarks_tie,
        )
        # queries that share a choice stand together: (..., groups, choices, queries of a choice, ...)
        choices = choice.block.shape[4]
        shape = (choices, grouped.shape[4] // choices)
        position = groups.position[:, None, None, ..., None] + choice.distance * block_size
        rotated = rotary.rotate(grouped.unsqueeze(-2), position)  # (..., groups, queries, k, head_dim)
        key, value = storage.gather(choice.block.clamp_min(0))
        output = attend_retrieved(
            rotated.unflatten(4, shape).transpose(-3, -2),
            key,
            value,
            (choice.block >= 0).unsqueeze(-1),
            (output.unflatten(4, shape), lse.unflatten(4, shape)),
            scale,
        ).flatten(4, 5)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def _attend_direct(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, block_size: int, rotary: RotaryTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `query` (batch, kv_heads, group, groups, queries, head_dim) over the groups' windows."""
    slot = torch.arange(groups.window, device=query.device)
    key, value = storage.gather((groups.first_block.unsqueeze(-1) + slot).unsqueeze(1))
    key = rotary.rotate(key, (slot * block_size).unsqueeze(-1))
    rotated = rotary.rotate(query, groups.position[:, None, None]).transpose(2, 3).flatten(3, 4)
    position = groups.position.unsqueeze(1).repeat(1, 1, 1, query.shape[2])
    output, lse = attend_window(rotated, key.flatten(-3, -2), value.flatten(-3, -2), position, block_size, scale)
    heads = (query.shape[2], query.shape[4])
    return output.unflatten(3, heads).transpose(2, 3), lse.unflatten(3, heads).transpose(2, 3)
