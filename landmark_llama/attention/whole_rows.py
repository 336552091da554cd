"""Landmark attention over whole rows: one function with the fastest back end behind it, and the view of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.attention.availability import kernels_take_rows
from landmark_llama.attention.blockwise import blockwise_landmark_attention
from landmark_llama.attention.exact import exact_attention
from landmark_llama.attention.pooling import pool_rows
from landmark_llama.attention.rotary import RotaryTable


@dataclass(frozen=True)
class WholeRows:
    """The view of a call without a cache whose rows fit the window: each row attends to all of itself, as in training.

    block_size: positions of a block, its landmark included.
    num_retrieved_blocks: if given, a query sees only so many of its earlier blocks, the best ones, beside the
        `num_direct_blocks` before its own (`train_retrieved_blocks` of the configuration).
    kernels: False: PyTorch attends on a GPU, too.
    pooled: whether landmark keys are pooled of their blocks' keys.
    num_sink_blocks: of the retrieved blocks, so many are the first ones.
    exact_weights: earlier blocks weigh what their tokens do.
    """

    block_size: int
    num_retrieved_blocks: int | None = None
    num_direct_blocks: int = 0
    kernels: bool = True
    pooled: bool = False
    num_sink_blocks: int = 0
    exact_weights: bool = False

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
        """Attention of one layer.

        Args:
            query: (batch, columns, heads, head_dim), not rotated; rows begin in column 0.
            key, value: (batch, columns, kv_heads, head_dim), not rotated either.
            layer_idx: which layer; every one attends in the same way here.
            landmark_query: the shape of `query`, not rotated: what scores landmarks in its place.
            landmark_prior: (batch, columns, kv_heads, head_dim), not rotated, where landmark keys are pooled: that of a
                landmark's column is the query that its block is pooled around.

        Returns:
            (batch, columns, heads, head_dim), in the dtype of `query`.
        """
        position = torch.arange(query.shape[1], device=query.device).unsqueeze(-1)
        query, key = rotary.rotate_all(position, query, key)
        if landmark_query is not None:
            landmark_query = rotary.rotate(landmark_query, position).transpose(1, 2)
        if self.pooled:
            landmark_prior = rotary.rotate(landmark_prior, position).transpose(1, 2)
        rows = (x.transpose(1, 2) for x in (query, key, value))
        landmarks = {"landmark_query": landmark_query, "landmark_prior": landmark_prior}
        return self.attend_rotated(*rows, scale=scale, **landmarks).transpose(1, 2)

    def attend_rotated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        landmark_query: Tensor | None = None,
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        """`landmark_attention` with this view's settings."""
        bias = None
        if self.pooled:
            key, bias = pool_rows(key, landmark_prior, self.block_size, scale)
        return landmark_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            scale=scale,
            num_retrieved_blocks=self.num_retrieved_blocks,
            num_direct_blocks=self.num_direct_blocks,
            num_sink_blocks=self.num_sink_blocks,
            exact_weights=self.exact_weights,
            landmark_query=landmark_query,
            landmark_bias=bias,
            kernels=self.kernels,
        )


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    num_retrieved_blocks: int | None = None,
    num_direct_blocks: int = 0,
    num_sink_blocks: int = 0,
    exact_weights: bool = False,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    kernels: bool = True,
) -> Tensor:
    """Causal landmark attention.

    Every `block_size`-th key is the landmark of its block. A query attends to the ordinary tokens of its own block
    up to itself, and to those of each earlier block with the weight that it gives to the block's landmark; a
    landmark itself has no value (Mohtashami & Jaggi 2023, section 3.1; `docs/attention.md`).

    Args:
        query: (batch, heads, query_length, head_dim), aligned with the last `query_length` keys.
        key, value: (batch, kv_heads, key_length, head_dim); `heads` a multiple of `kv_heads`, key_length >=
            query_length.
        block_size: positions of a block, its landmark included (>= 2).
        scale: factor of the scores; by default `head_dim ** -0.5`.
        num_retrieved_blocks: if given, a query sees no more than so many earlier blocks, those whose landmarks it
            scores highest, beside the `num_direct_blocks` before its own. On a GPU, too, that is computed by PyTorch.
        num_sink_blocks: of the retrieved blocks, so many are the first ones, whatever their landmarks score.
        exact_weights: earlier blocks weigh what their tokens weigh in ordinary attention; landmarks only choose them.
        landmark_query: (batch, heads, query_length, head_dim): what scores landmarks in place of `query`.
        landmark_bias: (batch, kv_heads, blocks): added to the scores of the landmarks of the complete blocks. With one
            of these two, the kernels take memory for one fp32 number for each query, head and block.
        kernels: on a GPU, use the Triton kernels where they can run. False: PyTorch.

    Returns:
        (batch, heads, query_length, head_dim), in the dtype of `query`. Differentiable once.

    Raises:
        ValueError: if shapes, dtypes or `block_size` do not fit, naming the argument.
    """
    _check(query, key, value, block_size)
    if landmark_query is not None or landmark_bias is not None:
        _check_landmarks(query, key, landmark_query, landmark_bias, block_size)
    numbers = {"num_retrieved_blocks": num_retrieved_blocks, "num_direct_blocks": num_direct_blocks}
    for name, number in {**numbers, "num_sink_blocks": num_sink_blocks}.items():
        if (number or 0) < 0:
            raise ValueError(f"{name}={number}: must not be negative")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    landmarks = landmark_query, landmark_bias
    if kernels and _on_gpu(query) and num_retrieved_blocks is None and kernels_take_rows(query):
        from landmark_llama.attention.fused import fused_landmark_attention

        return fused_landmark_attention(query, key, value, block_size, scale, *landmarks, exact_weights)
    retrieval = None if num_retrieved_blocks is None else (num_retrieved_blocks, num_direct_blocks, num_sink_blocks)
    if exact_weights:
        return exact_attention(query, key, value, block_size, scale, retrieval, *landmarks)
    return blockwise_landmark_attention(query, key, value, block_size, scale, retrieval, *landmarks)


def _on_gpu(query: Tensor) -> bool:
    return query.is_cuda


def _check(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a block needs at least one ordinary token and its landmark (>= 2)")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating-point tensor of shape (batch, heads, length, head_dim), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, query is {query.dtype} on {query.device}: make them equal"
            )
    if key.shape != value.shape:
        raise ValueError(f"value: shape {tuple(value.shape)} differs from that of key, {tuple(key.shape)}")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(
            f"key: batch and head_dim of shape {tuple(key.shape)} differ from query's {tuple(query.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads: not a multiple of key's {key.shape[1]}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} positions, more than key's {key.shape[2]}")


def _check_landmarks(
    query: Tensor, key: Tensor, landmark_query: Tensor | None, landmark_bias: Tensor | None, block_size: int
) -> None:
    if landmark_query is not None and (landmark_query.shape, landmark_query.dtype) != (query.shape, query.dtype):
        raise ValueError(
            f"landmark_query: {landmark_query.dtype} of shape {tuple(landmark_query.shape)}; it needs the shape and "
            f"dtype of query, {query.dtype} of {tuple(query.shape)}"
        )
    if landmark_bias is not None:
        expected = (*key.shape[:2], key.shape[2] // block_size)
        if landmark_bias.shape != expected or not landmark_bias.is_floating_point():
            raise ValueError(
                f"landmark_bias: {landmark_bias.dtype} of shape {tuple(landmark_bias.shape)}; expected real numbers of "
                f"shape (batch, kv_heads, complete blocks), {expected}"
            )
