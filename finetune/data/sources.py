"""What `--data` and `--mixture` name: files, folders or a hub data set, as subsets that are read in shares.

A subset is what is mixed as one. Without `--mixture` there is one, of everything.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from zlib import crc32

import datasets

from finetune.arguments import UserError
from finetune.data.reading import SUFFIXES, Outcome, format_by_content, format_by_name, read_file, text_of

# Files are read in shards of at least so many bytes: what does not fill a row at the end of a shard is dropped.
SHARD_BYTES = 64 << 20
MOST_SHARDS = 64
HUB = "hub:"  # in front of a data set's name where files have their path
Stamp = tuple[str, int, int]  # a file's path, size in bytes and time of change in ns: it changes when the file does
Shard = tuple[Stamp, ...]


@dataclass(frozen=True)
class Subset:
    """A share of the training text.

    Args:
        name: as in `--mixture`; "" for everything.
        weight: its share of the rows, between 0 and 1.
        stamps: its files.
        in_rows: the subset's name where rows, not files, say what they belong to.
    """

    name: str
    weight: float
    stamps: tuple[Stamp, ...]
    in_rows: str | None = None

    def shards(self) -> list[Shard]:
        """The files in groups of similar size, which several processes can share."""
        total = sum(size for _, size, _ in self.stamps)
        smallest = max(SHARD_BYTES, total // MOST_SHARDS)
        shards, shard, size = [], [], 0
        for stamp in self.stamps:
            shard.append(stamp)
            size += stamp[1]
            if size >= smallest:
                shards.append(tuple(shard))
                shard, size = [], 0
        return [*shards, tuple(shard)] if shard else shards

    def describe(self) -> str:
        files = ", ".join(name for name, _, _ in self.stamps[:3])
        more = f" and {len(self.stamps) - 3} more" if len(self.stamps) > 3 else ""
        return f"{self.name + ': ' if self.name else ''}{files}{more}"


def find_subsets(sources: list[str], mixture: list[str]) -> list[Subset]:
    """The subsets to read.

    `NAME=WEIGHT` of `mixture` takes the files that have NAME in their path as a folder or as the beginning of the
    file's name (`arxiv/1.jsonl`, `arxiv_sample.jsonl`). Where no file has it, rows are asked: NAME is then what their
    `meta.redpajama_set_name` says, with or without its `RedPajama`.

    Raises:
        UserError: nothing is there to read, a weight is no positive number, or a file belongs to two names.
    """
    weights = parse_mixture(mixture)
    if len(sources) == 1 and _looks_like_hub_name(sources[0]):
        stamps = (_hub_stamp(sources[0]),)
        return [Subset(name, weight, stamps, name) for name, weight in weights.items()] or [Subset("", 1.0, stamps)]
    placed = [pair for source in sources for pair in _files(Path(source).expanduser())]
    if not weights:
        return [Subset("", 1.0, tuple(_stamp(file) for file, _ in placed))]
    files = {name: [file for file, below in placed if _belongs(below, name)] for name in weights}
    if not any(files.values()):
        stamps = tuple(_stamp(file) for file, _ in placed)
        return [Subset(name, weight, stamps, name) for name, weight in weights.items()]
    owner: dict[Path, str] = {}
    for name in weights:
        if not files[name]:
            raise UserError(f"--mixture {name}: no file of {', '.join(sources)} has that name or a folder of that name")
        for file in files[name]:
            if owner.setdefault(file, name) != name:
                raise UserError(f"--mixture {name}: {file} belongs to {owner[file]}, too; give longer names")
    return [Subset(name, weight, tuple(map(_stamp, files[name]))) for name, weight in weights.items()]


def parse_mixture(mixture: list[str]) -> dict[str, float]:
    """`["arxiv=1", "book=3"]` to `{"arxiv": 0.25, "book": 0.75}`. UserError if a weight is not a positive number."""
    weights: dict[str, float] = {}
    for entry in mixture:
        name, _, value = entry.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise UserError(f"--mixture {entry}: expected NAME=WEIGHT with a weight above 0, such as arxiv=0.1")
        if name in weights:
            raise UserError(f"--mixture {entry}: {name} has a weight already")
        weights[name] = weight
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def read_shard(shard: Shard, in_rows: str | None = None) -> Iterator[Outcome]:
    """`(text, problem)`, one of them None, for every row of a shard's files."""
    for name, _, _ in shard:
        yield from _hub_rows(name, in_rows) if name.startswith(HUB) else read_file(name, in_rows)


def fingerprint(**what: object) -> str:
    """A name for everything that `what` says; another name where any of it differs."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def describe_files(subsets: list[Subset]) -> str:
    """How many files there are, their size and last change, in one line; a hub data set's name and commit."""
    stamps = {stamp for subset in subsets for stamp in subset.stamps}
    hub = [name for name, _, _ in stamps if name.startswith(HUB)]
    if hub:
        return hub[0]
    changed = datetime.fromtimestamp(max(time for _, _, time in stamps) // 10**9, timezone.utc)
    return (
        f"{len(stamps)} of {sum(size for _, size, _ in stamps):,} bytes, last changed {changed:%Y-%m-%d %H:%M:%S} UTC"
    )


def stamped_by_content(subset: Subset) -> Subset:
    """The same files under names that say what is in them, not where they lie and since when."""
    files = [Path(name) for name, _, _ in subset.stamps]
    return replace(subset, stamps=tuple((file.name, file.stat().st_size, crc32(file.read_bytes())) for file in files))


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"--data {file}: {error.strerror}") from error
    return str(file), status.st_size, status.st_mtime_ns


def _files(source: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """The files of `source`, each with the parts of its path that may name a subset, the source's own name included."""
    if source.is_file():
        if not (format_by_name(source) or format_by_content(source)):
            raise UserError(f"--data {source}: not one of {', '.join(SUFFIXES)}, nor JSON lines by its content")
        return [(source, (source.name,))]
    if not source.is_dir():
        raise UserError(f"--data {source}: no such file or folder")
    found = {path: format_by_name(path) for path in sorted(source.rglob("*")) if path.is_file()}
    # A text file beside data files explains them; where a folder has nothing else, text files are the data.
    with_data = {path.parent for path, kind in found.items() if kind in ("json", "parquet")}
    files = [path for path, kind in found.items() if kind and (kind != "text" or path.parent not in with_data)]
    if not files:
        raise UserError(f"--data {source}: the folder holds no {', '.join(SUFFIXES)} file")
    return [(file, (source.resolve().name, *file.relative_to(source).parts)) for file in files]


def _belongs(parts: tuple[str, ...], name: str) -> bool:
    *folders, file = (part.lower() for part in parts)
    name = name.lower()
    return name in folders or (file.startswith(name) and not file[len(name) : len(name) + 1].isalnum())


def _looks_like_hub_name(source: str) -> bool:
    return (
        not Path(source).expanduser().exists()
        and not source.startswith((".", "/", "~"))
        and format_by_name(Path(source)) is None
    )


def _hub_stamp(name: str) -> Stamp:
    """Stands for hub data set `name`, or `name:configuration`, at its present commit."""
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(name.partition(":")[0]).sha
    except Exception as error:  # the hub client raises many kinds, none of which is worth a traceback
        raise UserError(
            f"--data {name}: no such file or folder, and no hub data set could be found: {_first_line(error)}"
        ) from error
    return f"{HUB}{name}@{commit}", 0, 0


def _hub_rows(name: str, in_rows: str | None) -> Iterator[Outcome]:
    """The documents of a hub data set's training split, read as they come."""
    source, _, commit = name.removeprefix(HUB).rpartition("@")
    path, _, configuration = source.partition(":")
    try:
        data = datasets.load_dataset(path, configuration or None, split="train", streaming=True, revision=commit)
        for number, row in enumerate(data, start=1):
            wanted, text = text_of(row, in_rows)
            if wanted:
                yield (None, f"{source}, row {number}: no `text` string") if text is None else (text, None)
    except UserError:
        raise
    except Exception as error:  # as above
        yield None, f"--data {source}: the hub data set cannot be read: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
