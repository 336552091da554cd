"""The folder of a saved memory: which files it has, and how it goes from one complete state to the next.

    memory.json             what is remembered: how much of each file counts, checksums, the model, the texts
    blocks.safetensors      complete blocks' keys and values: (blocks, layers, 2, rows, kv_heads, block_size, head_dim)
    landmarks.safetensors   their landmark keys: (blocks, layers, rows, kv_heads, head_dim)
    biases.safetensors      where landmark keys are pooled: their biases, (blocks, layers, rows, kv_heads)
    tokens.safetensors      the text, (tokens, 3): id, character and line in its file; only where texts were read
    tail-N.safetensors      keys and values of what follows the complete blocks, after N tokens

`memory.json` is replaced last and at once. The files that grow do so behind what it counts, so a process that is killed
leaves the state before, and readers of that state are not disturbed by a writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from landmark_llama.saved.growing import GrowingFile, Rows

MANIFEST, LOCK = "memory.json", "writing.lock"
VERSION = 1


@dataclass(frozen=True)
class Shape:
    """What the keys of a memory measure: `rows` of the batch, and the rest as in the model."""

    layers: int
    rows: int
    kv_heads: int
    block_size: int
    head_dim: int


@dataclass(frozen=True)
class Manifest:
    """What `memory.json` says.

    model: from `fingerprint.describe`.
    read_with: the retrieval settings that the text was read with, as in `RetrievalSettings`.
    shape, dtype: of the keys; `bias_dtype` where landmark keys are pooled.
    ordinary: tokens that each row has read.
    files: the rows of each growing file that count, by its name without suffix.
    tail: the name of the file with what follows the complete blocks, or None.
    tokenizer: a digest of it, where texts were read.
    sources: the texts read, in order (`memories/texts.py`).
    """

    model: dict[str, Any]
    read_with: list[dict[str, Any]]
    shape: Shape
    dtype: str
    bias_dtype: str | None = None
    ordinary: list[int] = field(default_factory=list)
    files: dict[str, Rows] = field(default_factory=dict)
    tail: str | None = None
    tokenizer: str | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Complete blocks in `blocks.safetensors`."""
        return self.rows("blocks").count

    def rows(self, name: str) -> Rows:
        return self.files.get(name, Rows())

    def file(self, folder: Path, name: str) -> GrowingFile:
        """The growing file `name` in `folder`."""
        s, dtype = self.shape, getattr(torch, self.dtype)
        shape, dtype = {
            "blocks": ((s.layers, 2, s.rows, s.kv_heads, s.block_size, s.head_dim), dtype),
            "landmarks": ((s.layers, s.rows, s.kv_heads, s.head_dim), dtype),
            "biases": ((s.layers, s.rows, s.kv_heads), getattr(torch, self.bias_dtype or "float32")),
            "tokens": ((3,), torch.int32),
        }[name]
        return GrowingFile(folder / f"{name}.safetensors", name, shape, dtype)

    def read(self, folder: Path, name: str) -> Tensor:
        """The rows of a growing file that count, over the mapped file (`GrowingFile.read`)."""
        return self.file(folder, name).read(self.rows(name), scattered=name == "blocks")

    def read_tail(self, folder: Path) -> dict[str, Tensor]:
        """`blocks` (layers, 2, rows, kv_heads, blocks, block_size, head_dim), with `biases` if pooled; or nothing."""
        if self.tail is None:
            return {}
        try:
            return load_file(folder / self.tail)
        except (SafetensorError, FileNotFoundError) as error:
            raise OSError(f"{folder / self.tail}: missing or damaged ({error}); read the text again") from error

    def check(self, folder: Path) -> None:
        """Reads every file. Raises OSError naming one that is not as it was written."""
        for name, rows in self.files.items():
            self.file(folder, name).check(rows)
        self.read_tail(folder)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """What the folder of a memory says about it.

    Raises:
        OSError: there is no memory, or its `memory.json` is damaged.
        ValueError: it was written by a newer version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = "holds no memory.json" if path.parent.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {what}: make a memory with python -m landmark_llama.read, or cache.save")
    try:
        content = json.loads(path.read_text("utf-8"))
        version = content.pop("landmark_memory")
        if version != VERSION:
            raise ValueError(f"{path}: format {version}; this version of landmark_llama reads format {VERSION}")
        content["shape"] = Shape(**content["shape"])
        content["files"] = {name: Rows(**rows) for name, rows in content["files"].items()}
        return Manifest(**content)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{path}: damaged ({type(error).__name__}: {error}); read the text again") from error


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[Writer]:
    """Opens a memory for writing, a new one where there is none.

    Raises:
        BlockingIOError: another process is writing to it.
        OSError: no permission, or the memory is damaged.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(x.name != LOCK for x in folder.iterdir()):
        begun = {f"{name}.safetensors" for name in ("blocks", "landmarks", "biases", "tokens")}
        foreign = [x.name for x in folder.iterdir() if x.name not in begun | {LOCK} and not x.name.startswith("tail-")]
        if foreign:
            raise FileExistsError(f"{folder}: holds {min(foreign)} and no memory: give an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as lock:  # gone with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder}: another process is writing to this memory; wait for it to end") from error
        yield Writer(folder, read_manifest(folder) if (folder / MANIFEST).exists() else None)


class Writer:
    """Appends to a memory; made by `writing`.

    manifest: the state that was last completed; None for a new memory.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self.folder, self.manifest = folder, manifest
        self._pending: dict[str, Rows] = {}

    def append(self, state: Manifest, added: dict[str, Tensor]) -> None:
        """Writes rows to growing files, behind what counts; `commit` makes them count."""
        for name, rows in added.items():
            before = self._pending.get(name) or (self.manifest.rows(name) if self.manifest else Rows())
            self._pending[name] = state.file(self.folder, name).append(rows, before)

    def commit(self, state: Manifest, tail: dict[str, Tensor]) -> Manifest:
        """Makes `state` the memory's, with what was appended and `tail`, the blocks that follow; returns it.

        `state.files` and `state.tail` are set here.
        """
        files = {**(self.manifest.files if self.manifest else {}), **self._pending}
        for name, rows in files.items():
            state.file(self.folder, name).finish(rows)
        name = f"tail-{max(state.ordinary)}.safetensors" if tail else None
        if tail:
            partial = self.folder / f"{name}.partial"
            partial.write_bytes(save({key: x.detach().cpu().contiguous() for key, x in tail.items()}))
            _to_disk(partial)
            os.replace(partial, self.folder / name)
        state = replace(state, files=files, tail=name)
        text = json.dumps({"landmark_memory": VERSION, **asdict(state)}, indent=1) + "\n"
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(text, "utf-8")
        _to_disk(partial)
        os.replace(partial, self.folder / MANIFEST)
        _to_disk(self.folder)
        for path in self.folder.glob("tail-*"):
            if path.name != name:
                path.unlink()
        self.manifest, self._pending = state, {}
        return state


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
