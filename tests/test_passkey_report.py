"""What rows come to: intervals, summary, table, pictures."""

from pathlib import Path

import pytest

from eval_passkey.report import Measured, plot_accuracy, plot_depth, summarise, table, wilson_interval
from eval_passkey.report import _depth_counts as depth_counts

PNG = b"\x89PNG\r\n\x1a\n"


def row(length: int, correct: bool, depth: float = 0.5, seconds: float = 1.0) -> dict:
    return {"length": length, "seed": 0, "depth": depth, "correct": correct, "seconds": seconds}


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [(20, 20, 0.838875, 1.0), (0, 20, 0.0, 0.161125), (10, 20, 0.299298, 0.700702), (49, 50, 0.895046, 0.996461)],
)
def test_wilson_interval_has_the_published_values(correct, samples, low, high):
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=1e-5)


def test_wilson_interval_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_summary_has_a_row_a_length_in_order():
    rows = [row(4096, True, seconds=9.0), row(512, True), row(512, False, seconds=2.0), row(512, True, seconds=100.0)]
    short, long = summarise(rows)
    assert (short["length"], short["samples"], short["correct"]) == (512, 3, 2)
    assert short["accuracy"] == pytest.approx(2 / 3)
    assert (short["ci_low"], short["ci_high"]) == wilson_interval(2, 3)
    assert short["seconds_per_prompt"] == 2.0
    assert (long["length"], long["samples"], long["accuracy"]) == (4096, 1, 1.0)


def test_table_sets_the_baseline_beside_the_model_and_says_what_was_not_run():
    model = Measured("model (a)", [row(512, True), row(1024, False)], 256, None)
    baseline = Measured("baseline (b)", [row(512, False)], 512, None)
    lines = table([model, baseline]).splitlines()
    assert "model (a)" in lines[0] and "baseline (b)" in lines[0]
    assert " ".join(lines[3].split()) == "512 | 1/1 100.0 % 21-100 % 1.00 | 0/1 0.0 % 0-79 % 1.00"
    assert lines[4].split()[-2:] == ["not", "run"]


def test_depths_fall_into_their_cells():
    rows = [row(512, True, 0.0), row(512, False, 0.249), row(512, True, 1.0), row(1024, True, 0.5)]
    grid = depth_counts(Measured("m", rows, None, num_depths=5), [512, 1024])
    assert grid == [[[1, 1], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]]
    bands = depth_counts(Measured("m", rows, None, num_depths=None), [512, 1024])
    assert bands[0] == [[1, 1], [0, 0]] and bands[1] == [[0, 1], [0, 0]] and bands[4] == [[1, 1], [0, 0]]
    assert depth_counts(Measured("m", rows[:1], None, num_depths=1), [512]) == [[[1, 1]]]


@pytest.mark.parametrize("contexts", [(256, 512), (512, 512), (None, 131_072)])
def test_pictures_are_drawn_without_a_display(contexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    rows = [row(length, length < 2000, depth / 4) for length in (500, 1024, 1024**2) for depth in range(5)]
    models = [Measured("model (a)", rows, contexts[0], 5), Measured("baseline (b)", rows[:5], contexts[1], 5)]
    for count in (1, 2):
        plot_accuracy(models[:count], tmp_path / "accuracy.png")
        plot_depth(models[:count], tmp_path / "depth.png")
        for name in ("accuracy.png", "depth.png"):
            content = (tmp_path / name).read_bytes()
            assert content.startswith(PNG) and len(content) > 10_000
            (tmp_path / name).unlink()
