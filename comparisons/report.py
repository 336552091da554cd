"""Tables and pictures of the rows of results: mean over seeds, and from the least to the greatest of them."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from comparisons.bench import Bench

Cells = dict[tuple[str, int], list[float]]  # by method and length, a value a seed


def write(bench: Bench, rows: list[dict], folder: Path) -> list[Path]:
    """Writes `tables.md` and a picture of each kind of rows; returns their paths."""
    parts, paths = [], []
    for domain in bench.data:
        nll = [row for row in rows if row["kind"] == "perplexity" and row["on"] == domain]
        if nll:
            perplexity = gather(nll, lambda row: math.exp(row["nll"] / row["tokens"]))
            bits = gather(nll, lambda row: row["nll"] / math.log(2) / row["bytes"])
            parts.append(f"## Perplexity of {domain}, by tokens of context\n\n" + table(bench, perplexity, "{:.2f}"))
            parts.append(f"## Bits per byte of {domain}\n\n" + table(bench, bits, "{:.3f}"))
            paths.append(_lines(bench, bits, "bits per byte", domain, folder / f"perplexity_{domain}.png"))
    for task in bench.retrieval.tasks:
        asked = [row for row in rows if row["kind"] == "retrieval" and row["on"] == task]
        if asked:
            accuracy = gather(asked, lambda row: row["correct"] / row["samples"])
            parts.append(f"## Accuracy of {task}, by tokens of the prompt\n\n" + table(bench, accuracy, "{:.2f}"))
            paths.append(_lines(bench, accuracy, "accuracy", task, folder / f"retrieval_{task.replace(':', '_')}.png"))
    parts += _cost_tables(bench, rows)
    paths += _cost_picture(bench, rows, folder / "cost.png")
    path = folder / "tables.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [path, *paths]


def gather(rows: list[dict], value: Callable[[dict], float]) -> Cells:
    """The values of rows by method and length."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row.get("length", 0)].append(value(row))
    return dict(cells)


def table(bench: Bench, cells: Cells, form: str) -> str:
    """Markdown: a line a method, a column a length; what is not measured is a dash, explained below the table."""
    lengths = sorted({length for _, length in cells})
    lines = ["| method | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    reasons = []
    for label, method in bench.methods.items():
        if not any((label, length) in cells for length in lengths):
            continue
        lines.append(f"| {label} | " + " | ".join(_cell(cells.get((label, n)), form) for n in lengths) + " |")
        if method.max_length and method.max_length < lengths[-1] and method.reason:
            reasons.append(f"{label}: not above {method.max_length:,} tokens, {method.reason}.")
    return "\n".join(lines) + ("\n\n" + "\n".join(reasons) if reasons else "")


def _cell(values: list[float] | None, form: str) -> str:
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _cost_tables(bench: Bench, rows: list[dict]) -> list[str]:
    training = {
        name: [row for row in rows if row["kind"] == "training" and row["method"] == name] for name in bench.methods
    }
    lines = ["| method | parameters | training, s | tokens |", "|---|---|---|---|"]
    for label, some in training.items():
        if some:
            seconds = _cell([row["seconds"] for row in some], "{:.0f}")
            lines.append(f"| {label} | {some[0]['parameters']:,} | {seconds} | {some[0]['tokens']:,} |")
    parts = ["## Training\n\n" + "\n".join(lines)] if any(training.values()) else []
    costs = [row for row in rows if row["kind"] == "cost"]
    if costs:
        for name, unit, scale, form in (
            ("read_seconds", "Seconds to read a text", 1, "{:.2f}"),
            ("decode_seconds", "Milliseconds a token decoded after it", 1e3, "{:.1f}"),
            ("memory", "Memory that takes, MB", 1e-6, "{:.0f}"),
        ):
            cells = gather(costs, lambda row, name=name, scale=scale: row[name] * scale)
            parts.append(f"## {unit}\n\n" + table(bench, cells, form))
    return parts


def _lines(bench: Bench, cells: Cells, what: str, title: str, path: Path) -> Path:
    """A line a method over length, the seeds' range around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, label in enumerate(bench.methods):
        lengths = sorted(length for method, length in cells if method == label)
        if lengths:
            values = [cells[label, length] for length in lengths]
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "."}
            axes.plot(lengths, [sum(some) / len(some) for some in values], label=label, **style)
            axes.fill_between(lengths, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel=what, title=title)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _cost_picture(bench: Bench, rows: list[dict], path: Path) -> list[Path]:
    """How good against how dear, at the greatest length measured: of retrieval if there is any, else bits per byte."""
    from matplotlib.figure import Figure

    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("cost", "retrieval", "perplexity")}
    kind = "retrieval" if kinds["retrieval"] else "perplexity"
    if not kinds["cost"] or not kinds[kind]:
        return []
    longest = max(row["length"] for row in kinds[kind])
    dear = max(row["length"] for row in kinds["cost"])
    seconds = gather(kinds["cost"], lambda row: row["read_seconds"])
    if kind == "retrieval":
        good = gather(kinds[kind], lambda row: row["correct"] / row["samples"])
    else:
        good = gather(kinds[kind], lambda row: row["nll"] / math.log(2) / row["bytes"])
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for label in bench.methods:
        if (label, dear) in seconds and (label, longest) in good:
            x, values = seconds[label, dear][0], good[label, longest]
            axes.plot(x, sum(values) / len(values), "o")
            axes.annotate(
                label, (x, sum(values) / len(values)), fontsize="small", xytext=(4, 4), textcoords="offset points"
            )
    what = "accuracy, mean of the tasks" if kind == "retrieval" else "bits per byte"
    axes.set_xscale("log")
    axes.set(xlabel=f"seconds to read {dear:,} tokens", ylabel=f"{what}, {longest:,} tokens")
    figure.savefig(path, dpi=120)
    return [path]
