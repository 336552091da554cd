"""RULER's own tasks (arXiv 2404.06654) in RULER's own wording, with prompts of an exact length.

    niah_single_1     a number for one name, in noise: the same sentences, a line each, again and again
    niah_single_2     the same in a text
    niah_single_3     a UUID for one name, in a text
    niah_multikey_1   numbers for four names in a text, one of which is asked for
    ruler_vt:HOPS     variable tracking in noise: one chain, behind a worked example of another one

What differs from RULER: the text is the user's, not Paul Graham's essays; a text is cut at clauses, not at sentences;
names and numbers are drawn from this project's pools; and an answer has as many tokens as it needs and a few more where
RULER allows 128 (30 in tracking), so that naming every number of the text is no right answer.
"""

import json
import random
import uuid
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from eval_passkey.haystack import Lines, TextHaystack
from eval_passkey.names import draw_labels, draw_numbers, names
from eval_passkey.prompts import Encoder, Haystack, Hidden, Task
from eval_passkey.tracking import links

_WORDING = Path(__file__).resolve().parent / "ruler.json"
_NUMBER_DIGITS, _VALUE_DIGITS = 7, 5
_EXAMPLE_LINES = 12  # of noise, in the worked example


class Needles(NamedTuple):
    """What a needle task hides: `count` names, each with a `what` (number or uuid), in a text or in noise."""

    count: int
    what: str
    text: bool


NIAH = {
    "niah_single_1": Needles(1, "number", text=False),
    "niah_single_2": Needles(1, "number", text=True),
    "niah_single_3": Needles(1, "uuid", text=True),
    "niah_multikey_1": Needles(4, "number", text=True),
}
TRACKING = "ruler_vt"


@cache
def wording(kind: str) -> dict[str, str]:
    """RULER's sentences: of `niah` or of `tracking`."""
    return json.loads(_WORDING.read_text(encoding="utf-8"))[kind]


class NiahTask(Task):
    """A needle in a haystack: one of the names of `NIAH`."""

    def __init__(self, name: str, encoder: Encoder, haystack: Haystack):
        super().__init__(name, encoder, haystack)
        self.kind, self.needles = name, NIAH[name]

    def describe(self) -> dict:
        """The wording, and what is hidden."""
        return {**super().describe(), "needles": self.needles._asdict(), "wording": wording("niah")}

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """Every needle at a place of its own; the one that is asked for at `depth` if it is given."""
        words, (count, what, _) = wording("niah"), self.needles
        owners = list(islice(names(rng, separator="-"), count))
        if what == "number":
            values = draw_numbers(rng, count, _NUMBER_DIGITS)
        else:
            values = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in owners]
        places = [rng.random() for _ in owners]
        if depth is not None:
            places[0] = depth
        order = sorted(range(count), key=places.__getitem__)
        # a text is one paragraph below the opening; each line of noise begins one itself
        after_opening, before_needle = ("\n", " ") if self.needles.text else ("", "\n")
        parts: list[str | None] = [words["opening"].format(what=what) + after_opening, None]
        for i in order:
            parts += [before_needle + words["needle"].format(what=what, name=owners[i], value=values[i]), None]
        return Hidden(
            parts,
            "\n" + words["question"].format(what=what, name=owners[0]),
            words["answer_start"].format(what=what, name=owners[0]),
            (values[0],),
            cuts=[places[i] for i in order],
            before=order.index(0) + 1,
            joiner="",
        )


class RulerTrackingTask(Task):
    """A chain of `hops` assignments in noise, `hops + 1` variables, all of them asked for."""

    kind = TRACKING

    def __init__(self, name: str, encoder: Encoder, haystack: Lines, hops: int):
        super().__init__(name, encoder, haystack)
        self.hops = hops

    def describe(self) -> dict:
        """The wording, and how long the chain is."""
        return {**super().describe(), "hops": self.hops, "wording": wording("tracking")}

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """The assignments in order, at places of their own, none before `depth` if it is given."""
        words = wording("tracking")
        labels = draw_labels(rng, 2 * (self.hops + 1))
        shown, example = draw_numbers(rng, 2, _VALUE_DIGITS)
        chain, others = labels[: self.hops + 1], labels[self.hops + 1 :]
        places = sorted(rng.random() for _ in chain)
        if depth is not None:
            places = [depth, *(depth + (1 - depth) * place for place in places[1:])]
        parts: list[str | None] = [f"{self._example(rng, others, example)}\n\n{words['opening']}\n", None]
        for link in links(words, chain, shown):
            parts += [link, None]
        question, answer_start = _question(words, chain, shown)
        return Hidden(parts, question, answer_start, answers=tuple(chain), cuts=places, before=1)

    def _example(self, rng: random.Random, chain: list[str], value: str) -> str:
        """Another chain in a few lines of noise, and its answer."""
        words = wording("tracking")
        lines = [self.haystack.sentences] * _EXAMPLE_LINES
        places = sorted(rng.randrange(len(lines) + 1) for _ in chain)
        for shift, (place, link) in enumerate(zip(places, links(words, chain, value), strict=True)):
            lines.insert(place + shift, link)
        question, answer_start = _question(words, chain, value)
        return "\n".join([f"{words['opening']}\n", *lines, f"{question} {answer_start} {' '.join(chain)}"])


def _question(words: dict[str, str], chain: list[str], value: str) -> tuple[str, str]:
    slots = {"value": value, "count": len(chain)}
    return words["question"].format(**slots), words["answer_start"].format(**slots)


def make_ruler_task(name: str, encoder: Encoder, text: TextHaystack | None, noise: str, hops: int) -> Task:
    """The task of a name; `noise`: the sentences that a haystack without a text says again and again."""
    lines = Lines(encoder, noise)
    if name in NIAH:
        return NiahTask(name, encoder, text or lines)
    return RulerTrackingTask(name, encoder, lines, hops)
