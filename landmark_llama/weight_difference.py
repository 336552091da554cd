"""A tuned model as its difference from the LLaMA it was made from, for weights that may not be passed on themselves.

    python -m landmark_llama.weight_difference make TUNED BASE OUT
    python -m landmark_llama.weight_difference recover DIFFERENCE BASE OUT

What is stored is the exclusive or of the two tensors' bits, the base's cast to the tuned dtype first: a difference of
floating-point numbers is rounded and does not give the tuned weights back, this one does, bit by bit and in any dtype.
Rows of tokens that the base does not have are stored as they are. SHA-256 sums of every tensor (tuned, base, stored)
stand in the manifest: a wrong base or a damaged file is named before anything is written. One tensor is read at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark_llama import self_test
from landmark_llama.checkpoints.files import (
    GENERATION_CONFIG,
    INPUT_ROWS,
    OUTPUT_ROWS,
    TOKENIZER_FILES,
    Checkpoint,
    check_base_shape,
    check_output,
    copy_files,
    local_folder,
    read_json,
    sha256,
    staged,
    write_weights,
)
from landmark_llama.configuration import LandmarkLlamaConfig
from landmark_llama.import_released import import_released, is_released

MANIFEST = "weight_difference.json"
FORMAT = 1
OTHER_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


@dataclass(frozen=True)
class Record:
    """What the manifest says of a tensor. SHA-256 sums are of bytes, the base's after its cast to `dtype`."""

    dtype: str  # of the tuned tensor
    base_name: str
    base_shape: list[int]
    sha256: str
    base_sha256: str
    difference_sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def make(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    max_shard_size: int | str = "2GB",
) -> None:
    """Writes the difference between a landmark LLaMA and the LLaMA it was made from.

    Args:
        tuned: a checkpoint of this library.
        base: the LLaMA; safetensors files or .bin files. Both are local folders or hub ids.
        output: a folder that does not exist yet, or is empty; it appears when everything in it is written.
        max_shard_size: of the files of weights: bytes, or a text such as "2GB".

    Raises:
        OSError: a file is missing, truncated or damaged.
        ValueError: `tuned` is no landmark LLaMA, `base` of another shape, or `output` not empty.
    """
    output = Path(output)
    check_output(output)
    tuned_files, base_files = Checkpoint.open(tuned), Checkpoint.open(base)
    model_type = read_json(tuned_files.folder / "config.json").get("model_type")
    if model_type != LandmarkLlamaConfig.model_type:
        raise ValueError(
            f"{tuned}: model_type is {model_type!r}, not {LandmarkLlamaConfig.model_type!r}; what the paper's released "
            "code made has to be imported first, by python -m landmark_llama.import_released"
        )
    base_names = {name: _base_name(name, base_files) for name in tuned_files.names()}
    for name, base_name in base_names.items():
        check_base_shape(name, tuned_files.shapes[name], base_files, base_files.shapes.get(base_name))
    records = {}

    def difference(name: str) -> Tensor:
        weight, base_name = tuned_files.read(name), base_names[name]
        start = base_files.read(base_name).to(weight.dtype)
        stored = exclusive_or(weight, start)
        records[name] = Record(
            dtype=str(weight.dtype).removeprefix("torch."),
            base_name=base_name,
            base_shape=list(start.shape),
            sha256=sha256(weight),
            base_sha256=sha256(start),
            difference_sha256=sha256(stored),
        )
        return stored

    planned = {name: bits(tuned_files.shapes[name]) for name in base_names}
    with staged(output) as staging:
        write_weights(staging, planned, difference, max_shard_size)
        copy_files(tuned_files.folder, staging, OTHER_FILES)
        _write_manifest(staging, records)


def recover(
    difference: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    max_shard_size: int | str = "2GB",
) -> str:
    """Writes the tuned model that a difference was made of; or, from the paper's own difference, imports that model.

    Args:
        difference: what `make` wrote, or a weight difference of the released code.
        base: the LLaMA that it was made from. Both are local folders or hub ids.
        output, max_shard_size: as for `make`.

    Returns:
        What was checked, in words.

    Raises:
        OSError: a file is missing, truncated or damaged; it is named, and nothing is written.
        ValueError: `base` is not the one that the difference was made from (the first tensor that differs is named), or
            `output` not empty.
    """
    output, folder = Path(output), local_folder(difference)
    check_output(output)
    if not (folder / MANIFEST).is_file() and is_released(folder):
        return import_released(folder, output, base, max_shard_size=max_shard_size)
    records = _read_manifest(folder)
    stored, base_files = Checkpoint.open(folder), Checkpoint.open(base)
    _check_stored(stored, records)
    _check_base(base_files, records)

    def weight(name: str) -> Tensor:
        record = records[name]
        start = base_files.read(record.base_name).to(record.torch_dtype)
        tensor = exclusive_or(stored.read(name), start).view(record.torch_dtype)
        if sha256(tensor) != record.sha256:
            raise OSError(f"{folder}: {name} was not recovered exactly; was a file changed meanwhile?")
        return tensor

    planned = {name: stored.shapes[name].view(record.torch_dtype) for name, record in records.items()}
    with staged(output) as staging:
        write_weights(staging, planned, weight, max_shard_size)
        copy_files(folder, staging, OTHER_FILES)
    return f"all {len(records)} tensors are bitwise those of the tuned model (SHA-256)"


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers."""
    return tensor.view(BITS[tensor.element_size()])


def exclusive_or(tensor: Tensor, base: Tensor) -> Tensor:
    """Integers whose bits are those of `tensor` where they differ from those of `base`; twice, it gives `tensor` back.

    tensor: (rows, ...); base: of as many bytes an element, (rows or fewer, ...), missing rows counting as zeros.
    """
    result = bits(tensor).clone()
    result[: len(base)] ^= bits(base)
    return result


def _base_name(name: str, base: Checkpoint) -> str:
    """The base's tensor for one of the tuned model; of a tied base, the embedding stands for the output."""
    return INPUT_ROWS if name == OUTPUT_ROWS and OUTPUT_ROWS not in base.shapes else name


def _write_manifest(folder: Path, records: dict[str, Record]) -> None:
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in OTHER_FILES
        if (folder / name).is_file()
    }
    content = {"tensors": {name: asdict(record) for name, record in records.items()}, "files": files}
    manifest = {"format": FORMAT, "sha256": _digest(content), **content}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Record]:
    """The records of the tensors, once the manifest and the files beside the weights are known to be whole."""
    if not (folder / MANIFEST).is_file():
        raise OSError(
            f"{folder}: holds no {MANIFEST}, so it is no weight difference; one that the paper's first code made is "
            "recovered by python -m landmark_llama.import_released --base BASE --legacy"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: format {manifest.get('format')!r}; this version reads format {FORMAT}")
    content = {name: manifest.get(name) for name in ("tensors", "files")}
    if manifest.get("sha256") != _digest(content):
        raise OSError(f"{folder / MANIFEST}: damaged (its SHA-256 is another); fetch the difference again")
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise OSError(f"{path}: missing or damaged (its SHA-256 is another); fetch the difference again")
    return {name: Record(**record) for name, record in content["tensors"].items()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_stored(stored: Checkpoint, records: dict[str, Record]) -> None:
    for name in sorted(records.keys() ^ stored.shapes.keys()):
        raise OSError(f"{stored.folder}: {name} stands in the manifest or in the weights, not in both; fetch it again")
    for name, record in records.items():
        if sha256(stored.read(name)) != record.difference_sha256:
            raise OSError(
                f"{stored.sources[name]}: {name} is damaged (its SHA-256 is another); fetch the difference again"
            )


def _check_base(base: Checkpoint, records: dict[str, Record]) -> None:
    for record in records.values():
        found = base.shapes.get(record.base_name)
        if found is None or list(found.shape) != record.base_shape:
            what = "missing" if found is None else f"of shape {tuple(found.shape)}, not {tuple(record.base_shape)}"
            raise ValueError(f"{base.folder}: not the base of this difference: {record.base_name} is {what}")
        if sha256(base.read(record.base_name).to(record.torch_dtype)) != record.base_sha256:
            raise ValueError(
                f"{base.folder}: not the base of this difference: {record.base_name} is the first tensor that differs "
                f"(SHA-256, as {record.dtype})"
            )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.weight_difference", description=make.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the difference between a tuned model and its base")
    making.add_argument("tuned", help="a landmark LLaMA: a folder or a hub id")
    recovering = commands.add_parser("recover", help="write the tuned model")
    recovering.add_argument("difference", help="what make wrote, or the paper's own weight difference")
    for command in (making, recovering):
        command.add_argument("base", help="the LLaMA that the tuned model was made from: a folder or a hub id")
        command.add_argument("output", help="the folder to write; must not exist, or be empty")
        command.add_argument("--max_shard_size", default="2GB", help="of the files of weights (default: 2GB)")
    recovering.add_argument("--no_self_test", action="store_true", help="do not load the model to ask it a pass key")
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            make(args.tuned, args.base, args.output, args.max_shard_size)
            print(f"the difference is in {args.output}")
            return
        print(recover(args.difference, args.base, args.output, args.max_shard_size))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the recovered model is in {args.output}")
    if not args.no_self_test:
        print(self_test.report(Path(args.output)))


if __name__ == "__main__":
    main()
