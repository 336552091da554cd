"""benchmarks/memory.py: a small run writes rows whose figures mean something."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import index, memory
from landmark_llama.reading.repeated import RepeatedLandmarks

SHAPE = ["--hidden_size", "32", "--intermediate_size", "48", "--layers", "2", "--heads", "2", "--head_dim", "16"]
SMALL = [
    "--device",
    "cpu",
    "--threads",
    "1",
    "--vocab_size",
    "99",
    "--block_size",
    "8",
    "--train_context_length",
    "128",
]


@pytest.mark.slow
def test_a_small_run_measures_every_tier_and_the_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "memory.jsonl"
    what = ["--lengths", "600", "--dense_lengths", "300", "--budgets", "0", "--piece", "250", "--overlap_length", "400"]
    what += ["--reading_retrieved_blocks", "1"]
    assert memory.main([*SHAPE, *SMALL, *what, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = [(row["quantity"], row["implementation"], row["length"]) for row in rows]
    assert found == [
        ("reading", "dense", 300),
        ("reading", "device", 600),
        ("reading", "host", 600),
        ("reading", "file", 600),
        ("overlap", "landmark", 400),
    ]
    assert all(row["read_seconds"] > 0 and row["question_seconds"] > 0 for row in rows[:-1])
    for host_or_file in rows[2:4]:
        assert host_or_file["hit_rate"] == [0, 0] and host_or_file["tier_mib_read"] > 0
    assert rows[3]["file_mib"] > 0 and rows[2]["file_mib"] == 0
    assert all(0 <= share <= 1 for share in rows[-1]["overlap"])
    assert "| 600 | file | 0 MiB |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_index_is_measured_beside_the_exact_choice(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    output = tmp_path / "index.jsonl"
    # more blocks than are compared all
    what = ["--lengths", "33000", "--kinds", "exact", "ivf", "--output", str(output)]
    assert index.main([*SHAPE, *SMALL, *what]) == 0
    exact, searched = (json.loads(line) for line in output.read_text().splitlines())
    assert [row["choice"] for row in (exact, searched)] == ["exact", "ivf"] and "recall" not in exact
    assert exact["read_seconds"] > 0 and searched["read_seconds"] > 0
    assert searched["recall"] and all(0 < share <= 1 for share in searched["recall"])
    with pytest.raises(ValueError, match="--text BOOK: needs --model"):
        index.main(["--text", "BOOK"])


@pytest.mark.slow
def test_the_dense_model_can_be_given_the_memory_of_a_tier(tmp_path: Path) -> None:
    output = tmp_path / "memory.jsonl"
    what = ["--lengths", "3000", "--dense_lengths", "0", "--tiers", "file", "--budgets", "0", "--overlap_length", "0"]
    assert memory.main([*SHAPE, *SMALL, *what, "--equal_memory", "true", "--output", str(output)]) == 0
    tier, dense = (json.loads(line) for line in output.read_text().splitlines())
    assert dense["implementation"] == "dense" and dense["memory_of"] == "file, 0 MiB, 3000"
    assert dense["peak_memory_mib"] <= tier["peak_memory_mib"], "measured, with all that dense needs beside its cache"
    assert dense["length"] >= 1 and dense["read_seconds"] > 0


@pytest.mark.parametrize("true_limit", [1, 40, 700, 900])
def test_the_longest_text_that_fits_is_measured_from_below(true_limit: int) -> None:
    tried = []

    def measured(length: int) -> dict[str, float]:
        tried.append(length)
        return {"peak_memory_mib": 10.0 if length <= true_limit else 11.0, "read_seconds": float(length)}

    found = memory.longest_that_fits(measured, 10.0, most=1000)
    assert found["read_seconds"] == found["length"] <= true_limit
    assert true_limit < found["length"] + max(1, (true_limit + 1) // 8), "too far below what fits"
    assert max(tried) <= 2.2 * true_limit or true_limit < 15, "a text too long may take hours"


def test_where_not_even_a_token_fits_the_failure_says_so() -> None:
    with pytest.raises(memory.MeasurementFailed, match="more than 10.0 MiB for a single token"):
        memory.longest_that_fits(lambda length: {"peak_memory_mib": 11.0}, 10.0, most=1000)


def test_overlap_counts_the_choices_that_are_made_again() -> None:
    storage = memory.ObservedStorage(4)
    keys = torch.zeros(1, 40, 1, 8)
    storage.write(keys, keys, torch.zeros(1, dtype=torch.long))
    # three groups of one query that choose two blocks each
    storage.gather(torch.tensor([[1, 2], [2, 5], [2, 5]]).view(1, 1, 1, 3, 1, 2))
    assert (storage.again, storage.chosen) == (3, 4)
    assert isinstance(storage.repeated, RepeatedLandmarks), "what is counted must not hide what storages have"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tiers", "tape"], "--tiers tape: must be device, host or file"),
        (["--piece", "0"], "--piece 0: must be at least 1"),
        (["--text", "BOOK.txt"], "--text BOOK.txt: needs --model"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.main(flags)
