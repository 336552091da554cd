"""A decoding step: one new token a row, and the landmark of each block that it completes.

Each query of a step reads one table of blocks, chosen ones first:

    [ retrieved blocks, for each head and query its own | direct blocks | own block ]

A step is a chunk of one or two columns and could go through `reading/table.py`, as it does on a GPU. Here the same is
written for a CPU, where the groups and tiles of longer chunks would take longer than the attention itself: small
operations are all that a step costs. So what layers share, positions, angles and masks, is made once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.configuration import LandmarkLlamaConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.choice import choose_blocks, top_latest
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.rows.documents import find_documents


@dataclass(frozen=True)
class DecodingStep:
    """The view of a decoding step. Tensors are on the CPU.

    source: (batch, columns): which column of the call a landmarked column shows; 1 for a landmark, which is none.
    output: (batch, 1): the column whose states are the result's.
    start: (batch,): landmarked position of each row's token; `stop`: the largest after the step.
    valid: (batch, columns), boolean: False where a row has no landmark to add, and others have.
    turn: rotates queries (batch, columns, heads, 1, head_dim) to their distance from each block that they may read:
        for retrieved blocks the farthest first, one distance more than there are blocks; the own block, 0, last.
    turn_key: rotates keys (batch, columns, kv_heads, head_dim) by their offset in their block, as distance 0 does.
    direct: (batch, 1, 1, 1, direct blocks + 1): the blocks read directly, the own last; negative where none is.
    hidden: (batch, 1, 1, columns, blocks or 1, block_size), boolean: positions of the table that are no token to read.
    candidates: what may be retrieved; None where nothing is.
    cache: what has been read; each layer adds the step's keys and values.
    settings: how many blocks are retrieved, and who shares a choice.
    """

    source: Tensor
    output: Tensor
    start: Tensor
    stop: int
    valid: Tensor
    turn: Turn
    turn_key: Turn
    direct: Tensor
    hidden: Tensor
    candidates: Candidates | None
    cache: LandmarkCache
    settings: RetrievalSettings

    @classmethod
    def of(
        cls,
        config: LandmarkLlamaConfig,
        content: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LandmarkCache | None,
        retrieval: tuple,
        rotary: RotaryTable,
    ) -> DecodingStep | None:
        """The step that a call is, or None if it is more than that.

        Args:
            content: ids (batch, 1) for a step; more columns, embeddings, or tensors of a GPU make no step.
            position_ids: checked, and otherwise of no use: a cache holds one document a row.
            retrieval: arguments of `LandmarkLlamaConfig.retrieval`.
            rotary: holds every position that a step can ask for.
        """
        step = cache is not None and content.dim() == 2 and content.shape[1] == 1 and content.device.type == "cpu"
        if not step or attention_mask is not None and not attention_mask[:, -1].all():
            return None
        if (content == config.landmark_token_id).any():
            return None
        settings, block_size = config.retrieval(*retrieval), config.block_size
        ordinary = cache.ordinary_tokens(len(content))
        if position_ids is not None:
            find_documents(position_ids, torch.ones(content.shape, dtype=torch.bool), ordinary, cached=True)
        start = ordinary + ordinary // (block_size - 1)
        block, offset = start // block_size, (start % block_size).unsqueeze(1)
        completes = offset == block_size - 2
        column = torch.arange(1 + int(completes.any()))
        offset = offset + column

        num_direct = 0 if settings.local_attention == "chunked" else settings.num_direct_blocks
        num_candidates, candidates = (block - num_direct).clamp_min(0), None
        most = int(num_candidates.max()) if settings.num_retrieved_blocks else 0
        if most:
            candidates = Candidates.of(num_candidates, most, settings.num_retrieved_blocks)
        num_blocks = num_direct + 1 + (settings.num_retrieved_blocks if most else 0)
        distance = torch.arange(num_blocks if most else num_blocks - 1, -1, -1)
        turn = Turn.of(rotary, offset, distance * block_size)

        place = torch.arange(block_size)
        hidden = (place == block_size - 1).expand(*offset.shape, num_blocks, -1).clone()  # landmarks are no tokens
        hidden[:, :, -1] |= place > offset.unsqueeze(-1)
        return cls(
            source=column.expand(len(content), -1),
            output=completes.long() if config.predict_from_landmark else torch.zeros_like(completes, dtype=torch.long),
            start=start,
            stop=int(start.max()) + len(column),
            valid=(column == 0) | completes,
            turn=turn,
            turn_key=turn.last(),
            direct=(block.unsqueeze(1) + torch.arange(-num_direct, 1))[:, None, None, None],
            hidden=hidden[:, None, None],
            candidates=candidates,
            cache=cache,
            settings=settings,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer_idx: int, rotary: RotaryTable, scale: float
    ) -> Tensor:
        """Attention of one layer, whose keys and values go to the cache first; arguments and result as in `Table`."""
        storage, dtype, kv_heads = self.cache.layers[layer_idx].storage, query.dtype, key.shape[2]
        storage.write(self.turn_key(key).to(dtype), value, self.start, self.stop)
        query = self.turn(query.unsqueeze(-2)) * scale  # (batch, columns, heads, distances, head_dim)
        query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4, 5)
        table = self.direct
        if self.candidates is not None:
            chosen = self._choose(query, storage, landmarks_tie=layer_idx == 0).expand(*query.shape[:4], -1)
            table = torch.cat([chosen, table.expand(*query.shape[:4], -1)], dim=-1)
            # of the last candidates and the direct blocks, each is read at its own distance; those before, one farther
            near = table >= self.candidates.first_recent
            query = torch.where(near.unsqueeze(-1), query[..., 1:, :], query[..., :-1, :])
        key, value = storage.gather(
            table.clamp_min(0)
        )  # (batch, kv_heads, group, columns, blocks, block_size, head_dim)
        scores = (key.to(query.dtype) @ query.unsqueeze(-1)).squeeze(-1)
        weights = self._weights(scores, table < 0).flatten(-2)
        output = (weights.unsqueeze(-2) @ value.to(weights.dtype).flatten(-3, -2)).squeeze(-2)
        return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype)

    def _choose(self, query: Tensor, storage: BlockStorage, landmarks_tie: bool) -> Tensor:
        """The k blocks of each query, (batch, kv_heads or 1, group or 1, columns or 1, k), as `choose_blocks` does.

        query: (batch, kv_heads, group, columns, distances, head_dim), rotated and scaled.
        """
        candidates, k, columns = self.candidates, self.settings.num_retrieved_blocks, query.shape[3]
        landmarks, query = storage.landmarks(candidates.most), query[..., : k + 1, :]
        if self.settings.granularity == "token" or self.settings.granularity == "head" and columns > 1:
            shared = {"granularity": self.settings.granularity, "landmarks_tie": landmarks_tie}
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
        scores = torch.cat([far.expand(*far.shape[:-1], block.shape[-1] - k), near], dim=-1)
        column = top_latest(scores.masked_fill(none, -torch.inf), k)[1]
        return block.expand_as(scores).gather(-1, column).sort(-1).values

    def _weights(self, scores: Tensor, none: Tensor) -> Tensor:
        """Weights of the positions of a table of blocks, the own one last; 0 for landmarks.

        Args:
            scores: (batch, kv_heads, group, columns, blocks, block_size).
            none: (batch, kv_heads or 1, group or 1, columns or 1, blocks), boolean: True where there is no such block.
        """
        tokens = scores.masked_fill(self.hidden, -torch.inf)
        # a block's logit: its landmark's score, or for the own block the logsumexp of its tokens
        own = tokens[..., -1, :].logsumexp(-1, keepdim=True)
        logit = torch.cat([scores[..., :-1, -1], own], dim=-1).masked_fill(none, -torch.inf)
        return tokens.softmax(-1) * logit.softmax(-1).unsqueeze(-1)


class Turn(NamedTuple):
    """A rotation by angles that all layers share: `cos` and `sin`, (..., head_dim), the first half of `sin` negative."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rotary: RotaryTable, offset: Tensor, distance: Tensor) -> Turn:
        """Turns to `offset` (batch, columns) and from there by `distance` (distances,): (batch, columns, 1, distances, ..).

        The sum of the two may lie outside the table: turning twice needs no such row.
        """
        half = rotary.cos.shape[-1]
        unit = torch.cat([rotary.cos.new_ones(half), rotary.cos.new_zeros(half)])  # turned, it is (cos, sin)
        turned = rotary.rotate(rotary.rotate(unit, offset).unsqueeze(-2), distance).unsqueeze(2)
        cos, sin = turned.chunk(2, dim=-1)
        return cls(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def last(self) -> Turn:
        """The turn by the last of the distances."""
        return Turn(self.cos[..., -1, :], self.sin[..., -1, :])

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., head_dim), rotated, in the angles' dtype at least."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1).to(self.cos.dtype), self.sin)


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
        """For rows with `number` (batch,) candidates, and k of them retrieved."""
        number = number.unsqueeze(1)
        recent = number + torch.arange(-k, 0)
        older = torch.arange(max(most - k, 1)).expand(len(number), -1)
        blocks = (
            torch.cat([older.masked_fill(older >= number - k, -1), recent], dim=1),
            number + torch.arange(-2 * k, 0),
        )
        everything, tied = ((block, block < 0) for block in (x[:, None, None, None] for x in blocks))
        first_recent = (number - k)[:, None, None, None]
        row = torch.arange(len(number)).unsqueeze(1)
        return cls(number, most, first_recent, row, recent.clamp_min(0), everything, tied)
