"""Documents' tokens to training rows of one length, documents joined or kept apart.

Shapes: a document is a sequence of token ids that ends with end-of-sequence; a piece is part of one document; a row is
made of pieces. Everything here works on one piece of text after the other and holds a few rows at most, so that it
serves a corpus on disk and a stream alike.

- `join`: documents follow each other as in one long text. Rows have their landmarks, `input_ids` and `labels`.
- `apart`: a row's documents do not see each other. The row is plain (the model sets the landmarks of each document),
  and its `position_ids` start at 0 with each document.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from landmark_llama.tokenization import insert_landmarks, landmarked_length, plain_length

IGNORED_LABEL = -100  # what transformers' losses leave out
OPEN_ROWS = 64  # rows that `apart` fills at the same time: what a document too long for one may find room in
Piece = TypeVar("Piece", bound=Sequence[int])


@dataclass(frozen=True)
class Packing:
    """How rows are made.

    Args:
        context_length: landmarked positions of a row.
        block_size: positions of a block, its landmark included.
        landmark_token_id: None for a dense model, whose joined rows are a landmark model's without their landmarks, and
            for rows of several segments.
        documents: `join` or `apart`.
    """

    context_length: int
    block_size: int
    landmark_token_id: int | None
    documents: str = "join"

    @property
    def row_tokens(self) -> int:
        """Ordinary tokens of a row: exactly where documents are joined, at most (of one document) where apart."""
        return plain_length(self.context_length, self.block_size)

    def pack(self, documents: Iterable[Piece]) -> Iterator[list[Piece]]:
        """The rows, as lists of pieces, of documents that come one by one.

        Works on anything that has a length and can be sliced: arrays of ids, or ranges of their places in a file.
        """
        if self.documents == "join":
            return pack_joined(documents, self.row_tokens)
        return pack_apart(documents, self.context_length, self.block_size)

    def row(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The tensors of a row, each of shape (context_length,); a dense row is shorter by its landmarks."""
        if self.documents == "join":
            return self._joined_row(torch.from_numpy(np.concatenate(pieces).astype(np.int64)))
        return self._apart_row(pieces)

    def _joined_row(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.landmark_token_id is None:
            return {"input_ids": tokens, "labels": tokens.clone()}
        landmarked = insert_landmarks(tokens, self.block_size, self.landmark_token_id)
        labels = landmarked.masked_fill(landmarked == self.landmark_token_id, IGNORED_LABEL)
        return {"input_ids": landmarked, "labels": labels}

    def _apart_row(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        row = {name: torch.zeros(self.context_length, dtype=torch.long) for name in _APART_COLUMNS}
        row["labels"].fill_(IGNORED_LABEL)
        start = 0
        for piece in pieces:
            stop = start + len(piece)
            tokens = torch.from_numpy(np.asarray(piece).astype(np.int64))
            row["input_ids"][start:stop] = tokens
            row["labels"][start + 1 : stop] = tokens[1:]  # nothing that it could see predicts a piece's first token
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


def pack_apart(documents: Iterable[Piece], context_length: int, block_size: int) -> Iterator[list[Piece]]:
    """Rows of whole documents that take at most `context_length` positions, each document with its own landmarks.

    A document of `n` tokens takes `n + n // (block_size - 1)` positions. One that is longer than a row is cut: all but
    its last piece fill a row each. What is left goes to the fullest of at most 64 open rows that has room for it (best
    fit); nothing is dropped, and a row may end in padding.
    """
    longest = plain_length(context_length, block_size)
    open_rows: list[tuple[int, int, list[Piece]]] = []  # (positions left, a number that breaks ties, pieces), sorted
    opened = 0
    for document in documents:
        while len(document) > longest:
            yield [document[:longest]]
            document = document[longest:]
        if not len(document):
            continue
        taken = landmarked_length(len(document), block_size)
        place = bisect.bisect_left(open_rows, (taken, 0))
        if place < len(open_rows):
            room, number, pieces = open_rows.pop(place)
        else:
            if len(open_rows) == OPEN_ROWS:
                yield open_rows.pop(0)[2]
            room, number, pieces = context_length, opened, []
            opened += 1
        pieces.append(document)
        if room > taken:
            bisect.insort(open_rows, (room - taken, number, pieces))
        else:
            yield pieces
    yield from (pieces for _, _, pieces in open_rows)
