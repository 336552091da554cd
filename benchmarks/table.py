"""Makes Markdown tables from result files, and names the lengths at which dense attention wins.

    python benchmarks/table.py                                # every file in benchmarks/results/
    python benchmarks/table.py benchmarks/results/generation.jsonl

Shows the last run of each file. Smaller figures are better in all tables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
DENSE = {"dense": "dense, SDPA", "dense static": "dense, SDPA, `StaticCache`"}
TITLES = {
    "prefill_seconds": "Reading a prompt, seconds",
    "decode_ms_per_token": "Generating, milliseconds a token",
    "peak_memory_mib": "Peak memory beside the weights, MiB",
    "step_seconds": "One training step, seconds",
}

Row = dict[str, Any]


def last_run(path: Path) -> list[Row]:
    """The rows of a file's last run. Raises ValueError if the file cannot be read or a line is not a row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            complete = {"run", "benchmark", "quantity", "implementation", "median"} <= row.keys()
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise ValueError(f"{path}, line {number}: is no row of results")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def markdown(rows: list[Row]) -> str:
    """The tables of one run, after a description of its setup and before a sentence on where dense wins."""
    size = "length" if rows[0]["benchmark"] == "generation" else "batch"
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    tables = [_table(quantity, [row for row in rows if row["quantity"] == quantity], size) for quantity in quantities]
    return "\n\n".join([_setup(rows), *tables, _where_dense_wins(rows, size)])


def _table(quantity: str, rows: list[Row], size: str) -> str:
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    unit = "tokens" if size == "length" else "rows of a batch"
    lines = [
        f"**{TITLES[quantity]}**",
        "",
        f"| {unit} | " + " | ".join(_in_words(name) for name in implementations) + " |",
        "|---:|" + "---:|" * len(implementations),
    ]
    for value in sorted({row[size] for row in rows}):
        cells = {row["implementation"]: row for row in rows if row[size] == value}
        best = min(row["median"] for row in cells.values())
        figures = [_cell(cells.get(name), best) for name in implementations]
        lines.append(f"| {value:,} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _cell(row: Row | None, best: float) -> str:
    """A median, in bold if it is the best of its row, and its factor relative to the dense model at its fastest."""
    if row is None:
        return "–"
    figure = _number(row["median"]) + ("\\*" if "note" in row else "")
    if row["median"] == best:
        figure = f"**{figure}**"
    if row["implementation"] in DENSE or not row["ratio_to_dense"]:
        return figure
    # training: our time divided by the dense model's; generation: the dense model's figure divided by ours
    factor = row["ratio_to_dense"] if row["benchmark"] == "training" else 1 / row["ratio_to_dense"]
    return f"{figure} ({_number(factor)}×)"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _in_words(implementation: str) -> str:
    kind, _, granularity = implementation.partition(" ")
    if kind == "dense":
        return DENSE[implementation]
    return f"{kind}, `{granularity}`" if granularity else kind


def _setup(rows: list[Row]) -> str:
    """Machine, versions, shape and spread of a run, and what the numbers in brackets mean."""
    machine, shape, versions = rows[0]["machine"], rows[0]["shape"], rows[0]["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    spread = max((row["max"] - row["min"]) / row["median"] for row in rows)
    repetitions = max(row["repetitions"] for row in rows)
    training = rows[0]["benchmark"] == "training"
    meaning = "how many times as large the dense model's figure is, with the faster of its caches"
    if training:
        meaning = "times the dense model's time"
    together = "" if training or rows[0].get("batch", 1) == 1 else f", {rows[0]['batch']} rows at once"
    once = " (\\*: measured fewer times)" if any("note" in row for row in rows) else ""
    return (
        f"{where}; {rows[0]['dtype']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{rows[0]['model']}: {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} heads of {shape['head_dim']}, blocks of {shape['block_size']}, "
        f"a window of {shape['train_context_length']} positions, {shape['num_retrieved_blocks']} blocks retrieved"
        f"{together}. "
        f"Medians of {repetitions}{once}; a row's extremes lie at most {spread:.0%} of its median apart. "
        f"In brackets: {meaning}."
    )


def _where_dense_wins(rows: list[Row], size: str) -> str:
    """A sentence that lists where the dense model is better than every landmark model."""
    found: dict[str, list[str]] = {}
    for quantity, value in dict.fromkeys((row["quantity"], row[size]) for row in rows):
        there = [row for row in rows if (row["quantity"], row[size]) == (quantity, value)]
        dense = [row["median"] for row in there if row["implementation"] in DENSE]
        others = [row["median"] for row in there if row["implementation"] not in DENSE]
        if dense and others and min(dense) < min(others):
            found.setdefault(quantity, []).append(f"{value:,}")
    if not found:
        return "The dense model is nowhere ahead."
    unit = "tokens" if size == "length" else "rows"
    places = [f"{TITLES[quantity].split(',')[0].lower()} at {', '.join(at)} {unit}" for quantity, at in found.items()]
    return f"The dense model is ahead in {'; '.join(places)}."


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of the named files, or of all results."""
    paths = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    # these benchmarks print their own figures and have no dense model to compare with
    others = ("*.failed.jsonl", "kernels*.jsonl", "tokenisation*.jsonl")
    paths = paths or [path for path in sorted(RESULTS.glob("*.jsonl")) if not any(map(path.match, others))]
    if not paths:
        raise ValueError(f"{RESULTS}: no results yet; run benchmarks/generation.py or benchmarks/training.py")
    print("\n\n".join(markdown(last_run(path)) for path in paths))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
