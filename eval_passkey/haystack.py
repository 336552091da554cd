"""What prompts hide their needles in: a few sentences said again and again, or a text of the user's."""

import hashlib
import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from eval_passkey.prompts import Encoder, InputError

_CLAUSE_END = re.compile(r"(?<=[.!?;:,]) ")
_ROUNDS = 16  # of a filler that are tokenised at once
_LEAST_DRIFT = 32  # tokens that a cut may move to the end of a clause; in long prompts a twentieth of the haystack


class Filler:
    """Sentences said again and again, from their beginning in each piece; a piece starts with the joiner."""

    def __init__(self, encoder: Encoder, sentences: str, joiner: str = "\n"):
        self.encoder, self.sentences, self.joiner = encoder, sentences, joiner
        self._ids: dict[bool, list[int]] = {True: [], False: []}  # by: at the start of the prompt?

    def describe(self) -> dict:
        """The sentences."""
        return {"filler": self.sentences}

    def split(self, room: int, cuts: Sequence[float], rng: random.Random, first: bool) -> list[list[int]]:
        """`room` tokens in `len(cuts) + 1` pieces, cut at exactly those shares, between any two tokens."""
        bounds = [0, *(round(cut * room) for cut in cuts), room]
        return [
            self._piece(end - start, first and i == 0)
            for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]

    def _piece(self, count: int, first: bool) -> list[int]:
        """The first `count` tokens of the sentences, said again and again."""
        rounds = _ROUNDS
        while len(self._ids[first]) < count:
            ids, more, most = (self._rounds(n * rounds, first) for n in (1, 2, 3))
            period = more[len(ids) :]
            if ids + period == more and more + period == most:  # to tokenise millions of rounds takes gigabytes
                ids += period * (count // len(period) + 1)
            self._ids[first] = ids
            rounds *= 2
        return self._ids[first][:count]

    def _rounds(self, rounds: int, first: bool) -> list[int]:
        text = " ".join([self.sentences] * rounds)
        return self.encoder.encode(text if first else self.joiner + text, first)


class Lines(Filler):
    """The same sentences line after line, as RULER's noise: needles stand between two lines, none of which they cut.

    The last line of all is wherever the length ends.
    """

    def describe(self) -> dict:
        """The sentences, a line each."""
        return {"lines": self.sentences}

    def split(self, room: int, cuts: Sequence[float], rng: random.Random, first: bool) -> list[list[int]]:
        """`room` tokens in `len(cuts) + 1` pieces, cut after whole lines near those shares."""
        line = self.encoder.encode(self.joiner + self.sentences)
        bounds = [0]
        for cut in cuts:
            bounds.append(max(bounds[-1], min(round(cut * room / len(line)), room // len(line))))
        pieces = [line * (end - start) for start, end in zip(bounds, bounds[1:], strict=False)]
        rest = room - bounds[-1] * len(line)
        return [*pieces, (line * (rest // len(line) + 1))[:rest]]


class TextHaystack:
    """A text, from a clause drawn for each prompt on; after its end it begins again.

    White space is made single spaces, as in RULER's essays. Cuts move to the nearest end of a clause where one is near,
    so that needles cut no word; the last token of all is wherever the length ends.
    """

    def __init__(self, encoder: Encoder, text: str, name: str):
        self.name = name
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        words = " ".join(text.replace("\ufeff", "").split())
        if not words:
            raise InputError(f"--haystack {name}: holds no text")
        self.ids: list[int] = []
        self.ends: list[int] = []  # of clauses, in tokens
        for clause in _CLAUSE_END.split(words):
            self.ids += encoder.encode(" " + clause)
            self.ends.append(len(self.ids))

    def describe(self) -> dict:
        """The text's digest: the same text in another place is the same haystack."""
        return {"text": self.digest}

    def split(self, room: int, cuts: Sequence[float], rng: random.Random, first: bool) -> list[list[int]]:
        """`room` tokens in `len(cuts) + 1` pieces, cut after about those shares."""
        start = rng.choice([0, *self.ends[:-1]])
        bounds = [0]
        for cut in cuts:
            end = self._clause_end(start, cut * room, room) if 0 < cut < 1 else round(cut * room)
            bounds.append(max(bounds[-1], end))
        bounds.append(room)
        text = self._tokens(start, room)
        return [text[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]

    def _tokens(self, start: int, count: int) -> list[int]:
        rounds = (start + count) // len(self.ids) + 1
        return (self.ids * rounds)[start : start + count]

    def _clause_end(self, start: int, wanted: float, room: int) -> int:
        """Tokens after `start` to the end of a clause near `wanted`, or to `wanted` itself; at most `room`."""
        lap, offset = divmod(start + round(wanted), len(self.ids))
        i = bisect_left(self.ends, offset)  # the last end is the text's, so there is one
        near = [lap * len(self.ids) + end - start for end in (self.ends[i - 1] if i else 0, self.ends[i])]
        end = min(near, key=lambda end: abs(end - wanted))
        drift = max(_LEAST_DRIFT, room // 20)
        return end if 0 <= end <= room and abs(end - wanted) <= drift else round(wanted)


def read_texts(paths: Sequence[str]) -> str:
    """The files' texts, one after the other; InputError naming the file that cannot be read."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--haystack {path}: cannot be read as a text in UTF-8 ({error})") from error
    return "\n".join(texts)
