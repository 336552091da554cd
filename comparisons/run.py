"""Trains the methods of a configuration, measures them, and draws tables and pictures.

    python comparisons/run.py --config comparisons/configs/smoke.yaml --output runs/comparisons/smoke
    python comparisons/run.py --config comparisons/configs/books.yaml --data FOLDER --output runs/comparisons/books
    python comparisons/run.py --config ... --output ... --methods dense landmark --seeds 0 1
    python comparisons/run.py --config ... --output ... --only_report

Writes `results.jsonl` (a row a measurement, as soon as it is made), `weights/`, `tables.md` and pictures into the
output folder. What is there is not done again: an interrupted run goes on where it stopped, and several processes with
different --methods or --seeds may share a folder. `comparisons/README.md` says how a method is added.
"""

import argparse
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder
from comparisons import measures, report
from comparisons.bench import Bench, load
from comparisons.corpus import Corpus
from comparisons.reader import Reader
from comparisons.training import load_weights, make_reader, save_weights, train
from eval_passkey.models import device_in_words, versions
from eval_passkey.prompts import InputError
from eval_passkey.results import ResultsFolder

KEY = ("kind", "method", "seed", "on", "length")  # `on`: domain or task


class Run:
    """A bench, its folder, and what of it is done."""

    def __init__(self, bench: Bench, root: Path, folder: Path, device: str):
        self.bench, self.root, self.folder, self.device = bench, root, folder, device
        whole = asdict(bench)
        identity = {name: whole[name] for name in ("data", "training", "base", "model", "vocabulary", "perplexity")}
        settings = {
            label: {name: getattr(method, name) for name in ("module", "options", "weights", "steps")}
            for label, method in bench.methods.items()
        }
        self.results = ResultsFolder(folder, {"bench": identity}, settings, fields=("kind", "method", "seed"))
        self.done = {tuple(row.get(name) for name in KEY) for row in self.results.rows}
        self.corpus = Corpus(bench, root, folder / "corpus")

    def method(self, label: str, seed: int) -> None:
        """Trains one method with one seed, and makes every measurement of it that is missing."""
        missing = [cell for cell in self.cells(label, seed) if cell not in self.done]
        if not missing and self.weights(label, seed).is_file():
            return
        reader = self.trained(label, seed).to(self.device).eval()
        for cell in missing:
            kind, _, _, on, length = cell
            if kind == "perplexity":
                measured = measures.perplexity(reader, self.corpus, on, length, self.device)
            elif kind == "retrieval":
                samples = self.bench.retrieval.samples
                measured = measures.retrieval(reader, self.corpus, on, length, samples, self.device)
            else:
                where = self.bench, self.root, self.folder / "corpus", label, seed, self.weights(label, seed)
                measured = measures.cost(*where, length, self.device)
            self.add(cell, measured)

    def cells(self, label: str, seed: int) -> list[tuple]:
        """The keys of a method's rows beside its training's; cost is measured with the first seed only."""
        bench, method = self.bench, self.bench.methods[label]
        cells = [("perplexity", on, length) for length in bench.perplexity.lengths for on in bench.read]
        cells += [("retrieval", on, length) for length in bench.retrieval.lengths for on in bench.retrieval.tasks]
        cells += [("cost", None, length) for length in bench.cost.lengths if seed == bench.seeds[0]]
        longest = method.max_length or float("inf")
        return [
            (kind, label, seed, on, length)
            for kind, on, length in cells
            if kind in method.measures and length <= longest
        ]

    def trained(self, label: str, seed: int) -> Reader:
        """The reader with the weights that its training gave, which is made up for if they are not there."""
        path, method = self.weights(label, seed), self.bench.methods[label]
        if not path.is_file() and method.weights is not None and not self.weights(method.weights, seed).is_file():
            self.trained(method.weights, seed)
        reader = make_reader(self.bench, self.corpus, label, seed)
        if path.is_file():
            load_weights(reader, path)
            return reader
        if method.weights is not None:
            load_weights(reader, self.weights(method.weights, seed))
        print(f"{label}, seed {seed}: training for {method.steps} steps", flush=True)
        took = train(reader, self.bench, method, self.corpus, seed, self.device, self.folder)
        save_weights(reader, path)
        self.add(("training", label, seed, None, None), took)
        return reader

    def weights(self, label: str, seed: int) -> Path:
        """Where a method's weights are kept; those of another method if it never trains."""
        method = self.bench.methods[label]
        if method.weights is not None and not method.steps:
            return self.weights(method.weights, seed)
        return self.folder / "weights" / f"{label}-{seed}.safetensors"

    def rows_of_all(self) -> list[dict]:
        """The rows of this and of every other process."""
        lines = self.results.rows_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def add(self, cell: tuple, measured: dict) -> None:
        """A row of results."""
        machine = {"device": device_in_words(self.device), "torch": versions()["torch"]}
        row = {name: value for name, value in zip(KEY, cell, strict=True) if value is not None}
        self.results.append(row | measured | machine)
        self.done.add(cell)
        print(" ".join(f"{name}={value}" for name, value in (row | measured).items()), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 if a method failed."""
    options = arguments(argv)
    bench = load(options.config)
    folder, failed = Path(options.output), []
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.set_verbosity_error()  # no warning about texts beyond the training context: they are the point
    run = Run(bench, Path(options.data), folder, device)
    for seed in [] if options.only_report else options.seeds or bench.seeds:
        for label in options.methods or bench.methods:
            if label not in bench.methods:
                raise InputError(f"--methods {label}: choose from {', '.join(bench.methods)}")
            count = bench.methods[label].seeds
            if seed not in bench.seeds[:count]:
                continue
            try:
                run.method(label, seed)
            except (RuntimeError, ValueError, ArithmeticError):  # one method's failure leaves the others their night
                traceback.print_exc()
                failed.append(f"{label}, seed {seed}")
    for path in report.write(bench, run.rows_of_all(), folder):
        print(path)
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; bench.py says what is in it")
    parser.add_argument("--output", required=True, help="folder of results, weights, tables and pictures")
    parser.add_argument("--data", default=".", help="folder that the configuration's files are in")
    parser.add_argument("--methods", nargs="+", help="labels; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the configuration")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--only_report", action="store_true", help="draws what has been measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"comparisons: {error}")
    except KeyboardInterrupt:
        sys.exit("comparisons: interrupted; the same command goes on from here")
