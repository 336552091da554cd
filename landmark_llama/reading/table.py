"""Attention of new queries through a table of blocks: retrieved ones, the direct ones before them, their own.

One forward call over a cache is cut into groups of queries that share a window of direct blocks (`QueryGroups`); each
layer then attends with `attend_through_table`. Nothing here depends on how the text was cut into calls, except that
chunked attention reads the blocks of the current chunk directly.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.availability import triton_is_installed
from landmark_llama.attention.blockwise import attend_retrieved, attend_window
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.choice import choose_blocks, rotate_to_distances
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import BlockStorage, DeviceStorage


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
    landmark_query: Tensor | None = None,
) -> Tensor:
    """Attention of the queries of one call, whose own keys and values `storage` already holds.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        rotary: holds every position that a window can ask for.
        landmarks_tie: as in `choose_blocks`.
        landmark_query: the shape of `query`, not rotated: what scores landmarks in its place.

    Returns:
        (batch, columns, kv_heads, group, head_dim), in the dtype of `query`.
    """
    plain = landmark_query is None and storage.biases(0) is None
    if plain and kernels_take(storage, query.dtype, rotary):
        settings = {"block_size": block_size, "rotary": rotary, "scale": scale}
        return _attend_with_kernels(query, storage, groups, num_retrieved_blocks, granularity, landmarks_tie, settings)
    grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)  # (batch, kv_heads, group, groups, queries, head_dim)
    scoring = None if landmark_query is None else groups.gather(landmark_query).permute(0, 3, 4, 1, 2, 5)
    output, lse = _attend_direct(grouped, scoring, storage, groups, block_size, rotary, scale)
    if num_retrieved_blocks and groups.candidates:
        rotated, rotated_scoring = (
            None
            if x is None
            else rotate_to_distances(x * scale, groups.position, num_retrieved_blocks, block_size, rotary)
            for x in (grouped, scoring)
        )
        choice = choose_blocks(
            rotated if scoring is None else rotated_scoring,
            storage.landmarks(groups.candidates),
            groups.first_block,
            groups.valid,
            granularity=granularity,
            landmarks_tie=landmarks_tie,
            biases=storage.biases(groups.candidates),
        )
        # queries that share a choice stand together: (..., groups, choices, queries of a choice, ...)
        choices = choice.block.shape[4]
        shape = (choices, grouped.shape[4] // choices)
        key, value = storage.gather(choice.block.clamp_min(0))
        placed, placed_scoring = (
            None if x is None else choice.at_their_distances(x).unflatten(4, shape).transpose(-3, -2)
            for x in (rotated, rotated_scoring)
        )
        output = attend_retrieved(
            placed,
            key,
            value,
            (choice.block >= 0).unsqueeze(-1),
            (output.unflatten(4, shape), lse.unflatten(4, shape)),
            placed_scoring,
            storage.gather_biases(choice.block.clamp_min(0)),
        ).flatten(4, 5)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def kernels_take(storage: BlockStorage, dtype: torch.dtype, rotary: RotaryTable) -> bool:
    """Whether the GPU kernels can read `storage` for queries of `dtype`; where not, PyTorch does."""
    if not (isinstance(storage, DeviceStorage) and storage.capacity and storage.key.is_cuda and triton_is_installed()):
        return False
    from landmark_llama.reading.table_triton import supported

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
    from landmark_llama.reading.choice_triton import select_blocks
    from landmark_llama.reading.table_triton import attend_table
    from landmark_llama.reading.triton_rows import QueryRows

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
    query: Tensor,
    landmark_query: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `query` (batch, kv_heads, group, groups, queries, head_dim) over the tiles' windows.

    `landmark_query`: the shape of `query`, scores landmarks in its place.
    """
    tiles = groups.base.shape[1]
    slot = torch.arange(groups.window, device=query.device)
    block = (groups.base.unsqueeze(-1) + slot).clamp_min(0).minimum(groups.last_block[:, None, None])
    key, value = storage.gather(block.unsqueeze(1))
    key = rotary.rotate(key, (slot * block_size).unsqueeze(-1)).flatten(-3, -2)
    position = groups.window_position.unflatten(1, (1, 1, -1))

    def in_tiles(x: Tensor) -> Tensor:
        tiled = x.flatten(3, 4).unflatten(3, (tiles, -1))  # (batch, kv_heads, group, tiles, queries, head_dim)
        # the query heads of a KV head stand one after the other in a tile's queries
        return rotary.rotate(tiled, position).transpose(2, 3).flatten(3, 4)

    rotated, scoring = in_tiles(query), None if landmark_query is None else in_tiles(landmark_query)
    biases = storage.gather_biases(block.unsqueeze(1))
    seen_from, first = (
        x.unsqueeze(1).repeat(1, 1, 1, query.shape[2]) for x in (groups.window_position, groups.window_first)
    )
    output, lse = attend_window(
        rotated, key, value.flatten(-3, -2), seen_from, first, block_size, scale, scoring, biases
    )
    output = output.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    lse = lse.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    return output.reshape(query.shape), lse.reshape(query.shape[:-1])


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep what the tensors of a chunk leave, for those of the next one.

    glibc gives large blocks back to the system when they are freed; mapping their pages anew can take longer than what
    is computed on them. It stops doing so for blocks up to the size of the largest one that was freed, 32 MiB at most
    (mallopt(3), M_MMAP_THRESHOLD), so that freeing one is enough. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
