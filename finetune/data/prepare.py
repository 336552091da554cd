"""Documents to training rows: which files, which share of each, tokens, and rows cut from them.

Dense and landmark runs of one `context_length` get the same rows of the same ordinary tokens (where documents are
joined), so their losses and perplexities compare: a dense row is a landmark row without its landmarks.
"""

import bisect
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finetune.arguments import DataArguments, RunArguments, UserError
from finetune.data.packing import Packing
from finetune.data.sources import Subset, describe_files, find_subsets, fingerprint, stamped_by_content
from finetune.data.streaming import heldout_rows, training_stream
from finetune.data.tokens import tokenised_subset, tokens_fingerprint
from finetune.demo.corpus import corpus_files, write_corpus
from finetune.segments import Segments


class PackedRows(torch.utils.data.Dataset):
    """The rows of tokenised documents, in the documents' order.

    A row is put together when it is asked for, from the documents that it touches; the tokens stay in the data set's
    memory-mapped files.

    Args:
        tokenised: data set with a column `input_ids` (a list of ids a document) and a column `length`.
        packing: how rows are made.
    """

    def __init__(self, tokenised: datasets.Dataset, packing: Packing) -> None:
        self.documents = tokenised.select_columns("input_ids").with_format("numpy")
        self.packing = packing
        self.ends = np.cumsum(tokenised.with_format("numpy")["length"][:])
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        if packing.documents == "join":
            self.rows = self.tokens // packing.row_tokens
        else:
            self._plan()

    def _plan(self) -> None:
        """Notes, for each row, the places of its pieces among all tokens."""
        starts = np.concatenate([[0], self.ends[:-1]]).tolist()
        documents = (range(start, end) for start, end in zip(starts, self.ends.tolist(), strict=True))
        pieces, last = [], [0]
        for row in self.packing.pack(documents):
            pieces.extend((piece.start, piece.stop) for piece in row)
            last.append(len(pieces))
        self.pieces, self.last_piece, self.rows = np.array(pieces), np.array(last), len(last) - 1

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """What `Packing.row` returns."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        if self.packing.documents == "join":
            places = [(row * self.packing.row_tokens, (row + 1) * self.packing.row_tokens)]
        else:
            places = self.pieces[self.last_piece[row] : self.last_piece[row + 1]].tolist()
        return self.packing.row([self._tokens(start, stop) for start, stop in places])

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of all documents joined, shape (stop - start,)."""
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.ends, stop)
        before = self.ends[first - 1] if first else 0
        joined = np.concatenate(self.documents[first : last + 1]["input_ids"])
        return joined[start - before : stop - before]


@dataclass
class Rows:
    """What a run trains on and is measured by, and what was found on the way.

    `train` is an endless `datasets.IterableDataset` where data are streamed; `train_rows` is then None. `problems` says
    what is wrong with each bad row that was left out, a stream's as they come. `fingerprint` names all that shaped the
    rows, `files` says in words which files they are from.
    """

    train: torch.utils.data.Dataset
    heldout: torch.utils.data.Dataset
    packing: Packing
    problems: set[str]
    fingerprint: str
    files: str

    @property
    def train_rows(self) -> int | None:
        return None if isinstance(self.train, datasets.IterableDataset) else len(self.train)

    @property
    def bad_rows(self) -> int:
        return len(self.problems)

    @property
    def row_tokens(self) -> int:
        return self.packing.row_tokens

    def describe(self) -> str:
        skipped = f", {self.bad_rows} bad rows skipped" if self.bad_rows else ""
        train = "streamed" if self.train_rows is None else self.train_rows
        at_most = "" if self.packing.documents == "join" else "at most "
        return (
            f"{train} training and {len(self.heldout)} held-out rows of {at_most}{self.row_tokens} ordinary "
            f"tokens ({self.packing.context_length} positions){skipped}; data {self.fingerprint[:12]}"
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
        register_share=data.corpus_register_share,
        refrain_share=data.corpus_refrain_share,
        decoy_share=data.corpus_decoy_share,
        seed=data.corpus_seed,
    )


def make_rows(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    landmark_token_id: int | None,
    embedded: tuple[Path, Path] | None,
    seed: int,
    segments: Segments | None = None,
) -> Rows:
    """Reads, tokenises, mixes and packs the data.

    Args:
        data: what to read and how long rows are.
        tokenizer: must have an end-of-sequence token.
        block_size, landmark_token_id: where landmarks go; `landmark_token_id=None` for a dense model.
        embedded: training and held-out file of the embedded corpus, if that is the data.
        seed: of the held-out split, which is by document, of the mixture and of a stream's order.
        segments: that a row is made of, in place of `context_length` positions; its rows are plain.

    Raises:
        UserError: the data cannot be read or fills no row, or no row can have `context_length` positions.
    """
    if segments is not None:
        packing = Packing(segments.number * segments.positions, block_size, None, data.pack_documents)
    elif data.context_length % block_size == block_size - 1:
        # The last token of a block always brings its landmark along.
        raise UserError(
            f"--context_length {data.context_length}: no text takes that many positions in blocks of {block_size}; "
            f"give {data.context_length - 1} or {data.context_length + 1}"
        )
    else:
        packing = Packing(data.context_length, block_size, landmark_token_id, data.pack_documents)
    if embedded:
        train, heldout = (find_subsets([str(file)], []) for file in embedded)
    else:
        train, heldout = find_subsets(data.data, data.mixture), None
    make = _streamed_rows if data.streaming else _stored_rows
    rows = make(train, heldout, tokenizer, packing, data, seed)
    subsets = [*train, *(heldout or [])]
    named = [stamped_by_content(subset) for subset in subsets] if embedded else subsets
    tokens = [(tokens_fingerprint(subset, tokenizer), subset.weight) for subset in named]
    shaping = (data.streaming, data.shuffle_buffer, data.heldout_share, data.max_heldout_rows)
    name = fingerprint(tokens=tokens, packing=dataclasses.asdict(packing), shaping=shaping, seed=seed)
    return Rows(*rows, name, "the embedded corpus" if embedded else describe_files(subsets))


def _streamed_rows(
    train: list[Subset],
    heldout: list[Subset] | None,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    data: DataArguments,
    seed: int,
) -> tuple[datasets.IterableDataset, list, Packing, set[str]]:
    """The first four fields of `Rows`, as in `_stored_rows`; `heldout=None` takes a share of the training documents."""
    share = 0.0 if heldout else data.heldout_share
    problems: set[str] = set()
    common = {"skipped": problems if data.skip_bad_rows else None, "heldout_share": share}
    kept = heldout_rows(heldout or train, tokenizer, packing, seed, max_rows=data.max_heldout_rows, **common)
    stream = training_stream(train, tokenizer, packing, seed, shuffle_buffer=data.shuffle_buffer, **common)
    return stream, kept, packing, problems


def _stored_rows(
    train: list[Subset],
    heldout: list[Subset] | None,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    data: DataArguments,
    seed: int,
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset, Packing, set[str]]:
    problems: set[str] = set()

    def tokenised(subsets: list[Subset]) -> list[datasets.Dataset]:
        pairs = [tokenised_subset(s, tokenizer, data.skip_bad_rows, data.preprocessing_workers) for s in subsets]
        problems.update(problem for _, bad in pairs for problem in bad)
        return [documents for documents, _ in pairs]

    documents = tokenised(train)
    if heldout:
        kept = tokenised(heldout)
    else:
        splits = []
        for subset, its_documents in zip(train, documents, strict=True):
            if len(its_documents) < 2:
                raise UserError(
                    f"{subset.describe()}: one document cannot be split into training and held-out documents"
                )
            splits.append(its_documents.train_test_split(test_size=data.heldout_share, seed=seed))
        documents, kept = [split["train"] for split in splits], [split["test"] for split in splits]
    mixed = []
    for parts, which in ((documents, "training"), (kept, "held-out")):
        packed = [PackedRows(part, packing) for part in parts]
        for subset, rows in zip(train, packed, strict=True):
            _check_filled(rows, which, subset)
        mixed.append(_mix(packed, train, seed, again=which == "training"))
    train_rows, kept_rows = mixed
    kept_rows = torch.utils.data.Subset(kept_rows, range(min(len(kept_rows), data.max_heldout_rows)))
    return train_rows, kept_rows, packing, problems


def _mix(packed: list[PackedRows], subsets: list[Subset], seed: int, again: bool) -> torch.utils.data.Dataset:
    """The rows of all subsets in the shares of their weights.

    `again`: until each row was there once, and those of smaller subsets several times; otherwise as many as there are
    without one being there twice.
    """
    if len(packed) == 1:
        return packed[0]
    first = np.cumsum([0] + [len(rows) for rows in packed[:-1]])
    numbers = [
        datasets.Dataset.from_dict({"row": np.arange(start, start + len(rows))})
        for start, rows in zip(first, packed, strict=True)
    ]
    order = datasets.interleave_datasets(
        numbers,
        [subset.weight for subset in subsets],
        seed=seed,
        stopping_strategy="all_exhausted" if again else "first_exhausted",
    )
    return torch.utils.data.Subset(torch.utils.data.ConcatDataset(packed), order.with_format("numpy")["row"][:])


def _check_filled(rows: PackedRows, which: str, subset: Subset) -> None:
    if not len(rows):
        of = f" of {subset.name}" if subset.name else ""
        raise UserError(
            f"the {which} documents{of} hold {rows.tokens} tokens, fewer than one row of {rows.packing.row_tokens}: "
            "give more data, a smaller --context_length"
            + (" or a larger --heldout_share" if which == "held-out" else "")
        )
