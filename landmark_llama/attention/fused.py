"""Landmark attention by the Triton kernels of `triton_training.py`, as custom operators of PyTorch.

Being operators with a fake implementation and a backward, they go through `torch.compile`, activation checkpointing and
FSDP as PyTorch's own do. The table below says on which tiles a kernel works; a GPU that lacks the shared memory for one
takes the next, smaller one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from landmark_llama.attention import triton_training
from landmark_llama.attention.triton_tiles import launch_largest

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Work of one program: `queries` by `keys`, powers of two; its warps, and the loads it keeps under way."""

    queries: int
    keys: int
    warps: int
    stages: int


# The tiles to try, in order, by kernel and by the bytes of a row of head_dim elements. Chosen from the compiled code,
# for few registers spilled and shared memory that fits sm_90, then sm_80, then smaller chips; not timed on a GPU.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        256: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
        512: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
    "query_gradient": {
        256: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
        512: (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
    "key_gradient": {
        256: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        512: (Tile(128, 64, 8, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
}
# float32 is multiplied in full precision, without tensor cores, and keeps whole rows in registers: small tiles
FLOAT32_TILES = (Tile(16, 16, 4, 1),)


def fused_landmark_attention(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float) -> Tensor:
    """Causal landmark attention; arguments and result as in `landmark_attention`.

    Raises:
        ValueError: if the kernels do not support the device, dtype or head_dim, naming what they do.
    """
    if problem := unsupported(query):
        raise ValueError(problem)
    if scale <= 0:  # the kernels take the largest score before they scale it
        query, scale = query * ((scale > 0) - (scale < 0)), abs(scale) or 1.0
    return torch.ops.landmark_llama.attention_forward(query, key, value, block_size, scale)[0]


def unsupported(query: Tensor) -> str | None:
    """Why the kernels cannot take a query, if they cannot."""
    if not query.is_cuda and not _interpreted():
        return f"query is on {query.device}: the Triton kernels run on CUDA devices"
    if query.dtype not in DTYPES:
        return f"query is {query.dtype}: the Triton kernels support float16, bfloat16 and float32"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"query has head_dim {query.shape[-1]}: the Triton kernels support at most {MAX_HEAD_DIM}"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return triton.knobs.runtime.interpret


@torch.library.custom_op("landmark_llama::attention_forward", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and the logsumexp (batch, heads, query_length) of its rows, to base 2, in float32."""
    output, lse = _empty_forward(query, key, value, block_size, scale)
    batch, heads, query_length, _ = query.shape
    _launch(
        "forward",
        lambda tile: batch * heads * triton.cdiv(query_length, tile.queries),
        (query, key, value, output, lse),
        (query, key, value, output),
        (scale * LOG2_E,),
        block_size,
    )
    return output, lse


@_forward.register_fake
def _empty_forward(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grads = _empty_backward(grad, query, key, value, output, lse, block_size, scale)
    grad_query, grad_key, grad_value = grads
    delta = torch.empty_like(lse)
    batch, heads, query_length, _ = query.shape
    _launch(
        "query_gradient",
        lambda tile: batch * heads * triton.cdiv(query_length, tile.queries),
        (query, key, value, output, grad, lse, delta, grad_query),
        (query, key, value, output, grad, grad_query),
        (scale, scale * LOG2_E),
        block_size,
    )
    _launch(
        "key_gradient",
        lambda tile: key.shape[0] * key.shape[1] * _key_tiles(key.shape[2], block_size, tile),
        (query, key, value, grad, lse, delta, grad_key, grad_value),
        (query, key, value, grad, grad_key, grad_value),
        (scale, scale * LOG2_E),
        block_size,
    )
    return grads


@_backward.register_fake
def _empty_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    grads = torch.ops.landmark_llama.attention_backward(grad, *ctx.saved_tensors, ctx.block_size, ctx.scale)
    return *grads, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles to try for a kernel, from the largest; `kernel`: a name in `TILES`."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    row_bytes = head_dim * dtype.itemsize
    return next(choices for most, choices in TILES[kernel].items() if row_bytes <= most)


def constants(block_size: int, head_dim: int, tile: Tile) -> dict[str, int]:
    """What a kernel is compiled for; the letters are explained in `triton_training.py`."""
    columns = triton.next_power_of_2(block_size)
    return {
        "BLOCK": block_size,
        "HEAD_DIM": head_dim,
        "D": max(16, triton.next_power_of_2(head_dim)),  # the least that a matrix product takes
        "M": tile.queries,
        "N": tile.keys,
        "C": max(1, tile.keys // columns),
        "PARTS": max(1, columns // tile.keys),
    }


def _key_tiles(key_length: int, block_size: int, tile: Tile) -> int:
    meaning = constants(block_size, 1, tile)
    return triton.cdiv(key_length, block_size * meaning["C"]) * meaning["PARTS"]


def _launch(
    name: str,
    programs: Any,
    pointers: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    scales: tuple[float, ...],
    block_size: int,
) -> None:
    """Runs a kernel on the first of its tiles that the device has room for.

    Args:
        name: of the kernel, without its ending.
        programs: how many there are, given the tile.
        pointers: tensors that the kernel reads and writes, query and key first.
        strided: those whose strides it takes.
        scales: its last arguments before the constants.
    """
    query, key = pointers[:2]
    kernel = getattr(triton_training, f"{name}_kernel")
    lengths = (query.shape[1], query.shape[1] // max(key.shape[1], 1), query.shape[2], key.shape[2])

    def launch(tile: Tile) -> None:
        count = programs(tile)
        if count == 0:
            return
        with torch.cuda.device_of(query):
            kernel[(count,)](
                *pointers,
                *(x.stride() for x in strided),
                *lengths,
                *scales,
                **constants(block_size, query.shape[3], tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    launch_largest(tiles(name, query.shape[3], query.dtype), launch, query, name, block_size)
