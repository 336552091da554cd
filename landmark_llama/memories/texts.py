"""Texts to be read: files, folders, JSON lines and standard input, as tokens that know their places."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 1 << 16  # characters that are tokenised at once
STDIN = "-"
HEADING = "==> {name} <==\n"  # as `head` and `tail` print it
JSON_SUFFIXES = (".jsonl", ".ndjson")
ANCHOR = "\n"  # what stands before a piece: no tokenizer merges it with a letter that follows
_PIECE_END = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class Part:
    """A text, or a row of a file of JSON lines. `line`: where it begins in its file, from 1."""

    text: str
    line: int = 1


@dataclass(frozen=True)
class Source:
    """A text to be read under a name.

    heading: what is read before it; part of the text, with no place of its own.
    rows: the parts are rows of a file of JSON lines, documents of their own.
    """

    name: str
    parts: tuple[Part, ...]
    heading: str = ""
    rows: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of what is read."""
        found = hashlib.sha256(self.heading.encode())
        for part in self.parts:
            found.update(f"\0{part.line}\0".encode())
            found.update(part.text.encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    @property
    def characters(self) -> int:
        return sum(len(part.text) for part in self.parts)


class Sources(Sequence[Source]):
    """The texts of the arguments `names`, each read from its file when it is asked for.

    Args:
        names: files, folders (all texts in them, except hidden ones) or "-" for standard input.
        heading: put before each text if there are several, with its name for `{name}`.

    Raises:
        OSError: one is missing or cannot be read.
        ValueError: nothing was given, or a folder holds no text.
    """

    def __init__(self, names: Sequence[str], heading: str = HEADING) -> None:
        if not names:
            raise ValueError("no text: give files, folders or - for standard input")
        self.files: list[str] = []
        for name in names:
            self.files += _texts_in(Path(name)) if name != STDIN and Path(name).is_dir() else [name]
        for name in self.files:
            if name != STDIN and not Path(name).is_file():
                raise FileNotFoundError(f"{name}: there is no such file")
        several = len(names) > 1 or any(name != STDIN and Path(name).is_dir() for name in names)
        self.heading = heading if several else ""
        self._stdin: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Source:
        name = self.files[i]
        text = self._standard_input() if name == STDIN else _read_text(Path(name))
        rows = name.lower().endswith(JSON_SUFFIXES)
        parts = tuple(_json_rows(name, text)) if rows else (Part(text),) if text else ()
        return Source(name, parts, self.heading.replace("{name}", name) if parts else "", rows)

    def size(self, i: int) -> int:
        """Bytes of a text, about."""
        name = self.files[i]
        return len(self._standard_input()) if name == STDIN else Path(name).stat().st_size

    def _standard_input(self) -> str:
        if self._stdin is None:
            self._stdin = _decode(STDIN, sys.stdin.buffer.read())
        return self._stdin


def tokenise(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, int]]:
    """Tokens (tokens, 3) of a text, some at a time: id, character and line in its file. With them, characters read.

    Long texts are cut between two lines; the tokens are those of the whole text. Text that spells a special token stays
    text. Where a tokenizer does not tell places, the character is -1.
    """
    if source.heading:
        ids = _encode(source.heading, tokenizer, anchored=False)[0]
        yield _rows(ids, [0] * len(ids), [1] * len(ids)), 0
    for number, part in enumerate(source.parts):
        first, line = 0, part.line
        # an empty line stands between documents
        text = part.text if number + 1 == len(source.parts) else part.text.rstrip("\n") + "\n\n"
        for piece in _pieces(text):
            follows = first > 0 or number > 0 or source.heading.endswith(ANCHOR)
            ids, places = _encode(piece, tokenizer, anchored=follows)
            lines = [line] * len(ids) if source.rows else _lines(piece, places, line)
            yield _rows(ids, [first + x if x >= 0 else -1 for x in places], lines), len(piece)
            first += len(piece)
            line += 0 if source.rows else piece.count("\n")


def _pieces(text: str) -> Iterator[str]:
    """Parts of at least `PIECE` characters that end with a line, where the next one begins with no white space."""
    first = 0
    while first < len(text):
        end = _PIECE_END.search(text, first + PIECE)
        stop = end.end() if end else len(text)
        yield text[first:stop]
        first = stop


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, anchored: bool) -> tuple[list[int], list[int]]:
    """Ids and the characters that they begin at. `anchored`: the text goes on after a line."""
    skipped = len(ANCHOR) if anchored else 0
    encoded = tokenizer(
        ANCHOR * anchored + text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = encoded["input_ids"]
    if not tokenizer.is_fast:
        before = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"] if anchored else []
        ids = ids[len(before) :]
        return ids, [-1] * len(ids)
    kept = [(i, begin - skipped) for i, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
            if end > skipped or not anchored]  # fmt: skip
    return [i for i, _ in kept], [max(begin, 0) for _, begin in kept]


def _lines(text: str, places: list[int], first: int) -> list[int]:
    """The line of each place in `text`, which begins at line `first`; places ascend."""
    lines, counted = [], 0
    for place in places:
        if place > counted:
            first, counted = first + text.count("\n", counted, place), place
        lines.append(first)
    return lines


def _rows(ids: list[int], places: list[int], lines: list[int]) -> Tensor:
    return torch.tensor([ids, places, lines], dtype=torch.int32).T


def _texts_in(folder: Path) -> list[str]:
    """The paths of all texts in a folder, sorted. Hidden files and what is no text are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _is_text(path):
            found.append(str(path))
    if not found:
        raise ValueError(f"{folder}: holds no text")
    return found


def _is_text(path: Path) -> bool:
    try:
        _read_text(path)
    except (OSError, ValueError):
        return False
    return True


def _read_text(path: Path) -> str:
    return _decode(str(path), path.read_bytes())


def _decode(name: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no text in UTF-8 (byte {error.start} cannot be read): convert it first") from error
    if "\0" in text:
        raise ValueError(f"{name}: no text: it holds a zero byte at character {text.index(chr(0))}")
    return text


def _json_rows(name: str, text: str) -> Iterator[Part]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            document = row["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{name}, line {number}: no JSON object with a field 'text' ({type(error).__name__})"
            ) from error
        if not isinstance(document, str):
            raise ValueError(f"{name}, line {number}: its field 'text' is no string, but {type(document).__name__}")
        if document:
            yield Part(document, number)
