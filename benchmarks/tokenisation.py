"""Tokens per second from files to ids on disk: `finetune` beside plain `datasets.map` with the same tokenizer.

    python benchmarks/tokenisation.py --tokenizer DIR --data FOLDER
    python benchmarks/tokenisation.py --tokenizer DIR --data FOLDER --megabytes 60 --processes 2 --repetitions 5

Both read the same JSON lines (the rows of `--data`, repeated up to `--megabytes`) and write a data set of ids to an
empty cache. The plain way is `load_dataset("json")` and a batched `map` in `--processes` processes. Before any timing,
both must agree on every id. Then they take turns, each measurement in a fresh process.
"""
# ruff: noqa: E402  (the path must be set before transformers is imported)

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# The repository root replaces this folder on the path. So the script runs from anywhere, and transformers does not take
# the kernels.py here for the package `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tqdm import tqdm
from transformers import HfArgumentParser

from benchmarks.measure import (
    MeasurementFailed,
    ResultsFile,
    Stopwatch,
    exit_with,
    isolated,
    machine,
    statistics_of,
    versions,
)
from finetune.arguments import UserError
from finetune.data.sources import find_subsets, read_shard

PLAIN, OURS = "datasets.map", "finetune"


@dataclass
class Arguments:
    """What is tokenised, and how often."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or hub name."})
    data: list[str] = field(metadata={"help": "Files or folders, as for finetune/run.py."})
    megabytes: int = field(default=60, metadata={"help": "Size of the JSON lines that are read."})
    files: int = field(default=1, metadata={"help": "Number of files that the lines are spread over."})
    processes: int = field(default=2, metadata={"help": "Processes of both implementations."})
    repetitions: int = field(default=5, metadata={"help": "Measurements of each implementation."})
    output: str = field(
        default=str(Path(__file__).parent / "results" / "tokenisation.jsonl"),
        metadata={"help": "File that rows are added to."},
    )

    def __post_init__(self) -> None:
        for name in ("megabytes", "files", "processes", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


def plain(tokenizer: str, files: list[str], processes: int, cache: str):
    """Makes a data set of ids in `cache` with a few lines of `datasets`."""
    import datasets

    tokenizer = _loaded(tokenizer)

    def tokenise(texts: list[str]) -> dict[str, list]:
        ids = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    return rows.map(tokenise, batched=True, input_columns="text", remove_columns=rows.column_names, num_proc=processes)


def ours(tokenizer: str, files: list[str], processes: int, cache: str):
    """Makes a data set of ids in `cache` with the code of `finetune`."""
    import datasets

    from finetune.data.tokens import tokenised_subset

    datasets.config.HF_DATASETS_CACHE = cache
    (subset,) = find_subsets(files, [])
    return tokenised_subset(subset, _loaded(tokenizer), skip_bad_rows=False, workers=processes)[0]


def _loaded(tokenizer: str):
    import datasets
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = VERY_LARGE_INTEGER
    return loaded


IMPLEMENTATIONS = {PLAIN: plain, OURS: ours}


def measure(implementation: str, tokenizer: str, files: list[str], processes: int) -> tuple[int, float]:
    """The number of tokens, and the seconds from files to a data set of ids in an empty cache."""
    make = IMPLEMENTATIONS[implementation]
    with tempfile.TemporaryDirectory() as cache:
        watch = Stopwatch("cpu")
        ids = make(tokenizer, files, processes, cache)
        seconds = watch.lap()
        return sum(len(document) for document in ids.with_format("numpy")["input_ids"]), seconds


def check(tokenizer: str, files: list[str], processes: int) -> str | None:
    """None if both make the same ids, otherwise a sentence on the first difference."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        pair = plain(tokenizer, files, processes, first), ours(tokenizer, files, processes, second)
        if len(pair[0]) != len(pair[1]):
            return f"{len(pair[1])} documents, not {len(pair[0])}"
        for number, (a, b) in enumerate(zip(pair[0]["input_ids"], pair[1]["input_ids"], strict=True), start=1):
            if list(a) != list(b):
                return f"document {number} has other ids"
    return None


def write_data(args: Arguments, folder: Path) -> list[str]:
    """Writes the rows of `args.data`, repeated up to `args.megabytes`, as JSON lines. Returns the files."""
    (subset,) = find_subsets(args.data, [])
    texts = [text for shard in subset.shards() for text, _ in read_shard(shard) if text]
    if not texts:
        raise ValueError(f"--data {' '.join(args.data)}: holds no document")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    paths, number, room = [folder / f"{i}.jsonl" for i in range(args.files)], 0, args.megabytes * 10**6 // args.files
    for path in paths:
        with path.open("w", encoding="utf-8") as file:
            while file.tell() < room:
                file.write(lines[number % len(lines)])
                number += 1
    return [str(path) for path in paths]


def run(args: Arguments) -> ResultsFile:
    """Checks that both make the same ids, then measures them. Raises ValueError if there is nothing to read."""
    common = {
        "benchmark": "tokenisation",
        "model": Path(args.tokenizer).name,
        "shape": {"megabytes": args.megabytes, "files": args.files, "processes": args.processes},
        "machine": machine("cpu", args.processes),
        "versions": versions() | _more_versions(),
    }
    results = ResultsFile(Path(args.output), common)
    folder = Path(tempfile.mkdtemp())
    try:
        files = write_data(args, folder)
        what = (args.tokenizer, files, args.processes)
        problem = isolated(check, *what)
        if problem:
            raise MeasurementFailed(f"not measured, the result is wrong: {problem}")
        speeds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
        for repetition in tqdm(range(args.repetitions), unit="repetition", dynamic_ncols=True):
            for name in list(IMPLEMENTATIONS)[:: 1 if repetition % 2 == 0 else -1]:
                tokens, seconds = isolated(measure, name, *what)
                speeds[name].append(tokens / seconds)
        _add_rows(results, tokens, speeds)
    except MeasurementFailed as error:
        results.add_failure({"implementation": OURS}, str(error))
        tqdm.write(str(error), file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return results


def _more_versions() -> dict[str, str]:
    import datasets
    import tokenizers

    return {"datasets": datasets.__version__, "tokenizers": tokenizers.__version__}


def _add_rows(results: ResultsFile, tokens: int, speeds: dict[str, list[float]]) -> None:
    base = statistics_of(speeds[PLAIN])["median"]
    for name, values in speeds.items():
        figures = statistics_of(values)
        ratio = round(figures["median"] / base, 4)
        row = {"quantity": "tokens_per_second", "implementation": name, "tokens": tokens, **figures}
        results.add({**row, "ratio_to_plain": ratio})
        tqdm.write(f"{name:<12} {figures['median']:>12,.0f} tokens a second ({ratio:.2f} of plain)", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if something could not be measured."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    results = run(args)
    return results.report()


if __name__ == "__main__":
    exit_with(main, mistakes=(ValueError, UserError))
