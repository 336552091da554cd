"""Texts to token ids: batches that keep all cores busy, and a cache on the disk named after all that shapes it."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from finetune.arguments import UserError
from finetune.data.sources import Shard, Subset, fingerprint, read_shard
from finetune.disk import is_disk_full

# Texts are tokenised so many at a time, by all cores at once, or fewer where they are long: that bounds the memory.
BATCH_TEXTS, BATCH_CHARACTERS = 1000, 1_000_000
WRITTEN_TOGETHER = 200  # documents that are held before they are written to the cache
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "problem": datasets.Value("string"),
    }
)
# These files decide a document's tokens; a cache made by other versions of them is not read.
_CODE = ("reading.py", "sources.py", "tokens.py")


def tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The ids of each text, int32 of shape (tokens,), end-of-sequence last.

    Text that spells a special token ("</s>", "<landmark>") stays text. A suspended generator holds the ids of its
    present batch and nothing else, since a stream suspends a few dozen of them.
    """
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            documents = _encode(batch, tokenizer)
            batch, characters = [], 0
            yield from documents
            del documents
    if batch:
        yield from _encode(batch, tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    encoded = tokenizer(
        texts, split_special_tokens=True, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )
    return [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded["input_ids"]]


def tokenised_subset(
    subset: Subset, tokenizer: PreTrainedTokenizerBase, skip_bad_rows: bool, workers: int
) -> tuple[datasets.Dataset, list[str]]:
    """All documents of a subset as ids, and the bad rows; from the cache of `datasets` if it is there.

    Returns:
        A data set with the columns `input_ids` (end-of-sequence last) and `length`, a row a document; and what is wrong
        with each bad row.

    Raises:
        UserError: a row is bad and `skip_bad_rows` is not given, or there is no good row.
    """
    shards = subset.shards()
    try:
        rows = datasets.Dataset.from_generator(
            _token_rows,
            features=_FEATURES,
            gen_kwargs={"shards": shards, "in_rows": subset.in_rows, "tokenizer": tokenizer},
            num_proc=min(workers, len(shards)) if min(workers, len(shards)) > 1 else None,
            fingerprint=tokens_fingerprint(subset, tokenizer),
            writer_batch_size=WRITTEN_TOGETHER,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if is_disk_full(error):
            raise UserError(
                f"the tokens do not fit on the disk of {datasets.config.HF_DATASETS_CACHE}: make room there, set "
                "HF_DATASETS_CACHE to a folder on another disk, or give --streaming true"
            ) from error
        raise UserError(f"the data cannot be read: {error.__cause__ or error}") from error
    lengths = rows.with_format("numpy")["length"][:]
    good = np.flatnonzero(lengths)
    problems = [problem for problem in rows.select(np.flatnonzero(lengths == 0))["problem"] if problem]
    if problems and not skip_bad_rows:
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; --skip_bad_rows counts such rows and goes on")
    if not len(good):
        raise UserError(f"no document in {subset.describe()}: not a single good row")
    return rows.select(good).remove_columns("problem"), problems


def _token_rows(shards: list[Shard], in_rows: str | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    nothing = np.zeros(0, dtype=np.int32)
    problems: list[str] = []

    def texts(shard: Shard) -> Iterator[str]:
        for text, problem in read_shard(shard, in_rows):
            if problem is None:
                yield text
            else:
                problems.append(problem)

    for shard in shards:
        for ids in tokenise(texts(shard), tokenizer):
            yield {"input_ids": ids, "length": len(ids), "problem": None}
    # `datasets` cannot make a data set of no rows at all; an empty problem is none.
    for problem in problems or [""]:
        yield {"input_ids": nothing, "length": 0, "problem": problem}


def tokens_fingerprint(subset: Subset, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for a subset's tokens: another one if files (path, size, time), tokenizer, code or versions change."""
    return fingerprint(
        stamps=subset.stamps,
        in_rows=subset.in_rows,
        tokenizer=tokenizer_state(tokenizer),
        code=_code_version(),
        versions=(tokenizers.__version__, datasets.__version__),
    )


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else datasets.fingerprint.Hasher.hash(tokenizer)
    return f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {hashlib.sha256(state.encode()).hexdigest()}"


@cache
def _code_version() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _CODE)).hexdigest()
