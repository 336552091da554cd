"""The texts whose perplexity is measured: read, cut into tokens, and cut into windows by the protocol.

    segments   the paper's: a document is cut into equal segments of the evaluation length, each is read by itself and
               all of its tokens are scored. With a stride, windows of that length move on by the stride, and only the
               tokens that no earlier window scored are scored.
    last       a document is cut into stretches of the greatest length. Of each, the last N tokens are scored, after as
               many tokens before them as each length leaves: the same tokens at every length. Where N exceeds a
               length, windows that move on by half of it score them, so that each has at least as many before it.

A window of length L holds L tokens of text. The token in front of them is BOS where the tokenizer begins its texts with
one, otherwise the text's own token there; it is read and never scored. So L tokens are read (the window's last one is
not) and L can be scored.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eval_passkey.prompts import InputError
from finetune.data.reading import SUFFIXES, format_by_content, format_by_name, read_file


@dataclass(frozen=True, eq=False)
class Document:
    """A text and its tokens.

    Args:
        name: of the file, with the number of the document where the file may hold several.
        digest: of the text.
        ids: (tokens,) without special tokens.
        bytes_until: (tokens + 1,) bytes of the text, in UTF-8, that the tokens before each one stand for. A character
            that is cut into several tokens belongs to the first of them.
        bos: the token in front of every window; None where the tokenizer sets none.
    """

    name: str
    digest: str
    text: str
    ids: torch.Tensor
    bytes_until: np.ndarray
    bos: int | None

    @property
    def first(self) -> int:
        """The first token that can be scored: something has to stand before it."""
        return 0 if self.bos is not None else 1

    @property
    def scorable(self) -> int:
        """Tokens that something stands before."""
        return max(0, len(self.ids) - self.first)


@dataclass(frozen=True, eq=False)
class Window:
    """What the model is given at once. It ends before token `end`, and its last `scored` tokens are scored."""

    document: Document
    length: int
    end: int
    scored: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Tells the window from all others, in a run and in its rows."""
        return self.document.digest, self.length, self.end, self.scored

    @property
    def bytes(self) -> int:
        """Of the scored text, in UTF-8."""
        until = self.document.bytes_until
        return int(until[self.end] - until[self.end - self.scored])

    @property
    def input_ids(self) -> torch.Tensor:
        """(1, length + 1): the token in front, and the text."""
        bos, start = self.document.bos, self.end - self.length
        if bos is None:
            return self.document.ids[start - 1 : self.end].unsqueeze(0)
        return torch.cat([torch.tensor([bos]), self.document.ids[start : self.end]]).unsqueeze(0)


@dataclass(frozen=True)
class Protocol:
    """How documents become windows.

    Args:
        lengths: tokens of the windows, ascending.
        stride: of `segments`, tokens from one window to the next; None: the window's own length.
        score_tokens: of `last`, how many are scored.
        tokens_per_document: no more than these first ones of a document are measured; None: all.
    """

    name: Literal["segments", "last"]
    lengths: tuple[int, ...]
    stride: int | None = None
    score_tokens: int | None = None
    tokens_per_document: int | None = None

    def windows(self, documents: Sequence[Document], length: int) -> list[Window]:
        """The windows of one length. All lengths cover the same stretches of text."""
        return [window for document in documents for window in self._of_document(document, length)]

    def _of_document(self, document: Document, length: int) -> Iterator[Window]:
        longest, first = self.lengths[-1], document.first
        tokens = min(document.scorable, self.tokens_per_document or document.scorable)
        end = first + tokens // longest * longest
        if self.name == "last":
            for stop in range(first + longest, end + 1, longest):
                yield from self._last_tokens(document, length, stop)
            return
        stride = self.stride or length
        for stop in range(first + length, end + 1, stride):
            yield Window(document, length, stop, length if stop == first + length else stride)

    def _last_tokens(self, document: Document, length: int, stop: int) -> Iterator[Window]:
        """Windows that score the tokens before `stop`, and no token twice."""
        if self.score_tokens <= length:
            yield Window(document, length, stop, self.score_tokens)
            return
        step = -(-length // 2)
        for start in range(stop - self.score_tokens, stop, step):
            end = min(start + step, stop)
            yield Window(document, length, end, end - start)


def encode(tokenizer, text: str) -> tuple[torch.Tensor, np.ndarray]:
    """Ids (tokens,), and the bytes of the text (tokens + 1,) that the tokens before each one stand for.

    Text that spells a special token stays text. InputError if the tokenizer cannot say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer ({type(tokenizer).__name__}) cannot say where in a text its tokens stand")
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    bytes_until_character = np.concatenate([[0], width.cumsum()])
    # a tokenizer may leave the space before a word out of its place: it belongs to the word all the same
    ends = np.array([0, *(end for _, end in encoded["offset_mapping"])], dtype=np.int64)
    return torch.tensor(encoded["input_ids"], dtype=torch.long), bytes_until_character[np.maximum.accumulate(ends)]


def beginning_of_text(tokenizer) -> int | None:
    """The token that the tokenizer puts in front of a text by itself; None if it does not."""
    bos, ids = tokenizer.bos_token_id, tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and ids[:1] == [bos] else None


def read_documents(sources: Sequence[str], tokenizer, shortest: int, most: int) -> list[Document]:
    """The first documents of files and folders that have enough tokens; one that was there before is left out.

    Args:
        sources: files, and folders that are searched through, in alphabetical order.
        shortest: tokens to score that a document has at least.
        most: how many documents are wanted.

    Raises:
        InputError: a file is missing or broken, or no document is long enough.
    """
    documents: dict[str, Document] = {}
    bos, seen, longest = beginning_of_text(tokenizer), 0, 0
    for name, text in _texts(sources):
        if len(documents) == most:
            break
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
        document = Document(name, digest, text, *encode(tokenizer, text), bos)
        seen, longest = seen + 1, max(longest, document.scorable)
        if document.scorable >= shortest:
            documents.setdefault(digest, document)
    if not documents:
        raise InputError(
            f"--data {' '.join(sources)}: none of {seen} documents has {shortest} tokens to score, the longest has "
            f"{longest}; give longer texts or shorter --lengths"
        )
    return list(documents.values())


def _texts(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and texts of all documents."""
    for path in [file for source in sources for file in _files(Path(source).expanduser())]:
        several = format_by_name(path) != "text"
        for number, (text, problem) in enumerate(read_file(str(path)), start=1):
            if problem is not None:
                raise InputError(f"--data {problem}")
            yield f"{path.name}:{number}" if several else path.name, text


def _files(source: Path) -> list[Path]:
    """What `finetune/run.py --data` would read, too: text files beside data files are notes about them."""
    if source.is_file():
        if not (format_by_name(source) or format_by_content(source)):
            raise InputError(f"--data {source}: not one of {', '.join(SUFFIXES)}, nor JSON lines by its content")
        return [source]
    if not source.is_dir():
        raise InputError(f"--data {source}: there is no such file or folder")
    found = {path: format_by_name(path) for path in sorted(source.rglob("*")) if path.is_file()}
    with_data = {path.parent for path, kind in found.items() if kind in ("json", "parquet")}
    files = [path for path, kind in found.items() if kind and (kind != "text" or path.parent not in with_data)]
    if not files:
        raise InputError(f"--data {source}: the folder holds no {', '.join(SUFFIXES)} file")
    return files
