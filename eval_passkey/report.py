"""What the rows of a run come to: accuracy with its interval, by length and by phase, and the printed tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import median

Z95 = 1.959964  # two-sided 95 % of the normal distribution
_TABLE_PHASES = 8  # columns of the table by phase


@dataclass(frozen=True)
class Measured:
    """The rows of one model, and how to call it."""

    label: str
    rows: Sequence[dict]
    training_context: int | None
    num_depths: int | None  # of the grid; None where depths are random
    period: int | None = None  # ordinary tokens of a block; None where there are no blocks

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were asked."""
        return list(dict.fromkeys(row["task"] for row in self.rows))

    def of_task(self, task: str) -> "Measured":
        """The rows of one task."""
        return replace(self, rows=[row for row in self.rows if row["task"] == task])


def wilson_interval(correct: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the accuracy `correct / samples`; (0, 1) without samples."""
    if samples == 0:
        return 0.0, 1.0
    accuracy, squared = correct / samples, Z95**2
    centre = accuracy + squared / (2 * samples)
    spread = Z95 * sqrt(accuracy * (1 - accuracy) / samples + squared / (4 * samples**2))
    scale = 1 + squared / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarise(rows: Sequence[dict]) -> list[dict]:
    """One entry a task and length, in the order of the tasks, shortest first.

    `accuracy` is the share of prompts answered in full. For tasks with several answers, `recall` is the mean share of
    them that was given (RULER's string match, all), `part` the share of prompts with at least one (its match, part).
    `seconds_per_prompt` is the median.
    """
    entries = []
    for (task, length), group in _grouped(rows, "length").items():
        entries.append(
            {
                "task": task,
                "length": length,
                **_accuracy(group),
                "recall": sum(row["recall"] for row in group) / len(group),
                "part": sum(row["recall"] > 0 for row in group) / len(group),
                "seconds_per_prompt": median(row["seconds"] for row in group),
            }
        )
    return entries


def summarise_phases(rows: Sequence[dict]) -> list[dict]:
    """One entry a task and phase, all lengths together; empty where there are no blocks.

    The phase of a prompt is the number of its tokens in the last block, which says where the question stands in it.
    """
    known = [row for row in rows if row["phase"] is not None]
    return [
        {"task": task, "phase": phase, **_accuracy(group)} for (task, phase), group in _grouped(known, "phase").items()
    ]


def phase_counts(rows: Sequence[dict], bins: Sequence[range]) -> list[list[int]]:
    """[right, total] in each bin of phases."""
    counts = [[0, 0] for _ in bins]
    for row in rows:
        i = next(i for i, phases in enumerate(bins) if row["phase"] in phases)
        counts[i][0] += bool(row["correct"])
        counts[i][1] += 1
    return counts


def phase_bins(period: int, at_most: int) -> list[range]:
    """The phases 0 to `period - 1` in at most so many bins, all but the last of the same width."""
    width = -(-period // at_most)
    return [range(start, min(start + width, period)) for start in range(0, period, width)]


def bin_name(phases: range) -> str:
    """`4-5`, or `4` alone."""
    return f"{phases[0]}-{phases[-1]}" if len(phases) > 1 else str(phases[0])


def _grouped(rows: Sequence[dict], field: str) -> dict[tuple, list[dict]]:
    """Rows by task and the field, tasks in the order in which they come, the field ascending."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"], row[field]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (tasks.index(item[0][0]), item[0][1])))


def _accuracy(group: Sequence[dict]) -> dict:
    correct = sum(row["correct"] for row in group)
    low, high = wilson_interval(correct, len(group))
    accuracy = correct / len(group)
    return {"samples": len(group), "correct": correct, "accuracy": accuracy, "ci_low": low, "ci_high": high}


def table(models: Sequence[Measured]) -> str:
    """The summaries side by side, a line a task and length; with the recall where a task has several answers."""
    summaries = [{(entry["task"], entry["length"]): entry for entry in summarise(model.rows)} for model in models]
    keys = list(dict.fromkeys(key for summary in summaries for key in summary))
    tasks = list(dict.fromkeys(task for task, _ in keys))
    several = any(entry["recall"] != entry["accuracy"] for summary in summaries for entry in summary.values())
    column = f"{'right':>9} {'accuracy':>9} {'95 %':>9} " + (f"{'recall':>8} " if several else "") + f"{'s/prompt':>8}"
    width = max(map(len, ["task", *tasks]))
    names = [" " * (width + 8)] + [f"{model.label:^{len(column)}}" for model in models]
    heads = [f"{'task':<{width}} {'length':>7}"] + [column for _ in models]
    lines = [" | ".join(names), " | ".join(heads), "-+-".join("-" * len(head) for head in heads)]
    for task, length in sorted(keys, key=lambda key: (tasks.index(key[0]), key[1])):
        cells = [_table_cell(summary.get((task, length)), several) for summary in summaries]
        lines.append(" | ".join([f"{task:<{width}} {length:>7}", *(f"{cell:<{len(column)}}" for cell in cells)]))
    return "\n".join(line.rstrip() for line in lines)


def _table_cell(entry: dict | None, several: bool) -> str:
    if entry is None:
        return f"{'not run':>9}"
    right = f"{entry['correct']}/{entry['samples']}"
    interval = f"{100 * entry['ci_low']:.0f}-{100 * entry['ci_high']:.0f} %"
    recall = f"{100 * entry['recall']:>6.1f} % " if several else ""
    return f"{right:>9} {100 * entry['accuracy']:>7.1f} % {interval:>9} {recall}{entry['seconds_per_prompt']:>8.2f}"


def phase_table(models: Sequence[Measured]) -> str:
    """The share of right answers by the phase of the prompt, a line a model and task; all have the same period."""
    period = next(model.period for model in models if model.period)
    bins = phase_bins(period, _TABLE_PHASES)
    names = [bin_name(phases) for phases in bins]
    lines = [(f"{model.label}, {task}", model.of_task(task)) for model in models for task in model.tasks]
    title = f"right, in %, by tokens in the last block (0 to {period - 1})"
    width = max(map(len, [title, *(label for label, _ in lines)]))
    shown = [f"{title:<{width}} " + " ".join(f"{name:>5}" for name in names)]
    for label, measured in lines:
        counts = phase_counts(measured.rows, bins)
        cells = [f"{100 * right / total:>5.0f}" if total else f"{'-':>5}" for right, total in counts]
        shown.append(f"{label:<{width}} " + " ".join(cells))
    return "\n".join(shown)
