"""Rows from a corpus larger than the disk: read, tokenised and packed while the model trains, in bounded memory.

The files' order and the seed decide everything, so a resumed run reads the same rows again, and the Trainer skips the
batches that it has trained on. (The state that `datasets` can save would be quicker, but leaves out its shuffle
buffer.) Subsets are mixed row by row. All rows hold the same number of tokens, so a weight is a share of the tokens,
however long a subset's documents are. A subset that ends starts again, which keeps the shares.
"""

import logging
import zlib
from collections.abc import Iterator
from functools import partial

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finetune.arguments import UserError
from finetune.data.packing import Packing
from finetune.data.sources import Shard, Subset, read_shard
from finetune.data.tokens import tokenise

# A row as it waits in the shuffle buffer: 4 bytes a token, and the lengths of its pieces.
_FEATURES = datasets.Features({"tokens": datasets.Value("binary"), "lengths": datasets.Value("binary")})
_logger = logging.getLogger(__name__)


def training_stream(
    subsets: list[Subset],
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    seed: int,
    *,
    shuffle_buffer: int,
    skipped: set[str] | None,
    heldout_share: float,
) -> datasets.IterableDataset:
    """Training rows without end, mixed by the subsets' weights and shuffled through a buffer.

    Args:
        shuffle_buffer: rows that are held and drawn from; the order of the files is shuffled beside.
        skipped: gets what is wrong with each bad row that is left out; None: the first one ends the stream.
        heldout_share: share of the documents that are left out, for `heldout_rows`.

    Raises:
        UserError: a subset fills no row (at once), or a row is bad and `skipped` is None (when it is met).
    """
    read = partial(_stream, tokenizer=tokenizer, packing=packing, skipped=skipped)
    streams = [read(subset, split=("train", heldout_share, seed)) for subset in subsets]
    _check_filled(streams, subsets, packing, "training", "")
    mixed = _mixed([stream.repeat(None) for stream in streams], subsets, seed)
    mixed = mixed.shuffle(seed=seed, buffer_size=shuffle_buffer)
    return mixed.map(partial(_tensors, packing=packing), remove_columns=list(_FEATURES))


def heldout_rows(
    subsets: list[Subset],
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    seed: int,
    *,
    skipped: set[str] | None,
    heldout_share: float,
    max_rows: int,
) -> list[dict[str, torch.Tensor]]:
    """The first `max_rows` rows of the documents that `training_stream` leaves out, in the subsets' shares.

    Raises:
        UserError: they fill no row, or a row is bad and `skipped` is None.
    """
    split = ("heldout", heldout_share, seed)
    streams = [_stream(subset, tokenizer, packing, skipped, split) for subset in subsets]
    _check_filled(streams, subsets, packing, "held-out", " or a larger --heldout_share")
    return [_tensors(row, packing) for row in _mixed(streams, subsets, seed).take(max_rows)]


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept for evaluation: its text decides, so that copies of it are kept, too."""
    return zlib.crc32(text.encode("utf-8"), zlib.crc32(str(seed).encode())) < share * 2**32


def _mixed(streams: list[datasets.IterableDataset], subsets: list[Subset], seed: int) -> datasets.IterableDataset:
    if len(streams) == 1:
        return streams[0]
    weights = [subset.weight for subset in subsets]
    return datasets.interleave_datasets(streams, weights, seed=seed, stopping_strategy="first_exhausted")


def _check_filled(
    streams: list[datasets.IterableDataset], subsets: list[Subset], packing: Packing, which: str, remedy: str
) -> None:
    for subset, stream in zip(subsets, streams, strict=True):
        if next(iter(stream), None) is None:
            raise UserError(
                f"{subset.describe()}: the {which} documents fill no row of {packing.row_tokens} tokens: give more "
                f"data, a smaller --context_length{remedy}"
            )


def _stream(
    subset: Subset,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    skipped: set[str] | None,
    split: tuple[str, float, int],
) -> datasets.IterableDataset:
    """A subset's rows, once, file by file."""
    settings = {"in_rows": subset.in_rows, "tokenizer": tokenizer, "packing": packing, "split": split}
    return datasets.IterableDataset.from_generator(
        _packed,
        features=_FEATURES,
        gen_kwargs={"shards": subset.shards(), "skipped": skipped, **settings},
    )


def _packed(
    shards: list[Shard],
    in_rows: str | None,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    skipped: set[str] | None,
    split: tuple[str, float, int],
) -> Iterator[dict[str, bytes]]:
    """`split` is which part to take ("train" or "heldout"), the share that is held out, and the seed."""
    part, share, seed = split
    for shard in shards:
        texts = _good_texts(shard, in_rows, skipped)
        taken = (text for text in texts if not share or is_held_out(text, share, seed) == (part == "heldout"))
        for pieces in packing.pack(tokenise(taken, tokenizer)):
            lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
            yield {"tokens": np.concatenate(pieces).tobytes(), "lengths": lengths.tobytes()}


def _good_texts(shard: Shard, in_rows: str | None, skipped: set[str] | None) -> Iterator[str]:
    for text, problem in read_shard(shard, in_rows):
        if problem is None:
            yield text
        elif skipped is None:
            raise UserError(f"{problem}; --skip_bad_rows names such rows and goes on")
        elif problem not in skipped:  # a stream meets it once each time it starts again
            skipped.add(problem)
            _logger.warning("skipped: %s", problem)


def _tensors(row: dict[str, bytes], packing: Packing) -> dict[str, torch.Tensor]:
    pieces = np.split(np.frombuffer(row["tokens"], np.int32), np.cumsum(np.frombuffer(row["lengths"], np.int32))[:-1])
    return packing.row(pieces)
