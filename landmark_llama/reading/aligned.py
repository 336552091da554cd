"""The most frequent decoding step: one new token a row, all rows at the same position, no block completed.

It is what `reading/decoding.py` computes, and that does whatever this one refuses. Where all rows stand at one
position, block and offset are numbers of the host: slices take the place of masks, and nothing is asked of a tensor
but whether scores tie. What follows from the block alone is made at its first step and kept for the others.

Shapes: `heads` (kv_heads * group) of query heads, `pairs` (batch * kv_heads), `table` blocks that a query reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable, StillTable
from landmark_llama.configuration import LandmarkConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.decoding import DecodingStep, Places, turn, turning_tables
from landmark_llama.reading.highest import FOLDED_FROM, top_latest
from landmark_llama.reading.storage import BlockStorage, DeviceStorage
from landmark_llama.reading.trace import recorder
from landmark_llama.rows.documents import find_documents


def step_of(
    config: LandmarkConfig,
    content: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LandmarkCache | None,
    retrieval: tuple,
    rotary: RotaryTable,
) -> AlignedStep | DecodingStep | None:
    """The decoding step that a call is, or None if it is more than that.

    Args:
        content: ids (batch, 1) for a step; more columns, embeddings, or tensors of a GPU make no step.
        position_ids: checked, and otherwise of no use: a cache holds one document a row.
        retrieval: arguments of `LandmarkConfig.retrieval`.
        rotary: holds every position that a step can ask for.
    """
    if cache is None or content.dim() != 2 or content.shape[1] != 1 or content.device.type != "cpu":
        return None
    if attention_mask is not None and not all(attention_mask[:, -1].tolist()):
        return None
    batch, landmark = len(content), config.landmark_token_id
    if any(row[0] == landmark for row in content.tolist()):
        return None
    if position_ids is not None:
        one_each = torch.ones(content.shape, dtype=torch.bool)
        find_documents(position_ids, one_each, cache.ordinary_tokens(batch), cached=True)
    shared = config, cache, batch, config.retrieval(*retrieval), rotary
    return AlignedStep.of(*shared) or DecodingStep.of(*shared)


@dataclass(frozen=True)
class AlignedStep:
    """The view of such a step. Tensors are on the CPU.

    cache: what has been read; each layer adds the step's keys and values.
    block, offset: where the rows stand.
    first: the first block that is read directly.
    candidates: how many blocks may be retrieved; 0 where none is: then `first` is as far back as all fit the table.
    place: angles to each distance, (distances, head_dim), for every offset; `still`: of layers without RoPE.
    blocks: (pairs, 1, table): the blocks read directly, those to be chosen in front.
    row: (pairs, 1, 1): where the blocks of a pair begin among those of all.
    settings: how many blocks are retrieved.
    pooled: whether landmark keys are pooled of their blocks' keys.
    """

    cache: LandmarkCache
    storages: list[DeviceStorage]
    block: int
    offset: int
    first: int
    candidates: int
    place: Places
    still: Places | None
    blocks: Tensor
    row: Tensor
    settings: RetrievalSettings
    pooled: bool

    @classmethod
    def of(
        cls, config: LandmarkConfig, cache: LandmarkCache, batch: int, settings: RetrievalSettings, rotary: RotaryTable
    ) -> AlignedStep | None:
        """The step of `batch` rows, or None where one of the conditions does not hold."""
        ordinary = [] if cache.ordinary_counts is None else cache.ordinary_counts.tolist()
        if len(ordinary) != batch or ordinary.count(ordinary[0]) < batch or settings.granularity == "token":
            return None
        block, offset = divmod(ordinary[0], config.block_size - 1)
        storages, pooled = cache.storages, config.landmark_key == "pooled"
        held = (batch, config.num_key_value_heads, storages[0].capacity, config.block_size, config.head_dim)
        if offset == config.block_size - 2 or recorder() is not None:
            return None
        for x in storages:
            here = isinstance(x, DeviceStorage) and x.capacity > block and x.key.shape == held
            if not here or x.repeated.pay or (x.bias is not None) != pooled:
                return None
        direct = 0 if settings.chunked else settings.num_direct_blocks
        k, candidates = settings.num_retrieved_blocks, max(0, block - direct)
        # where no block is left out, those retrieved stand at their true distances, as if they were read directly
        retrieves = candidates > k > 0
        first = block - direct if retrieves else max(0, block - direct - k)
        place, still = (
            None if x is None else turning_tables(x, config.block_size, direct + 1, k) for x in (rotary, rotary.still)
        )
        row = torch.arange(0, held[0] * held[1] * held[2], held[2]).view(-1, 1, 1)
        number = k if retrieves else 0
        blocks = torch.arange(first - number, block + 1).repeat(len(row), 1, 1)
        if number:
            blocks[..., : settings.num_sink_blocks] = torch.arange(settings.num_sink_blocks)
        return cls(
            cache,
            storages,
            block,
            offset,
            first,
            candidates if retrieves else 0,
            place,
            still,
            blocks,
            row,
            settings,
            pooled,
        )

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
        """Attention of one layer, whose keys and values go to the cache first; arguments and result as in `Table`."""
        storage, shape, (batch, _, kv_heads, head_dim) = self.storages[layer_idx], query.shape, key.shape
        table = self.still if isinstance(rotary, StillTable) else self.place
        cos, sin = table.cos[self.offset], table.sin[self.offset]  # (distances, head_dim)
        storage.write_token(turn(key, cos[-1], sin[-1]), value, self.block, self.offset)
        pairs, group, exact = batch * kv_heads, shape[2] // kv_heads, self.settings.exact_weights
        # (pairs, group, distances, head_dim), the farthest first
        query = turn((query * scale).view(pairs, group, 1, head_dim), cos, sin)
        scoring = query
        if landmark_query is not None:
            scoring = turn((landmark_query * scale).view(pairs, group, 1, head_dim), cos, sin)
        blocks, length = self.blocks, self.blocks.shape[-1]
        if self.candidates:
            blocks = blocks.repeat(1, group, 1)
            self._choose(scoring, storage, layer_idx == 0 and not self.pooled, blocks)
            near = (blocks >= self.candidates - self.settings.num_retrieved_blocks).unsqueeze(-1)
            query = torch.where(near, query[:, :, 1:], query[:, :, :-1])
            if landmark_query is not None and not exact:
                scoring = torch.where(near, scoring[:, :, 1:], scoring[:, :, :-1])
            else:
                scoring = query
        else:
            blocks = blocks.expand(-1, group, -1)
            query, scoring = query[:, :, -length:], scoring[:, :, -length:]
        index = (blocks + self.row).flatten()
        # (pairs * group * table, block_size, head_dim)
        keys, values = (x.view(-1, x.shape[3] * head_dim).index_select(0, index) for x in (storage.key, storage.value))
        keys = keys.view(len(index), -1, head_dim).to(query.dtype)
        scores = (keys @ query.reshape(-1, head_dim, 1)).view(pairs * group, length, -1)
        if exact:
            weights = self._exact_weights(scores)
        else:
            logit = scores[:, :-1, -1]
            if landmark_query is not None:
                landmark = keys.view(pairs, group, length, -1, head_dim)[..., :-1, -1, :]
                logit = torch.linalg.vecdot(scoring[:, :, :-1], landmark).flatten(0, 1)
            if self.pooled:
                logit = logit + storage.bias.view(-1).index_select(0, index).view(len(logit), length)[:, :-1]
            weights = self._weights(scores, logit)
        values = values.view(pairs * group, -1, head_dim).to(weights.dtype)
        return (weights.view(pairs * group, 1, -1) @ values).view(shape).to(value.dtype)

    def _choose(self, query: Tensor, storage: BlockStorage, landmarks_tie: bool, blocks: Tensor) -> None:
        """Puts the k blocks of each query in front of `blocks` (pairs, group, table), as `choose_blocks` chooses.

        query: (pairs, group, distances, head_dim), rotated and scaled: what scores landmarks.
        """
        n, k, sinks = self.candidates, self.settings.num_retrieved_blocks, self.settings.num_sink_blocks
        if k == sinks:
            return
        landmarks = storage.landmarks(n).flatten(0, 1)  # (pairs, n, head_dim)
        query = query[:, :, : k + 1]
        if landmarks_tie:
            # of those before the last k only the latest can be chosen: the latest first, in a stable order
            scores = torch.linalg.vecdot(query, landmarks[:, :1].unsqueeze(1).to(query.dtype)).flip(-1)
            scores = torch.cat([scores, scores[..., -1:].expand(-1, -1, k - 1)], dim=-1)[..., : n - sinks]
            order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : k - sinks]
            blocks[..., sinks:k] = (n - 1 - order).sort(-1).values
            return
        far, recent = landmarks[:, : n - k].to(query.dtype), landmarks[:, None, n - k :].to(query.dtype)
        far, near = query[:, :, 0] @ far.transpose(1, 2), torch.linalg.vecdot(query[:, :, 1:], recent)
        scores = torch.cat([far, near], dim=-1)
        if self.pooled:
            scores += storage.biases(n).flatten(0, 1).unsqueeze(1)
        if sinks:
            scores = scores[..., sinks:]
        wanted = k - sinks
        if n < FOLDED_FROM:
            values, column = scores.topk(wanted + 1, dim=-1)
            tied = (values[..., -1] == values[..., -2]).any()
            column = column[..., :-1]
        if n >= FOLDED_FROM or tied:
            column = top_latest(scores, wanted)[1]
        blocks[..., sinks:k] = (column + sinks if sinks else column).sort(-1).values

    def _exact_weights(self, scores: Tensor) -> Tensor:
        """Weights (heads, table * block_size) of the positions, from their `scores` (heads, table, block_size)."""
        scores[:, :, -1] = -torch.inf
        scores[:, -1, self.offset + 1 :] = -torch.inf
        return scores.flatten(1).softmax(-1)

    def _weights(self, scores: Tensor, logit: Tensor) -> Tensor:
        """As `_exact_weights`, where earlier blocks weigh what their `logit` (heads, table - 1) says."""
        weights = torch.zeros_like(scores)
        earlier, own = logit.shape[1], scores[:, -1, : self.offset + 1]
        shares = torch.cat([logit, own], dim=-1).softmax(-1)
        tokens = scores[:, :-1, :-1].softmax(-1)
        torch.mul(tokens, shares[:, :earlier].unsqueeze(-1), out=weights[:, :-1, :-1])
        weights[:, -1, : self.offset + 1] = shares[:, earlier:]
        return weights
