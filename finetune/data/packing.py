"""Documents' tokens to training rows of one length: documents joined, kept whole, or kept apart.

Rows are plain: they hold ordinary tokens, and the model inserts the landmarks. `context_length` counts positions with
landmarks, so a row has fewer tokens than that.

Shapes: a document is a sequence of token ids that ends with end-of-sequence; a piece is part of one document; a row is
made of pieces. At most a few rows are held at a time, so the same code packs a corpus on disk and a stream.

- `join`: documents follow each other as in one long text. A row is `input_ids` and `labels`.
- `whole`: the same, but a document that a row can hold is not cut: its end and what it refers to share a row.
- `apart`: the documents of a row do not see each other. `position_ids` start at 0 with each document.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import pad

from landmark_llama.tokenization import landmarked_length, plain_length

IGNORED_LABEL = -100  # what transformers' losses leave out
OPEN_ROWS = 64  # rows that are filled at the same time: what is left of a document too long for one finds room there
Piece = TypeVar("Piece", bound=Sequence[int])


@dataclass(frozen=True)
class Packing:
    """How rows are made.

    Args:
        context_length: landmarked positions of a row.
        block_size: positions of a block, its landmark included. A dense model's rows need it, too: they hold as many
            tokens as a landmark model's.
        documents: `join`, `whole` or `apart`.
    """

    context_length: int
    block_size: int
    documents: str = "join"

    @property
    def row_tokens(self) -> int:
        """Tokens of a row; of a row of documents apart, the most that one document can have."""
        return plain_length(self.context_length, self.block_size)

    def pack(self, documents: Iterable[Piece]) -> Iterator[list[Piece]]:
        """The rows, as lists of pieces, of documents that come one by one.

        Works on anything that has a length and can be sliced: arrays of ids, or ranges of their places in a file.
        """
        if self.documents == "join":
            return pack_joined(documents, self.row_tokens)
        if self.documents == "whole":
            return pack_whole(documents, self.row_tokens, self.row_tokens, len)
        positions = partial(_landmarked_length_of, block_size=self.block_size)
        return pack_whole(documents, self.row_tokens, self.context_length, positions)

    def row(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The tensors of a row, each of shape (row_tokens,); where documents are apart, (context_length,)."""
        if self.documents == "apart":
            return self._apart_row(pieces)
        return self._joined_row(torch.from_numpy(np.concatenate(pieces).astype(np.int64)))

    def _joined_row(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        room = (0, self.row_tokens - len(tokens))  # padding follows the text, so that no text sees it
        return {"input_ids": pad(tokens, room), "labels": pad(tokens, room, value=IGNORED_LABEL)}

    def _apart_row(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        row = {name: torch.zeros(self.context_length, dtype=torch.long) for name in _APART_COLUMNS}
        row["labels"].fill_(IGNORED_LABEL)
        start = 0
        for piece in pieces:
            stop = start + len(piece)
            tokens = torch.from_numpy(np.asarray(piece).astype(np.int64))
            row["input_ids"][start:stop] = tokens
            row["labels"][start + 1 : stop] = tokens[1:]  # a piece's first token has nothing before it
            row["position_ids"][start:stop] = torch.arange(len(piece))
            row["attention_mask"][start:stop] = 1
            start = stop
        return row


_APART_COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask")


def pack_joined(documents: Iterable[Piece], row_tokens: int) -> Iterator[list[Piece]]:
    """Rows of exactly `row_tokens` tokens in the documents' order; the last tokens, which fill no row, are dropped."""
    row: list[Piece] = []
    room = row_tokens
    for document in documents:
        start = 0
        while len(document) - start >= room:
            yield [*row, document[start : start + room]]
            start, row, room = start + room, [], row_tokens
        if start < len(document):
            row.append(document[start:])
            room -= len(document) - start


def pack_whole(
    documents: Iterable[Piece], longest: int, room: int, taken_by: Callable[[Piece], int]
) -> Iterator[list[Piece]]:
    """Rows of whole documents, as full as it goes.

    A document that is longer than a row is cut: all but its last piece fill a row each. What is left goes to the
    fullest of at most 64 open rows that has room for it (best fit); nothing is dropped, and a row may end in padding.

    Args:
        longest: tokens of one document that a row can hold.
        room: what a row offers.
        taken_by: what a piece takes of it.
    """
    open_rows: list[tuple[int, int, list[Piece]]] = []  # (room left, a number that breaks ties, pieces), sorted
    opened = 0
    for document in documents:
        while len(document) > longest:
            yield [document[:longest]]
            document = document[longest:]
        if not len(document):
            continue
        taken = taken_by(document)
        place = bisect.bisect_left(open_rows, (taken, 0))
        if place < len(open_rows):
            left, number, pieces = open_rows.pop(place)
        else:
            if len(open_rows) == OPEN_ROWS:
                yield open_rows.pop(0)[2]
            left, number, pieces = room, opened, []
            opened += 1
        pieces.append(document)
        if left > taken:
            bisect.insort(open_rows, (left - taken, number, pieces))
        else:
            yield pieces
    yield from (pieces for _, _, pieces in open_rows)


def _landmarked_length_of(piece: Sequence[int], block_size: int) -> int:
    """Positions of a piece that has landmarks of its own: `n + n // (block_size - 1)` for `n` tokens."""
    return landmarked_length(len(piece), block_size)
