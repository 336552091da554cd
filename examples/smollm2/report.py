"""What the run found, as one table with two pictures: `report.md`."""

import json
import shutil
from pathlib import Path

PICTURES = (("passkey", "accuracy.png"), ("perplexity", "perplexity.png"))


def write_report(output: Path) -> Path:
    """Writes `report.md` from the summaries in `output`, and copies the two pictures beside it."""
    lines = ["# SmolLM2-135M with landmark attention", "", *_table(output), "", *_answer(output), ""]
    for folder, name in PICTURES:
        if (output / folder / name).is_file():
            shutil.copyfile(output / folder / name, output / name)
            lines.append(f"![{folder}]({name})")
    landmark = _read(output / "passkey" / "summary.json")
    versions = ", ".join(f"{name} {version}" for name, version in landmark["versions"].items())
    lines += ["", f"{landmark['device']}; {landmark['settings']['dtype']}; {versions}"]
    path = output / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _table(output: Path) -> list[str]:
    """A line a length: right answers and seconds a prompt of both models, perplexities of all methods."""
    keys = {
        "landmark": _by_length(_read(output / "passkey" / "summary.json")["rows"]),
        "dense": _by_length(_read(output / "passkey" / "baseline" / "summary.json")["rows"]),
    }
    rows = _read(output / "perplexity" / "summary.json")["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    perplexity = {method: _by_length([row for row in rows if row["method"] == method]) for method in methods}
    head = ["tokens", *(f"pass keys, {name}" for name in keys), *(f"seconds, {name}" for name in keys)]
    head += [f"perplexity, {method}" for method in methods]
    table = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for length in sorted({length for entries in (*keys.values(), *perplexity.values()) for length in entries}):
        cells = [f"{length:,}"]
        cells += [_cell(entries.get(length), "{correct} of {samples}") for entries in keys.values()]
        cells += [_cell(entries.get(length), "{seconds_per_prompt:.1f}") for entries in keys.values()]
        cells += [_cell(perplexity[method].get(length), "{perplexity:.2f}") for method in methods]
        table.append("| " + " | ".join(cells) + " |")
    return table


def _answer(output: Path) -> list[str]:
    asked = _read(output / "question.json")
    tokens = asked["answers"]["landmark"]["tokens"]
    lines = [f"Asked of {tokens:,} tokens of {asked['document']}, with a note in their middle:", ""]
    lines += [f"> {asked['note']}", "", asked["question"], ""]
    for name in ("landmark", "dense"):
        answer = asked["answers"][name]
        lines.append(f"- {name} ({answer['seconds']:.0f} s): {' '.join(answer['text'].split()) or '(nothing)'}")
    return lines


def _by_length(rows: list[dict]) -> dict[int, dict]:
    return {row["length"]: row for row in rows}


def _cell(entry: dict | None, pattern: str) -> str:
    return "" if entry is None else pattern.format(**entry)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
