"""Landmark attention by the Triton kernels of `triton_training.py`, as custom operators of PyTorch.

They have a fake implementation and a backward, so they work under `torch.compile`, activation checkpointing and FSDP as
PyTorch's own operators do. `TILES` says on which tiles a kernel works. A GPU that lacks the shared memory for one takes
the next, smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from landmark_llama.attention import triton_training
from landmark_llama.attention.availability import unsupported
from landmark_llama.attention.triton_blocks import Sizes, block_columns, block_parts
from landmark_llama.attention.triton_tiles import LOG2_E, Strided, Tile, launch_largest

# The tiles to try, in order, by kernel and by the bytes of a row of head_dim elements. Chosen from the compiled code,
# for few registers spilled and shared memory that fits sm_90, then sm_80, then smaller chips; not timed on a GPU.
# With fewer than 3 stages no load overlaps the work; the key gradient has no room for a third.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        256: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
        512: (Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
    "query_gradient": {
        256: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
        512: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(32, 64, 4, 1), Tile(32, 16, 4, 1)),
    },
    "key_gradient": {
        256: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        512: (Tile(32, 64, 8, 1), Tile(16, 64, 8, 1), Tile(32, 16, 4, 1)),
    },
}
# float32 is multiplied in full precision, without tensor cores, and keeps whole rows in registers: small tiles
FLOAT32_TILES = (Tile(16, 16, 4, 1),)


def fused_landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    landmark_query: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    exact_weights: bool = False,
) -> Tensor:
    """Causal landmark attention; arguments and result as in `landmark_attention`.

    A query or a bias of the landmarks' own takes fp32 numbers for each query, head and block: their logits.

    Raises:
        ValueError: if the kernels do not support the device, dtype or head_dim, naming what they do.
    """
    if problem := unsupported(query):
        raise ValueError(problem)
    landmark = None
    if not exact_weights and (landmark_query is not None or landmark_bias is not None):
        scoring = query if landmark_query is None else landmark_query
        landmark = _landmark_logits(scoring, key[:, :, block_size - 1 :: block_size], landmark_bias, scale)
    if scale <= 0:  # the kernels take the largest score before they scale it
        query, scale = query * ((scale > 0) - (scale < 0)), abs(scale) or 1.0
    return torch.ops.landmark_llama.attention_forward(query, key, value, block_size, scale, landmark, exact_weights)[0]


def _landmark_logits(query: Tensor, landmarks: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scores (batch, heads, query_length, blocks), fp32, of the landmark keys (batch, kv_heads, blocks, head_dim)."""
    with torch.autocast(query.device.type, enabled=False):
        # the query heads that share a KV head stand one after the other: one product for all of them
        rows = query.float().unflatten(1, (landmarks.shape[1], -1)).flatten(2, 3)
        logits = rows @ landmarks.float().transpose(-1, -2) * scale
        if bias is not None:
            logits = logits + bias.float().unsqueeze(-2)
    return logits.unflatten(2, (-1, query.shape[2])).flatten(1, 2)


@torch.library.custom_op("landmark_llama::attention_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    landmark: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output, and the logsumexp (batch, heads, query_length) of its rows, to base 2, in float32.

    landmark: (batch, heads, query_length, complete blocks), fp32: the landmarks' logits, in place of their scores.
    exact: blocks weigh what their tokens do, whatever their landmarks score.
    """
    output, lse = _empty_output(query)
    _launch(
        "forward",
        lambda tile: query.shape[0] * query.shape[1] * triton.cdiv(query.shape[2], tile.queries),
        (query, key, value, output),
        (lse, None if landmark is None else landmark.contiguous()),
        (scale * LOG2_E,),
        block_size,
        exact,
    )
    return output, lse


@_forward.register_fake
def _empty_output(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("landmark_llama::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    landmark: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and `landmark`; the last one is empty where no `landmark` is given."""
    grads = _empty_gradients(grad, query, key, value, output, lse, block_size, scale, landmark)
    grad_query, grad_key, grad_value, grad_landmark = grads
    delta, given = torch.empty_like(lse), landmark is not None
    if given:
        landmark = landmark.contiguous()
        grad_landmark.zero_()  # the kernel writes what its queries see
    _launch(
        "query_gradient",
        lambda tile: query.shape[0] * query.shape[1] * triton.cdiv(query.shape[2], tile.queries),
        (query, key, value, output, grad, grad_query),
        (lse, delta, landmark, grad_landmark if given else None),
        (scale * LOG2_E, scale),
        block_size,
        exact,
    )
    _launch(
        "key_gradient",
        lambda tile: key.shape[0] * key.shape[1] * _key_tiles(key.shape[2], block_size, tile),
        (query, key, value, grad, grad_key, grad_value),
        (lse, delta, landmark),
        (scale * LOG2_E, scale),
        block_size,
        exact,
    )
    return grads


@_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    landmark: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_landmark = lse.new_empty(0 if landmark is None else landmark.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), like_landmark


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.block_size, ctx.scale, landmark, ctx.exact = inputs
    ctx.save_for_backward(query, key, value, *output, landmark)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *rows, landmark = ctx.saved_tensors
    backward = torch.ops.landmark_llama.attention_backward
    *grads, grad_landmark = backward(grad, *rows, ctx.block_size, ctx.scale, landmark, ctx.exact)
    return *grads, None, None, None if landmark is None else grad_landmark, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles to try for a kernel, from the largest; `kernel`: a name in `TILES`."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    row_bytes = head_dim * dtype.itemsize
    return next(choices for most, choices in TILES[kernel].items() if row_bytes <= most)


def _key_tiles(key_length: int, block_size: int, tile: Tile) -> int:
    """Key tiles of a sequence: each holds whole blocks, or a part of one."""
    blocks = tile.keys // block_columns(block_size, tile.keys)
    return triton.cdiv(key_length, block_size * blocks) * block_parts(block_size, tile.keys)


def _launch(
    name: str,
    programs: Callable[[Tile], int],
    tensors: tuple[Tensor, ...],
    row_numbers: tuple[Tensor | None, ...],
    scales: tuple[float, ...],
    block_size: int,
    exact: bool,
) -> None:
    """Runs a kernel on the first of its tiles that the device has room for.

    Args:
        name: of the kernel, without its ending.
        programs: how many there are, given the tile.
        tensors: (batch, heads, length, head_dim), of any strides: its first arguments, query and key before the others.
        row_numbers: (batch, heads, query_length, ...), contiguous, or None: its next arguments.
        scales: its last arguments before the constants.
    """
    query, key = tensors[:2]
    kernel = getattr(triton_training, f"{name}_kernel")
    size = Sizes(query.shape[1], query.shape[1] // max(key.shape[1], 1), query.shape[2], key.shape[2])

    def launch(tile: Tile) -> None:
        count = programs(tile)
        if count == 0:
            return
        with torch.cuda.device_of(query):
            kernel[(count,)](
                *(Strided(x, x.stride()) for x in tensors),
                *row_numbers,
                size,
                *scales,
                BLOCK=block_size,
                HEAD_DIM=query.shape[3],
                M=tile.queries,
                N=tile.keys,
                EXACT=exact,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    launch_largest(
        tiles(name, query.shape[3], query.dtype), launch, query, name, block_size, exact, None in row_numbers
    )
