"""What the host side of every kernel uses: tiles, strided tensors, and launching on the largest tile that fits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

LOG2_E = 1.4426950408889634  # the kernels' exponentials and logarithms are to base 2
SMALLEST_CHIP = 163 * 1024  # bytes of shared memory that a program may take on sm_80

Result = TypeVar("Result")

# launches that a device had no room for: they are not compiled again
_too_large: set[tuple[Hashable, ...]] = set()


class Tile(NamedTuple):
    """Work of one program: `queries` by `keys`, powers of two; its warps, and the loads it keeps in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Strided(NamedTuple):
    """A tensor as a kernel takes it: its pointer, and the strides that the kernel needs.

    p: on the host the tensor, in a kernel the pointer.
    stride: of the leading dimensions, in elements.
    """

    p: Any
    stride: tuple[Any, ...]


@triton.constexpr_function
def padded(size: int) -> int:
    """The power of two, at least 16 (the smallest that tensor cores take), that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; without a GPU, those of the smallest supported chip."""
    if device.type != "cuda":
        return SMALLEST_CHIP
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def launch_largest(
    tiles: Iterable[Tile], launch: Callable[[Tile], Result], query: Tensor, *compiled_for: Hashable
) -> Result:
    """`launch(tile)` with the first of `tiles` that fits.

    Args:
        tiles: those to try, the best one first.
        launch: runs the kernels with one tile.
        query: (..., head_dim): what they work on.
        compiled_for: what else changes the compiled kernels, beside the tile and the dtype, head_dim and device of
            `query`.

    Raises:
        ValueError: if none fits.
    """
    head_dim, dtype, device = query.shape[-1], query.dtype, query.device
    for tile in tiles:
        what = (tile, head_dim, dtype, device, *compiled_for)
        if what in _too_large:
            continue
        try:
            return launch(tile)
        except OutOfResources:
            _too_large.add(what)
    raise ValueError(f"query has head_dim {head_dim} in {dtype}: {device} lacks the shared memory")
