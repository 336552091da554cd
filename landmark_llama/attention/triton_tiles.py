"""Launching a kernel on the largest of its tiles that a GPU has the shared memory for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from torch import Tensor
from triton.runtime.errors import OutOfResources

Tile = TypeVar("Tile", bound=Hashable)
Result = TypeVar("Result")

# launches that a device had no room for, so that nothing is compiled for them again
_too_large: set[tuple[Hashable, ...]] = set()


def launch_largest(
    tiles: Iterable[Tile], launch: Callable[[Tile], Result], query: Tensor, *compiled_for: Hashable
) -> Result:
    """`launch(tile)` with the first of `tiles` that fits.

    Args:
        tiles: those to try, the best one first.
        launch: runs the kernels in tiles of one size.
        query: (..., head_dim): what they work on.
        compiled_for: what else they are compiled for, beside the tile, and the dtype, head_dim and device of `query`.

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
