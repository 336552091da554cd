"""How sure a difference of two scores is: 95 % intervals for the same prompts and for different ones.

A prompt's score is 1 for right and 0 for wrong, or between them where it has several answers.
"""

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


def paired_difference(ours: Mapping[object, float], theirs: Mapping[object, float]) -> Difference | None:
    """Of the mean scores of what both were asked; None if that is nothing.

    The interval is Bonett and Price's (2012): one more prompt that only ours has right, and one that only theirs has,
    so that it has a width even where both were right on the same. Of scores in between, their squares count.
    """
    both = ours.keys() & theirs.keys()
    if not both:
        return None
    differences = [ours[key] - theirs[key] for key in both]
    count = len(both) + 2
    centre, squares = sum(differences) / count, (sum(value**2 for value in differences) + 2) / count
    spread = Z95 * sqrt((squares - centre**2) / count)
    value = sum(differences) / len(both)
    return Difference(value, max(-1.0, centre - spread), min(1.0, centre + spread), len(both))


def difference(right: float, samples: int, other_right: float, other_samples: int) -> Difference | None:
    """Of mean scores on different prompts, from their sums; None without samples.

    The interval is Newcombe's (1998), of Wilson's two; scores between 0 and 1 vary less, so that it is wide for them.
    """
    if not samples or not other_samples:
        return None
    ours, theirs = right / samples, other_right / other_samples
    low, high = wilson_interval(right, samples)
    other_low, other_high = wilson_interval(other_right, other_samples)
    value = ours - theirs
    below, above = hypot(ours - low, other_high - theirs), hypot(high - ours, theirs - other_low)
    return Difference(value, max(-1.0, value - below), min(1.0, value + above), min(samples, other_samples))
