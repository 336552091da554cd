"""What was measured so far, as a page: `results.md`, tables for the documentation, with its pictures beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from eval_passkey.models import Subject, device_in_words, versions
from eval_passkey.report import wilson_interval
from examples.smollm2.goals import find_goals, read_jsonl, read_summary, seconds_of

PICTURES = {"passkey/accuracy.png": "passkey.png", "ruler/accuracy.png": "ruler.png"}
PICTURES |= {"perplexity/perplexity.png": "perplexity.png"}


def write_results(folder: Path, landmark: Subject, dense: Subject) -> Path:
    """Writes the page of what lies in `folder`, and copies the pictures into it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_goals, _perplexity, _pass_keys, _ruler, _short_tasks, _reading, _answers]
    sections = [section for section in (part(folder) for part in parts) if section]
    for source, name in PICTURES.items():
        if (folder / source).is_file():
            shutil.copyfile(folder / source, folder / name)
            sections.append([f"![{Path(name).stem}]({name})"])
    models = f"landmark {Path(landmark.name).name} ({landmark.fingerprint}), dense {Path(dense.name).name}"
    settings = ", ".join(f"{name} {value}" for name, value in landmark.retrieval_settings.items())
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    sections.append([f"{models} ({dense.fingerprint}); {settings}; {device_in_words('cpu')}; {software}"])
    path = folder / "results.md"
    path.write_text("\n\n".join("\n".join(section) for section in sections) + "\n", encoding="utf-8")
    return path


def _table(title: str, head: list[str], rows: list[list[str]], note: str = "") -> list[str]:
    """A section of Markdown; nothing without rows."""
    if not rows:
        return []
    lines = [" | ".join(cells) for cells in (head, *rows)]
    lines.insert(1, " | ".join("---" for _ in head))
    return [f"## {title}", "", *(f"| {line} |" for line in lines), *(["", note] if note else [])]


def _goals(folder: Path) -> list[str]:
    rows = [
        [goal.what, goal.measured, "yes" if goal.reached else "no", "yes" if goal.sure else "no"]
        for goal in find_goals(folder)
    ]
    note = "Sure: the whole 95 % interval says the same."
    return _table("What it must reach", ["goal", "measured", "reached", "sure"], rows, note)


def _perplexity(folder: Path) -> list[str]:
    entries = read_summary(folder / "perplexity").get("rows", [])
    of = {(entry["method"], entry["length"]): entry for entry in entries}
    methods = list(dict.fromkeys(method for method, _ in of))
    rows = [
        [f"{length:,}", *(_perplexity_cell(of.get((method, length))) for method in methods)]
        for length in sorted({length for _, length in of})
    ]
    note = ""
    if entries:
        note = f"The same tokens at every length, {entries[0]['tokens']:,} of {entries[0]['documents']} texts."
    return _table("Perplexity", ["context", *methods], rows, note)


def _perplexity_cell(entry: dict | None) -> str:
    if entry is None:
        return ""
    interval = "" if entry["ci_low"] is None else f" ({entry['ci_low']:.2f} to {entry['ci_high']:.2f})"
    return f"{entry['perplexity']:.2f}{interval}, {entry['seconds_per_window']:.0f} s"


def _pass_keys(folder: Path) -> list[str]:
    return _prompts(folder / "passkey", "Pass keys, in the paper's wording", "Right of all (95 %), seconds a prompt.")


def _ruler(folder: Path) -> list[str]:
    note = "RULER's score: the share of the expected answers that was given (95 %); prompts, seconds a prompt."
    return _prompts(folder / "ruler", "RULER's tasks, in RULER's wording", note, _score)


def _prompts(folder: Path, title: str, note: str, cell: Callable[[dict | None], str] | None = None) -> list[str]:
    sides = [
        {(entry["task"], entry["length"]): entry for entry in read_summary(path).get("rows", [])}
        for path in (folder, folder / "baseline")
    ]
    rows = [
        [task, f"{length:,}", *((cell or _accuracy)(side.get((task, length))) for side in sides)]
        for task, length in sides[0]
    ]
    return _table(title, ["task", "tokens", "landmark", "dense"], rows, note)


def _accuracy(entry: dict | None) -> str:
    if entry is None:
        return "not asked"
    interval = f"{100 * entry['ci_low']:.0f} to {100 * entry['ci_high']:.0f} %"
    return f"{entry['correct']} of {entry['samples']} ({interval}), {entry['seconds_per_prompt']:.1f} s"


def _score(entry: dict | None) -> str:
    if entry is None:
        return "not asked"
    low, high = wilson_interval(entry["recall"] * entry["samples"], entry["samples"])
    share = f"{100 * entry['recall']:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
    return f"{share}, {entry['samples']}, {entry['seconds_per_prompt']:.1f} s"


def _short_tasks(folder: Path) -> list[str]:
    rows = []
    for name in ("landmark", "dense"):
        for entry in read_summary(folder / "cloze" / name).get("rows", []):
            if entry["samples"]:
                interval = f"{100 * entry['ci_low']:.1f} to {100 * entry['ci_high']:.1f} %"
                right = f"{entry['correct']} of {entry['samples']} ({interval})"
                rows.append([name, right, f"{entry['nats_a_word']:.4f}"])
    note = "The last word of a few sentences that holds it already: a test of this project's own, not one of lm-eval."
    return _table("Short tasks", ["model", "right", "nats a word"], rows, note)


def _reading(folder: Path) -> list[str]:
    measured = read_jsonl(folder / "reading" / "results.jsonl")
    rows = []
    for (name, length), seconds in seconds_of(measured).items():
        same = [row for row in measured if (row["model"], row["length"]) == (name, length)]
        peak = max(row["resident_mib"] for row in same)
        rows.append([name, f"{length:,}", f"{seconds:.1f}", f"{length / seconds:,.0f}", f"{peak / 1024:.2f}"])
    head = ["model", "tokens", "seconds", "tokens a second", "peak memory of the process, GiB"]
    load = max((row["load_before"] for row in measured), default=0)
    return _table("Reading", head, rows, f"Load of the machine before a reading, at most: {load:.1f}.")


def _answers(folder: Path) -> list[str]:
    rows = read_jsonl(folder / "answers" / "results.jsonl")
    cells = [
        [*(row[name] for name in ("document", "question")), _said(row, "landmark"), _said(row, "dense")] for row in rows
    ]
    same = sum(row["landmark"] == row["dense"] for row in rows)
    note = (
        f"Topics of Python's documentation, greedy, in the chat template; {same} of {len(rows)} answers are the same."
    )
    return _table("Chat answers", ["topic", "question", "landmark", "dense"], cells, note)


def _said(row: dict, name: str) -> str:
    return " ".join(row[name].replace("|", "\\|").split()) or "(nothing)"
