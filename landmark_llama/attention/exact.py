"""Attention in which blocks weigh what their tokens do: ordinary attention over the tokens of the blocks that are read.

Landmarks have no value and no weight in it; where a query does not see all of its earlier blocks, their scores choose
which. `docs/exact_weights.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from landmark_llama.attention.reference import seen_blocks


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    retrieval: tuple[int, int, int] | None = None,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
) -> Tensor:
    """Causal attention over ordinary tokens; arguments and result as in `landmark_attention`, differentiable.

    retrieval: its `num_retrieved_blocks`, `num_direct_blocks` and `num_sink_blocks`; None: queries see all earlier
        blocks.
    """
    mask = _sees(query, key, block_size)
    if retrieval is not None and key.shape[2] > (sum(retrieval[:2]) + 1) * block_size:
        seen = _seen(query, key, block_size, scale, retrieval, landmark_query, landmark_bias)
        mask = mask & seen.repeat_interleave(block_size, dim=-1)[..., : key.shape[2]]
    grouped = query.shape[1] != key.shape[1]
    # precision is that of the inputs, as in a dense model
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """The same over all blocks, with the logsumexp (batch, heads, query_length) that a merge with others needs.

    Both in fp32, or in float64 for such inputs.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    kv_heads = key.shape[1]
    grouped = query.to(wide).unflatten(1, (kv_heads, -1))
    scores = grouped @ key.to(wide).unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.masked_fill(~_sees(query, key, block_size), -torch.inf)
    output = scores.softmax(-1) @ value.to(wide).unsqueeze(2)
    return output.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def _sees(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Which ordinary tokens come before or with each query, boolean (query_length, key_length)."""
    column = torch.arange(key.shape[2], device=key.device)
    row = column[key.shape[2] - query.shape[2] :, None]
    return (column <= row) & (column % block_size != block_size - 1)


@torch.no_grad()
def _seen(
    query: Tensor,
    key: Tensor,
    block_size: int,
    scale: float,
    retrieval: tuple[int, int, int],
    landmark_query: Tensor | None,
    landmark_bias: Tensor | None,
) -> Tensor:
    """Which blocks each query sees, boolean (batch, heads, query_length, blocks); blocks begun last count, too."""
    group = query.shape[1] // key.shape[1]
    landmark = key[:, :, block_size - 1 :: block_size].repeat_interleave(group, dim=1)
    scores = (query if landmark_query is None else landmark_query) @ landmark.transpose(-1, -2) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if landmark_bias is not None:
        scores = scores + landmark_bias[..., : scores.shape[-1]].repeat_interleave(group, dim=1).unsqueeze(-2)
    blocks = -(-key.shape[2] // block_size)
    scores = torch.nn.functional.pad(scores, (0, blocks - scores.shape[-1]))
    own = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device) // block_size
    return seen_blocks(scores, own, *retrieval)
