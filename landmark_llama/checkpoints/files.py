"""A checkpoint's files: reads one tensor at a time, writes one shard at a time. A failed write leaves nothing behind.

Weights come from safetensors files, or from the `pytorch_model*.bin` of older checkpoints. A .bin file is a pickle, and
a pickle can run code. `torch.load(weights_only=True, mmap=True)` runs none: it builds only tensors, from a mapped file.
Memory holds the tensors that the caller keeps, and one shard (twice while it is written).
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
# Old checkpoints hold these buffers; the configuration determines them.
ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, listed but not loaded."""

    folder: Path
    sources: dict[str, Path]  # the file that holds each tensor
    meta: dict[str, Tensor]  # meta tensors: shape and dtype of each, no data

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Lists all tensors of a local folder or hub id, rotary buffers included.

        Raises:
            OSError: a file is missing, truncated or damaged, or is a pickle of more than tensors.
        """
        folder = local_folder(source)
        sources, meta = {}, {}
        for path in _weight_files(folder):
            for name, tensor in _meta_tensors(path).items():
                sources[name], meta[name] = path, tensor
        return cls(folder, sources, meta)

    def read(self, name: str) -> Tensor:
        """Loads one tensor into memory of its own."""
        path = self.sources[name]
        if path.suffix == ".bin":
            return _load_bin(path)[name].clone(memory_format=torch.contiguous_format)
        with open_safetensors(path) as file:
            return file.get_tensor(name)

    def names(self) -> list[str]:
        """Names of the weights: of all tensors but the rotary buffers."""
        return [name for name in self.meta if not name.endswith(ROTARY_BUFFERS)]


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint. A hub id is downloaded: safetensors files, or .bin files if it has none.

    Raises:
        OSError: `source` is neither a folder nor written like a hub id.
    """
    if Path(source).is_dir():
        return Path(source)
    looks_like_hub_id = str(source).count("/") == 1 and not str(source).startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise OSError(f"{source}: there is no such folder")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.model", "*.jinja", "*.txt"]
    folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.bin"]))
    return folder


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError if the file is missing, damaged or holds no object."""
    if not path.is_file():
        raise OSError(f"{path.parent}: holds no {path.name}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise OSError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise OSError(f"{path}: damaged (no JSON object)")
    return content


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, for any dtype and shape."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def check_output(output: Path) -> None:
    """Raises ValueError unless `output` does not exist yet or is an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is not empty; give a folder that does not exist yet")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Gives a temporary folder to write into. On success it is renamed to `output`; on failure it is deleted."""
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
    folder: Path, meta: Mapping[str, Tensor], make: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Writes safetensors shards and their index, one shard after another.

    Args:
        meta: a meta tensor for each weight, with its shape and dtype.
        make: returns the weight of a name. It is called once for each weight, when its shard is written.
        max_shard_size: bytes, or a text such as "2GB".
    """
    shards = split_torch_state_dict_into_shards(dict(meta), max_shard_size=max_shard_size)
    for file_name, names in shards.filename_to_tensors.items():
        save_file({name: make(name).contiguous() for name in names}, folder / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies the named files that exist in `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def open_safetensors(path: Path) -> safe_open:
    """Opens a safetensors file. Raises OSError if it is truncated or damaged."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise OSError(f"{path}: truncated or damaged ({error}); fetch or save the checkpoint again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, or its .bin files if it has none. Raises OSError if one is missing."""
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


def _meta_tensors(path: Path) -> dict[str, Tensor]:
    """A meta tensor for each tensor in a file: name, shape and dtype, without loading data."""
    if path.suffix == ".bin":
        return {name: tensor.to("meta") for name, tensor in _load_bin(path).items()}
    meta = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:1] if shape else file.get_tensor(name)).dtype  # a scalar has no slices
            meta[name] = torch.empty(shape, dtype=dtype, device="meta")
    return meta


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, memory-mapped. Raises OSError if it holds anything else, or is damaged."""
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
        raise OSError(f"{path}: holds more than tensors, so it is not a weight file")
    return content


def check_base_shape(name: str, tuned: Tensor, base: Checkpoint, found: Tensor | None) -> None:
    """Raises ValueError unless the base's tensor `found` has the shape of the tuned one.

    Embedding and output rows are an exception: the base may have fewer, since tuning adds tokens.
    """
    if found is None:
        raise ValueError(f"{base.folder}: lacks {name}, so it is not the base of this model")
    rows_fit = len(found) <= len(tuned) if name in (INPUT_ROWS, OUTPUT_ROWS) else len(found) == len(tuned)
    if not rows_fit or found.shape[1:] != tuned.shape[1:]:
        raise ValueError(
            f"{base.folder}: not the base of this model: its {name} has the shape {tuple(found.shape)}, the tuned "
            f"model's {tuple(tuned.shape)}"
        )
