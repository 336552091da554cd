"""Tiers of blocks: memory of the host, and files mapped into memory. Records and their numbers: `held_blocks.Tier`."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROWTH, LARGEST_GROWTH = 8, 1 << 28  # a tier grows by an eighth, or by so many bytes, or by what is needed
MAPPED_BYTES = 1 << 24  # read through a mapping before its pages leave the process: they count as its memory


class TierError(OSError):
    """Blocks cannot be stored, or are not what was stored. The message says which, and what to do."""


class HostTier:
    """Records in memory of the host, pinned where a GPU reads them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.content = torch.empty(0, *shape, dtype=dtype, device="cpu")

    def reserve(self, records: int) -> None:
        if records <= len(self.content):
            return
        # by an eighth at least: all of it is copied
        records = max(records, len(self.content) + len(self.content) // GROWTH)
        more = torch.zeros(records, *self.content.shape[1:], dtype=self.content.dtype, device="cpu")
        more[: len(self.content)] = self.content
        self.content = more.pin_memory() if self.pinned else more

    def read(self, records: Tensor) -> Tensor:
        kind = {"dtype": self.content.dtype, "device": "cpu", "pin_memory": self.pinned}
        found = torch.empty(len(records), *self.content.shape[1:], **kind)
        return torch.index_select(self.content, 0, records, out=found)

    def write(self, records: Tensor, content: Tensor) -> None:
        self.content[records] = content.to("cpu")


class TierFolder:
    """A folder that one cache at a time keeps its blocks in: a file a layer. They are scratch, and go with the cache.

    What a killed process left is deleted by the next one.

    Raises:
        TierError: the folder cannot be written to, or another cache uses it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "in_use.lock", "w")  # noqa: SIM115 (open as long as the folder is in use)
        except OSError as error:
            problem = f"the folder {self.path} cannot be written to ({error.strerror})"
            raise TierError(f"{problem}: give one that can be, or change its permissions") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise TierError(
                f"another cache keeps its blocks in {self.path}: give each a folder of its own, or drop the other one"
            ) from error
        self.lock, self.files = lock, 0
        for stale in self.path.glob("blocks-*.bin"):
            stale.unlink()
        weakref.finalize(self, lock.close)

    def new_file(self) -> Path:
        """A path that no other file of the folder has."""
        self.files += 1
        return self.path / f"blocks-{self.files}.bin"

    def __deepcopy__(self, memo: dict[int, Any]) -> TierFolder:
        return self


class FileTier:
    """Records in a file that is mapped into memory for reading.

    A checksum of each record stays in memory. So what is read is what was written, or an error names the file.

    Raises:
        TierError: the disk is full, or a record is not as it was written.
    """

    def __init__(self, folder: TierFolder, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.path, self.shape, self.dtype = folder, folder.new_file(), shape, dtype
        self.record_bytes = dtype.itemsize * torch.Size(shape).numel()
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        weakref.finalize(self, _delete, self.path, self.file)
        self.records = 0
        self.checksum = torch.zeros(0, dtype=torch.int32, device="cpu")
        # odd, so that no change of one word goes unnoticed
        generator = torch.Generator("cpu").manual_seed(0)
        words = torch.randint(1 << 62, (self.record_bytes // 8,), generator=generator, device="cpu")
        self.weights = 2 * words + 1
        self.mapping: mmap.mmap | None = None
        self.mapped: Tensor | None = None  # (records, words)
        self.mapped_bytes = 0

    def reserve(self, records: int) -> None:
        self._check_size()
        if records <= self.records:
            return
        records = _grown(self.records, records, self.record_bytes)
        try:
            # takes the room now: a mapped file that finds the disk full ends the process
            os.posix_fallocate(self.file, 0, records * self.record_bytes)
        except OSError as error:
            raise self._full(error) from error
        added = records - self.records
        self.checksum = torch.nn.functional.pad(self.checksum, (0, added))  # of zeros
        self.records = records
        self._map()

    def read(self, records: Tensor) -> Tensor:
        self._check_size()
        for first, number in _runs(records):
            start = first * self.record_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            end = (first + number) * self.record_bytes
            self.mapping.madvise(mmap.MADV_WILLNEED, start, end - start)
        found = self.mapped.index_select(0, records)
        wrong = self._checksums(found) != self.checksum[records]
        if wrong.any():
            record = int(records[wrong][0])
            raise TierError(
                f"{self.path}: bytes {record * self.record_bytes} to {(record + 1) * self.record_bytes} have not the "
                "checksum of what was written: something else changed the file; read the text again"
            )
        self.mapped_bytes += found.nbytes
        if self.mapped_bytes > MAPPED_BYTES:
            self.mapped_bytes = 0
            self.mapping.madvise(mmap.MADV_DONTNEED)
        return found.view(self.dtype).view(-1, *self.shape)

    def write(self, records: Tensor, content: Tensor) -> None:
        words = content.to("cpu").contiguous().view(len(records), -1).view(torch.int64)
        done = 0
        for first, number in _runs(records):
            part = memoryview(words[done : done + number].numpy()).cast("B")
            offset = first * self.record_bytes
            try:
                while part:
                    written = os.pwrite(self.file, part, offset)
                    part, offset = part[written:], offset + written
            except OSError as error:
                raise self._full(error) from error
            done += number
        self.checksum[records] = self._checksums(words)

    def _map(self) -> None:
        self.mapping = mmap.mmap(self.file, self.records * self.record_bytes, prot=mmap.PROT_READ)
        self.mapping.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mapping cannot be written to
            self.mapped = torch.frombuffer(self.mapping, dtype=torch.int64).view(self.records, -1)

    def _check_size(self) -> None:
        size, expected = os.fstat(self.file).st_size, self.records * self.record_bytes
        if size < expected:
            raise TierError(
                f"{self.path}: {size} bytes, and {expected} were written: something else cut the file; read the text "
                "again"
            )

    def _checksums(self, words: Tensor) -> Tensor:
        """(n, words) to (n,)."""
        return ((words * self.weights).sum(1) >> 32).int()

    def _full(self, error: OSError) -> TierError:
        return TierError(
            f"{self.folder.path}: the blocks cannot be stored ({os.strerror(error.errno)}); what earlier calls read is "
            "intact: make room there and make this call again"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FileTier:
        copy = FileTier(self.folder, self.shape, self.dtype)
        if self.records:
            copy.reserve(self.records)
            shutil.copyfile(self.path, copy.path)
            copy.checksum = torch.nn.functional.pad(self.checksum, (0, copy.records - self.records))
            os.posix_fallocate(copy.file, 0, copy.records * copy.record_bytes)
        return copy


def _grown(held: int, needed: int, record_bytes: int) -> int:
    return max(needed, held + min(held // GROWTH, LARGEST_GROWTH // record_bytes))


def _runs(records: Tensor) -> list[tuple[int, int]]:
    """First and number of each run of consecutive numbers in `records` (n,)."""
    ends = (records.diff() != 1).nonzero().flatten() + 1
    first = [0, *ends.tolist()]
    stop = [*ends.tolist(), len(records)]
    return [(int(records[a]), b - a) for a, b in zip(first, stop, strict=True) if b > a]


def _delete(path: Path, file: int) -> None:
    os.close(file)
    path.unlink(missing_ok=True)
