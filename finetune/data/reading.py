"""Reads the documents of a file: JSON lines, parquet or plain text, compressed or not; one reader a format.

A reader yields `(text, problem)`, one of them None, for every row, so that a caller can stop at the first bad row or
count them all. A `problem` names file and line. Compression is detected from a file's first bytes, the format from its
suffix, or from its content where the suffix is unknown.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

TEXT_COLUMNS = ("text", "raw_content")  # RedPajama-V2 uses the second
SUBSET_KEY = "redpajama_set_name"  # in the `meta` of SlimPajama's rows
_COMPRESSIONS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}
_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSION_SUFFIXES = (".zst", ".gz")
SUFFIXES = (".jsonl", ".json", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")  # the usual ones, for messages

Outcome = tuple[str | None, str | None]


def format_by_name(path: Path) -> str | None:
    """`json`, `parquet`, `text`, or None where the name does not say."""
    name = path.name.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return next((kind for suffix, kind in _FORMATS.items() if name.endswith(suffix)), None)


def format_by_content(path: Path) -> str | None:
    """`parquet`, `json` (the first row begins with a brace) or None. OSError if the file cannot be read."""
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    try:
        with _opened(str(path)) as lines:
            return "json" if lines.read(1024).lstrip().startswith(b"{") else None
    except pyarrow.ArrowException:
        return None


def read_file(name: str, subset: str | None = None) -> Iterator[Outcome]:
    """All documents of a file.

    Args:
        name: its path.
        subset: take only the rows whose `meta` names this subset, as SlimPajama's do.

    Yields:
        `(text, None)`, or `(None, problem)` for a row that cannot be read and for a file that is damaged or gone.
    """
    try:
        kind = format_by_name(Path(name)) or format_by_content(Path(name))
        yield from _READERS[kind or "json"](name, subset)
    except FileNotFoundError:
        yield None, f"{name}: the file was there and is gone"
    except (OSError, pyarrow.ArrowException) as error:
        yield None, f"{name}: cannot be read ({_first_line(error)})"


def text_of(row: Any, subset: str | None = None) -> tuple[bool, str | None]:
    """Whether a row belongs to `subset` (None: always), and its text; None if it has none."""
    if not isinstance(row, dict):
        return True, None
    if subset is not None:
        meta = row.get("meta")
        name = meta.get(SUBSET_KEY) if isinstance(meta, dict) else None
        if not isinstance(name, str) or not is_subset(name, subset):
            return False, None
    text = next((row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)), None)
    # Lone surrogates are legal in JSON, but no text.
    return True, None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def is_subset(name_in_row: str, asked: str) -> bool:
    """Whether `RedPajamaArXiv` (SlimPajama's name) is what a user calls `arxiv`; `common_crawl` works, too."""
    plain = (name.lower().replace("_", "").removeprefix("redpajama") for name in (name_in_row, asked))
    return len(set(plain)) == 1


def _opened(name: str) -> pyarrow.NativeFile:
    """The file's bytes, decompressed. Unlike most decompressors, Arrow's refuses a stream that breaks off."""
    with open(name, "rb") as file:
        start = file.read(4)
    compression = next((kind for magic, kind in _COMPRESSIONS.items() if start.startswith(magic)), None)
    return pyarrow.input_stream(name, compression=compression)


def _lines(name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines. Bytes are split at line feeds alone: a line's other separators belong to its text."""
    number, pieces = 1, []
    with _opened(name) as file:
        try:
            while chunk := file.read(1 << 20):
                *whole, rest = chunk.split(b"\n")
                for line in whole:
                    yield number, b"".join([*pieces, line])
                    number, pieces = number + 1, []
                pieces.append(rest)
        except OSError as error:
            raise OSError(f"after line {number - 1}: {_first_line(error)}") from error
    if last := b"".join(pieces):
        yield number, last


def _json_rows(name: str, subset: str | None) -> Iterator[Outcome]:
    for number, line in _lines(name):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield None, f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line)"
                continue
            except (ValueError, RecursionError):
                yield None, f"{name}, line {number}: not JSON"
                continue
            wanted, text = text_of(row, subset)
            if wanted:
                yield (None, f"{name}, line {number}: no `text` string") if text is None else (text, None)


def _parquet_rows(name: str, subset: str | None) -> Iterator[Outcome]:
    with pyarrow.parquet.ParquetFile(name) as file:
        columns = [column for column in TEXT_COLUMNS if column in file.schema_arrow.names]
        if not columns:
            yield None, f"{name}: no column `text`"
            return
        columns = columns[:1] if subset is None else [columns[0], "meta"]
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                wanted, text = text_of(row, subset)
                if wanted:
                    yield (None, f"{name}, row {number}: no `text` string") if text is None else (text, None)


def _text_file(name: str, subset: str | None) -> Iterator[Outcome]:
    """A text file is one document."""
    with _opened(name) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield None, f"{name}, line {line}: not UTF-8 (byte {error.start + 1} of the file)"
        return
    if text.strip() and subset is None:
        yield text, None


_READERS = {"json": _json_rows, "parquet": _parquet_rows, "text": _text_file}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
