"""RULER's variable tracking (arXiv 2404.06654): one name is given a number, each next one the value of the one before.

Asked are all names that end up with the number, so that an answer needs every link of the chain. As in RULER there is
one chain, names are five capital letters, and a short worked example of another chain opens the prompt. The wordings
are this project's own.
"""

import random

from eval_passkey.names import draw_labels, draw_numbers, pool
from eval_passkey.prompts import Encoder, Haystack, Hidden, Task

_DIGITS = 5


class TrackingTask(Task):
    """A chain of `hops` links: `hops + 1` names, all of them asked for."""

    kind = "variable_tracking"

    def __init__(self, name: str, encoder: Encoder, haystack: Haystack, hops: int):
        super().__init__(name, encoder, haystack)
        self.hops = hops

    def describe(self) -> dict:
        """The wordings it draws from, and how long the chain is."""
        return {**super().describe(), "hops": self.hops, "wordings": pool("tracking")}

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """The links in order, at places of their own, none before `depth` if it is given."""
        wording = rng.choice(pool("tracking"))
        labels = draw_labels(rng, 2 * (self.hops + 1))
        shown, example = draw_numbers(rng, 2, _DIGITS)
        names, others = labels[: self.hops + 1], labels[self.hops + 1 :]
        places = sorted(rng.random() for _ in names)
        if depth is not None:
            places = [depth, *(depth + (1 - depth) * place for place in places[1:])]
        parts: list[str | None] = [_example(wording, others, example) + "\n\n" + wording["opening"], None]
        for link in links(wording, names, shown):
            parts += [link, None]
        return Hidden(parts, *_question(wording, names, shown), answers=tuple(names), cuts=places, before=1)


def links(wording: dict, names: list[str], value: str) -> list[str]:
    """The sentences of a chain, in the words of `first` and `hop`."""
    hops = [wording["hop"].format(name=name, before=before) for before, name in zip(names, names[1:], strict=False)]
    return [wording["first"].format(name=names[0], value=value), *hops]


def _question(wording: dict, names: list[str], value: str) -> tuple[str, str]:
    slots = {"value": value, "count": len(names)}
    return wording["question"].format(**slots), wording["answer_start"].format(**slots)


def _example(wording: dict, names: list[str], value: str) -> str:
    """The whole task with another chain and no haystack, and its answer."""
    question, answer_start = _question(wording, names, value)
    lines = [wording["opening"], *links(wording, names, value), f"{question} {answer_start} {', '.join(names)}"]
    return "\n".join(lines)
