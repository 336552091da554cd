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

from landmark_llama.attention import availability
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.windows import attend_gathered, attend_window
from landmark_llama.configuration import RetrievalSettings
from landmark_llama.reading.choice import Choice, choose_blocks, rotate_to_distances
from landmark_llama.reading.exact_table import attend_exact_table
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.rerank import choose_by_weight
from landmark_llama.reading.storage import BlockStorage, Prior
from landmark_llama.reading.trace import Report, report_of_chunk

# most elements of keys that PyTorch gathers at once of what queries retrieve, and as many of values: 512 MB in bf16
GATHERED_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Table:
    """The view of a chunk of a streamed call.

    groups: the chunk's queries.
    storages: the cache's blocks, layer by layer; each layer adds the chunk's own.
    settings: how many blocks are retrieved, and who shares a choice.
    kernels: False: PyTorch attends on a GPU, too.
    pooled: whether landmark keys are pooled of their blocks' keys.
    """

    groups: QueryGroups
    storages: Sequence[BlockStorage]
    settings: RetrievalSettings
    kernels: bool = True
    pooled: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> Table:
        """The same view with its groups on `device` (the signature that accelerate's device hooks call)."""
        return replace(self, groups=self.groups.to(device, non_blocking))

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
        """Attention of one layer, whose keys and values go to the cache first.

        Args:
            query: (batch, columns, heads, head_dim), not rotated.
            key, value: (batch, columns, kv_heads, head_dim), not rotated.
            landmark_query: the shape of `query`, not rotated: what scores landmarks in its place.
            landmark_prior: (batch, columns, kv_heads, head_dim), not rotated, where landmark keys are pooled: that of a
                landmark's column is the query that its block is pooled around.

        Returns:
            (batch, columns, heads, head_dim), in the dtype of `query`.
        """
        shared = {"layer_idx": layer_idx, "rotary": rotary, "scale": scale}
        self.fill_cache_only(key, value, **shared, landmark_prior=landmark_prior)
        by_kv_head = key.shape[2], -1
        return attend_through_table(
            query.unflatten(2, by_kv_head),
            self.storages[layer_idx],
            self.groups,
            num_retrieved_blocks=self.settings.num_retrieved_blocks,
            granularity=self.settings.granularity,
            num_sink_blocks=self.settings.num_sink_blocks,
            num_reranked_blocks=self.settings.num_reranked_blocks,
            exact_weights=self.settings.exact_weights,
            rotary=rotary,
            scale=scale,
            landmarks_tie=layer_idx == 0 and not self.pooled,
            kernels=self.kernels,
            landmark_query=None if landmark_query is None else landmark_query.unflatten(2, by_kv_head),
            report=report_of_chunk(layer_idx, self.groups, self.storages[layer_idx], self.settings.exact_weights),
        ).flatten(2, 3)

    def fill_cache_only(
        self,
        key: Tensor,
        value: Tensor,
        *,
        layer_idx: int,
        rotary: RotaryTable,
        scale: float,
        landmark_prior: Tensor | None = None,
    ) -> None:
        """Stores the chunk's keys, rotated by their offsets in their blocks, and its values."""
        storage, groups = self.storages[layer_idx], self.groups
        position = groups.start.unsqueeze(1) + torch.arange(key.shape[1], device=key.device)
        offset = (position % storage.block_size).unsqueeze(-1)
        prior = Prior.of(landmark_prior, offset, rotary, scale)
        storage.write(rotary.rotate(key, offset), value, groups.start, groups.stop, prior)


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
    num_sink_blocks: int = 0,
    num_reranked_blocks: int = 0,
    exact_weights: bool = False,
    kernels: bool = True,
    landmark_query: Tensor | None = None,
    report: Report | None = None,
) -> Tensor:
    """Attention of the queries of one call, whose own keys and values `storage` already holds.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated.
        rotary: holds every position that a window can ask for.
        landmarks_tie, num_sink_blocks: as in `choose_blocks`.
        num_reranked_blocks: if not 0, queries that share no choice choose as in `choose_by_weight`.
        exact_weights: blocks weigh what their tokens do, whatever their landmarks score.
        kernels: use the GPU kernels where they can run. False: PyTorch.
        landmark_query: the shape of `query`, not rotated: what scores landmarks in its place.
        report: is told what was chosen, by PyTorch.

    Returns:
        (batch, columns, kv_heads, group, head_dim), in the dtype of `query`.
    """
    shared = {"k": num_retrieved_blocks, "granularity": granularity, "landmarks_tie": landmarks_tie}
    if groups.valid.shape[2] > 1 and granularity != "token_and_head" or landmarks_tie:
        num_reranked_blocks = 0
    if exact_weights and report is None and query.device.type == "cpu":
        how = {**shared, "num_sink_blocks": num_sink_blocks, "rotary": rotary, "scale": scale}
        how["num_reranked_blocks"] = num_reranked_blocks
        return attend_exact_table(query, landmark_query, storage, groups, **how)
    settings = {"block_size": storage.block_size, "rotary": rotary, "scale": scale}
    kernels = kernels and report is None and kernels_take(storage, query.dtype, rotary)
    grouped = scoring = rotated = rotated_scoring = choice = None
    if not kernels or granularity == "token" or num_reranked_blocks:  # for which there is no kernel
        grouped = groups.gather(query).permute(0, 3, 4, 1, 2, 5)  # (batch, kv_heads, group, groups, queries, head_dim)
        if landmark_query is not None:
            scoring = groups.gather(landmark_query).permute(0, 3, 4, 1, 2, 5)
    if num_retrieved_blocks and groups.candidates:
        shared["num_sink_blocks"] = num_sink_blocks
        if grouped is None:
            scoring = query if landmark_query is None else landmark_query
            choice = _choose_with_kernels(scoring, storage, groups, **shared, **settings)
        else:
            shared["num_reranked_blocks"] = num_reranked_blocks
            rotated, rotated_scoring, choice = _choose_in_pytorch(
                grouped, scoring, storage, groups, **shared, **settings
            )
    if kernels:
        return _attend_with_kernels(query, landmark_query, storage, groups, choice, exact=exact_weights, **settings)
    output, lse = _attend_direct(grouped, scoring, storage, groups, exact_weights=exact_weights, **settings)
    if report is not None:
        report(choice, rotated if rotated_scoring is None or exact_weights else rotated_scoring, lse)
    if choice is not None:
        output = _add_retrieved(output, lse, rotated, rotated_scoring, choice, storage, exact_weights)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def _choose_in_pytorch(
    query: Tensor,
    scoring: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    k: int,
    granularity: str,
    landmarks_tie: bool,
    num_sink_blocks: int,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    num_reranked_blocks: int = 0,
) -> tuple[Tensor, Tensor | None, Choice]:
    """`query` (batch, kv_heads, group, groups, queries, head_dim), rotated to the slots, and the blocks it chose.

    `scoring`, likewise, scores the landmarks in its place.
    """
    rotated, rotated_scoring = (
        None if x is None else rotate_to_distances(x * scale, groups.position, k, block_size, rotary)
        for x in (query, scoring)
    )
    if num_reranked_blocks:
        farthest = (rotated if rotated_scoring is None else rotated_scoring)[..., 0, :]
        asked = {"num_reranked_blocks": num_reranked_blocks, "num_sink_blocks": num_sink_blocks}
        choice = choose_by_weight(rotated, farthest, storage, groups.first_block, groups.valid, **asked)
        return rotated, rotated_scoring, choice
    landmarks = storage.landmarks(groups.candidates)
    choice = choose_blocks(
        rotated if rotated_scoring is None else rotated_scoring,
        landmarks,
        groups.first_block,
        groups.valid,
        granularity=granularity,
        landmarks_tie=landmarks_tie,
        biases=storage.biases(groups.candidates),
        repeated=storage.repeated,
        num_sink_blocks=num_sink_blocks,
    )
    return rotated, rotated_scoring, choice


def _choose_with_kernels(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, *, granularity: str, **settings: Any
) -> Tensor:
    """The blocks of `Choice`, int32, chosen on the GPU by `query`; no number that the host must wait for."""
    from landmark_llama.reading.choice_triton import select_blocks

    settings |= {"share": granularity == "head", "bias": storage.biases(storage.capacity)}
    with torch.cuda.device_of(query):
        landmark = storage.landmarks(storage.capacity)
        return select_blocks(query.contiguous(), landmark, groups, **settings)


def _attend_with_kernels(
    query: Tensor,
    landmark_query: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    choice: Choice | Tensor | None,
    **settings: Any,
) -> Tensor:
    from landmark_llama.reading.table_triton import attend_table

    block = choice.block.int() if isinstance(choice, Choice) else choice
    rows = {"one_block": groups.one_block, "bias": storage.biases(storage.capacity), **settings}
    rows["landmark_query"] = None if landmark_query is None else landmark_query.contiguous()
    with torch.cuda.device_of(query):
        return attend_table(query.contiguous(), *storage.resident, groups, block, **rows)


def kernels_take(storage: BlockStorage, dtype: torch.dtype, rotary: RotaryTable) -> bool:
    """Whether the GPU kernels can read `storage` for queries of `dtype`; where not, PyTorch does."""
    if storage.resident is None or not storage.capacity or not availability.kernels_run_on(storage.device):
        return False
    from landmark_llama.reading.table_triton import supported

    one_dtype = dtype == storage.dtype and rotary.cos.dtype == torch.float32
    return one_dtype and supported(dtype, storage.resident[0].shape[-1], storage.block_size, storage.device)


def _attend_direct(
    query: Tensor,
    scoring: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    block_size: int,
    rotary: RotaryTable,
    scale: float,
    exact_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `query` (batch, kv_heads, group, groups, queries, head_dim) over the tiles' windows.

    `scoring`, likewise, scores the landmarks in its place.
    """
    tiles = groups.base.shape[1]
    slot = torch.arange(groups.window, device=query.device)
    block = (groups.base.unsqueeze(-1) + slot).clamp_min(0).minimum(groups.last_block[:, None, None])
    key, value = storage.gather(block.unsqueeze(1))
    key = rotary.rotate(key, (slot * block_size).unsqueeze(-1)).flatten(-3, -2)
    position = groups.window_position.unflatten(1, (1, 1, -1))

    def rotated_in_tiles(x: Tensor) -> Tensor:
        tiled = x.flatten(3, 4).unflatten(3, (tiles, -1))  # (batch, kv_heads, group, tiles, queries, head_dim)
        # the query heads of a KV head stand one after the other in a tile's queries
        return rotary.rotate(tiled, position).transpose(2, 3).flatten(3, 4)

    rotated, scoring = rotated_in_tiles(query), None if scoring is None else rotated_in_tiles(scoring)
    place, first = (
        x.unsqueeze(1).repeat(1, 1, 1, query.shape[2]) for x in (groups.window_position, groups.window_first)
    )
    biases = storage.gather_biases(block.unsqueeze(1))
    landmarks = scoring, biases, exact_weights
    output, lse = attend_window(rotated, key, value.flatten(-3, -2), place, first, block_size, scale, *landmarks)
    output = output.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    lse = lse.unflatten(3, (query.shape[2], -1)).transpose(2, 3)
    return output.reshape(query.shape), lse.reshape(query.shape[:-1])


def _add_retrieved(
    output: Tensor,
    lse: Tensor,
    rotated: Tensor,
    rotated_scoring: Tensor | None,
    choice: Choice,
    storage: BlockStorage,
    exact_weights: bool,
) -> Tensor:
    """Adds the chosen blocks to `output` (batch, kv_heads, group, groups, queries, head_dim) over the direct ones.

    Halves of the groups, then of the queries, go one after the other where the keys exceed `GATHERED_ELEMENTS`.
    """
    elements = output[:, :, 0, 0, 0].numel() * choice.block[0, 0].numel() * storage.block_size
    halved = next((dim for dim in (3, 4) if choice.block.shape[dim] > 1), None)
    if elements > GATHERED_ELEMENTS and halved is not None:
        rows = output, lse, rotated, rotated_scoring, *choice
        halves = zip(*((None, None) if x is None else x.chunk(2, halved) for x in rows), strict=True)
        return torch.cat([_add_retrieved(*x[:4], Choice(*x[4:]), storage, exact_weights) for x in halves], halved)
    # queries that share a choice stand together: (..., groups, choices, queries of a choice, ...)
    choices = choice.block.shape[4]
    shape = (choices, output.shape[4] // choices)
    block = choice.block.clamp_min(0)
    key, value = storage.gather(block)
    query, scoring = (
        None if x is None else choice.at_their_distances(x).unflatten(4, shape).transpose(-3, -2)
        for x in (rotated, rotated_scoring)
    )
    return attend_gathered(
        query,
        key,
        value,
        (choice.block >= 0).unsqueeze(-1),
        (output.unflatten(4, shape), lse.unflatten(4, shape)),
        scoring,
        storage.gather_biases(block),
        exact_weights,
    ).flatten(4, 5)
