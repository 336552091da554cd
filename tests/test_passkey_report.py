"""What rows come to: intervals, summary, table, pictures."""

from pathlib import Path

import pytest

from eval_passkey import pictures
from eval_passkey.pictures import _depth_counts as depth_counts
from eval_passkey.pictures import draw
from eval_passkey.report import (
    Measured,
    bin_name,
    phase_bins,
    phase_counts,
    phase_table,
    summarise,
    summarise_phases,
    table,
    wilson_interval,
)

PNG = b"\x89PNG\r\n\x1a\n"


def row(length: int, correct: bool, depth: float = 0.5, seconds: float = 1.0, **more) -> dict:
    fields = {"length": length, "seed": 0, "depth": depth, "correct": correct, "seconds": seconds}
    return {"task": "passkey", "phase": None, "recall": float(correct), **fields, **more}


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
    assert " ".join(lines[3].split()) == "passkey 512 | 1/1 100.0 % 21-100 % 1.00 | 0/1 0.0 % 0-79 % 1.00"
    assert lines[4].split()[-2:] == ["not", "run"]


def test_depths_fall_into_their_cells():
    rows = [row(512, True, 0.0), row(512, False, 0.249), row(512, True, 1.0), row(1024, True, 0.5)]
    grid = depth_counts(Measured("m", rows, None, num_depths=5), [512, 1024])
    assert grid == [[[1, 1], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]]
    bands = depth_counts(Measured("m", rows, None, num_depths=None), [512, 1024])
    assert bands[0] == [[1, 1], [0, 0]] and bands[1] == [[0, 1], [0, 0]] and bands[4] == [[1, 1], [0, 0]]
    assert depth_counts(Measured("m", rows[:1], None, num_depths=1), [512]) == [[[1, 1]]]


def test_tasks_are_summed_up_apart_in_the_order_in_which_they_were_asked():
    rows = [row(512, True), row(512, False, task="multi_query:4", recall=0.5), row(256, True, task="multi_query:4")]
    summary = summarise(rows)
    assert [(entry["task"], entry["length"]) for entry in summary] == [
        ("passkey", 512), ("multi_query:4", 256), ("multi_query:4", 512),
    ]  # fmt: skip
    assert (summary[2]["recall"], summary[2]["part"], summary[2]["accuracy"]) == (0.5, 1.0, 0.0)
    lines = table([Measured("model (a)", rows, None, None)]).splitlines()
    assert "recall" in lines[1] and lines[5].split()[-3:] == ["50.0", "%", "1.00"]
    assert "recall" not in table([Measured("model (a)", rows[:1], None, None)])


def test_phases_are_summed_up_over_all_lengths():
    rows = [row(512, True, phase=3), row(1024, False, phase=3), row(512, True, phase=0), row(512, True)]
    first, second = summarise_phases(rows)
    assert (first["phase"], first["samples"], first["correct"]) == (0, 1, 1)
    assert (second["phase"], second["samples"], second["correct"], second["accuracy"]) == (3, 2, 1, 0.5)
    assert (second["ci_low"], second["ci_high"]) == wilson_interval(1, 2)


@pytest.mark.parametrize(("period", "at_most"), [(15, 8), (15, 16), (63, 16), (1, 8), (7, 8), (49, 8)])
def test_every_phase_lies_in_one_bin(period, at_most):
    bins = phase_bins(period, at_most)
    assert [phase for phases in bins for phase in phases] == list(range(period)) and len(bins) <= at_most
    assert len({len(phases) for phases in bins[:-1]}) <= 1
    counts = phase_counts([row(512, phase % 2 == 0, phase=phase) for phase in range(period)], bins)
    assert [sum(cells) for cells in zip(*counts, strict=True)] == [(period + 1) // 2, period]


def test_bins_are_named_by_their_ends():
    assert [bin_name(phases) for phases in phase_bins(5, 3)] == ["0-1", "2-3", "4"]


def test_the_phase_table_has_a_line_a_model_and_task():
    rows = [
        row(512, True, phase=0),
        row(512, False, phase=1),
        row(512, True, phase=14),
        row(512, True, task="b", phase=3),
    ]
    head, *lines = phase_table([Measured("m", rows, None, None, 15)]).splitlines()
    assert head.split()[-8:] == ["0-1", "2-3", "4-5", "6-7", "8-9", "10-11", "12-13", "14"]
    assert lines[0].split() == ["m,", "passkey", "50", *["-"] * 6, "100"]
    assert lines[1].split() == ["m,", "b", "-", "100", *["-"] * 6]


@pytest.mark.parametrize(("contexts", "tasks"), [((256, 512), 1), ((512, 512), 5), ((None, 131_072), 2)])
def test_pictures_are_drawn_without_a_display(contexts, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    rows = [
        row(length, length < 2000, depth / 4, task=f"task {task}", phase=depth)
        for length in (500, 1024, 1024**2)
        for depth in range(5)
        for task in range(tasks)
    ]
    models = [Measured("model (a)", rows, contexts[0], 5, 15), Measured("baseline (b)", rows[:5], contexts[1], 5, 15)]
    for count in (1, 2):
        paths = draw(models[:count], tmp_path)
        assert [path.name for path in paths] == ["accuracy.png", "depth.png", "phase.png"]
        for path in paths:
            content = path.read_bytes()
            assert content.startswith(PNG) and len(content) > 10_000
            path.unlink()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are drawn, in order."""
    drawn, new = [], pictures._new_figure

    def kept(*size):
        figure, axes = new(*size)
        drawn.append(figure)
        return figure, axes

    monkeypatch.setattr(pictures, "_new_figure", kept)
    return drawn


def test_the_pictures_show_what_was_counted(figures: list, tmp_path: Path):
    rows = [row(512, True, 0.0, phase=0), row(512, False, 1.0, phase=1), row(1024, True, 1.0, phase=1)]
    rows += [row(1024, True, 0.0, phase=2)]
    baseline = [row(512, False, 0.0, phase=0), row(512, False, 1.0, phase=2)]
    draw([Measured("model (a)", rows, 256, 2, 3), Measured("baseline (b)", baseline, 512, 2, 3)], tmp_path)
    accuracy, depth, phase = figures
    (axes,) = accuracy.axes
    shown = {bar.get_label(): bar for bar in axes.containers}
    assert shown.keys() == {"model (a)", "baseline (b)"}
    for label, lengths, shares in (("model (a)", [512, 1024], [50, 100]), ("baseline (b)", [512], [0])):
        line, _, (bars,) = shown[label]
        assert line.get_ydata() == pytest.approx(shares)
        assert line.get_xdata() == pytest.approx(lengths, rel=0.02)  # lines stand a little apart
        ends = [segment[:, 1] / 100 for segment in bars.get_segments()]
        right = [round(share / 100 * 2) for share in shares]
        assert [tuple(pair) for pair in ends] == [pytest.approx(wilson_interval(count, 2)) for count in right]
    dotted = [line.get_xdata()[0] for line in axes.lines if ": trained at " in line.get_label()]
    assert dotted == [256, 512]

    def cells(axes) -> list[str]:
        return [text.get_text() for text in axes.texts]

    assert [axes.get_title() for axes in depth.axes[:2]] == ["model (a), passkey", "baseline (b), passkey"]
    assert cells(depth.axes[0]) == ["1/1", "1/1", "0/1", "1/1"]  # a line a depth, a column a length
    assert depth.axes[0].images[0].get_array().tolist() == [[1, 1], [0, 1]]
    assert [label.get_text() for label in depth.axes[0].get_yticklabels()] == ["0 %", "100 %"]
    assert cells(phase.axes[0]) == ["1/1", "1/2", "1/1"] and cells(phase.axes[1]) == ["0/1", "0/1"]


def test_no_picture_by_phase_where_there_are_no_blocks(tmp_path: Path):
    paths = draw([Measured("dense (a)", [row(512, True), row(1024, False)], 512, None)], tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "depth.png"]
