"""Documents to training rows: tokenise, join with end-of-sequence, cut into rows, insert landmarks, mask them.

Dense and landmark runs of one `context_length` get the same rows of the same ordinary tokens, so their losses and
perplexities compare: a dense row is a landmark row without its landmarks.
"""

import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from finetune.arguments import DataArguments, RunArguments, UserError
from finetune.corpus import corpus_files, write_corpus
from finetune.reading import read_documents
from landmark_llama.tokenization import insert_landmarks, plain_length

IGNORED_LABEL = -100  # what transformers' losses leave out


class PackedRows(torch.utils.data.Dataset):
    """Rows of exactly `row_tokens` ordinary tokens, cut from the documents' tokens in their order.

    Nothing is dropped but the last tokens that fill no row. A row is put together when it is asked for, from the
    documents that it touches; the tokens stay in the data set's memory-mapped files.

    Args:
        tokenised: data set with a column `input_ids` (a list of ids a document) and a column `length`.
        row_tokens: ordinary tokens of a row.
        context_length: positions of a row; more than `row_tokens` where landmarks are inserted.
        block_size, landmark_token_id: how landmarks are inserted; `landmark_token_id=None` inserts none.
    """

    def __init__(
        self,
        tokenised: datasets.Dataset,
        row_tokens: int,
        context_length: int,
        block_size: int,
        landmark_token_id: int | None,
        max_rows: int | None = None,
    ) -> None:
        self.documents = tokenised.select_columns("input_ids").with_format("numpy")
        self.ends = list(accumulate(tokenised["length"]))
        self.row_tokens, self.context_length = row_tokens, context_length
        self.block_size, self.landmark_token_id = block_size, landmark_token_id
        rows = (self.ends[-1] if self.ends else 0) // row_tokens
        self.rows = rows if max_rows is None else min(rows, max_rows)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, each of shape (context_length,)."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        tokens = self._tokens(row * self.row_tokens, (row + 1) * self.row_tokens)
        if self.landmark_token_id is None:
            return {"input_ids": tokens, "labels": tokens.clone()}
        landmarked = insert_landmarks(tokens, self.block_size, self.landmark_token_id)
        labels = landmarked.masked_fill(landmarked == self.landmark_token_id, IGNORED_LABEL)
        return {"input_ids": landmarked, "labels": labels}

    def _tokens(self, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` of all documents joined, shape (stop - start,)."""
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.ends, stop)
        before = self.ends[first - 1] if first else 0
        pieces = self.documents[first : last + 1]["input_ids"]
        joined = torch.cat([torch.as_tensor(piece, dtype=torch.long) for piece in pieces])
        return joined[start - before : stop - before]


@dataclass
class Rows:
    """What a run trains on and is measured by, and what was found on the way."""

    train: PackedRows
    heldout: PackedRows
    bad_rows: int

    def describe(self) -> str:
        skipped = f", {self.bad_rows} bad rows skipped" if self.bad_rows else ""
        return (
            f"{len(self.train)} training and {len(self.heldout)} held-out rows of {self.train.row_tokens} ordinary "
            f"tokens ({self.train.context_length} positions){skipped}"
        )


def embedded_files(data: DataArguments, run: RunArguments) -> tuple[Path, Path]:
    """Writes the embedded corpus, in the main process, and returns the paths of its training and held-out file."""
    folder = Path(data.corpus_folder or Path(run.output_dir) / "corpus")
    if run.process_index > 0:
        return corpus_files(folder)
    return write_corpus(
        folder,
        data.corpus_documents,
        retrieval_share=data.corpus_retrieval_share,
        retrieval_characters=tuple(data.corpus_retrieval_characters),
        copy_share=data.corpus_copy_share,
        seed=data.corpus_seed,
    )


def make_rows(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    landmark_token_id: int | None,
    embedded: tuple[Path, Path] | None,
    seed: int,
) -> Rows:
    """Reads, tokenises and packs the data.

    Args:
        data: what to read and how long rows are.
        tokenizer: must have an end-of-sequence token.
        block_size, landmark_token_id: where landmarks go; `landmark_token_id=None` for a dense model.
        embedded: training and held-out file of the embedded corpus, if that is the data.
        seed: of the held-out split, which is by document.

    Raises:
        UserError: the data cannot be read or fills no row, or no row can have `context_length` positions.
    """
    if embedded:
        (train, bad_train), (heldout, bad_heldout) = (
            read_documents([str(file)], data.skip_bad_rows, data.preprocessing_workers) for file in embedded
        )
        bad = bad_train + bad_heldout
    else:
        documents, bad = read_documents(data.data, data.skip_bad_rows, data.preprocessing_workers)
        if len(documents) < 2:
            raise UserError(
                f"{', '.join(data.data)}: one document cannot be split into training and held-out documents"
            )
        split = documents.train_test_split(test_size=data.heldout_share, seed=seed)
        train, heldout = split["train"], split["test"]
    row_tokens = plain_length(data.context_length, block_size)
    if data.context_length % block_size == block_size - 1:
        # The last token of a block always brings its landmark along.
        raise UserError(
            f"--context_length {data.context_length}: no text takes that many positions in blocks of {block_size}; "
            f"give {data.context_length - 1} or {data.context_length + 1}"
        )
    packed = []
    for documents, max_rows in ((train, None), (heldout, data.max_heldout_rows)):
        tokenised = _tokenise(documents, tokenizer, data.preprocessing_workers)
        packed.append(PackedRows(tokenised, row_tokens, data.context_length, block_size, landmark_token_id, max_rows))
        _check_filled(packed[-1], "training" if max_rows is None else "held-out", row_tokens)
    return Rows(*packed, bad_rows=bad)


def _tokenise(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, workers: int) -> datasets.Dataset:
    """A column `input_ids`, each document ending with end-of-sequence, and its `length`."""

    def tokenise(texts: list[str]) -> dict[str, list]:
        # Text that spells a special token ("</s>", "<landmark>") stays text.
        encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
        joined = [[*ids, tokenizer.eos_token_id] for ids in encoded]
        return {"input_ids": joined, "length": [len(ids) for ids in joined]}

    return documents.map(
        tokenise,
        batched=True,
        input_columns="text",
        remove_columns=documents.column_names,
        num_proc=min(workers, len(documents)) if workers > 1 and len(documents) > 1000 else None,
        desc="Tokenising",
    )


def _check_filled(rows: PackedRows, which: str, row_tokens: int) -> None:
    if not len(rows):
        total = rows.ends[-1] if rows.ends else 0
        raise UserError(
            f"the {which} documents hold {total} tokens, fewer than one row of {row_tokens}: give more data, a smaller "
            "--context_length" + (" or a larger --heldout_share" if which == "held-out" else "")
        )
