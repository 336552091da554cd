"""Differences of accuracies: their values, their sides, and intervals that hold what they should."""

import random

import pytest

from eval_passkey.differences import difference, paired_difference


def test_a_paired_difference_counts_only_what_both_were_asked():
    ours = {1: True, 2: True, 3: False, 4: True}
    theirs = {1: True, 2: False, 3: False, 9: False}
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx(1 / 3) and found.samples == 3
    assert found.low < found.value < found.high
    assert paired_difference(theirs, ours).value == pytest.approx(-1 / 3)
    assert paired_difference(ours, {8: True}) is None


def test_agreement_on_everything_still_has_a_width_that_shrinks():
    few, many = (paired_difference(dict.fromkeys(range(n), True), dict.fromkeys(range(n), True)) for n in (5, 500))
    assert few.value == many.value == 0
    assert -1 < few.low < many.low < 0 < many.high < few.high < 1


def test_scores_between_right_and_wrong_count_by_their_share():
    found = paired_difference({1: 1 / 3, 2: 1.0}, {1: 2 / 3, 2: 1.0})
    assert found.value == pytest.approx(-1 / 6)
    right_or_wrong = paired_difference({1: 0.0, 2: 1.0}, {1: 1.0, 2: 1.0})
    assert found.high - found.low < right_or_wrong.high - right_or_wrong.low
    # Bonett and Price by hand: of two, one is lost; of four with those that are added, two are lost and one is won
    assert right_or_wrong.high == pytest.approx(-0.25 + 1.959964 * ((0.75 - 0.0625) / 4) ** 0.5)


def test_different_prompts_are_compared_by_newcombes_interval():
    found = difference(56, 70, 48, 80)  # his own example: 0.2, 0.0524 to 0.3339
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference(0, 0, 1, 2) is None


@pytest.mark.parametrize("shared", [0.3, 0.9])
def test_nine_of_ten_paired_intervals_hold_the_true_difference(shared):
    rng, held = random.Random(0), 0
    for _ in range(300):
        ours, theirs = {}, {}
        for i in range(40):
            same, one, other = rng.random() < shared, rng.random() < 0.8, rng.random() < 0.8
            ours[i], theirs[i] = one, one if same else other
        found = paired_difference(ours, theirs)
        held += found.low <= 0 <= found.high
    assert held > 270
