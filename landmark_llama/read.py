"""Reads texts of any length into a memory, a folder that can be asked (`landmark_llama.ask`).

    python -m landmark_llama.read MODEL novel.txt --memory novel
    python -m landmark_llama.read MODEL src/ docs/ --memory project      # all texts of folders
    python -m landmark_llama.read MODEL rows.jsonl - --memory notes      # the rows' "text", and standard input

What the memory holds already is not read again: killed, the same command goes on; with other files, it adds them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from landmark_llama.memories.command import add_model_flags, add_retrieval_flags, ending_in_one_sentence, retrieval_of
from landmark_llama.memories.models import load_model, settings_of
from landmark_llama.memories.reader import Progress, read_texts
from landmark_llama.memories.texts import HEADING, Sources
from landmark_llama.saved.folder import MANIFEST, read_manifest


class ProgressBar(Progress):
    """Bytes of text read, time left, tokens."""

    def __init__(self, total: int) -> None:
        seldom = 0.1 if sys.stderr.isatty() else 30  # a line each, in a file
        self.bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=seldom)

    def skip(self, size: int) -> None:
        self.bar.initial += size
        self.bar.update(size)

    def read(self, size: int, tokens: int) -> None:
        self.bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        self.bar.update(min(size, self.bar.total - self.bar.n))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.read", description="Reads texts of any length into a memory.")
    add_model_flags(parser)
    parser.add_argument("text", nargs="+", help="files (text, or .jsonl with a field 'text'), folders, - for stdin")
    parser.add_argument(
        "--memory", required=True, metavar="DIR", help="the folder of the memory, new or to be added to"
    )
    parser.add_argument("--dtype", default="auto", help="of the model, and so of the memory (default: as it was saved)")
    parser.add_argument(
        "--heading", default=HEADING, help="put before each of several texts, with its {name} (default: %(default)r)"
    )
    parser.add_argument("--verify", action="store_true", help="first compare the memory's files with their checksums")
    add_retrieval_flags(parser)
    args = parser.parse_args(argv)
    again = f"{args.memory} holds what was read until then; make room and start the same command again"
    with ending_in_one_sentence(full_disk=again):
        read(args)


def read(args: argparse.Namespace) -> None:
    """Carries the command out."""
    sources = Sources(args.text, args.heading.encode().decode("unicode_escape"))
    memory = Path(args.memory)
    settings: dict[str, Any] = {}
    if (memory / MANIFEST).is_file():
        state = read_manifest(memory)
        if args.verify:
            state.check(memory)
        settings = settings_of(state)
    given = retrieval_of(args)
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device, settings={**settings, **given})
    bar = ProgressBar(sum(map(sources.size, range(len(sources)))))
    with bar.bar:
        state = read_texts(model, tokenizer, sources, memory, bar)
    tokens, texts = state.rows("tokens").count, len(state.sources)
    print(f"{memory} holds {tokens:,} tokens of {texts} text{'s' * (texts > 1)}: python -m landmark_llama.ask "
          f"{args.model} {memory} QUESTION")  # fmt: skip


if __name__ == "__main__":
    main()
