"""Writing so that an interruption leaves no half file, and telling a full disk from other errors."""

import errno
import json
import os
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Writes `content` so that `path` holds either the old or the new text, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind `error`; safetensors and torch wrap the operating system's own error."""
    # "unexpected pos" is what torch.save says when a write came out shorter than asked for.
    signs = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos ")
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False
