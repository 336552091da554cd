"""Publishes a tuned model without the weights of its base: as the exact difference from the dense model.

    python -m landmark_llama.weight_difference make TUNED BASE OUT
    python -m landmark_llama.weight_difference recover DIFFERENCE BASE OUT

Stored is the bitwise XOR of each pair of tensors, after the base's is cast to the tuned dtype. Subtracting floats would
round; XOR gives the tuned weights back bit for bit, in any dtype. Rows of tokens that the base lacks are stored as they
are. The manifest holds SHA-256 sums of every tensor (tuned, base, stored), so `recover` names a wrong base or a damaged
file before it writes anything. Tensors are read one at a time.
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
from landmark_llama.families import FAMILIES
from landmark_llama.import_released import import_released, is_released

MANIFEST = "weight_difference.json"
FORMAT = 1
OTHER_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@dataclass(frozen=True)
class Record:
    """The manifest's entry for one tensor."""

    dtype: str  # of the tuned tensor
    base_name: str
    base_shape: list[int]
    sha256: str  # of the tuned tensor's bytes
    base_sha256: str  # of the base tensor's bytes, cast to `dtype`
    difference_sha256: str  # of the stored bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def make(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    max_shard_size: int | str = "2GB",
) -> None:
    """Writes the difference between a landmark model and the dense one it was made from.

    Args:
        tuned: a checkpoint of this library: a local folder or a hub id.
        base: the dense model, as safetensors or .bin files: a local folder or a hub id.
        output: a new or empty folder. It appears only when everything in it is written.
        max_shard_size: largest weight file: bytes, or a text such as "2GB".

    Raises:
        OSError: a file is missing, truncated or damaged.
        ValueError: `tuned` is not a landmark model, `base` has another shape, or `output` is not empty.
    """
    output = Path(output)
    check_output(output)
    tuned_files, base_files = Checkpoint.open(tuned), Checkpoint.open(base)
    _check_is_landmark_model(tuned, tuned_files)
    base_names = {name: _base_name(name, base_files) for name in tuned_files.names()}
    for name, base_name in base_names.items():
        check_base_shape(name, tuned_files.meta[name], base_files, base_files.meta.get(base_name))
    records = {}

    def difference(name: str) -> Tensor:
        tuned_tensor, base_name = tuned_files.read(name), base_names[name]
        base_tensor = base_files.read(base_name).to(tuned_tensor.dtype)
        stored = exclusive_or(tuned_tensor, base_tensor)
        records[name] = Record(
            dtype=str(tuned_tensor.dtype).removeprefix("torch."),
            base_name=base_name,
            base_shape=list(base_tensor.shape),
            sha256=sha256(tuned_tensor),
            base_sha256=sha256(base_tensor),
            difference_sha256=sha256(stored),
        )
        return stored

    meta = {name: as_integers(tuned_files.meta[name]) for name in base_names}
    with staged(output) as staging:
        write_weights(staging, meta, difference, max_shard_size)
        copy_files(tuned_files.folder, staging, OTHER_FILES)
        _write_manifest(staging, records)


def _check_is_landmark_model(source: str | os.PathLike[str], files: Checkpoint) -> None:
    model_type = read_json(files.folder / "config.json").get("model_type")
    ours = [family.config_class.model_type for family in FAMILIES.values()]
    if model_type not in ours:
        raise ValueError(
            f"{source}: model_type is {model_type!r}, not {' or '.join(map(repr, ours))}; a model of the paper's "
            "released code has to be imported first: python -m landmark_llama.import_released"
        )
    if rank := read_json(files.folder / "config.json").get("landmark_query_rank"):
        raise ValueError(
            f"{source}: landmark_query_rank={rank}: a dense model has nothing that the weights of a calibration could "
            "be a difference from; publish an adapter, or the whole model"
        )


def recover(
    difference: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    max_shard_size: int | str = "2GB",
) -> str:
    """Recovers the tuned model from a difference and its base, and writes it to `output`.

    Args:
        difference: written by `make`, or a weight difference of the paper's released code, which is then imported.
        base: the dense model that the difference was made from. Both are local folders or hub ids.
        output, max_shard_size: as for `make`.

    Returns:
        What was checked, as a sentence for the user.

    Raises:
        OSError: a file is missing, truncated or damaged. The message names it, and nothing is written.
        ValueError: `base` is not the one that the difference was made from (the message names the first tensor that
            differs), or `output` is not empty.
    """
    output, folder = Path(output), local_folder(difference)
    check_output(output)
    if not (folder / MANIFEST).is_file() and is_released(folder):
        return import_released(folder, output, base, max_shard_size=max_shard_size)
    records = _read_manifest(folder)
    stored, base_files = Checkpoint.open(folder), Checkpoint.open(base)
    _check_stored(stored, records)
    _check_base(base_files, records)

    def recovered(name: str) -> Tensor:
        record = records[name]
        base_tensor = base_files.read(record.base_name).to(record.torch_dtype)
        tensor = exclusive_or(stored.read(name), base_tensor).view(record.torch_dtype)
        if sha256(tensor) != record.sha256:
            raise OSError(f"{folder}: {name} was not recovered exactly; was a file changed meanwhile?")
        return tensor

    meta = {name: stored.meta[name].view(record.torch_dtype) for name, record in records.items()}
    with staged(output) as staging:
        write_weights(staging, meta, recovered, max_shard_size)
        copy_files(folder, staging, OTHER_FILES)
    return f"all {len(records)} tensors are bitwise those of the tuned model (SHA-256)"


def as_integers(tensor: Tensor) -> Tensor:
    """The same bytes, viewed as integers of the same width."""
    return tensor.view(INTEGERS[tensor.element_size()])


def exclusive_or(tensor: Tensor, base: Tensor) -> Tensor:
    """Bitwise XOR, as integers. Applied twice with the same base, it gives the bits of `tensor` back.

    Args:
        tensor: (rows, ...).
        base: (rows or fewer, ...), with as many bytes per element. Missing rows count as zeros.
    """
    result = as_integers(tensor).clone()
    result[: len(base)] ^= as_integers(base)
    return result


def _base_name(name: str, base: Checkpoint) -> str:
    """The base's name for a tuned tensor. A base with tied embeddings has no output rows: its input rows serve."""
    return INPUT_ROWS if name == OUTPUT_ROWS and OUTPUT_ROWS not in base.meta else name


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
    """The tensors' records. Raises OSError if the manifest, or a file beside the weights, is missing or damaged."""
    if not (folder / MANIFEST).is_file():
        raise OSError(
            f"{folder}: holds no {MANIFEST}, so it is not a weight difference; recover one of the paper's first code "
            "with python -m landmark_llama.import_released --base BASE --legacy"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: format {manifest.get('format')!r}; this version reads format {FORMAT}")
    content = {name: manifest.get(name) for name in ("tensors", "files")}
    if manifest.get("sha256") != _digest(content):
        raise OSError(f"{folder / MANIFEST}: damaged (its SHA-256 does not match); fetch the difference again")
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise OSError(f"{path}: missing or damaged (its SHA-256 does not match); fetch the difference again")
    return {name: Record(**record) for name, record in content["tensors"].items()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_stored(stored: Checkpoint, records: dict[str, Record]) -> None:
    """Raises OSError unless the stored tensors are exactly those of the manifest."""
    for name in sorted(records.keys() ^ stored.meta.keys()):
        raise OSError(f"{stored.folder}: {name} stands in the manifest or in the weights, not in both; fetch it again")
    for name, record in records.items():
        if sha256(stored.read(name)) != record.difference_sha256:
            raise OSError(
                f"{stored.sources[name]}: {name} is damaged (its SHA-256 does not match); fetch the difference again"
            )


def _check_base(base: Checkpoint, records: dict[str, Record]) -> None:
    """Raises ValueError unless the base's tensors are those that the difference was made from."""
    for record in records.values():
        found = base.meta.get(record.base_name)
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
    making.add_argument("tuned", help="a landmark model: a folder or a hub id")
    recovering = commands.add_parser("recover", help="write the tuned model")
    recovering.add_argument("difference", help="a difference written by make, or the paper's own weight difference")
    for command in (making, recovering):
        command.add_argument("base", help="the dense model that the tuned model was made from: a folder or a hub id")
        command.add_argument("output", help="the folder to write; must be new or empty")
        command.add_argument("--max_shard_size", default="2GB", help="largest weight file (default: 2GB)")
    recovering.add_argument(
        "--no_self_test", action="store_true", help="skip loading the model and asking it a pass key"
    )
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
