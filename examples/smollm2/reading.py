"""How long a text takes to be read, and the most memory that it takes: both models, each in a process of its own.

What is measured is that of `benchmarks/memory.py`: a text of the user's, blocks in memory, then a question of 16 tokens
and an answer of 8.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import MeasurementFailed, isolated, machine
from benchmarks.memory import DEVICE
from benchmarks.memory import Arguments as Reading
from benchmarks.memory import measure as measured_reading
from benchmarks.models import DENSE, ModelArguments, landmark_config
from eval_passkey.models import Subject, versions
from eval_passkey.results import ResultsFolder

KINDS = {"landmark": DEVICE, "dense": DENSE}  # in benchmarks' words
FIELDS = ("model", "length", "read_seconds", "resident_mib")


def measure(
    landmark: Subject, lengths: Sequence[int], repeats: int, text: str, folder: Path, dtype: str,
    on_row: Callable[[dict], None] | None = None,
) -> None:  # fmt: skip
    """Rows in `folder` of what was not read before, shortest first; what fails, mostly for lack of memory, is left out.

    The dense model has the landmark model's weights: the time is that of its shape.
    """
    model = ModelArguments(model=landmark.name, dtype=dtype, device="cpu")
    config = landmark_config(model, "head")
    identity = {"fingerprint": landmark.fingerprint, "settings": {"dtype": dtype}}
    results = ResultsFolder(folder, identity, fields=FIELDS)
    results.on_row = on_row
    done = Counter((row["model"], row["length"]) for row in results.rows)
    skipped = []
    for length in sorted(lengths):
        for name, kind in KINDS.items():
            for _ in range(done[name, length], repeats):
                load = machine("cpu", 0)["load_before"]  # other work makes the time worthless
                try:
                    row = isolated(measured_reading, model, config, Reading(text=text), kind, 0, length)
                except MeasurementFailed as error:
                    skipped.append({"model": name, "length": length, "reason": str(error)})
                    break
                results.append({"model": name, "length": length, **row, "load_before": load})
    results.write_summary({"skipped": skipped, "versions": versions(), "machine": machine("cpu", 0)})
    results.close()
