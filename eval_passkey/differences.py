"""How sure a difference of two accuracies is: 95 % intervals for the same prompts and for different ones."""

from collections.abc import Mapping
from math import hypot, sqrt
from typing import NamedTuple

from eval_passkey.report import Z95, wilson_interval


class Difference(NamedTuple):
    """Ours minus theirs, from -1 to 1, with the ends of its interval; `samples` of the smaller side."""

    value: float
    low: float
    high: float
    samples: int


def paired_difference(ours: Mapping[object, bool], theirs: Mapping[object, bool]) -> Difference | None:
    """Of what both were asked; None if that is nothing. The interval is Bonett and Price's (2012), which has a width
    even where both were right on the same."""
    both = ours.keys() & theirs.keys()
    if not both:
        return None
    count = len(both)
    won, lost = sum(ours[key] > theirs[key] for key in both), sum(ours[key] < theirs[key] for key in both)
    won_share, lost_share = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    centre = won_share - lost_share
    spread = Z95 * sqrt((won_share + lost_share - centre**2) / (count + 2))
    return Difference((won - lost) / count, max(-1.0, centre - spread), min(1.0, centre + spread), count)


def difference(right: int, samples: int, other_right: int, other_samples: int) -> Difference | None:
    """Of accuracies on different prompts; None without samples. The interval is Newcombe's (1998), of Wilson's two."""
    if not samples or not other_samples:
        return None
    ours, theirs = right / samples, other_right / other_samples
    low, high = wilson_interval(right, samples)
    other_low, other_high = wilson_interval(other_right, other_samples)
    value = ours - theirs
    below, above = hypot(ours - low, other_high - theirs), hypot(high - ours, theirs - other_low)
    return Difference(value, max(-1.0, value - below), min(1.0, value + above), min(samples, other_samples))
