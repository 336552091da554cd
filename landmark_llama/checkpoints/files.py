"""A checkpoint's files: tensors read one at a time over its shards, shards written one at a time, whole or not at all.

Weights are read from safetensors files, or from the `pytorch_model*.bin` of older checkpoints. Those are pickles, and
no pickle is ever run here: `torch.load` with `weights_only=True` builds tensors and nothing else, and maps the file
instead of reading it. Memory holds the tensors that a caller keeps and one shard (twice while it is written).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INPUT_ROWS, OUTPUT_ROWS = "model.embed_tokens.weight", "lm_head.weight"
# Buffers in old checkpoints that follow from the configuration.
ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint's folder, still on the disk."""

    folder: Path
    sources: dict[str, Path]  # which file holds each tensor
    shapes: dict[str, Tensor]  # tensors without memory, of the same shapes and dtypes

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Lists the tensors of a local folder or of a checkpoint on the hub, those of rotary embeddings included.

        Raises:
            OSError: a file is missing, truncated or damaged, or is a pickle of more than tensors.
        """
        folder = local_folder(source)
        sources, shapes = {}, {}
        for path in _weight_files(folder):
            for name, tensor in _listed(path).items():
                sources[name], shapes[name] = path, tensor
        return cls(folder, sources, shapes)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        path = self.sources[name]
        if path.suffix == ".bin":
            return _load_bin(path)[name].clone(memory_format=torch.contiguous_format)
        with open_safetensors(path) as file:
            return file.get_tensor(name)

    def names(self) -> list[str]:
        """Of its weights, that is, of all tensors but the rotary buffers."""
        return [name for name in self.shapes if not name.endswith(ROTARY_BUFFERS)]


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; one that is not here is fetched from the hub: its safetensors, else its .bin."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):  # no hub id looks like that
        raise OSError(f"{source}: there is no such folder")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.model", "*.jinja", "*.txt"]
    folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.bin"]))
    return folder


def read_json(path: Path) -> dict:
    """The object in a JSON file; OSError if it is missing, damaged, or something else."""
    if not path.is_file():
        raise OSError(f"{path.parent}: holds no {path.name}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise OSError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise OSError(f"{path}: damaged (no JSON object)")
    return content


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row by row, whatever its dtype and shape."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def check_output(output: Path) -> None:
    """Raises ValueError unless `output` is a folder that does not exist yet, or is empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is not empty; give a folder that does not exist yet")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` once everything is written; if writing fails, nothing is left."""
    check_output(output)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if output.exists():
            output.rmdir()
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_weights(
    folder: Path, planned: Mapping[str, Tensor], make: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Writes safetensors shards and their index, asking for one tensor after the other.

    planned: tensors without memory, of the shapes and dtypes that `make` will give for their names.
    max_shard_size: bytes, or a text such as "2GB".
    """
    shards = split_torch_state_dict_into_shards(dict(planned), max_shard_size=max_shard_size)
    for file_name, names in shards.filename_to_tensors.items():
        save_file({name: make(name).contiguous() for name in names}, folder / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies those of the named files that `source` holds."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def open_safetensors(path: Path) -> safe_open:
    """The opened file; OSError if it is truncated or damaged."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise OSError(f"{path}: truncated or damaged ({error}); fetch or save the checkpoint again") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (index := folder / f"{name}.index.json").is_file():
            try:
                files = [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
            except (KeyError, AttributeError) as error:
                raise OSError(f"{index}: damaged (no weight_map); fetch or save the checkpoint again") from error
        elif (folder / name).is_file():
            files = [folder / name]
        else:
            continue
        for file in files:
            if not file.is_file():
                raise OSError(f"{folder}: holds no {file.name}, which its {index.name} names")
        return files
    raise OSError(f"{folder}: holds no weights: neither {' nor '.join(WEIGHTS)}, whole or in shards")


def _listed(path: Path) -> dict[str, Tensor]:
    """Tensors without memory, of the names, shapes and dtypes of those in a file."""
    if path.suffix == ".bin":
        return {name: tensor.to("meta") for name, tensor in _load_bin(path).items()}
    listed = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:1] if shape else file.get_tensor(name)).dtype
            listed[name] = torch.empty(shape, dtype=dtype, device="meta")
    return listed


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise OSError(
            f"{path}: damaged, or a pickle of more than tensors, which could run code and is not loaded; "
            "give the checkpoint as safetensors files"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(
            f"{path}: truncated, damaged or in PyTorch's format of before 1.6; fetch it again, or give the checkpoint "
            "as safetensors files"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise OSError(f"{path}: holds more than tensors, so it is no file of weights")
    return content


def check_base_shape(name: str, tuned: Tensor, base: Checkpoint, found: Tensor | None) -> None:
    """Raises ValueError unless the base's tensor `found` is of the tuned one's shape, or has fewer rows of tokens."""
    if found is None:
        raise ValueError(f"{base.folder}: lacks {name}, so it is not the base of this model")
    rows_fit = len(found) <= len(tuned) if name in (INPUT_ROWS, OUTPUT_ROWS) else len(found) == len(tuned)
    if not rows_fit or found.shape[1:] != tuned.shape[1:]:
        raise ValueError(
            f"{base.folder}: not the base of this model: its {name} has the shape {tuple(found.shape)}, the tuned "
            f"model's {tuple(tuned.shape)}"
        )
