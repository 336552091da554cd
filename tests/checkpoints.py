"""Changes checkpoint folders for tests: converts them to older formats, edits them, damages them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def edit(path: Path, **values) -> None:
    """Sets fields of a JSON file. A value of None removes the field."""
    fields = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def to_bin(folder: Path) -> None:
    """Turns a checkpoint's safetensors shards into the pickles of older versions."""
    for path in sorted(folder.glob("model*")):
        older = folder / path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        if path.suffix == ".json":
            older.write_text(path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        else:
            torch.save(load_file(path), older)
        path.unlink()


def flip_bit(path: Path, at: int) -> None:
    """Flips one bit of the byte at `at`; a negative `at` counts from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def refusal(main: Callable[[list[str]], None], *arguments: object) -> str:
    """Runs a command that must fail, and returns the single sentence that it ends with."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert isinstance(error.value.code, str) and error.value.code.startswith("error: ")  # printed, and exit code 1
    assert "\n" not in error.value.code
    return error.value.code


def names(folder: Path) -> list[str]:
    """The names of all entries of a folder, to check that nothing was written."""
    return sorted(path.name for path in folder.iterdir())
