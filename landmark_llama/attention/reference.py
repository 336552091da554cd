"""The definition of landmark attention, in a few lines of PyTorch. Every faster form is tested against it.

Scores `s[i, j] = scale * q_i . k_j`. A query in block `b` has one softmax, its *own group*, over the ordinary tokens
of its block up to itself and the landmarks of the earlier blocks; each earlier block has one softmax over its ordinary
tokens, and its share of the row is the own-group weight of its landmark. Written as one softmax over ordinary tokens
`j` of block `c`:

    own block:      s[i, j]
    earlier block:  s[i, j] - logsumexp_{j' in c} s[i, j'] + s[i, landmark(c)]
    landmarks:      -inf

A landmark's score is `s[i, landmark(c)] = scale * q_i . k_landmark(c)`, or, with a query and a bias of its own,
`scale * landmark_query_i . k_landmark(c) + landmark_bias_c`.

(Mohtashami & Jaggi, "Landmark Attention", 2023, section 3.1; `docs/attention.md` derives this form.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def landmark_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    num_retrieved_blocks: int | None = None,
    num_direct_blocks: int = 0,
    num_sink_blocks: int = 0,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
) -> Tensor:
    """Landmark attention by the definition, differentiable, in time and memory quadratic in the length.

    Args:
        query: (batch, heads, query_length, head_dim); aligned with the last `query_length` keys.
        key, value: (batch, kv_heads, key_length, head_dim); a landmark at the last position of each block of
            `block_size`.
        block_size: positions of a block, its landmark included.
        scale: factor of the scores; by default `head_dim ** -0.5`.
        num_retrieved_blocks, num_direct_blocks, num_sink_blocks: which earlier blocks a query sees (`seen_blocks`); by
            default all.
        landmark_query: the shape of `query`: what scores landmarks in its place.
        landmark_bias: (batch, kv_heads, blocks): added to the scores of the landmarks, of complete blocks at least.
        exact_weights: an earlier block's share is what its tokens weigh in ordinary attention: every token that a query
            sees has the logit `s[i, j]`, and landmarks only say which blocks those are.

    Returns:
        (batch, heads, query_length, head_dim), in the dtype of `query`.
    """
    weights = landmark_attention_weights(
        query,
        key,
        block_size=block_size,
        scale=scale,
        num_retrieved_blocks=num_retrieved_blocks,
        num_direct_blocks=num_direct_blocks,
        num_sink_blocks=num_sink_blocks,
        landmark_query=landmark_query,
        landmark_bias=landmark_bias,
        exact_weights=exact_weights,
    )
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return weights.to(value.dtype) @ value


def landmark_attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    num_retrieved_blocks: int | None = None,
    num_direct_blocks: int = 0,
    num_sink_blocks: int = 0,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
) -> Tensor:
    """Weights (batch, heads, query_length, key_length) of landmark attention: rows sum to 1, landmarks weigh 0.

    Computed in the dtype of `query`, or in float32 for narrower ones. Arguments as in `landmark_attention_reference`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2) * scale).to(wide)
    landmarks = slice(block_size - 1, None, block_size)
    landmark_scores = scores[..., landmarks]  # (batch, heads, query_length, complete blocks)
    if landmark_query is not None:
        landmark_scores = (landmark_query @ key[..., landmarks, :].transpose(-1, -2) * scale).to(wide)
    if landmark_bias is not None:
        bias = landmark_bias[..., : landmark_scores.shape[-1]].repeat_interleave(group, dim=1)
        landmark_scores = landmark_scores + bias.unsqueeze(-2).to(wide)

    query_length, key_length = scores.shape[-2:]
    key_position = torch.arange(key_length, device=scores.device)
    query_position = key_position[key_length - query_length :, None]
    block, own_block = key_position // block_size, query_position // block_size
    ordinary = key_position % block_size != block_size - 1
    own = (block == own_block) & (key_position <= query_position) & ordinary
    earlier = (block < own_block) & ordinary
    if num_retrieved_blocks is not None:
        landmark = torch.nn.functional.pad(landmark_scores, (0, 1))
        seen = seen_blocks(landmark, own_block.squeeze(-1), num_retrieved_blocks, num_direct_blocks, num_sink_blocks)
        earlier = earlier & seen[..., block]

    if exact_weights:
        return torch.where(own | earlier, scores, -torch.inf).softmax(-1)
    logits = torch.where(own, scores, -torch.inf)
    for c in range((key_length - 1) // block_size):
        members = earlier & (block == c)
        landmark = landmark_scores[..., c, None]
        inside = torch.where(members, scores, -torch.inf)
        # a row that does not see block c takes the logsumexp of zeros: finite, so that no NaN enters its gradient
        norm = torch.where(members.any(-1, keepdim=True), inside, 0.0).logsumexp(-1, keepdim=True)
        logits = torch.where(members, scores - norm + landmark, logits)
    return logits.softmax(-1)


def seen_blocks(
    landmark: Tensor, own: Tensor, num_retrieved_blocks: int, num_direct_blocks: int, num_sink_blocks: int = 0
) -> Tensor:
    """Which blocks each query sees if it retrieves the best of the earlier ones, as in reading long texts.

    Args:
        landmark: (..., queries, blocks): scores of the blocks' landmarks. Those of the own block and later are ignored.
        own: (..., queries): block of each query.
        num_retrieved_blocks: a query sees so many candidates with the highest scores, and all that tie with the last.
        num_direct_blocks: blocks before the own one that are always seen. The blocks before these are the candidates.
        num_sink_blocks: of those retrieved, so many are the first candidates, whatever they score.

    Returns:
        Boolean, the shape of `landmark`. The own block is seen.
    """
    block, own = torch.arange(landmark.shape[-1], device=landmark.device), own.unsqueeze(-1)
    seen = (block >= own - num_direct_blocks) & (block <= own)
    if num_retrieved_blocks:
        candidate = block < own - num_direct_blocks
        value = landmark.masked_fill(~candidate, -torch.inf)
        value[..., :num_sink_blocks] = value[..., :num_sink_blocks].masked_fill(
            candidate[..., :num_sink_blocks], torch.inf
        )
        best = value.topk(min(num_retrieved_blocks, landmark.shape[-1]), dim=-1).values
        seen = seen | candidate & (value >= best[..., -1:])
    return seen.expand(landmark.shape)
