"""How a streamed call is cut into chunks of whole blocks, each of which goes through all layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.configuration import LandmarkConfig, RetrievalSettings
from landmark_llama.rows.layout import Layout

TILE_QUERIES = 32  # at least, of those that share a window of keys
CHUNK_POSITIONS = 4096  # most positions that a streamed call takes through all layers at once
# most elements of keys that the windows of a chunk may take on a CPU: few, to stay in the cores' caches
GATHERED_ELEMENTS = 1 << 20
# and of the keys that its queries retrieve: 16 MB in fp32, which is freed and taken again for each chunk
RETRIEVED_ELEMENTS = 1 << 22


class Chunk(NamedTuple):
    """A part of a streamed call: where it begins among the call's columns, (batch,), its queries, how they read."""

    begin: Tensor
    length: Tensor
    groups: QueryGroups
    settings: RetrievalSettings


def cut_into_chunks(layout: Layout, settings: RetrievalSettings, config: LandmarkConfig) -> Iterator[Chunk]:
    """Cuts a call into chunks of whole blocks of every row; the question at its end goes by itself."""
    stop = layout.start + layout.length
    if not settings.num_question_blocks or int(layout.length.max()) <= 1:
        yield from _cut(layout, layout.start, stop, settings, config)
        return
    last = (stop - 1) // config.block_size
    question = ((last + 1 - settings.num_question_blocks) * config.block_size).clamp_min(layout.start).minimum(stop)
    yield from _cut(layout, layout.start, question, settings, config)
    yield from _cut(layout, question, stop, settings._replace(granularity="token_and_head"), config)


def _cut(
    layout: Layout, start: Tensor, stop: Tensor, settings: RetrievalSettings, config: LandmarkConfig
) -> Iterator[Chunk]:
    """Chunks of the landmarked positions from `start` to `stop`, both (batch,), of a call."""
    block_size = config.block_size
    blocks = settings.chunk_blocks if settings.chunked else _chunk_blocks(layout, settings, config)
    first = start // block_size
    begun = torch.where(stop > start, -(-stop // block_size) - first, 0)
    for skipped in range(0, int(begun.max()), blocks):
        begin = torch.maximum(start, (first + skipped) * block_size).minimum(stop)
        length = ((first + skipped + blocks) * block_size).minimum(stop) - begin
        groups = QueryGroups.of(
            begin,
            length,
            num_direct_blocks=settings.num_direct_blocks,
            tile_blocks=_tile_blocks(settings, config),
            chunked=settings.chunked,
            share=settings.granularity == "head",
            block_size=block_size,
        )
        yield Chunk(begin - layout.start, length, groups, settings)


def _tile_blocks(settings: RetrievalSettings, config: LandmarkConfig) -> int:
    """Query blocks that share a window of keys.

    More of them share more of what is gathered, and each sees less of it. All must fit the rotary table.
    """
    fitting = config.train_context_length // config.block_size - settings.num_direct_blocks
    return min(fitting, max(settings.num_direct_blocks, -(-TILE_QUERIES // config.block_size)))


def _chunk_blocks(layout: Layout, settings: RetrievalSettings, config: LandmarkConfig) -> int:
    """Blocks of a chunk in sliding attention, where their number changes nothing but memory and speed."""
    tile = _tile_blocks(settings, config)
    blocks = max(1, CHUNK_POSITIONS // config.block_size)
    if layout.source.device.type != "cpu":
        return -(-blocks // tile) * tile
    block = len(layout.start) * config.num_key_value_heads * config.head_dim * config.block_size
    window = block * (1 + settings.num_direct_blocks / tile + settings.num_retrieved_blocks)
    # each query head has choices of its own, of which the queries of a block share one or not
    choices = config.num_attention_heads // config.num_key_value_heads
    choices *= config.block_size if settings.granularity == "token_and_head" else 1
    retrieved = block * settings.num_retrieved_blocks * choices
    blocks = min(blocks, int(GATHERED_ELEMENTS // window), RETRIEVED_ELEMENTS // max(retrieved, 1))
    return max(1, blocks // tile) * tile


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
        block, places, slot = _group(start, columns, last, chunked=chunked, share=share, block_size=block_size)
        # whole blocks of queries stand at the same places of every window, so that several share one
        aligned = not chunked and columns >= block_size
        if aligned:
            missing = -block.shape[1] % tile_blocks
            block, places = (_repeat_last(x, missing) for x in (block, places))
        groups_of_tile = tile_blocks if aligned else 1

        position = start[:, None, None] + places
        valid = (places >= 0) & (places < length[:, None, None])
        if chunked:
            first_block = base = block
            window = int((last - first).max()) + 1
        else:
            valid &= position // block_size == block.unsqueeze(-1)
            first_block = (block.minimum(last.unsqueeze(1)) - num_direct_blocks).clamp_min(0)
            base = block[:, ::groups_of_tile] - num_direct_blocks
            window = num_direct_blocks + groups_of_tile
        own = position.clamp_min(0).minimum(((last + 1) * block_size - 1)[:, None, None])
        window_position, window_first = _place_in_windows(position, first_block, base, window, block_size)
        if aligned:
            window_position = (num_direct_blocks * block_size + torch.arange(groups_of_tile * block_size)).view(
                1, 1, -1
            )
            window_first = window_first.maximum(torch.arange(groups_of_tile).repeat_interleave(block_size))
        return cls(
            column=places.clamp(0, columns - 1),
            valid=valid,
            slot=slot,
            first_block=first_block,
            position=(own - first_block.unsqueeze(-1) * block_size).clamp_min(0),
            base=base,
            window_position=window_position,
            window_first=window_first,
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
    """Block of each group (batch, groups), column of each query (batch, groups, queries), `slot` of QueryGroups.

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


def _place_in_windows(
    position: Tensor, first_block: Tensor, base: Tensor, window: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Where queries stand in their tile's window, and the first block of it that they see: (batch, tiles, queries).

    Args:
        position: (batch, groups, queries): landmarked positions.
        first_block: (batch, groups): the first block that each group reads directly.
        base: (batch, tiles): the block that each window begins with.
        window: blocks of a window.
    """
    tiles = base.shape[1]
    base = base.repeat_interleave(first_block.shape[1] // tiles, 1).unsqueeze(-1)
    place = (position - base * block_size).clamp(0, window * block_size - 1)
    first = (first_block.unsqueeze(-1) - base).expand_as(position)
    return place.reshape(len(base), tiles, -1), first.reshape(len(base), tiles, -1)


def _repeat_last(x: Tensor, times: int) -> Tensor:
    """Appends groups of padding to `x` (batch, groups, ...): further blocks, or columns outside the call."""
    further = torch.arange(1, times + 1).view(1, -1, *(1,) * (x.dim() - 2))
    step = 1 if x.dim() == 2 else x.shape[2]
    return torch.cat([x, x[:, -1:] + further * step], dim=1)
