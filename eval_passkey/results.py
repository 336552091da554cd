"""The files of one model's run: `results.jsonl`, a row a measurement, resumed if interrupted, and `summary.json`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from eval_passkey.prompts import InputError

PROMPT_FIELDS = ("length", "seed", "depth", "correct", "seconds")


class ResultsFolder:
    """Where the rows of one model and one setting are gathered.

        results = ResultsFolder(Path("out"), {"model": ..., "settings": {...}}, tasks={"passkey": {...}})
        if ("passkey", 512, 0) not in results.done:
            results.append({"task": "passkey", "length": 512, "seed": 0, ...})
        results.write_summary({"rows": ..., "versions": ...})

    identity: what all rows of the folder must share; JSON values, nested dictionaries allowed. It is written to
        `summary.json` before the first row.
    tasks: by name, what rows of that task must share. A folder takes further tasks.
    fields: what every row has; a line without them is no row of these results.
    on_row: an attribute; if set, it is called with each new row that was written.
    InputError if the folder cannot be written, holds rows of another identity, or a row in its middle is broken. A
    broken last row is what an interruption leaves: it is removed.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict,
        tasks: dict[str, dict] | None = None,
        fields: tuple[str, ...] = PROMPT_FIELDS,
    ):
        self.rows_path = folder / "results.jsonl"
        self.summary_path = folder / "summary.json"
        self.identity, self.tasks = identity, tasks or {}
        self.on_row: Callable[[dict], None] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows = _read_rows(self.rows_path, fields)
            if self.rows:
                self._refuse_another_identity()
            else:
                self.write_summary({"rows": []})
            self._file = self.rows_path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"output {folder}: cannot be read and written ({error.strerror})") from error

    @property
    def done(self) -> set[tuple[str, int, int]]:
        """Task, length and seed of the prompts that need not be run again."""
        return {(row["task"], row["length"], row["seed"]) for row in self.rows}

    def append(self, row: dict) -> None:
        """Adds a row to the file at once, so that an interruption loses no more than the prompt it hits."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.rows_path}: cannot be written ({error.strerror}); the rows so far are kept, run again to go on"
            ) from error
        self.rows.append(row)
        if self.on_row is not None:
            self.on_row(row)

    def write_summary(self, summary: dict) -> None:
        """Replaces `summary.json` in one step."""
        whole = {**summary, **self.identity, **({"tasks": self.tasks} if self.tasks else {})}
        unfinished = self.summary_path.with_suffix(".json.tmp")
        try:
            unfinished.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, self.summary_path)
        except OSError as error:
            raise InputError(f"{self.summary_path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Closes the file of rows."""
        self._file.close()

    def _refuse_another_identity(self) -> None:
        try:
            earlier = json.loads(self.summary_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(
                f"output {self.rows_path.parent}: holds results.jsonl without a readable summary.json that says what "
                "they are of; choose another --output"
            ) from error
        earlier_tasks = earlier.get("tasks", {})
        both = {name: task for name, task in self.tasks.items() if name in earlier_tasks}
        different = _differences(earlier, self.identity) + _differences(earlier_tasks, both, "tasks.")
        if different:
            raise InputError(
                f"output {self.rows_path.parent}: holds results of another run ({'; '.join(different)}); "
                "choose another --output"
            )
        self.tasks = {**earlier_tasks, **self.tasks}


def _read_rows(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """The rows of a file, none if there is no file. A torn row at its end is cut off the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict] = []
    for i, line in enumerate(lines):
        row = _row(line, fields)
        if row is None and i < len(lines) - 1:
            raise InputError(f"{path}, line {i + 1}: is no row of results; choose another --output")
        if row is None:
            os.truncate(path, sum(map(len, lines[:i])))
        else:
            rows.append(row)
    return rows


def _row(line: bytes, fields: tuple[str, ...]) -> dict | None:
    """The row that a line holds, or None if it is torn or something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and all(field in row for field in fields)
    return row if whole else None


def _differences(earlier: dict, now: dict, prefix: str = "") -> list[str]:
    """What of `now` was another value before, in words."""
    different = []
    for name, value in now.items():
        before = earlier.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            different += _differences(before, value, f"{prefix}{name}.")
        elif before != value:
            different.append(f"{prefix}{name} was {_short(before)} and is {_short(value)}")
    return different


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
