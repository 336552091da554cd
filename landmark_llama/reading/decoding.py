"""A decoding step: one new token a row, and the landmark of each block that it completes.

The queries of a step lie in the last block of their row, so that one table serves them:

    [ retrieved blocks, for each head and query its own | direct blocks | own block ]

A step is a chunk of one or two columns and could go through `reading/table.py`, as it does on a GPU. Here the same is
written for a CPU, where the groups and tiles of longer chunks would take longer than the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.configuration import LandmarkLlamaConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.choice import choose_blocks
from landmark_llama.reading.storage import BlockStorage, Prior
from landmark_llama.rows.documents import find_documents


@dataclass(frozen=True)
class DecodingStep:
    """The view of a decoding step. Tensors are on the CPU.

    source: (batch, columns): which column of the call a landmarked column shows; 1 for a landmark, which is none.
    output: (batch, 1): the column whose states are the result's.
    start: (batch,): landmarked position of each row's token.
    offset: (batch, columns): positions from the start of its block to each query.
    valid: (batch, columns), boolean: False where a row has no landmark to add, and others have.
    direct: (batch, direct blocks + 1): the blocks that a row reads directly, its own last; negative where none is.
    num_candidates: (batch, 1): blocks before those.
    cache: what has been read; each layer adds the step's keys and values.
    settings: how many blocks are retrieved, and who shares a choice.
    pooled: whether landmark keys are pooled of their blocks' keys.
    """

    source: Tensor
    output: Tensor
    start: Tensor
    offset: Tensor
    valid: Tensor
    direct: Tensor
    num_candidates: Tensor
    most_candidates: int
    stop: int
    cache: LandmarkCache
    settings: RetrievalSettings
    pooled: bool

    @classmethod
    def of(
        cls,
        config: LandmarkLlamaConfig,
        content: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LandmarkCache | None,
        retrieval: tuple,
    ) -> DecodingStep | None:
        """The step that a call is, or None if it is more than that.

        Args:
            content: ids (batch, 1) for a step; more columns, embeddings, or tensors of a GPU make no step.
            position_ids: checked, and otherwise of no use: a cache holds one document a row.
            retrieval: arguments of `LandmarkLlamaConfig.retrieval`.
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
        num_direct = 0 if settings.local_attention == "chunked" else settings.num_direct_blocks
        num_candidates = (block - num_direct).clamp_min(0).unsqueeze(1)
        return cls(
            source=column.expand(len(content), -1),
            output=completes.long() if config.predict_from_landmark else torch.zeros_like(offset),
            start=start,
            offset=offset + column,
            valid=(column == 0) | completes,
            direct=block.unsqueeze(1) + torch.arange(-num_direct, 1),
            num_candidates=num_candidates,
            most_candidates=int(num_candidates.max()),
            stop=int(start.max()) + len(column),
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
    ) -> Tensor:
        """Attention of one layer, whose keys and values go to the cache first; arguments and result as in `Table`."""
        storage, k = self.cache.layers[layer_idx].storage, 0
        dtype, kv_heads = query.dtype, key.shape[2]
        query = query.to(torch.promote_types(dtype, torch.float32)) * scale
        offset, prior = self.offset.unsqueeze(-1), None
        query, key = rotary.rotate_all(offset, query, key)
        if self.pooled:
            prior = Prior(query.unflatten(2, (kv_heads, -1)).mean(3), 1.0)
        storage.write(key, value, self.start, self.stop, prior)

        # a query is rotated to its distance from each block: retrieved ones at first, the own one (distance 0) last
        if self.most_candidates:
            k = self.settings.num_retrieved_blocks
        direct = self.direct.shape[1]
        distance = torch.arange(direct + k if k else direct - 1, -1, -1) * self.cache.block_size
        query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).unsqueeze(-2)
        query = rotary.rotate(query, distance)  # (batch, kv_heads, group, columns, distances, head_dim)
        if landmark_query is not None:
            scoring = rotary.rotate(landmark_query.to(query.dtype) * scale, offset)
            scoring = scoring.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).unsqueeze(-2)
            scoring = rotary.rotate(scoring, distance)
        block = self.direct.clamp_min(0).unsqueeze(1)
        key, direct_value = storage.gather(block)
        scores = _scores_of_shared(query[..., -direct:, :], key)
        if landmark_query is not None:
            scores[..., -1:] = _scores_of_shared(scoring[..., -direct:, :], key[..., -1:, :])
        if self.pooled:
            scores[..., -1] += storage.gather_biases(block)[:, :, None, None]
        seen = (self.direct >= 0)[:, None, None, None].expand(scores.shape[:-1])
        if not k:
            weights = self._weights(scores, seen)
            output = _read_shared(weights, direct_value)
        else:
            tie = layer_idx == 0 and not self.pooled
            far, far_scoring = query[..., : k + 1, :], None if landmark_query is None else scoring[..., : k + 1, :]
            block, chosen, chosen_value = self._chosen(far, far_scoring, storage, tie)
            seen = torch.cat([(block >= 0).expand(chosen.shape[:-1]), seen], dim=-1)
            weights = self._weights(torch.cat([chosen, scores], dim=-2), seen)
            output = _read_shared(weights[..., k:, :], direct_value)
            read = weights[..., :k, :].flatten(-2).unsqueeze(-2) @ chosen_value.to(weights.dtype).flatten(-3, -2)
            output = output + read.squeeze(-2)
        return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype)

    def _chosen(
        self, query: Tensor, scoring: Tensor | None, storage: BlockStorage, landmarks_tie: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks that a step retrieves.

        Args:
            query: (batch, kv_heads, group, columns, k + 1, head_dim), rotated to the blocks' possible distances.
            scoring: likewise, what scores landmarks in its place.

        Returns:
            Their numbers (batch, kv_heads or 1, group or 1, columns or 1, k), negative where there are fewer than k;
            the scores (batch, kv_heads, group, columns, k, block_size) of their positions, and their values.
        """
        choice = choose_blocks(
            (query if scoring is None else scoring).unsqueeze(3),
            storage.landmarks(self.most_candidates),
            self.num_candidates,
            self.valid.unsqueeze(1),
            granularity=self.settings.granularity,
            landmarks_tie=landmarks_tie,
            biases=storage.biases(self.most_candidates) if self.pooled else None,
        )
        at_chosen = choice.at_their_distances(query.unsqueeze(3)).squeeze(3)
        block = choice.block.squeeze(3)
        key, value = storage.gather(block.clamp_min(0))
        scores = (key.to(at_chosen.dtype) @ at_chosen.unsqueeze(-1)).squeeze(-1)
        if scoring is not None:
            scoring = choice.at_their_distances(scoring.unsqueeze(3)).squeeze(3)
            scores[..., -1] = torch.linalg.vecdot(scoring, key[..., -1, :].to(scoring.dtype))
        if self.pooled:
            scores[..., -1] += storage.gather_biases(block.clamp_min(0))
        return block, scores, value

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Weights of the positions of a table of blocks, the own one last; 0 for landmarks.

        Args:
            scores: (batch, kv_heads, group, columns, blocks, block_size).
            seen: (batch, kv_heads, group, columns, blocks), boolean: whether there is such a block for the query.
        """
        place = torch.arange(scores.shape[-1])
        own = (place <= self.offset.unsqueeze(-1)) & (place < scores.shape[-1] - 1)
        landmark = scores[..., -1]
        scores = scores.masked_fill(place == scores.shape[-1] - 1, -torch.inf)
        scores[..., -1, :].masked_fill_(~own[:, None, None], -torch.inf)
        # a block's logit: its landmark's score, or for the own block the logsumexp of its tokens
        logit = torch.cat([landmark[..., :-1], scores[..., -1, :].logsumexp(-1, keepdim=True)], dim=-1)
        share = logit.masked_fill(~seen, -torch.inf).softmax(-1)
        return scores.softmax(-1) * share.unsqueeze(-1)


def _scores_of_shared(query: Tensor, key: Tensor) -> Tensor:
    """Scores (batch, kv_heads, group, columns, blocks, block_size) of blocks that all heads of a KV head share.

    query: (batch, kv_heads, group, columns, blocks, head_dim), rotated to each block.
    key: (batch, kv_heads, blocks, block_size, head_dim).
    """
    shape = query.shape[2:4]
    rows = query.flatten(2, 3).transpose(2, 3)  # (batch, kv_heads, blocks, group * columns, head_dim)
    scores = rows @ key.to(query.dtype).transpose(-1, -2)
    return scores.transpose(2, 3).unflatten(2, shape)


def _read_shared(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sum (batch, kv_heads, group, columns, head_dim) of the values of blocks that all heads share.

    value: (batch, kv_heads, blocks, block_size, head_dim).
    """
    rows = weights.flatten(-2).flatten(2, 3)  # (batch, kv_heads, group * columns, blocks * block_size)
    return (rows @ value.to(weights.dtype).flatten(2, 3)).unflatten(2, weights.shape[2:4])
