"""Attention of new queries through a table of blocks: retrieved ones, the direct ones before them, their own.

One forward call over a cache is cut into groups of queries that share a window of direct blocks (`QueryGroups`); each
layer then attends with `attend_through_table`. Nothing here depends on how the text was cut into calls, except that
chunked attention reads the blocks of the current chunk directly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.availability import triton_is_installed
from landmark_llama.attention.blockwise import attend_retrieved, attend_window
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.retrieval import choose_blocks, rotate_to_distances
from landmark_llama.storage import BlockStorage, DeviceStorage


class QueryGroups(NamedTuple):
    """How the queries of one call are grouped. All tensors of integers unless said otherwise.

    A group is what may share a choice of blocks: the queries of one block, or fewer. A tile is some groups side by side
    that share a window of keys, each of them seeing its own part of it.

    column: (batch, groups, queries): which column of the call each query is.
    valid: (batch, groups, queries), boolean: False where a group has fewer queries.
    slot: (batch, columns): where each column went, `group * queries + query`.
    first_block: (batch, groups): the first block that the group reads directly; the blocks before it are its
        candidates.
    position: (batch, groups, queries): positions from the start of that block to the query.
    base: (batch, tiles): the block that the tile's window begins with; negative where the text has not as many.
    window_position: (batch or 1, tiles or 1, queries of a tile): positions from the start of the window to the query.
    window_first: (batch, tiles, queries of a tile): the first block of the window that the query sees.
    last_block: (batch,): the last block that the row has begun.
    start: (batch,): landmarked position of each row's first column.
    window: blocks of a window.
    candidates: the most candidates of a group.
    stop: the largest landmarked position after the call's columns.
    one_block: whether the valid queries of every group lie in one block (a boolean).

    The last four are numbers of the host, which need not ask a device for them.
    """

    column: Tensor
    valid: Tensor
    slot: Tensor
    first_block: Tensor
    position: Tensor
    base: Tensor
    window_position: Tensor
    window_first: Tensor
    last_block: Tensor
    start: Tensor
    window: int
    candidates: int
    stop: int
    one_block: bool

    @classmethod
    def of(
        cls,
        start: Tensor,
        length: Tensor,
        *,
        num_direct_blocks: int,
        tile_blocks: int,
        chunked: bool,
        share: bool,
        block_size: int,
    ) -> QueryGroups:
        """Groups for rows that stand at landmarked positions `start` (batch,) and bring `length` (batch,) new ones.

        tile_blocks: most groups of a tile; `tile_blocks + num_direct_blocks` blocks must fit the rotary table.
        chunked: all queries of the call are one group, which reads the blocks of the call directly.
        share: the queries of a block must stand in one group, however few they are.
        """
        columns = int(length.max())
        first = start // block_size
        last = ((start + length - 1) // block_size).maximum(first)
        block, slots, slot = _group(start, columns, last, chunked=chunked, share=share, block_size=block_size)
        aligned = not chunked and columns >= block_size
        if aligned:
            missing = -block.shape[1] % tile_blocks
            block, slots = (_repeat_last(x, missing) for x in (block, slots))
        tiles = block.shape[1] // tile_blocks if aligned else block.shape[1]
        groups = block.shape[1] // tiles

        position = start[:, None, None] + slots
        valid = (slots >= 0) & (slots < length[:, None, None])
        if chunked:
            first_block = base = block
            window = int((last - first).max()) + 1
        else:
            valid &= position // block_size == block.unsqueeze(-1)
            first_block = (block.minimum(last.unsqueeze(1)) - num_direct_blocks).clamp_min(0)
            base = block[:, ::groups] - num_direct_blocks
            window = num_direct_blocks + groups
        own = position.clamp_min(0).minimum(((last + 1) * block_size - 1)[:, None, None])
        relative = (own - first_block.unsqueeze(-1) * block_size).clamp_min(0)
        seen = (first_block.unsqueeze(-1) - base.repeat_interleave(groups, 1).unsqueeze(-1)).expand_as(slots)
        in_window = (position - base.repeat_interleave(groups, 1).unsqueeze(-1) * block_size).clamp(
            0, window * block_size - 1
        )
        if aligned:
            # block-aligned queries stand at the same places of every window
            in_window = (num_direct_blocks * block_size + torch.arange(groups * block_size)).view(1, 1, -1)
            seen = seen.maximum(torch.arange(groups).repeat(tiles)[:, None])
        return cls(
            column=slots.clamp(0, columns - 1),
            valid=valid,
            slot=slot,
            first_block=first_block,
            position=relative,
            base=base,
            window_position=in_window.reshape(in_window.shape[0], -1, groups * slots.shape[2]),
            window_first=seen.reshape(len(start), tiles, -1),
            last_block=last,
            start=start,
            window=window,
            candidates=int(first_block.max()),
            stop=int(start.max()) + columns,
            one_block=not chunked,
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> QueryGroups:
        """The same groups on `device` (the signature that accelerate's device hooks call)."""
        return QueryGroups(*(x.to(device, non_blocking=non_blocking) for x in self[:-4]), *self[-4:])

    def gather(self, x: Tensor) -> Tensor:
        """(batch, columns, ...) to (batch, groups, queries, ...)."""
        return x[torch.arange(len(x), device=x.device)[:, None, None], self.column]

    def scatter(self, x: Tensor) -> Tensor:
        """(batch, groups, queries, ...) back to (batch, columns, ...)."""
        return x.flatten(1, 2)[torch.arange(len(x), device=x.device)[:, None], self.slot]


def _group(
    start: Tensor, columns: int, last: Tensor, *, chunked: bool, share: bool, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block of each group (batch, groups), column of each query (batch, groups, queries), and `slot` of QueryGroups.

    Columns may lie outside the call: such queries are padding.
    """
    first, offset = start // block_size, (start % block_size).unsqueeze(1)
    column = torch.arange(columns)
    if chunked:
        block, slots, slot = first.unsqueeze(1), column.view(1, 1, -1), column.unsqueeze(0)
    elif columns < block_size and not share:
        block, slots, slot = (start.unsqueeze(1) + column) // block_size, column.view(1, -1, 1), column.unsqueeze(0)
    else:
        group = torch.arange(int((last - first).max()) + 1)
        block = first.unsqueeze(1) + group
        if columns < block_size:
            slots = column.expand(1, len(group), -1)
            slot = (column + offset) // block_size * columns + column
        else:
            slots = (group.unsqueeze(1) * block_size + torch.arange(block_size)) - offset.unsqueeze(-1)
            slot = column + offset
    batch = len(start)
    slot = slot.clamp_max(slots.shape[1] * slots.shape[2] - 1)
    return block, slots.expand(batch, -1, -1), slot.expand(batch, -1)


def _repeat_last(x: Tensor, times: int) -> Tensor:
    """`x` (batch, groups, ...) with groups of padding appended: further blocks, columns outside the call."""
    further = torch.arange(1, times + 1).view(1, -1, *(1,) * (x.dim() - 2))
    step = 1 if x.dim() == 2 else x.shape[2]
    return torch.cat([x, x[:, -1:] + further * step], dim=1)


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
    if kernels_take(storage, query.dtype, rotary):
        settings = {"block_size": block_size, "rotary": rotary, "scale": scale}
        return _attend_with_kernels(query, storage, groups, num_retrieved_blocks, granularity, landmarks_tie, settings)
    grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)  # (batch, kv_heads, group, groups, queries, head_dim)
    output, lse = _attend_direct(grouped, storage, groups, block_size, rotary, scale)
    if num_retrieved_blocks and groups.candidates:
        rotated = rotate_to_distances(grouped * scale, groups.position, num_retrieved_blocks, block_size, rotary)
        choice = choose_blocks(
            rotated,
            storage.landmarks(groups.candidates),
            groups.first_block,
            groups.valid,
            granularity=granularity,
            landmarks_tie=landmarks_tie,
        )
        # queries that share a choice stand together: (..., groups, choices, queries of a choice, ...)
        choices = choice.block.shape[4]
        shape = (choices, grouped.shape[4] // choices)
        key, value = storage.gather(choice.block.clamp_min(0))
        output = attend_retrieved(
            choice.at_their_distances(rotated).unflatten(4, shape).transpose(-3, -2),
            key,
            value,
            (choice.block >= 0).unsqueeze(-1),
            (output.unflatten(4, shape), lse.unflatten(4, shape)),
        ).flatten(4, 5)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def kernels_take(storage: BlockStorage, dtype: torch.dtype, rotary: RotaryTable) -> bool:
    """Whether the GPU kernels can read `storage` for queries of `dtype`; where not, PyTorch does."""
    if not (isinstance(storage, DeviceStorage) and storage.capacity and storage.key.is_cuda and triton_is_installed()):
        return False
    from landmark_llama.attention.triton_table import supported

    one_dtype = dtype == storage.key.dtype and rotary.cos.dtype == torch.float32
    return one_dtype and supported(dtype, storage.key.shape[-1], storage.block_size, storage.key.device)


def _attend_with_kernels(
    query: Tensor,
    storage: DeviceStorage,
    groups: QueryGroups,
    k: int,
    granularity: str,
    landmarks_tie: bool,
    settings: dict[str, Any],
) -> Tensor:
    """`attend_through_table` in Triton: a few launches, and no number that the host must wait for."""
    from landmark_llama.attention.triton_rows import QueryRows
    from landmark_llama.attention.triton_selection import select_blocks
    from landmark_llama.attention.triton_table import attend_table

    query = query.contiguous()
    rows = QueryRows(groups.column, groups.valid, groups.position, groups.first_block).contiguous()
    choice = None
    with torch.cuda.device_of(query):
        if k and groups.candidates and granularity == "token":
            choice = _choose_for_all_heads(query, storage, groups, k, landmarks_tie, **settings)
        elif k and groups.candidates:
            how = {"k": k, "share": granularity == "head", "landmarks_tie": landmarks_tie}
            choice = select_blocks(query, storage.landmark, rows, **how, **settings)
        return attend_table(query, storage.key, storage.value, rows, choice, one_block=groups.one_block, **settings)


def _choose_for_all_heads(
    query: Tensor,
    storage: BlockStorage,
    groups: QueryGroups,
    k: int,
    landmarks_tie: bool,
    *,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> Tensor:
    """The blocks of `choose_blocks` for `"token"`, which has no kernel, as the attention kernel takes them."""
    grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)
    rotated = rotate_to_distances(grouped * scale, groups.position, k, block_size, rotary)
    choice = choose_blocks(
        rotated,
        storage.landmarks(groups.candidates),
        groups.first_block,
        groups.valid,
        granularity="token",
        landmarks_tie=landmarks_tie,
    )
    return choice.block.int()


def _attend_direct(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, block_size: int, rotary: RotaryTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `query` (batch, kv_heads, group, groups, queries, head_dim) over the tiles' windows."""
    tiles = groups.base.shape[1]
    slot = torch.arange(groups.window, device=query.device)
    block = (groups.base.unsqueeze(-1) + slot).clamp_min(0).minimum(groups.last_block[:, None, None])
    key, value = storage.gather(block.unsqueeze(1))
    key = rotary.rotate(key, (slot * block_size).unsqueeze(-1)).flatten(-3, -2)
    position = groups.window_position.unflatten(1, (1, 1, -1))
    tiled = query.flatten(3, 4).unflatten(
        3, (tiles, -1)
    )  # (batch, kv_heads, group, tiles, queries of a tile, head_dim)
    # the query heads of a KV head stand one after the other in a tile's queries
    rotated = rotary.rotate(tiled, position).transpose(2, 3).flatten(3, 4)
    position, first = (
        x.unsqueeze(1).repeat(1, 1, 1, query.shape[2]) for x in (groups.window_position, groups.window_first)
    )
    output, lse = attend_window(rotated, key, value.flatten(-3, -2), position, first, block_size, scale)
    output = output.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    lse = lse.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    return output.reshape(query.shape), lse.reshape(query.shape[:-1])
