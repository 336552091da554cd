"""What the commands about memories share: flags of the model, and mistakes that end in one sentence."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any, get_args

from safetensors import SafetensorError

from landmark_llama.configuration import RETRIEVAL_SETTINGS, LocalAttention, RetrievalGranularity


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """`--device`; the model itself is the first argument."""
    parser.add_argument("model", help="a landmark model or adapter: a folder or a hub id")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def add_retrieval_flags(
    parser: argparse.ArgumentParser, title: str = "how the text is read, by default as the model's configuration says"
) -> None:
    """The settings that a text is read with, in place of the model's own."""
    group = parser.add_argument_group(title)
    group.add_argument("--num_retrieved_blocks", type=int, metavar="K")
    group.add_argument("--num_local_blocks", type=int, metavar="N")
    group.add_argument("--local_attention", choices=get_args(LocalAttention))
    group.add_argument("--retrieval_granularity", choices=get_args(RetrievalGranularity))


def retrieval_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(args, name) for name in RETRIEVAL_SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def ending_in_one_sentence(full_disk: str = "make room") -> Iterator[None]:
    """A mistake ends the process with exit code 1 and one sentence on standard error, Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: the disk is full: {full_disk}")
        if error.errno is not None and error.filename is not None:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        sys.exit(f"error: {_one_line(error)}")
    except (ValueError, SafetensorError) as error:
        sys.exit(f"error: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
