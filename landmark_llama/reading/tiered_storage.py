"""Storages whose blocks live in a tier: `HostStorage`, `FileStorage`. Landmark keys stay on the compute device."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.pooling import pool_block
from landmark_llama.reading.held_blocks import HeldBlocks, Tier
from landmark_llama.reading.repeated import RepeatedLandmarks
from landmark_llama.reading.storage import BlockStorage, DeviceStorage, Prior, check_written
from landmark_llama.reading.tiers import FileTier, HostTier, TierFolder

BUDGET = 1 << 28  # bytes of blocks kept on the device, in all layers
ROOM = 4096  # blocks: no more than that is made room for beyond what is announced

TierMaker = Callable[[tuple[int, ...], torch.dtype, torch.device], Tier]


class HostStorage:
    """Blocks in memory of the host, pinned beside a GPU: `LandmarkCache(config, storage=HostStorage(budget=2**30))`.

    Args:
        budget: bytes of keys and values that stay on the compute device, in all layers together: the blocks used last.
            The blocks that one layer reads at once are there beside them.
    """

    def __init__(self, *, budget: int = BUDGET) -> None:
        if budget < 0:
            raise ValueError(f"budget={budget}: bytes to keep on the device, 0 or more")
        self.budget = budget
        self._made: weakref.WeakSet[TieredStorage] = weakref.WeakSet()

    def __call__(self, block_size: int) -> TieredStorage:
        """The storage of one layer."""
        storage = TieredStorage(block_size, self._tier, self._share)
        self._made.add(storage)
        return storage

    def _tier(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tier:
        return HostTier(shape, dtype, device)

    def _share(self) -> int:
        """The budget of one layer, in bytes."""
        return self.budget // max(1, len(self._made))

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStorage:
        return self


class FileStorage(HostStorage):
    """Blocks in files of a folder, one a layer: `LandmarkCache(config, storage=FileStorage("folder"))`.

    The files are scratch: they are deleted with the cache (`docs/memory_tiers.md`).

    Args:
        folder: made if it is not there. One cache at a time can use it.
        budget: as for `HostStorage`.

    Raises:
        TierError: the folder cannot be written to, or is in use. In reading: the disk is full, or a file was changed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, budget: int = BUDGET) -> None:
        super().__init__(budget=budget)
        self.folder = TierFolder(folder)

    def _tier(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tier:
        return FileTier(self.folder, shape, dtype)


def storage_named(name: str, budget: int = BUDGET) -> Callable[[int], BlockStorage]:
    """The `storage` of a LandmarkCache that a command's flag names: `device`, `host`, or `file:FOLDER`.

    budget: of the last two.

    Raises:
        ValueError: the name is none of these.
        TierError: as `FileStorage`.
    """
    kind, _, folder = name.partition(":")
    if name == "device":
        return DeviceStorage
    if name == "host":
        return HostStorage(budget=budget)
    if kind == "file" and folder:
        return FileStorage(folder, budget=budget)
    raise ValueError(f"cache {name!r}: must be device, host, or file:FOLDER")


class TieredStorage:
    """Blocks of one layer in a tier, as a `BlockStorage`.

    A page is a block of all KV heads. Rows that have become one another share pages; a row that writes to a shared one
    takes a copy. Page 0 is never written: it stands for blocks that are not there.
    """

    resident = None

    def __init__(self, block_size: int, make_tier: TierMaker, budget: Callable[[], int]) -> None:
        self.block_size = block_size
        self.landmarks_tie = False
        self.repeated = RepeatedLandmarks()
        self.landmark: Tensor | None = None  # (batch, kv_heads, capacity, head_dim); of one block where they tie
        self.bias: Tensor | None = None  # (batch, kv_heads, capacity)
        self.page = torch.zeros(0, 0, dtype=torch.long, device="cpu")  # (batch, capacity)
        self.held: HeldBlocks | None = None
        self.pages = self.expected = 0
        self._make_tier, self._budget = make_tier, budget

    @property
    def capacity(self) -> int:
        """Blocks that a row can hold without growing."""
        return self.page.shape[1]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None while there are none."""
        return None if self.landmark is None else self.landmark.dtype

    @property
    def device(self) -> torch.device | None:
        """Where blocks are gathered; None while there are none."""
        return None if self.landmark is None else self.landmark.device

    def expect(self, blocks: int) -> None:
        self.expected = max(self.expected, blocks + min(blocks // 8, ROOM))

    def write(
        self, key: Tensor, value: Tensor, start: Tensor, stop: int | None = None, prior: Prior | None = None
    ) -> None:
        rows, length = key.shape[:2]
        held = None if self.landmark is None else (len(self.page), self.landmark.shape[1], self.landmark.shape[-1])
        check_written(held, key, self.bias is not None, prior)
        start = start.to("cpu")
        self.repeated.forget(int(start.min()) // self.block_size)
        first, offset = start // self.block_size, start % self.block_size
        span = (int(offset.max()) + length - 1) // self.block_size + 1
        block = first.unsqueeze(1) + torch.arange(span, device="cpu")  # (batch, span): those that are written to
        self._reserve(int(block.max()) + 1, key, rows)
        page = self._pages_to_write(block)
        content = self._content(block, offset, key, value)
        position = offset.to(key.device).unsqueeze(1) + torch.arange(length, device=key.device)
        # as `DeviceStorage.write` does, of the same blocks in the same order: the bits must not depend on the tier
        touched = torch.cat([position[:, :: self.block_size], position[:, -1:]], dim=1) // self.block_size
        bias = None if prior is None else self._pool(content, touched, position[:, :1], prior)
        self.held.write(self._records(page), content.flatten(0, 2))
        # only now, so that a full disk leaves the memory as it was
        self.pages = max(self.pages, int(page.max()) + 1)
        row = torch.arange(rows, device="cpu").unsqueeze(1)
        self.page[row, block] = page
        row, block = row.to(key.device), block.to(key.device)
        if not self.landmarks_tie:
            self.landmark[row, :, block] = content[:, :, :, 0, -1]
        elif (first == 0).any():
            self.landmark[first == 0, :, 0] = content[first == 0, 0, :, 0, -1]
        if bias is not None:
            self.bias[row, :, touched + block[:, :1]] = bias

    def landmarks(self, blocks: int) -> Tensor:
        return self.landmark.expand(-1, -1, blocks, -1) if self.landmarks_tie else self.landmark[:, :, :blocks]

    def biases(self, blocks: int) -> Tensor | None:
        return None if self.bias is None else self.bias[:, :, :blocks]

    def gather_biases(self, blocks: Tensor) -> Tensor | None:
        if self.bias is None:
            return None
        batch, kv_heads = self.bias.shape[:2]
        first = torch.arange(0, batch * kv_heads * self.capacity, self.capacity, device=blocks.device)
        first = first.view(batch, kv_heads, *(1,) * (blocks.dim() - 2))
        return self.bias.flatten()[first + blocks.clamp_max(self.capacity - 1)]

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        batch, kv_heads, head_dim = len(self.page), self.landmark.shape[1], self.landmark.shape[-1]
        blocks = blocks.to("cpu").clamp_max(self.capacity - 1)
        further = (1,) * (blocks.dim() - 2)
        page = self.page[torch.arange(batch, device="cpu").view(batch, 1, *further), blocks]
        record = page * kv_heads + torch.arange(kv_heads, device="cpu").view(1, kv_heads, *further)
        different, place = record.unique(return_inverse=True)
        table, row = self.held.find(different)
        row = 2 * row[place.flatten()].to(table.device)
        table, shape = table.view(-1, self.block_size * head_dim), (*record.shape, self.block_size, head_dim)
        return tuple(table.index_select(0, row + which).view(shape) for which in (0, 1))

    def select_rows(self, rows: Tensor) -> None:
        self.repeated.forget(0)
        if self.landmark is None:
            return
        self.page = self.page[rows.to("cpu")]
        rows = rows.to(self.landmark.device)
        self.landmark = self.landmark.index_select(0, rows)
        self.bias = None if self.bias is None else self.bias.index_select(0, rows)

    def _content(self, block: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the blocks (batch, span) hold after the write: (batch, span, kv_heads, 2, block_size, head_dim)."""
        rows, length, kv_heads, head_dim = key.shape
        shape = (rows, block.shape[1], kv_heads, 2, self.block_size, head_dim)
        content = torch.zeros(shape, dtype=self.landmark.dtype, device=key.device)
        if offset.any():  # only the first block of a row can hold something that stays
            content[:, 0] = torch.stack([x[:, :, 0] for x in self.gather(block[:, None, :1])], dim=2)
        position = offset.to(key.device).unsqueeze(1) + torch.arange(length, device=key.device)
        row = torch.arange(rows, device=key.device).unsqueeze(1)
        for which, x in enumerate((key, value)):
            content[row, position // self.block_size, :, which, position % self.block_size] = x.to(content.dtype)
        return content

    def _pool(self, content: Tensor, touched: Tensor, offset: Tensor, prior: Prior) -> Tensor:
        """Pools landmark keys into `content`; returns the biases (batch, touched, kv_heads) of blocks `touched`."""
        row = torch.arange(len(content), device=content.device).unsqueeze(1)
        column = (touched + 1) * self.block_size - 1 - offset
        query = prior.query[row, column.clamp(0, prior.query.shape[1] - 1)]
        pooled, bias = pool_block(content[row, touched, :, 0, :-1], query, prior.scale)
        content[row, touched, :, 0, -1] = pooled
        if self.bias is None:
            self.bias = bias.new_zeros(*self.landmark.shape[:2], self.capacity)
        return bias

    def _pages_to_write(self, block: Tensor) -> Tensor:
        """Pages of blocks (batch, span): new ones for blocks that are new or shared with another row."""
        row = torch.arange(len(block), device="cpu").unsqueeze(1)
        page = self.page[row, block]
        new = (page == 0) | ((self.page[:, block] == page).sum(0) > 1)
        fresh = int(new.sum())
        self.held.tier.reserve((self.pages + fresh) * self.landmark.shape[1])
        self.held.expect((self.pages + fresh) * self.landmark.shape[1])
        page[new] = self.pages + torch.arange(fresh, device="cpu")
        return page

    def _records(self, page: Tensor) -> Tensor:
        kv_heads = self.landmark.shape[1]
        return (page.unsqueeze(-1) * kv_heads + torch.arange(kv_heads, device="cpu")).flatten()

    def _reserve(self, blocks: int, like: Tensor, rows: int) -> None:
        """Makes room for `blocks` blocks a row. New room is zeroed: what is masked must still be finite."""
        if self.held is None:
            kv_heads, head_dim = like.shape[2:]
            shape = (2, self.block_size, head_dim)
            slots = self._budget() // (torch.Size(shape).numel() * like.dtype.itemsize)
            kind = shape, like.dtype, like.device
            self.held = HeldBlocks(self._make_tier(*kind), slots, *kind)
            self.page = torch.zeros(rows, 0, dtype=torch.long, device="cpu")
            self.landmark = like.new_zeros(rows, kv_heads, int(self.landmarks_tie), head_dim)
            self.pages = 1
            self.held.tier.reserve(kv_heads)
            self.held.expect(kv_heads)
        if blocks <= self.capacity:
            return
        added = max(blocks, self.expected, self.capacity + self.capacity // 4, 8) - self.capacity
        if not self.landmarks_tie:
            self.landmark = torch.nn.functional.pad(self.landmark, (0, 0, 0, added))
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, added))
        self.page = torch.nn.functional.pad(self.page, (0, added))
