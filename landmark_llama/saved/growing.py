"""A tensor in a safetensors file whose rows are appended: what is written once never moves.

The file's header has a fixed size, padded with spaces as the format allows, so it can be rewritten in place once more
rows have reached the disk. How many rows count is kept elsewhere (`folder.py`): whatever lies behind them was left by a
writer that was killed, and the next one cuts it off.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HEADER = 4096  # bytes in front of the rows: a page, so that mapped rows are aligned
SAFETENSORS_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The rows of a growing file that count.

    count: how many.
    checksum: CRC-32 of their bytes.
    """

    count: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class GrowingFile:
    """A file `path` with one tensor `name` of shape (rows, *shape)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def append(self, added: Tensor, rows: Rows) -> Rows:
        """Writes `added` (rows, *shape) behind `rows`, over whatever a killed writer left there; returns all rows.

        They are on the disk only after `finish`.
        """
        content = _bytes(added.to(self.dtype))
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(self._end(rows))
            file.write(content)
        return Rows(rows.count + len(added), zlib.crc32(content, rows.checksum))

    def finish(self, rows: Rows) -> None:
        """Brings `rows` to the disk, then names them in the header."""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._end(rows))
            os.fsync(file.fileno())
            file.write(self._header(rows))
            file.flush()
            os.fsync(file.fileno())

    def read(self, rows: Rows, *, scattered: bool = False) -> Tensor:
        """`rows` as a tensor (rows, *shape) over the mapped file, which must not be written to.

        scattered: few of them will be read, here and there.

        Raises:
            OSError: the file is missing or too short.
        """
        if not rows.count:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        if not self.path.is_file():
            raise OSError(f"{self.path.parent}: holds no {self.path.name}: the memory is damaged; read the text again")
        size = self.path.stat().st_size
        if size < self._end(rows):
            raise OSError(
                f"{self.path}: holds {size} bytes, and {self._end(rows)} were written: the file was cut; "
                "read the text again"
            )
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), self._end(rows), access=mmap.ACCESS_READ)
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(mapped, dtype=self.dtype, offset=HEADER)
        return flat.view(rows.count, *self.shape)

    def check(self, rows: Rows) -> None:
        """Reads all of `rows`. Raises OSError if they are not those that were written."""
        found = 0
        for part in self.read(rows).split(max(1, (64 << 20) // self.row_bytes)):
            found = zlib.crc32(_bytes(part), found)
        if found != rows.checksum:
            raise OSError(f"{self.path}: was changed after it was written (its checksum differs); read the text again")

    def _end(self, rows: Rows) -> int:
        return HEADER + rows.count * self.row_bytes

    def _header(self, rows: Rows) -> bytes:
        offsets = [0, rows.count * self.row_bytes]
        shape = [rows.count, *self.shape]
        tensor = {"dtype": SAFETENSORS_DTYPE[self.dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps({self.name: tensor}).encode()
        return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
