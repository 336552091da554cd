"""Attention through a table of blocks: those that a query retrieves, the direct ones before its own, its own.

`Table` is the view of one chunk of a streamed call. The blocks of a query are chosen in `attend_through_table`; PyTorch
or the Triton kernels then read them. Nothing here depends on how a text was cut into calls, except that chunked
attention reads the blocks of the current chunk directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.availability import triton_is_installed
from landmark_llama.attention.blockwise import attend_gathered, attend_window
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.configuration import RetrievalSettings
from landmark_llama.reading.choice import Choice, choose_blocks, rotate_to_distances
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import BlockStorage, DeviceStorage


@dataclass(frozen=True)
class Table:
    """The view of a chunk of a streamed call.

    groups: the chunk's queries.
    storages: the cache's blocks, layer by layer; each layer adds the chunk's own.
    settings: how many blocks are retrieved, and who shares a choice.
    kernels: False: PyTorch attends on a GPU, too.
    """

    groups: QueryGroups
    storages: Sequence[BlockStorage]
    settings: RetrievalSettings
    kernels: bool = True

    def to(self, device: torch.device, non_blocking: bool = False) -> Table:
        """The same view with its groups on `device` (the signature that accelerate's device hooks call)."""
        return replace(self, groups=self.groups.to(device, non_blocking))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer_idx: int, rotary: RotaryTable, scale: float
    ) -> Tensor:
        """Attention of one layer, whose keys and values go to the cache first.

        Args:
            query: (batch, columns, heads, head_dim), not rotated.
            key, value: (batch, columns, kv_heads, head_dim), not rotated.

        Returns:
            (batch, columns, heads, head_dim), in the dtype of `query`.
        """
        self.fill_cache_only(key, value, layer_idx=layer_idx, rotary=rotary)
        return attend_through_table(
            query.unflatten(2, (key.shape[2], -1)),
            self.storages[layer_idx],
            self.groups,
            num_retrieved_blocks=self.settings.num_retrieved_blocks,
            granularity=self.settings.granularity,
            rotary=rotary,
            scale=scale,
            landmarks_tie=layer_idx == 0,
            kernels=self.kernels,
        ).flatten(2, 3)

    def fill_cache_only(self, key: Tensor, value: Tensor, *, layer_idx: int, rotary: RotaryTable) -> None:
        """Stores the chunk's keys, rotated by their offsets in their blocks, and its values."""
        storage, groups = self.storages[layer_idx], self.groups
        position = groups.start.unsqueeze(1) + torch.arange(key.shape[1], device=key.device)
        key = rotary.rotate(key, (position % storage.block_size).unsqueeze(-1))
        storage.write(key, value, groups.start, groups.stop)


def attend_through_table(
    query: Tensor,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    num_retrieved_blocks: int,
    granularity: str,
    rotary: RotaryTable,
    scale: float,
    landmarks_tie: bool,
    kernels: bool = True,
) -> Tensor:
    """Attention of the queries of one call, whose own keys and values `storage` already holds.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        rotary: holds every position that a window can ask for.
        landmarks_tie: as in `choose_blocks`.
        kernels: use the GPU kernels where they can run. False: PyTorch.

    Returns:
        (batch, columns, kv_heads, group, head_dim), in the dtype of `query`.
    """
    settings = {"block_size": storage.block_size, "rotary": rotary, "scale": scale}
    kernels = kernels and kernels_take(storage, query.dtype, rotary)
    grouped = rotated = choice = None
    if not kernels or granularity == "token":  # for which there is no kernel
        grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)  # (batch, kv_heads, group, groups, queries, head_dim)
    if num_retrieved_blocks and groups.candidates:
        shared = {"k": num_retrieved_blocks, "granularity": granularity, "landmarks_tie": landmarks_tie}
        if grouped is None:
            choice = _choose_with_kernels(query, storage, groups, **shared, **settings)
        else:
            rotated, choice = _choose_in_pytorch(grouped, storage, groups, **shared, **settings)
    if kernels:
        return _attend_with_kernels(query, storage, groups, choice, **settings)
    output, lse = _attend_direct(grouped, storage, groups, **settings)
    if choice is not None:
        output = _add_retrieved(output, lse, rotated, choice, storage)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def _choose_in_pytorch(
    query: Tensor,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    k: int,
    granularity: str,
    landmarks_tie: bool,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
) -> tuple[Tensor, Choice]:
    """`query` (batch, kv_heads, group, groups, queries, head_dim), rotated to the slots, and the blocks it chose."""
    rotated = rotate_to_distances(query * scale, groups.position, k, block_size, rotary)
    landmarks = storage.landmarks(groups.candidates)
    choice = choose_blocks(
        rotated,
        landmarks,
        groups.first_block,
        groups.valid,
        granularity=granularity,
        landmarks_tie=landmarks_tie,
    )
    return rotated, choice


def _choose_with_kernels(
    query: Tensor, storage: DeviceStorage, groups: QueryGroups, *, granularity: str, **settings: Any
) -> Tensor:
    """The blocks of `Choice`, int32, chosen on the GPU; no number that the host must wait for."""
    from landmark_llama.reading.choice_triton import select_blocks

    with torch.cuda.device_of(query):
        return select_blocks(query.contiguous(), storage.landmark, groups, share=granularity == "head", **settings)


def _attend_with_kernels(
    query: Tensor, storage: DeviceStorage, groups: QueryGroups, choice: Choice | Tensor | None, **settings: Any
) -> Tensor:
    from landmark_llama.reading.table_triton import attend_table

    block = choice.block.int() if isinstance(choice, Choice) else choice
    rows = {"one_block": groups.one_block, **settings}
    with torch.cuda.device_of(query):
        return attend_table(query.contiguous(), storage.key, storage.value, groups, block, **rows)


def kernels_take(storage: BlockStorage, dtype: torch.dtype, rotary: RotaryTable) -> bool:
    """Whether the GPU kernels can read `storage` for queries of `dtype`; where not, PyTorch does."""
    if not (isinstance(storage, DeviceStorage) and storage.capacity and storage.key.is_cuda and triton_is_installed()):
        return False
    from landmark_llama.reading.table_triton import supported

    one_dtype = dtype == storage.key.dtype and rotary.cos.dtype == torch.float32
    return one_dtype and supported(dtype, storage.key.shape[-1], storage.block_size, storage.key.device)


def _attend_direct(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, *, block_size: int, rotary: RotaryTable, scale: float
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


def _add_retrieved(output: Tensor, lse: Tensor, rotated: Tensor, choice: Choice, storage: BlockStorage) -> Tensor:
    """Adds the chosen blocks to `output` (batch, kv_heads, group, groups, queries, head_dim) over the direct ones."""
    # queries that share a choice stand together: (..., groups, choices, queries of a choice, ...)
    choices = choice.block.shape[4]
    shape = (choices, output.shape[4] // choices)
    key, value = storage.gather(choice.block.clamp_min(0))
    return attend_gathered(
        choice.at_their_distances(rotated).unflatten(4, shape).transpose(-3, -2),
        key,
        value,
        (choice.block >= 0).unsqueeze(-1),
        (output.unflatten(4, shape), lse.unflatten(4, shape)),
    ).flatten(4, 5)
