"""A decoding step: one new token a row, and the landmark of each block that it completes.

Each query of a step reads one table of blocks, chosen ones first:

    [ retrieved blocks, for each head and query its own | direct blocks | own block ]

A step is a chunk of one or two columns and could go through `reading/table.py`, as it does on a GPU. Here the same is
written for a CPU, where the groups and tiles of longer chunks would take longer than the attention itself: small
operations are all that a step costs. So what layers share, positions, angles and masks, is made once a step, and what
depends on the offset in a block alone is made once for a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable, StillTable
from landmark_llama.configuration import LandmarkConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.choice import choose_blocks, scores_of_all, with_sinks
from landmark_llama.reading.highest import top_latest
from landmark_llama.reading.rerank import choose_by_weight
from landmark_llama.reading.storage import BlockStorage, Prior
from landmark_llama.reading.trace import recorder


@dataclass(frozen=True)
class DecodingStep:
    """The view of a decoding step. Tensors are on the CPU.

    source: (batch, columns): which column of the call a landmarked column shows; 1 for a landmark, which is none.
    output: (batch, 1): the column whose states are the result's.
    start: (batch,): landmarked position of each row's token; `stop`: the largest after the step.
    valid: (batch, columns), boolean: False where a row has no landmark to add, and others have.
    place: what follows from the offsets of the columns in their blocks.
    still: the same for layers without RoPE; None where there are none.
    direct: (batch, 1, 1, 1, direct blocks + 1): the blocks read directly, the own last; negative where none is.
    candidates: what may be retrieved; None where nothing is.
    cache: what has been read; each layer adds the step's keys and values.
    settings: how many blocks are retrieved, and who shares a choice.
    pooled: whether landmark keys are pooled of their blocks' keys.
    """

    source: Tensor
    output: Tensor
    start: Tensor
    stop: int
    valid: Tensor
    place: Places
    still: Places | None
    direct: Tensor
    candidates: Candidates | None
    cache: LandmarkCache
    settings: RetrievalSettings
    pooled: bool

    @classmethod
    def of(
        cls, config: LandmarkConfig, cache: LandmarkCache, batch: int, settings: RetrievalSettings, rotary: RotaryTable
    ) -> DecodingStep:
        """The step of `batch` rows. `rotary` holds every position that it can ask for."""
        block_size, ordinary = config.block_size, cache.ordinary_tokens(batch)
        start = ordinary + ordinary // (block_size - 1)
        block, offset = (start // block_size).unsqueeze(1), (start % block_size).unsqueeze(1)
        completes = offset == block_size - 2
        column = torch.arange(1 + int(completes.any()))
        num_direct = 0 if settings.local_attention == "chunked" else settings.num_direct_blocks
        k, number = settings.num_retrieved_blocks, (block - num_direct).clamp_min(0)
        most = int(number.max()) if k else 0
        place, still = (
            None
            if table is None
            else turning_tables(table, block_size, num_direct + 1, k if most else 0).at(offset + column)
            for table in (rotary, rotary.still)
        )
        return cls(
            source=column.expand(batch, -1),
            output=completes.long() if config.predict_from_landmark else torch.zeros_like(completes, dtype=torch.long),
            start=start,
            stop=int(start.max()) + len(column),
            valid=(column == 0) | completes,
            place=place,
            still=still,
            direct=(block + torch.arange(-num_direct, 1)).view(len(block), 1, 1, 1, -1),
            candidates=Candidates.of(number, most, k) if most else None,
            cache=cache,
            settings=settings,
            pooled=config.landmark_key == "pooled",
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
        storage, dtype, kv_heads = self.cache.layers[layer_idx].storage, query.dtype, key.shape[2]
        place = self.still if isinstance(rotary, StillTable) else self.place
        prior, scoring = None, None
        if self.pooled:
            prior = Prior(place.turn_key(landmark_prior), scale)
        storage.write(place.turn_key(key).to(dtype), value, self.start, self.stop, prior)
        query = place.at_distances(query, kv_heads, scale)
        if landmark_query is not None:
            scoring = place.at_distances(landmark_query, kv_heads, scale)
        table = self.direct
        if self.candidates is not None:
            tie = layer_idx == 0 and not self.pooled
            if self.settings.num_reranked_blocks and not tie:
                chosen = self._rerank(query, query if scoring is None else scoring, storage)
            else:
                chosen = self._choose(query if scoring is None else scoring, storage, tie)
            chosen = chosen.expand(*query.shape[:4], -1)
            if not tie and (found := recorder()) is not None and found.scores:
                found.add_scores(layer_idx, self._scores(query if scoring is None else scoring, storage))
            table = torch.cat([chosen, table.expand(*query.shape[:4], -1)], dim=-1)
            # of the last candidates and the direct blocks, each is read at its own distance; those before, one farther
            near = table >= self.candidates.first_recent
            query = torch.where(near.unsqueeze(-1), query[..., 1:, :], query[..., :-1, :])
            if scoring is not None and not self.settings.exact_weights:
                scoring = torch.where(near.unsqueeze(-1), scoring[..., 1:, :], scoring[..., :-1, :])
        block = table.clamp_min(0)
        key, value = storage.gather(block)  # (batch, kv_heads, group, columns, blocks, block_size, head_dim)
        scores = (key.to(query.dtype) @ query.unsqueeze(-1)).squeeze(-1)
        if self.settings.exact_weights:
            scores[..., -1] = scores[..., :-1].logsumexp(-1)
        elif scoring is not None:
            scores[..., -1] = torch.linalg.vecdot(scoring, key[..., -1, :].to(scoring.dtype))
        if self.pooled and not self.settings.exact_weights:
            scores[..., -1] += storage.gather_biases(block)
        weights, shares = self._weights(scores, table < 0)
        if self.candidates is not None and (found := recorder()) is not None:
            row, k = torch.arange(len(table)), self.settings.num_retrieved_blocks
            found.add(layer_idx, *(x[row, :, :, self.output[:, 0], :k] for x in (table, shares)))
        output = (weights.flatten(-2).unsqueeze(-2) @ value.to(weights.dtype).flatten(-3, -2)).squeeze(-2)
        return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype)

    def _choose(self, query: Tensor, storage: BlockStorage, landmarks_tie: bool) -> Tensor:
        """The k blocks of each query, (batch, kv_heads or 1, group or 1, columns or 1, k), as `choose_blocks` does.

        query: (batch, kv_heads, group, columns, distances, head_dim), rotated and scaled: what scores landmarks.
        """
        candidates, k, columns = self.candidates, self.settings.num_retrieved_blocks, query.shape[3]
        sinks = self.settings.num_sink_blocks
        landmarks, query = storage.landmarks(candidates.most), query[..., : k + 1, :]
        biases = storage.biases(candidates.most) if self.pooled else None
        together = self.settings.granularity == "token" or self.settings.granularity == "head" and columns > 1
        if together or storage.repeated.pay and not landmarks_tie:
            shared = {"granularity": self.settings.granularity, "landmarks_tie": landmarks_tie, "biases": biases}
            shared |= {"repeated": storage.repeated, "num_sink_blocks": sinks}
            query, valid = query.unsqueeze(3), self.valid.unsqueeze(1)
            return choose_blocks(query, landmarks, candidates.number, valid, **shared).block.squeeze(3)
        # each query chooses its own: older candidates by their score one block before the last k, those where they are
        if landmarks_tie:
            block, none = candidates.tied
            older = recent = landmarks[:, :, :1].to(query.dtype)
        else:
            block, none = candidates.all
            older = landmarks[:, :, : block.shape[-1] - k].to(query.dtype)
            recent = landmarks[candidates.row, :, candidates.recent].transpose(1, 2).to(query.dtype)
        far = (query[..., 0, :].flatten(2, 3) @ older.transpose(-1, -2)).unflatten(2, query.shape[2:4])
        near = torch.linalg.vecdot(query[..., 1:, :], recent[:, :, None, None])
        if biases is not None:
            far = far + biases[:, :, None, None, : block.shape[-1] - k]
            near = near + biases[candidates.row, :, candidates.recent].transpose(1, 2)[:, :, None, None]
        scores = torch.cat([far.expand(*far.shape[:-1], block.shape[-1] - k), near], dim=-1)
        if sinks:
            none = none | (block < sinks)
        column = top_latest(scores.masked_fill(none, -torch.inf), k - sinks)[1]
        chosen = block.masked_fill(none, -1).expand_as(scores).gather(-1, column)
        if sinks:
            chosen = with_sinks(chosen, sinks, candidates.number.view(-1, 1, 1, 1, 1))
        return chosen.sort(-1).values

    def _rerank(self, query: Tensor, scoring: Tensor, storage: BlockStorage) -> Tensor:
        """As `_choose`, by what the blocks weigh for `query`, of those that `scoring` proposes."""
        k, settings = self.settings.num_retrieved_blocks, self.settings
        asked = {"num_reranked_blocks": settings.num_reranked_blocks, "num_sink_blocks": settings.num_sink_blocks}
        rotated, farthest = query[..., : k + 1, :].unsqueeze(3), scoring[..., 0, :].unsqueeze(3)
        shown = storage, self.candidates.number, self.valid.unsqueeze(1)
        return choose_by_weight(rotated, farthest, *shown, **asked).block.squeeze(3)

    def _scores(self, query: Tensor, storage: BlockStorage) -> Tensor:
        """What the queries of the tokens compare, (batch, heads, candidates); arguments as of `_choose`."""
        most, k = self.candidates.most, self.settings.num_retrieved_blocks
        token = query[torch.arange(len(query)), :, :, self.output[:, 0], : k + 1]
        biases = storage.biases(most) if self.pooled else None
        return scores_of_all(token, storage.landmarks(most), self.candidates.number[:, 0], biases).flatten(1, 2)

    def _weights(self, scores: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the positions of a table of blocks, the own one last, 0 for landmarks; and of the blocks.

        Args:
            scores: (batch, kv_heads, group, columns, blocks, block_size).
            none: (batch, kv_heads or 1, group or 1, columns or 1, blocks), boolean: True where there is no such block.
        """
        tokens = scores.masked_fill(self.place.hidden, -torch.inf)
        # a block's logit: its landmark's score, or for the own block the logsumexp of its tokens
        own = tokens[..., -1, :].logsumexp(-1, keepdim=True)
        logit = torch.cat([scores[..., :-1, -1], own], dim=-1).masked_fill(none, -torch.inf)
        shares = logit.softmax(-1)
        return tokens.softmax(-1) * shares.unsqueeze(-1), shares


class Places(NamedTuple):
    """What follows from where queries stand in their blocks: angles and masks of columns at such offsets.

    cos, sin: (batch, columns, 1, distances, head_dim): of the angles to each block that they may read, for retrieved
        blocks the farthest first, one distance more than there are blocks; the own block, distance 0, last. The first
        half of `sin` is negative.
    hidden: (batch, 1, 1, columns, blocks, block_size), boolean: positions of the table that are no token to read.
    """

    cos: Tensor
    sin: Tensor
    hidden: Tensor

    def at(self, offset: Tensor) -> Places:
        """The rows `offset` (batch, columns) of tables over all offsets."""
        cos, sin, hidden = (x[offset] for x in self)
        return Places(cos.unsqueeze(2), sin.unsqueeze(2), hidden[:, None, None])

    def at_distances(self, query: Tensor, kv_heads: int, scale: float) -> Tensor:
        """`query` (batch, columns, heads, head_dim), rotated to all distances and scaled, in fp32 at least.

        Returns (batch, kv_heads, group, columns, distances, head_dim).
        """
        query = turn(query.unsqueeze(-2), self.cos, self.sin) * scale  # (batch, columns, heads, distances, head_dim)
        return query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4, 5)

    def turn_key(self, key: Tensor) -> Tensor:
        """`key` (batch, columns, kv_heads, head_dim), rotated by its offset."""
        return turn(key, self.cos[..., -1, :], self.sin[..., -1, :])


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(sin.dtype), sin)


@functools.lru_cache(maxsize=8)
def turning_tables(rotary: RotaryTable, block_size: int, num_direct: int, k: int) -> Places:
    """Tables over all offsets in a block, (block_size, ...). `num_direct`: blocks read directly, the own included."""
    offset, distance = torch.arange(block_size), torch.arange(num_direct + k - (not k), -1, -1)
    half = rotary.cos.shape[-1]
    unit = torch.cat([rotary.cos.new_ones(half), rotary.cos.new_zeros(half)])  # rotated, it is (cos, sin)
    # rotating twice: the sum of the positions may lie outside the rotary table
    cos, sin = rotary.rotate(rotary.rotate(unit, offset).unsqueeze(1), distance * block_size).chunk(2, dim=-1)
    hidden = (offset == block_size - 1).repeat(block_size, num_direct + k, 1)  # landmarks are no tokens
    hidden[:, -1] |= offset > offset.unsqueeze(1)  # nor what comes later in the own block
    return Places(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1), hidden)


class Candidates(NamedTuple):
    """The blocks that a step may retrieve from.

    number: (batch, 1): how many each row has; `most`: the largest.
    first_recent: (batch, 1, 1, 1, 1): the first of each row's last k, negative if there are fewer.
    row, recent: (batch, 1) and (batch, k): an index of those last k.
    all: the block of each score that is compared, (batch, 1, 1, 1, scores), and whether it is none: all older
        candidates, then the last k.
    tied: the same where landmarks tie: of the older ones only the last k can be chosen.
    """

    number: Tensor
    most: int
    first_recent: Tensor
    row: Tensor
    recent: Tensor
    all: tuple[Tensor, Tensor]
    tied: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, number: Tensor, most: int, k: int) -> Candidates:
        """For rows with `number` (batch, 1) candidates, and k of them retrieved."""
        batch, first = len(number), number - k
        recent, older = first + torch.arange(k), torch.arange(max(most - k, 1)).expand(batch, -1)
        everything = torch.cat([older.masked_fill(older >= first, -1), recent], dim=1)
        blocks = (x.view(batch, 1, 1, 1, -1) for x in (everything, number + torch.arange(-2 * k, 0)))
        everything, tied = ((block, block < 0) for block in blocks)
        row = torch.arange(batch).unsqueeze(1)
        return cls(number, most, first.view(batch, 1, 1, 1, 1), row, recent.clamp_min(0), everything, tied)
