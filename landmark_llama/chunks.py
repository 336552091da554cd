"""How a streamed call is cut into chunks of whole blocks, each of which goes through all layers at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.configuration import LandmarkLlamaConfig, RetrievalSettings
from landmark_llama.layout import Layout
from landmark_llama.streaming import QueryGroups

TILE_QUERIES = 32  # at least, of those that share a window of keys
CHUNK_POSITIONS = 4096  # most positions that a streamed call takes through all layers at once
# most elements of keys that the windows of a chunk may take on a CPU: few, to stay in the cores' caches
GATHERED_ELEMENTS = 1 << 20
# and of the keys that its queries retrieve: 16 MB in fp32, which is freed and taken again for each chunk
RETRIEVED_ELEMENTS = 1 << 22


class Chunk(NamedTuple):
    """A part of a streamed call: where it begins among the call's columns, (batch,), and its queries."""

    begin: Tensor
    length: Tensor
    groups: QueryGroups


def cut_into_chunks(layout: Layout, settings: RetrievalSettings, config: LandmarkLlamaConfig) -> Iterator[Chunk]:
    """Cuts a call into chunks of whole blocks of every row."""
    block_size = config.block_size
    chunked = settings.local_attention == "chunked"
    blocks = settings.num_direct_blocks if chunked else _chunk_blocks(layout, settings, config)
    first, stop = layout.start // block_size, layout.start + layout.length
    for skipped in range(0, int((-(-stop // block_size) - first).max()), blocks):
        begin = torch.maximum(layout.start, (first + skipped) * block_size).minimum(stop)
        length = ((first + skipped + blocks) * block_size).minimum(stop) - begin
        groups = QueryGroups.of(
            begin,
            length,
            num_direct_blocks=settings.num_direct_blocks,
            tile_blocks=_tile_blocks(settings, config),
            chunked=chunked,
            share=settings.granularity == "head",
            block_size=block_size,
        )
        yield Chunk(begin - layout.start, length, groups)


def _tile_blocks(settings: RetrievalSettings, config: LandmarkLlamaConfig) -> int:
    """Query blocks that share a window of keys.

    More of them share more of what is gathered, and each sees less of it. All must fit the rotary table.
    """
    fitting = config.train_context_length // config.block_size - settings.num_direct_blocks
    return min(fitting, max(settings.num_direct_blocks, -(-TILE_QUERIES // config.block_size)))


def _chunk_blocks(layout: Layout, settings: RetrievalSettings, config: LandmarkLlamaConfig) -> int:
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


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep what the tensors of a chunk leave, for those of the next one.

    glibc gives large blocks back to the system when they are freed; mapping their pages anew can take longer than what
    is computed on them. It stops doing so for blocks up to the size of the largest one that was freed, 32 MiB at most
    (mallopt(3), M_MMAP_THRESHOLD), so that freeing one is enough. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
