"""What the model must reach, and what was measured of it so far: a goal a line, with its 95 % interval."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from eval_passkey.differences import Difference, difference, paired_difference
from eval_passkey.report import wilson_interval

WITHIN_DENSE = 1.03  # of the dense model's perplexity, in contexts up to SHORT
SHORT, TRAINED = 2048, 8192  # tokens; TRAINED: the dense model's positions
PASS_KEYS, FAR_PASS_KEYS = 0.98, 0.95  # up to FAR tokens, and beyond
FAR = 32768
RULER_LOSS, SHORT_TASK_LOSS = -0.05, -0.02


@dataclass(frozen=True)
class Goal:
    """A limit, what was measured, and the interval of that; None where there is none."""

    what: str
    measured: str
    value: float
    low: float | None
    high: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the value itself keeps within the limit."""
        return self._within(self.value, self.value)

    @property
    def sure(self) -> bool:
        """Whether the interval says the same as the value."""
        if self.low is None or self.high is None:
            return False
        if self.reached:
            return self._within(self.low, self.high)
        return self.high < self.at_least if self.at_least is not None else self.low > self.at_most

    def _within(self, low: float, high: float) -> bool:
        return (self.at_least is None or low >= self.at_least) and (self.at_most is None or high <= self.at_most)


def find_goals(folder: Path) -> list[Goal]:
    """All goals of which something is measured."""
    return [*_perplexity(folder), *_pass_keys(folder), *_ruler(folder), *_short_tasks(folder), *_reading(folder)]


def _perplexity(folder: Path) -> Iterator[Goal]:
    summary = read_summary(folder / "perplexity")
    for entry in summary.get("differences", []):
        length, other = entry["length"], entry["against"]
        if length <= SHORT and other == "dense":
            yield _ratio(f"perplexity at {length:,} tokens: within 3 % of dense", entry, WITHIN_DENSE)
    for entry in summary.get("context_gains", []):
        if entry["method"] == "landmark" and entry["length"] >= TRAINED:
            yield _ratio(f"perplexity at {entry['length']:,} tokens: below that at {entry['against']:,}", entry, 1.0)
    for entry in summary.get("differences", []):
        if entry["length"] >= TRAINED:
            yield _ratio(f"perplexity at {entry['length']:,} tokens: below {entry['against']}", entry, 1.0)


def _ratio(what: str, entry: dict, at_most: float) -> Goal:
    low, high = entry["ci_low"], entry["ci_high"]
    documents = f"{entry['documents']} text" + ("s" if entry["documents"] > 1 else "")
    interval = "no interval" if low is None else f"{low:.3f} to {high:.3f}"
    return Goal(
        what, f"ratio {entry['perplexity_ratio']:.3f} ({interval}; {documents})", entry["perplexity_ratio"], low, high,
        at_most=at_most,
    )  # fmt: skip


def _pass_keys(folder: Path) -> Iterator[Goal]:
    for entry in read_summary(folder / "passkey").get("rows", []):
        limit = PASS_KEYS if entry["length"] <= FAR else FAR_PASS_KEYS
        right, samples = entry["correct"], entry["samples"]
        low, high = wilson_interval(right, samples)
        yield Goal(
            f"pass keys at {entry['length']:,} tokens: at least {limit:.0%}",
            f"{right} of {samples} ({low:.0%} to {high:.0%})", right / samples, low, high, at_least=limit,
        )  # fmt: skip


def _ruler(folder: Path) -> Iterator[Goal]:
    ours, theirs = read_jsonl(folder / "ruler" / "results.jsonl"), read_jsonl(folder / "ruler/baseline/results.jsonl")
    lengths = sorted({row["length"] for row in ours})
    tasks = list(dict.fromkeys(row["task"] for row in ours))
    for length in lengths[:1]:
        for task in [*tasks, "all tasks"]:
            found = paired_difference(scores_of(ours, task, length), scores_of(theirs, task, length))
            yield from _points(f"{task} at {length:,} tokens: within 5 points of dense", found, RULER_LOSS)
    for length in lengths[1:]:
        for task in [*tasks, "all tasks"]:
            far, near = scores_of(ours, task, length), scores_of(ours, task, lengths[0])
            found = difference(sum(far.values()), len(far), sum(near.values()), len(near))
            yield from _points(f"{task} at {length:,} tokens: within 5 points of {lengths[0]:,}", found, RULER_LOSS)


def _short_tasks(folder: Path) -> Iterator[Goal]:
    sides = [
        {row["passage"]: row["correct"] for row in read_jsonl(folder / "cloze" / name / "results.jsonl")}
        for name in ("landmark", "dense")
    ]
    found = paired_difference(*sides)
    yield from _points("last words of short passages: within 2 points of dense", found, SHORT_TASK_LOSS)


def _points(what: str, found: Difference | None, at_least: float) -> Iterator[Goal]:
    if found is not None:
        value, low, high, samples = found
        measured = f"{100 * value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}; {samples})"
        yield Goal(what, measured, value, low, high, at_least=at_least)


def _reading(folder: Path) -> Iterator[Goal]:
    seconds = seconds_of(read_jsonl(folder / "reading" / "results.jsonl"))
    for name, length in seconds:
        if name == "landmark" and length >= TRAINED and ("dense", length) in seconds:
            ours, theirs = seconds[name, length], seconds["dense", length]
            yield Goal(
                f"reading {length:,} tokens: faster than dense", f"{ours:.1f} s, dense {theirs:.1f} s",
                ours / theirs, None, None, at_most=1.0,
            )  # fmt: skip


def seconds_of(rows: list[dict]) -> dict[tuple[str, int], float]:
    """Median seconds of reading, by model and length."""
    keys = dict.fromkeys((row["model"], row["length"]) for row in rows)
    return {
        key: median(row["read_seconds"] for row in rows if (row["model"], row["length"]) == key) for key in sorted(keys)
    }


def scores_of(rows: list[dict], task: str, length: int) -> dict[tuple, float]:
    """RULER's score of each prompt, the share of its answers that was given, by task and seed; `all tasks`, too."""
    wanted = [row for row in rows if row["length"] == length and task in (row["task"], "all tasks")]
    return {(row["task"], row["seed"]): row["recall"] for row in wanted}


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.is_file() else []


def read_summary(folder: Path) -> dict:
    """`summary.json` of a folder; empty if there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
