"""Landmark keys made of what their blocks hold: a key and a bias that score a block much as all its keys would.

`g(q) = log sum_j exp(scale q . k_j)` is what a block weighs in ordinary attention. To first order around a prior query
`mu`, with `p = softmax_j(scale mu . k_j)`,

    g(q) = scale q . k' + b',    k' = sum_j p_j k_j,    b' = -sum_j p_j log p_j.

Where a landmark's score is `g`, the grouped softmax is the ordinary one (`docs/attention.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_block(key: Tensor, prior: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Pooled key and bias of complete blocks, differentiable in both arguments.

    Args:
        key: (..., block_size - 1, head_dim): the ordinary keys of a block, rotated.
        prior: (..., head_dim): the query around which the block's weight is expanded, rotated likewise.

    Returns:
        The pooled key (..., head_dim) in the dtype of `key`, and the bias (...), between 0 and log(block_size - 1), in
        the computing dtype, which is fp32 at least.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    with torch.autocast(key.device.type, enabled=False):
        wide = key.to(dtype)
        log_share = (torch.einsum("...jd,...d->...j", wide, prior.to(dtype)) * scale).log_softmax(-1)
        share = log_share.exp()
        pooled = torch.einsum("...j,...jd->...d", share, wide)
        return pooled.to(key.dtype), -(share * log_share).sum(-1)


def pool_rows(key: Tensor, prior: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Puts pooled keys in the places of the landmarks of whole rows.

    Args:
        key: (batch, kv_heads, length, head_dim), rotated, landmarks in their regular places.
        prior: (batch, kv_heads, length, head_dim), rotated: that of a landmark is its block's.

    Returns:
        The keys (batch, kv_heads, length, head_dim), and the bias (batch, kv_heads, blocks) of the complete blocks.
    """
    length = key.shape[2]
    complete = length - length % block_size
    block = key[:, :, :complete].unflatten(2, (-1, block_size))
    pooled, bias = pool_block(block[..., :-1, :], prior[:, :, block_size - 1 : complete : block_size], scale)
    whole = torch.cat([block[..., :-1, :], pooled.unsqueeze(-2)], dim=-2).flatten(2, 3)
    return torch.cat([whole, key[:, :, complete:]], dim=2), bias


def prior_of_heads(query: Tensor, kv_heads: int) -> Tensor:
    """(batch, columns, heads, head_dim) to (batch, columns, kv_heads, head_dim), at least fp32.

    The query heads that share a KV head share their mean.
    """
    return query.unflatten(2, (kv_heads, -1)).mean(3, dtype=torch.promote_types(query.dtype, torch.float32))
