"""The most frequent decoding step: one new token a row, all rows at the same position, no block completed.

It computes what `reading/decoding.py` does, which takes over wherever a condition of this one does not hold. Where all
rows stand at one position, block and offset are numbers of the host: slices take the place of masks, and no tensor is
asked for anything but whether scores tie. What follows from the block is made at its first step and kept for the rest.

Shapes: `pairs` (batch * kv_heads), `group` (query heads that share a KV head), `heads` (pairs * group), `table` (blocks
that a query reads: the retrieved ones, then the direct ones, the own last), `distances` (one more than `table` where
blocks are retrieved, the farthest first).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable, StillTable
from landmark_llama.configuration import LandmarkConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.decoding import DecodingStep, turn, turning_tables
from landmark_llama.reading.highest import FOLDED_FROM, top_latest
from landmark_llama.reading.rerank import choose_by_weight
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.trace import recorder
from landmark_llama.rows.documents import find_documents


def step_of(
    config: LandmarkConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LandmarkCache,
    retrieval: tuple,
    rotary: RotaryTable,
) -> AlignedStep | DecodingStep | None:
    """The decoding step that a call is, or None if it is more than that, or holds what must be refused.

    Args:
        input_ids: (batch, 1) for a step; more columns make none.
        attention_mask, position_ids: as they were given, not checked.
        retrieval: arguments of `LandmarkConfig.retrieval`.
        rotary: holds every position that a step can ask for.
    """
    batch, columns = input_ids.shape
    if columns != 1:
        return None
    landmark, vocabulary = config.landmark_token_id, config.vocab_size
    if any(token == landmark or not 0 <= token < vocabulary for (token,) in input_ids.tolist()):
        return None
    if attention_mask is not None:
        fits = attention_mask.dim() == 2 and len(attention_mask) == batch and attention_mask.shape[1]
        if not fits or not all(attention_mask[:, -1].tolist()):
            return None
    if position_ids is not None:
        one_each = torch.ones(input_ids.shape, dtype=torch.bool)
        find_documents(position_ids, one_each, cache.ordinary_tokens(batch), cached=True)
    shared = config, cache, batch, config.retrieval(*retrieval), rotary
    return AlignedStep.of(*shared) or DecodingStep.of(*shared)


class AlignedBlock(NamedTuple):
    """What all steps inside one block share. Tensors are on the CPU; `weights` alone is written to.

    made_for: what it follows from.
    candidates: how many blocks may be retrieved; 0 where none need be, as all that may be read fit the table.
    first: the first block that is read directly.
    gathered: blocks of the table that are gathered for each query head. Direct ones are read where they lie, if several
        query heads share them.
    direct: (pairs, group, table or fewer): the blocks read directly, and before them the sinks, if blocks are
        retrieved.
    row: (pairs, 1, 1): where the blocks of a pair begin among those of all.
    tables: cosines and sines of the angles to each distance, (block_size, distances, head_dim) each; of layers with
        RoPE, and of those without, if there are any.
    weights: (heads, table, block_size), zero at landmarks and beyond the row's end.
    """

    made_for: tuple
    settings: RetrievalSettings
    pooled: bool
    block: int
    candidates: int
    first: int
    gathered: int
    direct: Tensor
    row: Tensor
    tables: list[tuple[Tensor, Tensor]]
    weights: Tensor

    @classmethod
    def of(cls, made_for: tuple) -> AlignedBlock:
        """`made_for`: settings, whether landmark keys are pooled, rotary table, heads, dtype and the shape of the keys
        of all blocks, block.
        """
        settings, pooled, rotary, heads, dtype, (batch, kv_heads, capacity, block_size, head_dim), block = made_for
        local = 0 if settings.chunked else settings.num_direct_blocks
        k, candidates, pairs = settings.num_retrieved_blocks, max(0, block - local), batch * kv_heads
        retrieves = candidates > k > 0
        # where no block is left out, all stand at their true distances, as if they were read directly
        first = block - local if retrieves else max(0, block - local - k)
        direct = torch.arange(first, block + 1)
        if retrieves:
            direct = torch.cat([torch.arange(settings.num_sink_blocks), direct])
        length = k + local + 1 if retrieves else len(direct)
        tables = [
            (place.cos[:, -length - retrieves :], place.sin[:, -length - retrieves :])
            for place in (turning_tables(x, block_size, local + 1, k) for x in (rotary, rotary.still) if x is not None)
        ]
        return cls(
            made_for,
            settings,
            pooled,
            block,
            candidates if retrieves else 0,
            first,
            0 if not retrieves else length if heads == kv_heads else k,
            direct.repeat(pairs, heads // kv_heads, 1),
            torch.arange(0, pairs * capacity, capacity).view(-1, 1, 1),
            tables,
            torch.zeros(batch * heads, length, block_size, dtype=torch.promote_types(dtype, rotary.cos.dtype)),
        )


class AlignedStep:
    """The view of such a step.

    Args:
        cache: what has been read; each layer adds the step's keys and values.
        plan: of the block that the rows stand in.
        offset: where in it.
    """

    def __init__(self, cache: LandmarkCache, plan: AlignedBlock, offset: int) -> None:
        self.cache, self.settings, self.plan, self.offset = cache, plan.settings, plan, offset
        self.storages = cache.storages
        # (distances, head_dim)
        self.angles = [(cos[offset], sin[offset]) for cos, sin in plan.tables]
        self.own_angle = [(cos[-1], sin[-1]) for cos, sin in self.angles]

    @classmethod
    def of(
        cls, config: LandmarkConfig, cache: LandmarkCache, batch: int, settings: RetrievalSettings, rotary: RotaryTable
    ) -> AlignedStep | None:
        """The step of `batch` rows, or None where one of the conditions does not hold."""
        ordinary = [] if cache.ordinary_counts is None else cache.ordinary_counts.tolist()
        if len(ordinary) != batch or ordinary.count(ordinary[0]) < batch or settings.granularity == "token":
            return None
        storages, block_size = cache.storages, config.block_size
        block, offset = divmod(ordinary[0], block_size - 1)
        if offset == block_size - 2 or block >= storages[0].capacity or recorder() is not None:
            return None
        held = (batch, config.num_key_value_heads, storages[0].capacity, block_size, config.head_dim)
        pooled = config.landmark_key == "pooled"
        for x in storages:
            there = isinstance(x, DeviceStorage) and x.key is not None and x.key.shape == held
            if not there or x.repeated.pay or (x.bias is not None) != pooled:
                return None
        made_for = settings, pooled, rotary, config.num_attention_heads, storages[0].dtype, held, block
        plan = cache.aligned_block
        if plan is None or plan.made_for != made_for:
            # written to in every mode, which what is made in inference mode cannot be
            with torch.inference_mode(False):
                plan = cache.aligned_block = AlignedBlock.of(made_for)
        return cls(cache, plan, offset)

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
        storage, plan, shape = self.storages[layer_idx], self.plan, query.shape
        (pairs, group, _), head_dim, still = plan.direct.shape, shape[3], isinstance(rotary, StillTable)
        storage.write_token(turn(key, *self.own_angle[still]), value, plan.block, self.offset)
        # (pairs, group, distances, head_dim)
        rotated = scoring = turn((query * scale).view(pairs, group, 1, head_dim), *self.angles[still])
        if landmark_query is not None:
            scoring = turn((landmark_query * scale).view(pairs, group, 1, head_dim), *self.angles[still])
        blocks = plan.direct
        if plan.candidates:
            tie = layer_idx == 0 and not plan.pooled
            if plan.settings.num_reranked_blocks and not tie:
                blocks = self._rerank(rotated, scoring, storage)
            else:
                blocks = self._choose(scoring, storage, tie)
            # of the last candidates and the direct blocks, each is read at its own distance; those before, one farther
            near = (blocks >= plan.candidates - plan.settings.num_retrieved_blocks).unsqueeze(-1)
            rotated = torch.where(near, rotated[:, :, 1:], rotated[:, :, :-1])
            if landmark_query is not None:
                scoring = torch.where(near, scoring[:, :, 1:], scoring[:, :, :-1])
        index = blocks + plan.row
        scores, values = self._score(rotated, storage, index)
        if plan.settings.exact_weights:
            weights = self._exact_weights(scores)
        else:
            logit = scores[:, :-1, -1]
            if landmark_query is not None:
                landmark = storage.landmark.view(-1, head_dim)[index[..., :-1]].to(scoring.dtype)
                logit = torch.linalg.vecdot(scoring[:, :, :-1], landmark).flatten(0, 1)
            if plan.pooled:
                logit = logit + storage.bias.view(-1)[index[..., :-1]].flatten(0, 1)
            weights = self._weights(scores, logit)
        outputs, parts = [], weights.view(len(weights), -1).split([x.shape[1] for x in values], dim=1)
        for part, x in zip(parts, values, strict=True):
            outputs.append(torch.bmm(part.view(len(x), -1, x.shape[1]), x.to(part.dtype)).view(-1, head_dim))
        return sum(outputs[1:], start=outputs[0]).view(shape).to(query.dtype)

    def _score(self, query: Tensor, storage: DeviceStorage, index: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores (heads, table, block_size) of all positions, and their values, (heads or pairs, positions, head_dim)
        in one part or two.

        query: (pairs, group, table, head_dim), rotated to the distances of the blocks `index` (pairs, group, table).
        """
        gathered, head_dim, heads = self.plan.gathered, query.shape[-1], len(self.plan.weights)
        table, scores, values = index.shape[-1], [], []
        if gathered:
            chosen = index[..., :gathered].flatten()
            key, value = (x.view(-1, x.shape[3] * head_dim).index_select(0, chosen) for x in storage.resident)
            key = key.view(len(chosen), -1, head_dim).to(query.dtype)
            asking = query[:, :, :gathered].reshape(len(chosen), head_dim, 1)
            scores.append(torch.bmm(key, asking).view(heads, gathered, -1))
            values.append(value.view(heads, -1, head_dim))
        if gathered < table:
            key, value = (x.narrow(2, self.plan.first, table - gathered).flatten(0, 1) for x in storage.resident)
            direct = key.to(query.dtype) @ query[:, :, gathered:].permute(0, 2, 3, 1)
            scores.append(direct.permute(0, 3, 1, 2).flatten(0, 1))
            values.append(value.flatten(1, 2))
        return torch.cat(scores, dim=1) if len(scores) > 1 else scores[0], values

    def _choose(self, query: Tensor, storage: DeviceStorage, landmarks_tie: bool) -> Tensor:
        """The blocks (pairs, group, table) that each query reads, those retrieved as `choose_blocks` chooses them.

        query: (pairs, group, distances, head_dim), rotated and scaled: what scores landmarks.
        """
        plan, n, k = self.plan, self.plan.candidates, self.plan.settings.num_retrieved_blocks
        sinks = plan.settings.num_sink_blocks
        wanted = k - sinks
        if not wanted:
            return plan.direct
        query, landmarks = query[:, :, : k + 1], storage.landmark.flatten(0, 1)  # (pairs, capacity, head_dim)
        if landmarks_tie:
            # of those before the last k only the latest can be chosen: the latest first, in a stable order
            scores = torch.linalg.vecdot(query, landmarks[:, None, :1].to(query.dtype)).flip(-1)
            scores = torch.cat([scores, scores[..., -1:].expand(-1, -1, k - 1)], dim=-1)[..., : n - sinks]
            order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :wanted]
            chosen = (n - 1 - order).sort(-1).values
        else:
            far = landmarks.narrow(1, sinks, n - sinks).to(query.dtype)
            scores = torch.bmm(query[:, :, 0], far.transpose(1, 2))
            recent = min(k, n - sinks)  # sinks may be among the last k
            near = torch.linalg.vecdot(query[:, :, -recent:], far[:, None, -recent:])
            scores[:, :, -recent:] = near
            if plan.pooled:
                scores += storage.bias.flatten(0, 1).narrow(1, sinks, n - sinks).unsqueeze(1)
            chosen = _highest(scores, wanted)
            chosen = (chosen + sinks if sinks else chosen).sort(-1).values
        if sinks:
            return torch.cat([plan.direct[..., :sinks], chosen, plan.direct[..., sinks:]], dim=-1)
        return torch.cat([chosen, plan.direct], dim=-1)

    def _rerank(self, rotated: Tensor, scoring: Tensor, storage: DeviceStorage) -> Tensor:
        """As `_choose`, by what the blocks weigh for `rotated`, of those that `scoring` proposes."""
        settings, k = self.settings, self.settings.num_retrieved_blocks
        shape = storage.key.shape[:2]  # (batch, kv_heads)
        rotated, scoring = (x.unflatten(0, shape)[:, :, :, None, None] for x in (rotated, scoring))
        shown = storage, torch.full((shape[0], 1), self.plan.candidates), torch.ones(shape[0], 1, 1, dtype=torch.bool)
        asked = {"num_reranked_blocks": settings.num_reranked_blocks, "num_sink_blocks": settings.num_sink_blocks}
        choice = choose_by_weight(rotated[..., : k + 1, :], scoring[..., 0, :], *shown, **asked)
        return torch.cat(
            [choice.block.flatten(0, 1).flatten(2), self.plan.direct[..., settings.num_sink_blocks :]], dim=-1
        )

    def _exact_weights(self, scores: Tensor) -> Tensor:
        """Weights (heads, table * block_size) of the positions, from their `scores` (heads, table, block_size)."""
        scores[:, :, -1] = -torch.inf
        scores[:, -1, self.offset + 1 :] = -torch.inf
        return scores.flatten(1).softmax(-1)

    def _weights(self, scores: Tensor, logit: Tensor) -> Tensor:
        """As `_exact_weights`, where earlier blocks weigh what their `logit` (heads, table - 1) says."""
        weights, earlier, offset = self.plan.weights, logit.shape[1], self.offset + 1
        shares = torch.cat([logit, scores[:, -1, :offset]], dim=-1).softmax(-1)
        tokens = scores[:, :-1, :-1].softmax(-1)
        torch.mul(tokens, shares[:, :earlier, None], out=weights[:, :-1, :-1])
        weights[:, -1, :offset] = shares[:, earlier:]
        return weights


def _highest(scores: Tensor, number: int) -> Tensor:
    """Columns (..., number) of the highest of `scores` (..., more), in any order; of equal ones the later."""
    if scores.shape[-1] < FOLDED_FROM:
        values, column = scores.topk(number + 1, dim=-1)
        if not (values[..., -1] == values[..., -2]).any():
            return column[..., :-1]
    return top_latest(scores, number)[1]
