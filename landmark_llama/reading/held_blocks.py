"""The blocks of a slower tier that are kept on the compute device: as many as a budget has room for, by last use."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Tier(Protocol):
    """Where all blocks of one layer lie. A record holds one block of one KV head: its keys, then its values.

    Records are numbered from 0. They are zero until they are written. Their shape is (2, block_size, head_dim).
    """

    def reserve(self, records: int) -> None:
        """Makes room for `records` records. Raises TierError where there is none; what is there stays."""

    def read(self, records: Tensor) -> Tensor:
        """Records (n,), ascending, each once: (n, 2, block_size, head_dim), on the CPU."""

    def write(self, records: Tensor, content: Tensor) -> None:
        """Stores `content` (n, 2, block_size, head_dim), from any device, as `records` (n,)."""


class HeldBlocks:
    """Records of a tier, some of them on `device`.

    Args:
        tier: where all records lie.
        slots: how many records are kept on the device.
        shape: of a record.

    Attributes:
        asked, missed: records that were asked for, each once a call, and those that the tier had to be read for.
        bytes_read: from the tier.
    """

    def __init__(
        self, tier: Tier, slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tier = tier
        self.content = torch.zeros(slots, *shape, dtype=dtype, device=device)
        # the rest is bookkeeping of the host: which records are fetched must be known there
        self.slot_of = torch.zeros(0, dtype=torch.int32, device="cpu")  # (records,): -1 where not held
        self.record_in = torch.full((slots,), -1, device="cpu")
        self.last_use = torch.zeros(slots, dtype=torch.long, device="cpu")
        self.clock = 0
        self.asked = self.missed = self.bytes_read = 0

    def expect(self, records: int) -> None:
        """Announces that records up to `records` will be asked for."""
        added = records - len(self.slot_of)
        if added > 0:
            self.slot_of = torch.nn.functional.pad(self.slot_of, (0, added), value=-1)

    def find(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Where records (n,), ascending and each once, can be read: a table (slots, ...) on the device and rows (n,).

        The table may change at the next call.
        """
        slot = self.slot_of[records].long()
        missing = slot < 0
        misses = records[missing]
        self.asked += len(records)
        self.missed += len(misses)
        self._touch(slot[~missing])
        if not len(misses):
            return self.content, slot
        read = self.tier.read(misses)
        self.bytes_read += read.numel() * read.element_size()
        read = read.to(self.content.device, non_blocking=True)
        if len(records) <= len(self.content):
            slot[missing] = self._make_room(misses)
            self.content[slot[missing].to(read.device)] = read
            return self.content, slot
        # more than there is room for: what is held stays
        table = self.content.new_empty(len(records), *self.content.shape[1:])
        table[missing.to(read.device)] = read
        table[~missing.to(read.device)] = self.content[slot[~missing].to(read.device)]
        return table, torch.arange(len(records))

    def write(self, records: Tensor, content: Tensor) -> None:
        """Stores `content` (n, 2, block_size, head_dim) as `records` (n,), each once: in the tier, and held."""
        self.tier.write(records, content)
        slot = self.slot_of[records].long()
        if len(records) > len(self.content):
            held = slot >= 0
            self.record_in[slot[held]] = -1
            self.slot_of[records[held]] = -1
            return
        self._touch(slot[slot >= 0])
        slot[slot < 0] = self._make_room(records[slot < 0])
        self.content[slot.to(content.device)] = content

    def _touch(self, slot: Tensor) -> None:
        self.clock += 1
        self.last_use[slot] = self.clock

    def _make_room(self, records: Tensor) -> Tensor:
        """Slots (n,) for `records` (n,), those unused for longest. All slots of this call are touched already."""
        slot = self.last_use.topk(len(records), largest=False, sorted=False).indices
        dropped = self.record_in[slot]
        self.slot_of[dropped[dropped >= 0]] = -1
        self.record_in[slot] = records
        self.slot_of[records] = slot.int()
        self.last_use[slot] = self.clock
        return slot
