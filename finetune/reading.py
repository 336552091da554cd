"""Reads documents: JSONL, .jsonl.zst and parquet files, folders of them, or a hub data set, as one `datasets.Dataset`.

A row that cannot be read becomes a row with a `problem`, which names file and line, so that one pass over the data, in
several processes and cached by `datasets`, both stops at the first bad row and counts them all.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from finetune.arguments import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.zst", ".parquet")
_FEATURES = datasets.Features({"text": datasets.Value("large_string"), "problem": datasets.Value("string")})


def read_documents(sources: list[str], skip_bad_rows: bool = False, workers: int = 1) -> tuple[datasets.Dataset, int]:
    """Reads all documents of `sources`: a data set with one column `text`, and how many rows were bad.

    Args:
        sources: files, folders (searched through) or one hub data set name.
        skip_bad_rows: count rows that cannot be read, instead of stopping.
        workers: processes that read; a file is read by one of them.

    Raises:
        UserError: nothing is there to read, or a row is bad: not JSON, without a `text` string, or not UTF-8.
    """
    if len(sources) == 1 and _looks_like_hub_name(sources[0]):
        return _read_hub(sources[0]), 0
    files = [file for source in sources for file in _files(Path(source))]
    # Size and time belong to the arguments so that a changed file is read again and not taken from the cache.
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        rows = datasets.Dataset.from_generator(
            _rows, features=_FEATURES, gen_kwargs={"stamps": stamps}, num_proc=min(workers, len(files)) or None
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"the data cannot be read: {error.__cause__ or error}") from error
    bad = rows.filter(bool, input_columns="problem", desc="Checking rows")
    if len(bad) and not skip_bad_rows:
        more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]['problem']}{more}; --skip_bad_rows counts such rows and goes on")
    rows = rows.filter(lambda problem: problem is None, input_columns="problem", desc="Taking good rows")
    if not len(rows):
        raise UserError(f"no document in {', '.join(sources)}: {len(files)} files without a single good row")
    return rows.remove_columns("problem"), len(bad)


def _looks_like_hub_name(source: str) -> bool:
    return not Path(source).exists() and not source.startswith((".", "/", "~")) and not source.endswith(SUFFIXES)


def _read_hub(name: str) -> datasets.Dataset:
    """The training split of hub data set `name`, or `name:configuration`; its documents stand in the column `text`."""
    path, _, configuration = name.partition(":")
    try:
        data = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # the hub client raises many kinds, none of which is worth a traceback
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--data {name}: no such file or folder, and no hub data set could be loaded: {reason}"
        ) from error
    if "text" not in data.column_names:
        raise UserError(
            f"--data {name}: this hub data set has no column `text` (it has {', '.join(data.column_names)})"
        )
    return data.select_columns("text")


def _files(source: Path) -> list[Path]:
    source = source.expanduser()
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise UserError(f"--data {source}: not one of {', '.join(SUFFIXES)}")
        return [source]
    if not source.is_dir():
        raise UserError(f"--data {source}: no such file or folder")
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"--data {source}: the folder holds no {', '.join(SUFFIXES)} file")
    return files


def _rows(stamps: list[tuple[str, int, int]]) -> Iterator[dict[str, str | None]]:
    for name, _, _ in stamps:
        read = _parquet_rows if name.endswith(".parquet") else _json_rows
        for text, problem in read(name):
            yield {"text": text, "problem": problem}
    # `datasets` cannot make a data set of no rows at all; this one is neither good nor bad.
    yield {"text": None, "problem": ""}


def _json_rows(name: str) -> Iterator[tuple[str | None, str | None]]:
    """Yields `(text, problem)`, one of them None, of each line that is not blank."""
    with open(name, "rb") as raw:
        try:
            # Bytes are split at line feeds alone: a line's other separators belong to its text.
            for number, line in enumerate(_decompressed(raw, name), start=1):
                if line.strip():
                    yield _parse(line, f"{name}, line {number}")
        except Exception as error:  # decompressors raise their own kinds
            yield None, f"{name}: {error}"


def _decompressed(raw: io.BufferedReader, name: str) -> io.BufferedIOBase:
    if not name.endswith(".zst"):
        return raw
    try:
        import zstandard
    except ImportError as error:
        raise ValueError("reading .zst needs the package zstandard (pip install zstandard)") from error

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)


def _parse(line: bytes, place: str) -> tuple[str | None, str | None]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"{place}: not UTF-8 (byte {error.start + 1} of the line)"
    except (ValueError, RecursionError):
        return None, f"{place}: not JSON"
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None, f"{place}: no `text` string"
    # Lone surrogates are legal in JSON, but no text.
    text = row["text"].encode("utf-8", "replace").decode("utf-8")
    return text, None


def _parquet_rows(name: str) -> Iterator[tuple[str | None, str | None]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            if "text" not in file.schema_arrow.names:
                yield None, f"{name}: no column `text`"
                return
            number = 0
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield (text, None) if isinstance(text, str) else (None, f"{name}, row {number}: no `text` string")
    except (OSError, pyarrow.ArrowException) as error:
        yield None, f"{name}: not a readable parquet file ({str(error).splitlines()[0]})"
