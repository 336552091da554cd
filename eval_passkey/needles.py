"""RULER's needles (arXiv 2404.06654): several names with their numbers in one text, of which one or all are asked.

Multi-key hides one number for each of several names and asks for one of them; multi-value hides several numbers for one
name and asks for them all; multi-query asks for the numbers of all names. Numbers have seven digits, as RULER's do; the
wordings are this project's own, so the figures stand beside RULER's and do not replace them.
"""

import random
from itertools import islice
from typing import Literal

from eval_passkey.names import draw_numbers, names, pool
from eval_passkey.prompts import Encoder, Haystack, Hidden, Task

_DIGITS = 7


class NeedlesTask(Task):
    """`count` needles: different names of which one is asked (key), one name (value), or all names asked (query)."""

    def __init__(
        self, name: str, encoder: Encoder, haystack: Haystack, kind: Literal["key", "value", "query"], count: int
    ):
        super().__init__(name, encoder, haystack)
        self.kind, self.asks, self.count = f"multi_{kind}", kind, count

    def describe(self) -> dict:
        """The wordings it draws from, and how many needles there are."""
        return {**super().describe(), "needles": self.count, "wordings": pool("needles")}

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """Every needle at a place of its own; the first that is asked for at `depth` if it is given."""
        wording = rng.choice(pool("needles"))
        drawn = list(islice(names(rng), 1 if self.asks == "value" else self.count))
        owners = drawn * (self.count // len(drawn))
        values = draw_numbers(rng, self.count, _DIGITS)
        places = [rng.random() for _ in owners]
        if depth is not None:
            places[0] = depth
        order = sorted(range(self.count), key=places.__getitem__)
        parts: list[str | None] = [wording["opening"], None]
        for i in order:
            parts += [wording["needle"].format(name=owners[i], value=values[i]), None]
        asked = 1 if self.asks == "key" else self.count
        question, answer_start = wording["one" if asked == 1 else "many"]
        slots = {"names": _listed(list(dict.fromkeys(owners[:asked]))), "count": asked}
        return Hidden(
            parts,
            question.format(**slots),
            answer_start.format(**slots),
            tuple(values[:asked]),
            cuts=[places[i] for i in order],
            before=order.index(0) + 1,
        )


def _listed(owners: list[str]) -> str:
    """Names in a sentence: a, the b and the c."""
    *others, last = owners
    return f"{', the '.join(others)} and the {last}" if others else last
