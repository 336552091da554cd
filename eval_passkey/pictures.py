"""The pictures of a run: accuracy over length, by the needle's depth, and by the phase of the prompt."""

from collections.abc import Sequence
from pathlib import Path

from eval_passkey.ranks import summarise_ranks
from eval_passkey.report import Measured, bin_name, phase_bins, phase_counts, summarise

_RANDOM_DEPTH_BANDS = 5
_PANELS_A_ROW = 4
_PICTURE_PHASES = 16
_TRAINED_AT = ": trained at "
# Okabe and Ito's colours: told apart with any kind of colour vision, the first two by lightness in print, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_LINES = ({"marker": "o"}, {"marker": "s", "linestyle": "--"})  # the model, the baseline


def draw(models: Sequence[Measured], output: Path) -> list[Path]:
    """Makes the pictures and returns their paths; none by phase where there are no blocks."""
    pictures = [("accuracy.png", plot_accuracy), ("depth.png", plot_depth)]
    if any(model.period for model in models):
        pictures.append(("phase.png", plot_phase))
    if summarise_ranks(models[0].rows):
        pictures.append(("rank.png", plot_rank))
    for name, plot in pictures:
        plot(models, output / name)
    return [output / name for name, _ in pictures]


def plot_accuracy(models: Sequence[Measured], path: Path) -> None:
    """Accuracy over length with Wilson bars, a line a model and task; dotted lines where training contexts end."""
    figure, axes = _new_figure(7.2, 4.6)
    tasks = list(dict.fromkeys(task for model in models for task in model.tasks))
    lines = [(model, task) for model in models for task in model.tasks]
    for i, (model, task) in enumerate(lines):
        shift = 1.03 ** (i - (len(lines) - 1) / 2)  # keeps the bars apart
        _draw_accuracy(axes, model.of_task(task), shift, _style(models, model, tasks, task), len(tasks) > 1)
    for model in models:
        if model.training_context:
            colour = _style(models, model, tasks, tasks[0])["color"] if len(tasks) == 1 else "0.5"
            label = f"{model.label}{_TRAINED_AT}{model.training_context:,} positions"
            style = ":" if model is models[0] else "-."
            axes.axvline(model.training_context, color=colour, linestyle=style, linewidth=1.5, label=label)
    lengths = sorted({row["length"] for model in models for row in model.rows})
    ends = lengths + [model.training_context for model in models if model.training_context]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.25, max(ends) * 1.25)
    axes.set_ylim(-4, 104)
    axes.set_xticks(lengths, [_short_length(length) for length in lengths], rotation=45 if len(lengths) > 10 else 0)
    axes.minorticks_off()
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("answered in full (%)")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: _TRAINED_AT in labels[i])  # models come first
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def plot_rank(models: Sequence[Measured], path: Path) -> None:
    """Rank of the needle's block over the number of blocks, by each task's best head: median and 90th percentile."""
    figure, axes = _new_figure(7.2, 4.6)
    summaries = summarise_ranks(models[0].rows)
    retrieved = max(row["retrieved"] for row in models[0].rows if "retrieved" in row)
    for i, task in enumerate(dict.fromkeys(summary.task for summary in summaries)):
        own = [summary for summary in summaries if summary.task == task]
        blocks, colour = [summary.candidates for summary in own], _COLOURS[i % len(_COLOURS)]
        label = f"{task} (layer {own[0].layer}, head {own[0].head})"
        axes.plot(blocks, [1 + summary.median for summary in own], color=colour, marker="o", label=label)
        axes.fill_between(blocks, [1 + x.median for x in own], [1 + x.ninth for x in own], color=colour, alpha=0.15)
    axes.axhline(retrieved, color="0.4", linestyle=":", label=f"{retrieved} blocks are retrieved")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("blocks that could be retrieved")
    axes.set_ylabel("rank of the needle's block, from 1")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def _style(models: Sequence[Measured], model: Measured, tasks: Sequence[str], task: str) -> dict:
    """A colour a model where there is one task, else a colour a task; a kind of line a model."""
    i = models.index(model)
    colour = tasks.index(task) if len(tasks) > 1 else i
    return {"color": _COLOURS[colour % len(_COLOURS)], **_LINES[i % len(_LINES)]}


def _draw_accuracy(axes, model: Measured, shift: float, style: dict, name_task: bool) -> None:
    entries = summarise(model.rows)
    x = [entry["length"] * shift for entry in entries]
    accuracy = [100 * entry["accuracy"] for entry in entries]
    below = [max(0.0, 100 * (entry["accuracy"] - entry["ci_low"])) for entry in entries]
    above = [max(0.0, 100 * (entry["ci_high"] - entry["accuracy"])) for entry in entries]
    label = f"{model.label}, {model.tasks[0]}" if name_task else model.label
    axes.errorbar(x, accuracy, (below, above), label=label, capsize=3, elinewidth=1.2, linewidth=1.8, **style)


def plot_depth(models: Sequence[Measured], path: Path) -> None:
    """Accuracy by length and depth of the needle, a panel a model and task; a cell says how many of how many."""
    panels = [(model, task) for model in models for task in model.tasks]
    figure, axes = _panels(len(panels), 5.2, 4.4)
    for ax, (model, task) in zip(axes, panels, strict=True):
        image = _draw_depth(ax, model.of_task(task))
        ax.set_title(f"{model.label}, {task}", fontsize=10)
    axes[0].set_ylabel("depth of the needle (0 %: start)")
    figure.colorbar(image, ax=list(axes), label="share answered in full", fraction=0.04, pad=0.02)
    figure.savefig(path)


def _draw_depth(axes, model: Measured):
    """Draws a panel and returns its image, which the colour bar explains."""
    lengths = sorted({row["length"] for row in model.rows})
    image = _heat_map(axes, _depth_counts(model, lengths))
    axes.set_xticks(range(len(lengths)), [_short_length(length) for length in lengths])
    bands = _depth_bands(model.num_depths)
    axes.set_yticks(range(len(bands)), bands)
    axes.set_xlabel("prompt length (tokens)")
    return image


def plot_phase(models: Sequence[Measured], path: Path) -> None:
    """Accuracy by task and by the tokens of the prompt's last block, a panel a model, all lengths together."""
    models = [model for model in models if model.period]
    tasks = max(len(model.tasks) for model in models)
    figure, axes = _panels(len(models), 6.4, 1.6 + 0.5 * tasks)
    for ax, model in zip(axes, models, strict=True):
        bins = phase_bins(model.period, _PICTURE_PHASES)
        image = _heat_map(ax, [phase_counts(model.of_task(task).rows, bins) for task in model.tasks])
        ax.set_xticks(range(len(bins)), [bin_name(phases) for phases in bins], fontsize=8)
        ax.set_yticks(range(len(model.tasks)), model.tasks)
        ax.set_xlabel("tokens of the prompt in its last block")
        ax.set_title(model.label, fontsize=10)
    figure.colorbar(image, ax=list(axes), label="answered in full", fraction=0.04, pad=0.02)
    figure.savefig(path)


def _heat_map(axes, counts: Sequence[Sequence[Sequence[int]]]):
    """Cells of [right, total] with their numbers in them; grey where nothing was asked. Returns the image."""
    shares = [[right / total if total else float("nan") for right, total in line] for line in counts]
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(counts):
        for j, (right, total) in enumerate(line):
            if total:
                colour = "black" if right > total / 2 else "white"
                axes.text(j, i, f"{right}/{total}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_facecolor("0.9")
    axes.set_xticks([j + 0.5 for j in range(len(counts[0]) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(counts) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
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


def _panels(count: int, width: float, height: float):
    """A figure of `count` panels of that size in inches, at most four side by side, and the panels."""
    columns = min(count, _PANELS_A_ROW)
    rows = -(-count // columns)
    figure, axes = _new_figure(1.6 + width * columns, height * rows, rows, columns)
    panels = list(axes.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _new_figure(width: float, height: float, rows: int = 0, columns: int = 0):
    """A figure that needs no display, with its axes (an array of them if `rows` and `columns` are given)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if not rows:
        return figure, figure.subplots()
    return figure, figure.subplots(rows, columns, squeeze=False)
