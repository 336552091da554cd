"""Where the blocks of one layer's cache live: a small interface, and its first tier, the device of the model.

Slower tiers with more room: `reading/tiered_storage.py`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from landmark_llama.attention.pooling import pool_block
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.approximate import ApproximateLandmarks
from landmark_llama.reading.repeated import RepeatedLandmarks


class Prior(NamedTuple):
    """What landmark keys are pooled with: `query` (batch, length, kv_heads, head_dim), rotated by its offset, of which
    that of each landmark is used, and the `scale` of the scores.
    """

    query: Tensor
    scale: float

    @classmethod
    def of(cls, landmark_prior: Tensor | None, offset: Tensor, rotary: RotaryTable, scale: float) -> Prior | None:
        """That of a view's `landmark_prior` (batch, length, kv_heads, head_dim), not rotated; None without one.

        offset: (batch or 1, length, 1): positions from the start of its block to each query.
        """
        if landmark_prior is None:
            return None
        return cls(rotary.rotate(landmark_prior.detach(), offset), scale)


class BlockStorage(Protocol):
    """Keys and values of one layer, by row, KV head and block. Every position is written before it is read.

    Shapes: `batch` rows, `kv_heads`, `blocks` of `block_size` positions, `head_dim`. Landmark keys are kept apart as
    well, because selection reads them all at each step while it reads only a few blocks. Where landmark keys are pooled
    (`attention/pooling.py`), they are made when their block is complete, and stand in the places of the landmarks.

    Attributes:
        block_size: positions of a block.
        capacity: blocks that a row can hold without growing.
        dtype, device: of the keys and values that `gather` returns; None while there are none.
        resident: keys and values of all blocks as two contiguous tensors (batch, kv_heads, capacity, block_size,
            head_dim) on the device, which stay where they are while `capacity` stays; None where there are no such
            tensors. Kernels read these.
        landmarks_tie: set before the first write: all landmark keys are one and the same up to rounding (layer 0), and
            that of block 0 may stand for all.
        repeated: finds the highest scores without comparing all landmarks: by those that are equal to the bit, or
            approximately.
    """

    block_size: int
    capacity: int
    dtype: torch.dtype | None
    device: torch.device | None
    resident: tuple[Tensor, Tensor] | None
    landmarks_tie: bool
    repeated: RepeatedLandmarks | ApproximateLandmarks

    def expect(self, blocks: int) -> None:
        """Announces that rows will soon hold `blocks` blocks, so that room for them is made once."""

    def write(
        self, key: Tensor, value: Tensor, start: Tensor, stop: int | None = None, prior: Prior | None = None
    ) -> None:
        """Stores (batch, length, kv_heads, head_dim) at landmarked positions `start[row] ..`, growing where needed.

        stop: the largest of the positions after what is stored, where the caller knows it: no GPU need be asked.
        prior: pool the landmark keys of the blocks that this completes.
        """

    def landmarks(self, blocks: int) -> Tensor:
        """Landmark keys (batch, kv_heads, blocks, head_dim) of the first `blocks` blocks, without a copy."""

    def biases(self, blocks: int) -> Tensor | None:
        """What is added to the landmarks' scores, (batch, kv_heads, blocks), without a copy; None if nothing is."""

    def gather_biases(self, blocks: Tensor) -> Tensor | None:
        """The same (batch, kv_heads, ...) of blocks (batch, kv_heads or 1, ...)."""

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, kv_heads, ..., block_size, head_dim) of blocks (batch, kv_heads or 1, ...)."""

    def select_rows(self, rows: Tensor) -> None:
        """Makes row `rows[i]` row `i`, for beams and for batches that shrink or repeat."""


def check_written(held: tuple[int, int, int] | None, key: Tensor, holds_pooled: bool, prior: Prior | None) -> None:
    """Refuses keys (batch, length, kv_heads, head_dim) of another batch or model, or another kind of landmark keys.

    held: rows, KV heads and head_dim of what is stored; None if nothing is.
    """
    if held is None:
        return
    rows, _, kv_heads, head_dim = key.shape
    if (rows, kv_heads, head_dim) != held:
        raise ValueError(
            f"the cache holds {held[0]} rows of {held[1]} KV heads of {held[2]}; "
            f"got {rows} rows of {kv_heads} of {head_dim}: use one cache for one batch and model"
        )
    if holds_pooled != (prior is not None):
        kinds = ("pooled", "token") if holds_pooled else ("token", "pooled")
        raise ValueError(
            f"landmark_key={kinds[1]!r}: the cache holds {kinds[0]!r} landmark keys: read the text in a new one"
        )


class DeviceStorage:
    """Blocks in memory of one device, in the dtype of the first keys.

    Room is made for what is announced and an eighth more; beyond that, capacity doubles when it grows.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.key: Tensor | None = None  # (batch, kv_heads, capacity, block_size, head_dim)
        self.value: Tensor | None = None
        self.landmark: Tensor | None = None  # (batch, kv_heads, capacity, head_dim)
        self.bias: Tensor | None = None  # (batch, kv_heads, capacity), at least fp32, where landmark keys are pooled
        self.expected = 0
        self.landmarks_tie = False  # keeps them all, for kernels
        self.repeated = RepeatedLandmarks()

    @property
    def capacity(self) -> int:
        """Blocks that a row can hold without growing."""
        return 0 if self.key is None else self.key.shape[2]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None while there are none."""
        return None if self.key is None else self.key.dtype

    @property
    def device(self) -> torch.device | None:
        """Of keys and values; None while there are none."""
        return None if self.key is None else self.key.device

    @property
    def resident(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values, each (batch, kv_heads, capacity, block_size, head_dim); None while there are none."""
        return None if self.key is None else (self.key, self.value)

    def expect(self, blocks: int) -> None:
        self.expected = blocks + blocks // 8

    def write(
        self, key: Tensor, value: Tensor, start: Tensor, stop: int | None = None, prior: Prior | None = None
    ) -> None:
        rows, length = key.shape[:2]
        held = None if self.key is None else (*self.key.shape[:2], self.key.shape[-1])
        check_written(held, key, self.bias is not None, prior)
        stop = int(start.max()) + length if stop is None else stop
        # the longest row: what is grouped is one row alone
        self.repeated.forget((stop - length) // self.block_size)
        self._reserve(-(-stop // self.block_size), key)
        row = torch.arange(rows, device=key.device).unsqueeze(1)
        position = start.to(key.device).unsqueeze(1) + torch.arange(length, device=key.device)
        for stored, x in ((self.key, key), (self.value, value)):
            stored.flatten(2, 3)[row, :, position] = x.to(stored.dtype)
        # the last key of every block written to: which blocks are complete need not be known, the others' is never read
        touched = torch.cat([position[:, :: self.block_size], position[:, -1:]], dim=1) // self.block_size
        if prior is not None:
            self._pool(row, touched, position[:, :1], prior)
        self.landmark[row, :, touched] = self.key[row, :, touched, -1]

    def write_token(self, key: Tensor, value: Tensor, block: int, offset: int) -> None:
        """As `write` of one position in a block that it does not complete, for which there is room.

        key, value: (batch, 1, kv_heads, head_dim); all rows stand at `offset` of `block`.
        """
        self.repeated.forget(block)
        for stored, x in ((self.key, key), (self.value, value)):
            stored[:, :, block, offset] = x[:, 0]

    def _pool(self, row: Tensor, block: Tensor, start: Tensor, prior: Prior) -> None:
        """Pools the landmark keys of `block` (batch, touched); of incomplete ones they are never read."""
        column = (block + 1) * self.block_size - 1 - start
        query = prior.query[row, column.clamp(0, prior.query.shape[1] - 1)]  # (batch, touched, kv_heads, head_dim)
        pooled, bias = pool_block(self.key[row, :, block, :-1], query, prior.scale)
        if self.bias is None:
            self.bias = bias.new_zeros(self.key.shape[:3])
        self.key[row, :, block, -1] = pooled
        self.bias[row, :, block] = bias

    def landmarks(self, blocks: int) -> Tensor:
        return self.landmark[:, :, :blocks]

    def biases(self, blocks: int) -> Tensor | None:
        return None if self.bias is None else self.bias[:, :, :blocks]

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        index = self._index(blocks)
        return tuple(
            x.view(-1, self.block_size * x.shape[-1]).index_select(0, index.flatten()).view(*index.shape, *x.shape[-2:])
            for x in (self.key, self.value)
        )

    def gather_biases(self, blocks: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.flatten()[self._index(blocks)]

    def _index(self, blocks: Tensor) -> Tensor:
        """Places of blocks (batch, kv_heads or 1, ...) among those of all rows and heads, one after the other."""
        batch, kv_heads = self.key.shape[:2]
        first = torch.arange(0, batch * kv_heads * self.capacity, self.capacity, device=blocks.device)
        first = first.view(batch, kv_heads, *(1,) * (blocks.dim() - 2))
        # a window may reach past the last block of a short text; what it finds there is masked
        return first + blocks.clamp_max(self.capacity - 1)

    def select_rows(self, rows: Tensor) -> None:
        self.repeated.forget(0)
        if self.key is not None:
            rows = rows.to(self.key.device)
            self.key, self.value, self.landmark = (
                x.index_select(0, rows) for x in (self.key, self.value, self.landmark)
            )
            if self.bias is not None:
                self.bias = self.bias.index_select(0, rows)

    def _reserve(self, blocks: int, like: Tensor) -> None:
        """Makes room for `blocks` blocks a row. New room is zeroed: what is masked must still be finite."""
        if blocks <= self.capacity:
            return
        rows, _, kv_heads, head_dim = like.shape
        added = max(blocks, self.expected, 2 * self.capacity, 8) - self.capacity
        room = like.new_zeros(rows, kv_heads, added, self.block_size, head_dim)
        if self.key is None:
            self.key, self.value, self.landmark = room, room.clone(), room[..., 0, :].clone()
        else:
            self.key, self.value = (torch.cat([x, room], dim=2) for x in (self.key, self.value))
            self.landmark = torch.cat([self.landmark, room[..., 0, :]], dim=2)
            if self.bias is not None:
                self.bias = torch.nn.functional.pad(self.bias, (0, added))
