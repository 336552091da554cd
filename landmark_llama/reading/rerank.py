"""Blocks chosen in two stages: landmarks propose some, and what these weigh decides.

A landmark's score is one number for a block of many keys, and may miss a block in which a single key matches. With
exact weights what a block weighs is known once its keys are at hand. Looking at all of them would be dense attention;
looking at a few dozen costs little where few tokens choose: in a question, and in each token of an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark_llama.reading.choice import Choice, with_sinks
from landmark_llama.reading.highest import top_latest
from landmark_llama.reading.storage import BlockStorage


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
        num_reranked_blocks: how many older blocks the queries of a group that read one KV head propose together. The
            last k candidates are compared in any case, and sinks are chosen in any case.
    """
    k = rotated.shape[-2] - 1
    recent = candidates.unsqueeze(-1) + torch.arange(-k, 0, device=candidates.device)  # (batch, groups, k)
    older = _proposed(scoring, storage, (candidates - k).clamp_min(0), valid, num_reranked_blocks, num_sink_blocks)
    block = torch.cat([older, recent.unsqueeze(1).expand(-1, older.shape[1], -1, -1)], dim=-1)
    key = _keys(storage, block.clamp_min(0))[..., :-1, :].to(rotated.dtype)
    number = older.shape[-1]
    far = torch.einsum("bhgnqd,bhnmtd->bhgnqmt", rotated[..., 0, :], key[:, :, :, :number]).logsumexp(-1)
    near = torch.einsum("bhgnqkd,bhnktd->bhgnqkt", rotated[..., 1:, :], key[:, :, :, number:]).logsumexp(-1)
    block = block[:, :, None, :, None]
    weight = torch.cat([far, near], dim=-1).masked_fill(block < num_sink_blocks, -torch.inf)  # sinks, and none at all
    value, column = top_latest(weight, k - num_sink_blocks)
    block = block.expand_as(weight).gather(-1, column).masked_fill(value == -torch.inf, -1)
    number = candidates[:, None, None, :, None, None]
    if num_sink_blocks:
        block = with_sinks(block, num_sink_blocks, number)
    block = block.sort(-1).values
    return Choice(block, block >= number - k)


def _proposed(scoring: Tensor, storage: BlockStorage, older: Tensor, valid: Tensor, number: int, sinks: int) -> Tensor:
    """The `number` best of the first `older` (batch, groups) blocks by their landmarks, ascending, (batch, kv_heads,
    groups, number); -1 for none. Queries share them: each is the best of some query by its share of all.
    """
    most = max(int(older.max()), 1)
    landmarks, biases = storage.landmarks(most).to(scoring.dtype), storage.biases(most)
    scores = (scoring.flatten(2, 4) @ landmarks.transpose(-1, -2)).unflatten(2, scoring.shape[2:5])
    if biases is not None:
        scores = scores + biases[:, :, None, None, None]
    column = torch.arange(most, device=scores.device)
    none = ((column >= older.unsqueeze(-1)) | (column < sinks))[:, None, None, :, None]
    shares = scores.masked_fill(none, -torch.inf).softmax(-1).nan_to_num(0.0)
    shares = shares.masked_fill(~valid[:, None, None, :, :, None], 0.0).amax(
        (2, 4)
    )  # (batch, kv_heads, groups, blocks)
    value, block = shares.topk(min(number, most), dim=-1)
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
