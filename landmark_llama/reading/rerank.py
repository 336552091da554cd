"""Blocks chosen in two stages: landmarks propose some, and what these weigh decides.

A landmark's score is one number for a block of many keys, and may miss a block in which a single key matches. With
exact weights what a block weighs is known once its keys are at hand. Looking at all of them would be dense attention;
looking at a few dozen costs little where few tokens choose: in a question, and in each token of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from landmark_llama.reading.choice import Choice, with_sinks
from landmark_llama.reading.highest import top_latest
from landmark_llama.reading.storage import BlockStorage

SCORES_AT_ONCE = 2**24  # of queries and tokens, where all blocks are weighed


@torch.no_grad()
def choose_by_weight(
    rotated: Tensor,
    scoring: Tensor,
    storage: BlockStorage,
    candidates: Tensor,
    valid: Tensor,
    *,
    num_reranked_blocks: int,
    num_sink_blocks: int = 0,
) -> Choice:
    """Chooses k blocks for each query by what they weigh, of those that landmarks propose; ties go to the later one.

    Args:
        rotated: (batch, kv_heads, group, groups, queries, k + 1, head_dim), from `rotate_to_distances`, scaled: what
            weighs the blocks.
        scoring: (batch, kv_heads, group, groups, queries, head_dim): what scores landmarks, at the farthest distance.
        candidates, valid, num_sink_blocks: as in `choose_blocks`.
        num_reranked_blocks: how many older blocks the queries of a group that read one KV head propose together. If
            there are no more than that, all are compared. The last k candidates are compared in any case, and sinks are
            chosen in any case.
    """
    k, number = rotated.shape[-2] - 1, candidates.unsqueeze(-1)
    recent = number + torch.arange(-k, 0, device=candidates.device)  # (batch, groups, k)
    older = (candidates - k).clamp_min(0)
    most = max(int(older.max()), 1)
    if num_reranked_blocks < most:
        proposed = _proposed(scoring, storage, older, most, valid, num_reranked_blocks, num_sink_blocks)
        weight = [_weights(rotated[..., 0, :], _keys(storage, proposed.clamp_min(0)))]
    else:  # landmarks have nothing to decide
        proposed = torch.arange(most, device=candidates.device)
        proposed = proposed.masked_fill(proposed >= older.unsqueeze(-1), -1).unsqueeze(1)
        weight = [_weights(rotated[..., 0, :], key) for key in _all_keys(storage, most, rotated)]
    key = _keys(storage, recent.clamp_min(0).unsqueeze(1).expand(-1, rotated.shape[1], -1, -1))
    near = torch.einsum("bhgnqkd,bhnktd->bhgnqkt", rotated[..., 1:, :], key.to(rotated.dtype))
    near = near[..., :-1].logsumexp(-1)
    block = torch.cat([proposed, recent.unsqueeze(1).expand(-1, proposed.shape[1], -1, -1)], dim=-1)
    block = block[:, :, None, :, None]
    weight = torch.cat([*weight, near], dim=-1).masked_fill(block < num_sink_blocks, -torch.inf)  # sinks, and none
    value, column = top_latest(weight, k - num_sink_blocks)
    block = block.expand_as(weight).gather(-1, column).masked_fill(value == -torch.inf, -1)
    number = number[:, None, None, :, None]
    if num_sink_blocks:
        block = with_sinks(block, num_sink_blocks, number)
    block = block.sort(-1).values
    return Choice(block, block >= number - k)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """What blocks weigh, in logarithms: (batch, kv_heads, group, groups, queries, blocks).

    query: (batch, kv_heads, group, groups, queries, head_dim).
    key: (batch, kv_heads, groups or 1, blocks, block_size, head_dim).
    """
    (batch, heads, group, groups, queries, size), (blocks, tokens) = query.shape, key.shape[3:5]
    if key.shape[2] == 1:  # the same for all groups
        query = query.reshape(batch, heads, 1, -1, size)
    else:
        query = query.transpose(2, 3).reshape(batch, heads, groups, -1, size)
    weight = (query @ key.flatten(3, 4).to(query.dtype).transpose(-1, -2)).unflatten(-1, (blocks, tokens))
    weight = weight[..., :-1].logsumexp(-1)  # of the block's tokens, not of its landmark
    if key.shape[2] == 1:
        return weight.view(batch, heads, group, groups, queries, blocks)
    return weight.view(batch, heads, groups, group, queries, blocks).transpose(2, 3)


def _all_keys(storage: BlockStorage, most: int, query: Tensor) -> Iterator[Tensor]:
    """Keys of the first `most` blocks, (batch, kv_heads, 1, blocks, block_size, head_dim), in bounded parts."""
    scores = query[..., 0, 0].numel() * storage.block_size  # of a block
    at_once = max(1, SCORES_AT_ONCE // scores)
    for first in range(0, most, at_once):
        last = min(first + at_once, most)
        if storage.resident is None:
            block = torch.arange(first, last, device=query.device).expand(*query.shape[:2], 1, -1)
            yield storage.gather(block)[0]
        else:
            yield storage.resident[0][:, :, None, first:last]


def _proposed(
    scoring: Tensor, storage: BlockStorage, older: Tensor, most: int, valid: Tensor, number: int, sinks: int
) -> Tensor:
    """The `number` best of the first `older` (batch, groups), at most `most`, blocks by their landmarks, ascending,
    (batch, kv_heads, groups, number); -1 for none. Queries share them: each is the best of some query by its share.
    """
    landmarks, biases = storage.landmarks(most).to(scoring.dtype), storage.biases(most)
    scores = (scoring.flatten(2, 4) @ landmarks.transpose(-1, -2)).unflatten(2, scoring.shape[2:5])
    if biases is not None:
        scores = scores + biases[:, :, None, None, None]
    column = torch.arange(most, device=scores.device)
    none = ((column >= older.unsqueeze(-1)) | (column < sinks))[:, None, None, :, None]
    shares = scores.masked_fill(none, -torch.inf).softmax(-1).nan_to_num(0.0)
    shares = shares.masked_fill(~valid[:, None, None, :, :, None], 0.0).amax((2, 4))
    value, block = shares.topk(number, dim=-1)  # of (batch, kv_heads, groups, blocks)
    return block.masked_fill(value == 0, -1).sort(-1).values


def _keys(storage: BlockStorage, block: Tensor) -> Tensor:
    """Keys (batch, kv_heads, groups, blocks, block_size, head_dim) of `block`; without their values, where that saves
    anything.
    """
    if storage.resident is None:
        return storage.gather(block)[0]
    key = storage.resident[0]
    place = torch.arange(key.shape[0] * key.shape[1], device=block.device).view(*key.shape[:2], 1, 1)
    place = (place * storage.capacity + block.clamp_max(storage.capacity - 1)).flatten()
    return key.flatten(0, 2).index_select(0, place).view(*block.shape, *key.shape[-2:])
