"""What the rows of a run come to: accuracy with its interval, the table, the two pictures."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median

_Z95 = 1.959964  # two-sided 95 % of the normal distribution
_RANDOM_DEPTH_BANDS = 5
_TRAINED_AT = ": trained at "
# Okabe and Ito's blue and vermilion: told apart with any kind of colour vision, and by lightness in print.
_STYLES = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s", "linestyle": "--"})


@dataclass(frozen=True)
class Measured:
    """The rows of one model, and how to call it."""

    label: str
    rows: Sequence[dict]
    training_context: int | None
    num_depths: int | None  # of the grid; None where depths are random


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the accuracy `correct / samples`; (0, 1) without samples."""
    if samples == 0:
        return 0.0, 1.0
    accuracy, squared = correct / samples, _Z95**2
    centre = accuracy + squared / (2 * samples)
    spread = _Z95 * sqrt(accuracy * (1 - accuracy) / samples + squared / (4 * samples**2))
    scale = 1 + squared / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarise(rows: Sequence[dict]) -> list[dict]:
    """One entry a length, shortest first. `seconds_per_prompt` is the median."""
    by_length = defaultdict(list)
    for row in rows:
        by_length[row["length"]].append(row)
    summary = []
    for length, group in sorted(by_length.items()):
        correct = sum(row["correct"] for row in group)
        low, high = wilson_interval(correct, len(group))
        summary.append(
            {
                "length": length,
                "samples": len(group),
                "correct": correct,
                "accuracy": correct / len(group),
                "ci_low": low,
                "ci_high": high,
                "seconds_per_prompt": median(row["seconds"] for row in group),
            }
        )
    return summary


def table(models: Sequence[Measured]) -> str:
    """The summaries side by side, a line a length."""
    summaries = [{entry["length"]: entry for entry in summarise(model.rows)} for model in models]
    names = [" " * 7] + [f"{model.label:^38}" for model in models]
    heads = [f"{'length':>7}"] + [f"{'right':>9} {'accuracy':>9} {'95 %':>9} {'s/prompt':>8}" for _ in models]
    lines = [" | ".join(names), " | ".join(heads), "-+-".join("-" * len(head) for head in heads)]
    for length in sorted(set().union(*summaries)):
        cells = [f"{length:>7}"] + [_table_cell(summary.get(length)) for summary in summaries]
        lines.append(" | ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _table_cell(entry: dict | None) -> str:
    if entry is None:
        return f"{'not run':>9}" + " " * 29
    right = f"{entry['correct']}/{entry['samples']}"
    interval = f"{100 * entry['ci_low']:.0f}-{100 * entry['ci_high']:.0f} %"
    return f"{right:>9} {100 * entry['accuracy']:>7.1f} % {interval:>9} {entry['seconds_per_prompt']:>8.2f}"


def plot_accuracy(models: Sequence[Measured], path: Path) -> None:
    """Accuracy over length with Wilson bars; dotted lines where each model's training context ends."""
    figure, axes = _new_figure(7.2, 4.6)
    for i, model in enumerate(models):
        shift = 1.03 ** (i - (len(models) - 1) / 2)  # keeps the bars of two models apart
        _draw_accuracy(axes, model, shift, _STYLES[i % len(_STYLES)])
    lengths = sorted({row["length"] for model in models for row in model.rows})
    ends = lengths + [model.training_context for model in models if model.training_context]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.25, max(ends) * 1.25)
    axes.set_ylim(-4, 104)
    axes.set_xticks(lengths, [_short_length(length) for length in lengths], rotation=45 if len(lengths) > 10 else 0)
    axes.minorticks_off()
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("pass keys found (%)")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()  # dotted lines come first; models shall
    order = sorted(range(len(labels)), key=lambda i: _TRAINED_AT in labels[i])
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_accuracy(axes, model: Measured, shift: float, style: dict) -> None:
    entries = summarise(model.rows)
    x = [entry["length"] * shift for entry in entries]
    accuracy = [100 * entry["accuracy"] for entry in entries]
    below = [max(0.0, 100 * (entry["accuracy"] - entry["ci_low"])) for entry in entries]
    above = [max(0.0, 100 * (entry["ci_high"] - entry["accuracy"])) for entry in entries]
    axes.errorbar(x, accuracy, (below, above), label=model.label, capsize=3, elinewidth=1.2, linewidth=1.8, **style)
    if model.training_context:
        label = f"{model.label}{_TRAINED_AT}{model.training_context:,} positions"
        axes.axvline(model.training_context * shift, color=style["color"], linestyle=":", linewidth=1.5, label=label)


def plot_depth(models: Sequence[Measured], path: Path) -> None:
    """Accuracy by length and depth of the needle, a panel a model; each cell says how many of how many were right."""
    figure, panels = _new_figure(1.6 + 5.2 * len(models), 4.4, columns=len(models))
    for axes, model in zip(panels, models, strict=True):
        image = _draw_depth(axes, model)
    panels[0].set_ylabel("depth of the needle (0 %: start of the filler)")
    figure.colorbar(image, ax=list(panels), label="share of pass keys found", fraction=0.04, pad=0.02)
    figure.savefig(path)


def _draw_depth(axes, model: Measured):
    """Draws a panel and returns its image, which the colour bar explains."""
    lengths = sorted({row["length"] for row in model.rows})
    bands = _depth_bands(model.num_depths)
    counts = _depth_counts(model, lengths)
    shares = [[right / total if total else float("nan") for right, total in line] for line in counts]
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(counts):
        for j, (right, total) in enumerate(line):
            if total:
                colour = "black" if right > total / 2 else "white"
                axes.text(j, i, f"{right}/{total}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_facecolor("0.9")  # cells without a prompt
    axes.set_xticks(range(len(lengths)), [_short_length(length) for length in lengths])
    axes.set_yticks(range(len(bands)), bands)
    axes.set_xticks([j + 0.5 for j in range(len(lengths) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(bands) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("prompt length (tokens)")
    axes.set_title(model.label, fontsize=10)
    return image


def _depth_counts(model: Measured, lengths: Sequence[int]) -> list[list[list[int]]]:
    """[right, total] by depth band and length."""
    bands = len(_depth_bands(model.num_depths))
    counts = [[[0, 0] for _ in lengths] for _ in range(bands)]
    for row in model.rows:
        if model.num_depths is None:
            band = min(int(row["depth"] * bands), bands - 1)
        else:
            band = round(row["depth"] * (bands - 1))
        cell = counts[band][lengths.index(row["length"])]
        cell[0] += bool(row["correct"])
        cell[1] += 1
    return counts


def _depth_bands(num_depths: int | None) -> list[str]:
    """Names of the heat map's rows: the depths of the grid, or bands of random depths."""
    if num_depths is None:
        width = 100 // _RANDOM_DEPTH_BANDS
        return [f"{start}-{start + width} %" for start in range(0, 100, width)]
    return [f"{100 * i / max(num_depths - 1, 1):.0f} %" for i in range(num_depths)]


def _short_length(length: int) -> str:
    """1024 as 1k; a number that is no whole multiple stays as it is."""
    for size, unit in ((1024**2, "M"), (1024, "k")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _new_figure(width: float, height: float, columns: int | None = None):
    """A figure that needs no display, with its axes (a sequence of them if `columns` is given)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if columns is None:
        return figure, figure.subplots()
    return figure, figure.subplots(1, columns, squeeze=False)[0]
