"""What rows of the perplexity test come to: sums, intervals, paired differences, table, picture."""

from math import exp, log

import numpy as np
import pytest

from eval_perplexity.report import (
    Measured,
    compare_lengths,
    compare_methods,
    draw,
    perplexity_ratio,
    plot_perplexity,
    resampled,
    summarise,
    table,
)


def row(digest: str, nll: float, length: int = 512, tokens: int = 100, size: int = 300) -> dict:
    return {"digest": digest, "length": length, "tokens": tokens, "bytes": size, "nll": nll, "seconds": 2.0}


def corpus(shift: float = 0.0, length: int = 512, context: int | None = None, label: str = "m") -> Measured:
    """Six documents of very different difficulty, each `shift` nats a token harder than without."""
    return Measured(label, [row(f"d{i}", 100 * (1 + i + shift), length) for i in range(6)], context)


def test_losses_are_summed_before_they_are_divided():
    rows = [row("a", 200.0), row("a", 50.0, tokens=10, size=20), row("b", 30.0, tokens=90), row("a", 7.0, length=64)]
    short, long = summarise(Measured("landmark", rows, None), seed=0)
    assert (short["length"], long["length"]) == (64, 512)
    assert (long["method"], long["documents"], long["windows"], long["tokens"], long["bytes"]) == (
        "landmark", 2, 3, 200, 620,
    )  # fmt: skip
    assert long["perplexity"] == pytest.approx(exp(280 / 200))
    assert long["bits_per_byte"] == pytest.approx(280 / log(2) / 620)
    assert long["seconds_per_window"] == 2.0


def test_documents_are_drawn_whole():
    sums = resampled([np.array([1.0, 10.0]), np.array([100.0, 1000.0])], seed=3)
    assert set(sums[:, 0]) == {2.0, 101.0, 200.0} and np.array_equal(sums[:, 1], 10 * sums[:, 0])
    assert np.array_equal(sums, resampled([np.array([1.0, 10.0]), np.array([100.0, 1000.0])], seed=3))


def test_the_interval_holds_the_value_and_comes_from_the_documents_alone():
    (entry,) = summarise(corpus(), seed=0)
    assert entry["ci_low"] < entry["perplexity"] < entry["ci_high"]
    assert entry["bits_per_byte_ci_low"] < entry["bits_per_byte"] < entry["bits_per_byte_ci_high"]
    # no resample is easier than the easiest document or harder than the hardest one
    assert exp(1) <= entry["ci_low"] and entry["ci_high"] <= exp(6)
    (again,) = summarise(corpus(), seed=0)
    assert again == entry
    alike = Measured("m", [row(f"d{i}", 250.0) for i in range(6)], None)
    (entry,) = summarise(alike, seed=0)
    assert entry["ci_low"] == pytest.approx(entry["perplexity"]) == entry["ci_high"]


def test_few_documents_give_no_interval():
    rows = corpus().rows
    assert summarise(Measured("m", rows[:4], None), seed=0)[0]["ci_low"] is None
    assert summarise(Measured("m", rows[:5], None), seed=0)[0]["ci_low"] is not None
    assert perplexity_ratio(*[Measured("m", rows[:4], None).documents(512)] * 2, seed=0)["ci_high"] is None


def test_a_difference_is_paired_by_document():
    harder, easier = corpus(0.1).documents(512), corpus().documents(512)
    ratio = perplexity_ratio(harder, easier, seed=0)
    # documents differ by a factor of e^5, the two methods by the same factor in each of them
    assert [ratio[name] for name in ("perplexity_ratio", "ci_low", "ci_high")] == pytest.approx([exp(0.1)] * 3)
    missing = dict(list(easier.items())[1:])
    assert perplexity_ratio(harder, missing, seed=0)["documents"] == 5


def test_methods_and_lengths_are_compared_where_both_were_measured():
    ours = Measured("landmark", [*corpus().rows, *corpus(-0.2, 1024).rows], None)
    dense = Measured("dense", [*corpus(0.3).rows, *corpus(length=2048).rows], None)
    (difference,) = compare_methods([ours, dense], seed=0)
    assert (difference["method"], difference["against"], difference["length"]) == ("landmark", "dense", 512)
    assert difference["perplexity_ratio"] == pytest.approx(exp(-0.3))
    gains = compare_lengths([ours, dense], seed=0)
    assert [(gain["method"], gain["length"], gain["against"]) for gain in gains] == [
        ("landmark", 1024, 512),
        ("dense", 2048, 512),
    ]
    assert [gain["perplexity_ratio"] for gain in gains] == pytest.approx([exp(-0.2), exp(-0.3)])


def test_the_table_sets_a_methods_numbers_and_ratios_side_by_side():
    methods = [corpus(label="landmark"), corpus(0.1, label="dense")]
    summary = [entry for method in methods for entry in summarise(method, seed=0)]
    lines = table(summary, compare_methods(methods, seed=0)).splitlines()
    assert lines[0].split()[-4:] == ["|", "landmark", "/", "this"]
    assert lines[2].split()[:3] == ["512", "landmark", f"{exp(3.5):.4g}"]
    assert lines[3].split()[1] == "dense" and lines[3].endswith("0.9048 (0.905-0.905)")
    assert all(len(line) <= 120 for line in lines)
    few = Measured("m", corpus().rows[:2], None)
    assert " - " in table(summarise(few, seed=0))


def test_the_picture_shows_every_perplexity_and_interval_and_where_training_ended():
    methods = [
        Measured("landmark", [*corpus().rows, *corpus(-0.1, 2048).rows], 512),
        corpus(2.0, length=2048, context=1024, label="dense"),
    ]
    figure = draw(methods, seed=0)
    (axes,) = figure.axes
    for method, container in zip(methods, axes.containers, strict=True):
        line, caps, _ = container.lines
        entries = summarise(method, seed=0)
        assert list(line.get_ydata()) == pytest.approx([entry["perplexity"] for entry in entries])
        assert list(line.get_xdata()) == pytest.approx([entry["length"] for entry in entries], rel=0.03)
        assert [list(cap.get_ydata()) for cap in caps] == [
            pytest.approx([entry[end] for entry in entries]) for end in ("ci_low", "ci_high")
        ]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["landmark", "dense", "landmark: trained at 512 positions", "dense: trained at 1,024 positions"]
    assert axes.get_yscale() == "log" and [text.get_text() for text in axes.get_xticklabels()] == ["512", "2,048"]


def test_the_picture_needs_no_display_and_no_interval(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    few = Measured("m", corpus().rows[:2], None)
    plot_perplexity([few], 0, tmp_path / "perplexity.png")
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
