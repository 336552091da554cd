"""Rows themselves: documents joined, joined but whole, or kept apart with positions of their own."""

import datasets
import numpy as np
import pytest
import torch
from documents import LANDMARK, random_documents

from finetune.data.packing import IGNORED_LABEL, OPEN_ROWS, Packing
from finetune.data.prepare import PackedRows
from landmark_llama.tokenization import landmarked_length, plain_length

SHAPES = [(8, 4), (9, 4), (64, 4), (64, 16), (61, 8), (512, 64), (10, 2)]


def packed(documents: list[list[int]], packing: Packing) -> PackedRows:
    tokenised = datasets.Dataset.from_dict({"input_ids": documents, "length": [len(d) for d in documents]})
    return PackedRows(tokenised, packing)


def streamed(documents: list[list[int]], packing: Packing) -> list[dict[str, torch.Tensor]]:
    return [packing.row(pieces) for pieces in packing.pack(np.array(d, dtype=np.int32) for d in documents)]


def pieces_of(row: dict[str, torch.Tensor]) -> list[list[int]]:
    """The pieces of a row of documents kept apart, found by their positions alone."""
    tokens = row["input_ids"][row["attention_mask"] == 1].tolist()
    starts = (row["position_ids"][row["attention_mask"] == 1] == 0).nonzero().flatten().tolist()
    return [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize(("row_tokens", "block_size"), [(30, 4), (31, 4), (7, 16), (64, 16), (1, 2), (500, 8)])
def test_joined_rows_hold_every_token_in_order_and_lose_only_what_fills_no_row(
    row_tokens: int, block_size: int
) -> None:
    documents = random_documents(seed=row_tokens)
    joined = [token for document in documents for token in document]
    packing = Packing(landmarked_length(row_tokens, block_size), block_size)
    rows = packed(documents, packing)
    assert packing.row_tokens == row_tokens and len(rows) == len(joined) // row_tokens
    tokens = torch.cat([rows[i]["input_ids"] for i in range(len(rows))])
    assert tokens.tolist() == joined[: len(rows) * row_tokens]
    assert rows[0]["labels"].tolist() == joined[:row_tokens]


@pytest.mark.parametrize("context_length", [8, 9, 10, 12, 61, 62, 64])
def test_rows_are_plain_and_take_exactly_the_asked_positions(context_length: int) -> None:
    rows = packed(random_documents(seed=1), Packing(context_length, 4))
    assert len(rows) > 0
    for row in rows:
        assert landmarked_length(len(row["input_ids"]), 4) == context_length
        assert LANDMARK not in row["input_ids"] and torch.equal(row["labels"], row["input_ids"])


@pytest.mark.parametrize("kind", ["join", "whole", "apart"])
@pytest.mark.parametrize(("context_length", "block_size"), SHAPES)
def test_a_stream_of_documents_gives_the_rows_of_the_documents_on_disk(
    kind: str, context_length: int, block_size: int
) -> None:
    packing = Packing(context_length, block_size, kind)
    documents = random_documents(seed=2, count=300, longest=90)
    on_disk, from_stream = packed(documents, packing), streamed(documents, packing)
    assert len(on_disk) == len(from_stream) > 1
    for first, second in zip(on_disk, from_stream, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("context_length", "block_size"), SHAPES)
def test_documents_apart_fit_their_row_with_the_landmarks_of_each(context_length: int, block_size: int) -> None:
    documents = random_documents(seed=3, count=200, longest=3 * context_length)
    longest = plain_length(context_length, block_size)
    for row in packed(documents, Packing(context_length, block_size, "apart")):
        assert all(column.shape == (context_length,) for column in row.values())
        lengths = [len(piece) for piece in pieces_of(row)]
        assert lengths and sum(landmarked_length(n, block_size) for n in lengths) <= context_length
        assert max(lengths) <= longest
        positions = [position for n in lengths for position in range(n)]
        assert row["position_ids"][: len(positions)].tolist() == positions
        assert row["attention_mask"].tolist() == [1] * len(positions) + [0] * (context_length - len(positions))
        assert LANDMARK not in row["input_ids"]


def numbered_documents() -> list[list[int]]:
    """As many short ones as long ones, so that rows are filled up; each ends with a token of its own from 1000 on."""
    documents = random_documents(seed=4, count=400, longest=50) + random_documents(seed=5, count=100, longest=200)
    return [[*document, 1000 + number] for number, document in enumerate(documents)]


def pieces_that_fit(documents: list[list[int]], longest: int) -> list[list[int]]:
    return [document[i : i + longest] for document in documents for i in range(0, len(document), longest)]


def test_whole_documents_are_cut_only_where_no_row_can_hold_them_and_none_is_lost() -> None:
    documents = numbered_documents()
    packing = Packing(64, 8, "whole")
    rows = packed(documents, packing)
    pieces, text = [], []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == packing.row_tokens and LANDMARK not in ids
        length = int((labels != IGNORED_LABEL).sum())
        assert torch.equal(ids[:length], labels[:length])  # what is ignored stands behind
        text.append(ids[:length].tolist())
    fit = pieces_that_fit(documents, packing.row_tokens)
    assert sorted(token for row in text for token in row) == sorted(token for piece in fit for token in piece)
    for row in text:
        # a row is read off as pieces from its start on: each ends with its document's own token, or fills the row
        while row:
            piece = next(piece for piece in fit if row[: len(piece)] == piece)
            pieces.append(piece)
            row = row[len(piece) :]
    assert sorted(pieces) == sorted(fit)
    assert sum(map(len, text)) > 0.95 * packing.row_tokens * len(rows)


def test_documents_apart_are_whole_where_a_row_can_hold_them_and_none_is_lost() -> None:
    documents = numbered_documents()
    rows = packed(documents, Packing(64, 8, "apart"))
    pieces = [piece for row in rows for piece in pieces_of(row)]
    assert sorted(pieces) == sorted(pieces_that_fit(documents, plain_length(64, 8)))
    filled = sum(len(piece) + len(piece) // 7 for piece in pieces) / (64 * len(rows))
    assert filled > 0.95


def test_nothing_predicts_the_first_token_of_a_document_that_is_kept_apart() -> None:
    rows = packed(random_documents(seed=6), Packing(64, 8, "apart"))
    for row in rows:
        first = row["position_ids"] == 0  # padding, too
        assert (row["labels"][first] == IGNORED_LABEL).all()
        assert torch.equal(row["labels"][~first], row["input_ids"][~first])


@pytest.mark.parametrize("kind", ["whole", "apart"])
def test_few_rows_are_held_however_many_documents_come(kind: str) -> None:
    taken = 0

    def documents():
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield np.ones(37, dtype=np.int32)  # two of them fit no row

    next(Packing(64, 8, kind).pack(documents()))
    assert taken <= OPEN_ROWS + 1
