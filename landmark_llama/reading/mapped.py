"""Blocks of a saved memory, read from its mapped file, and behind them the blocks that are added, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from landmark_llama.reading.repeated import RepeatedLandmarks
from landmark_llama.reading.storage import DeviceStorage, Prior

LANDMARK_ROOM = 64  # blocks: landmarks of so many more are held without moving the others


class MappedStorage:
    """One layer of a saved memory, as a `BlockStorage`.

    The saved blocks are never written to: what is added goes to memory, so several processes may open one file and go
    on from it. Landmark keys, which each choice reads whole, are held on the device.

    Args:
        saved: (blocks, layers, 2, saved rows, kv_heads, block_size, head_dim), over the mapped file.
        landmark: (saved rows, kv_heads, blocks, head_dim): those of the layer.
        bias: (saved rows, kv_heads, blocks), where landmark keys are pooled.
        tail: (2, saved rows, kv_heads, blocks, block_size, head_dim): what follows the saved blocks; `tail_bias`
            (saved rows, kv_heads, blocks) where pooled.
        layer: whose blocks these are.
        device: where keys and values are wanted.
    """

    def __init__(
        self,
        saved: Tensor,
        landmark: Tensor,
        bias: Tensor | None,
        tail: Tensor,
        tail_bias: Tensor | None,
        layer: int,
        device: torch.device,
    ) -> None:
        self.block_size = saved.shape[-2]
        self.layer, self.dtype, self.device = layer, saved.dtype, device
        self.resident, self.landmarks_tie = None, False  # no kernel reads the file
        self.repeated = RepeatedLandmarks()
        self.rows = torch.arange(saved.shape[3])  # the saved row that each row goes on from
        self.saved, self.added = saved, DeviceStorage(self.block_size)
        if tail.shape[3]:
            added, tail = self.added, tail.to(device)
            added.key, added.value = (x.contiguous() for x in tail)
            added.landmark = added.key[..., -1, :].contiguous()
            added.bias = None if tail_bias is None else tail_bias.to(device).contiguous()
        # (rows, kv_heads, room, head_dim) and (rows, kv_heads, room): all blocks, also those added
        self.landmark = landmark.to(device).contiguous()
        self.bias = None if bias is None else bias.to(device).contiguous()
        self._copy_landmarks(0, tail.shape[3])

    @property
    def blocks(self) -> int:
        """Blocks in the file."""
        return len(self.saved)

    @property
    def capacity(self) -> int:
        """Blocks that a row can hold without growing."""
        return self.blocks + self.added.capacity

    def expect(self, blocks: int) -> None:
        self.added.expect(max(0, blocks - self.blocks))

    def write(
        self, key: Tensor, value: Tensor, start: Tensor, stop: int | None = None, prior: Prior | None = None
    ) -> None:
        held = (len(self.rows), *self.saved.shape[4:5], self.saved.shape[-1])
        if (key.shape[0], *key.shape[2:]) != held:
            raise ValueError(
                f"the memory holds {held[0]} rows of {held[1]} KV heads of {held[2]}; got {key.shape[0]} rows of "
                f"{key.shape[2]} of {key.shape[3]}: use one cache for one batch and model"
            )
        skipped = self.blocks * self.block_size
        self.repeated.forget(int(start.min()) // self.block_size)
        start = start - skipped
        stop = int(start.max()) + key.shape[1] if stop is None else stop - skipped
        # in the dtype of the memory, whatever autocast makes of the keys
        self.added.write(key.to(self.saved.dtype), value.to(self.saved.dtype), start, stop, prior)
        self._copy_landmarks(int(start.min()) // self.block_size, -(-stop // self.block_size))

    def landmarks(self, blocks: int) -> Tensor:
        return self.landmark[:, :, :blocks]

    def biases(self, blocks: int) -> Tensor | None:
        return None if self.bias is None else self.bias[:, :, :blocks]

    def gather_biases(self, blocks: Tensor) -> Tensor | None:
        if self.bias is None:
            return None
        rows, kv_heads, room = self.bias.shape
        first = torch.arange(0, rows * kv_heads * room, room, device=self.device)
        index = first.view(rows, kv_heads, *(1,) * (blocks.dim() - 2)) + blocks.clamp_max(room - 1)
        return self.bias.flatten()[index]

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        if not self.blocks:
            return self.added.gather(blocks)
        from_file = blocks < self.blocks
        if from_file.all():
            return self._gather_saved(blocks)
        added = self.added.gather((blocks - self.blocks).clamp_min(0))
        if not from_file.any():
            return added
        shape = added[0].shape[:-2]
        place = from_file.expand(shape).flatten().nonzero().squeeze(1)
        saved = self._gather_saved(blocks, place)
        for into, x in zip(added, saved, strict=True):
            into.view(-1, *into.shape[-2:])[place] = x
        return added

    def select_rows(self, rows: Tensor) -> None:
        self.rows = self.rows[rows.cpu()]
        self.repeated.forget(0)
        self.added.select_rows(rows)
        rows = rows.to(self.device)
        self.landmark = self.landmark.index_select(0, rows)
        self.bias = None if self.bias is None else self.bias.index_select(0, rows)

    def _gather_saved(self, blocks: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks (rows, kv_heads or 1, ...) of the file.

        With `place`, (places, block_size, head_dim) of some of them, counted over (rows, kv_heads, ...).
        """
        _, layers, _, saved_rows, kv_heads, _, head_dim = self.saved.shape
        first = self.rows.unsqueeze(1) * kv_heads + torch.arange(kv_heads)
        first = first.view(*first.shape, *(1,) * (blocks.dim() - 2))
        # rows of the file of all that stands before a block's keys in it
        index = (blocks.cpu() * layers + self.layer) * (2 * saved_rows * kv_heads) + first
        shape = index.shape
        index = index.flatten() if place is None else index.flatten()[place.cpu()]
        flat = self.saved.view(-1, self.block_size * head_dim)
        found = (flat.index_select(0, index + which * saved_rows * kv_heads) for which in (0, 1))
        leading = shape if place is None else index.shape
        return tuple(x.view(*leading, self.block_size, head_dim).to(self.device) for x in found)

    def _copy_landmarks(self, first: int, stop: int) -> None:
        """Copies the landmarks of the added blocks `first` to `stop` to those of all blocks."""
        if stop <= first:
            return
        missing = self.blocks + stop - self.landmark.shape[2]
        if missing > 0:
            missing = max(missing, self.landmark.shape[2] // 8, LANDMARK_ROOM)
            self.landmark = torch.nn.functional.pad(self.landmark, (0, 0, 0, missing))
        into = slice(self.blocks + first, self.blocks + stop)
        self.landmark[:, :, into] = self.added.landmark[:, :, first:stop]
        if self.added.bias is None:
            return
        if self.bias is None:
            self.bias = self.added.bias.new_zeros(self.landmark.shape[:3])
        self.bias = torch.nn.functional.pad(self.bias, (0, self.landmark.shape[2] - self.bias.shape[2]))
        self.bias[:, :, into] = self.added.bias[:, :, first:stop]

    def move_to_file(self, saved: Tensor) -> None:
        """Forgets the added blocks that `saved`, the file after more were appended to it, holds now."""
        number = len(saved) - self.blocks
        added = self.added
        self.saved = saved
        if not number or added.key is None:
            return
        self.added = DeviceStorage(self.block_size)
        if number < added.capacity:
            for name in ("key", "value", "landmark", "bias"):
                x = getattr(added, name)
                setattr(self.added, name, None if x is None else x[:, :, number:].clone())
