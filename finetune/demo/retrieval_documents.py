"""Synthetic retrieval documents: a number hidden under a name in a long text, and asked for by that name.

Everything varies, so that looking a name up is the only thing worth learning: the sentences around the number, the
sentence that states it, the one that asks for it, the name, the number's length, the distance, how many there are.
"""

import json
import random
import re
from pathlib import Path

# Every seventh five-digit number is kept for the passkey benchmark, which draws its keys from these alone
# (`eval_passkey.names.is_benchmark_key` says the same; a test compares the two).
BENCHMARK_KEY_DIVISOR, BENCHMARK_KEY_REMAINDER = 7, 3
PROSE_SHARE = 0.2  # of the texts that a number is hidden in
WORDING = Path(__file__).parent / "wording.json"
_FIVE_DIGITS = re.compile(r"(?=([1-9][0-9]{4}))")


def is_reserved_number(number: int) -> bool:
    """Whether `number` is one of the five-digit numbers that only the passkey benchmark may use."""
    return 10_000 <= number < 100_000 and number % BENCHMARK_KEY_DIVISOR == BENCHMARK_KEY_REMAINDER


def holds_reserved_number(text: str) -> bool:
    """Whether any five neighbouring digits of `text`, also inside a longer number, form a reserved number."""
    return any(is_reserved_number(int(match[1])) for match in _FIVE_DIGITS.finditer(text))


class RetrievalWriter:
    """Writes retrieval documents; the same generator state, words and prose give the same documents.

    Args:
        rng: where all choices come from.
        words: ordinary lower-case words, for names and fillers beside the built-in lists.
        prose: pieces of real text that serve as haystacks; they must hold no reserved number.
        register_share: share of registers among the documents that are no copy; the others hide numbers.
        refrain_share: share of the hiding texts that say a few sentences over and over.

    The built-in words and sentence shapes stand in `wording.json`. In a shape `{x}` is the name, `{k}` the
    number and `{t}` what kind of number it is; a statement cut off before its number is a question, too. The `invented`
    shapes are made of any words, because a number must be found however it was stated.
    """

    def __init__(
        self,
        rng: random.Random,
        words: list[str],
        prose: list[str],
        register_share: float = 0.3,
        refrain_share: float = 0.35,
    ) -> None:
        self.rng, self.words, self.prose = rng, words, prose
        self.register_share, self.refrain_share = register_share, refrain_share
        self.wording: dict[str, list[str]] = json.loads(WORDING.read_text(encoding="utf-8"))

    def document(self, characters: int, copy_share: float) -> str:
        """A document of about `characters` characters: numbers hidden in a long text, a register of them, or a copy.

        Registers and copies are made of little else than tokens that can be looked up. They teach a model how to look
        things up in a fraction of the time that the hidden numbers alone, a few digits in a long text, would take.
        """
        if self.rng.random() < copy_share:
            return self._copy(characters)
        return self._register(characters) if self.rng.random() < self.register_share else self._hidden(characters)

    def _copy(self, characters: int) -> str:
        """Any words and numbers, and the same again."""
        rng = self.rng
        parts: list[str] = []
        length = rng.randint(20, max(characters // 2, 20))
        while sum(map(len, parts)) + len(parts) < length:
            parts.append(self._number() if rng.random() < 0.2 else self._word())
        return rng.choice(("\n", " ", ". ")).join([" ".join(parts)] * 2)

    def _register(self, characters: int) -> str:
        """Names with their numbers, and then the same names in another order, each asking for its number."""
        rng = self.rng
        facts = [(name, self._number()) for name in self._names(rng.randint(2, max(2, min(16, characters // 50))))]
        shapes = ["{x}: {k}", "{x} {k}", "{x} = {k}", self._pick("statements"), self._statement(), self._statement()]
        # A sentence asks only if it has the name before the number.
        shape = rng.choice([shape for shape in shapes if shape.find("{x}") < shape.find("{k}")])
        asking = shape if rng.random() < 0.6 else self._pick("questions")
        thing = self._thing()
        lines = [self._fill(shape, x=name, k=number, t=thing) for name, number in facts]
        again = rng.sample(facts, len(facts))
        lines += [self._fill(asking, x=name, k=number, t=thing) for name, number in again]
        return rng.choice((" ", "\n", "\n")).join(lines)

    def _hidden(self, characters: int) -> str:
        """One or more numbers in a text that is beside the point, and then a question for each of them."""
        rng = self.rng
        count = 1 if rng.random() < 0.4 else rng.randint(2, max(2, min(8, characters // 60)))
        thing = self._thing()
        facts = [(name, self._number(), thing if rng.random() < 0.7 else self._thing()) for name in self._names(count)]
        # Mostly all numbers are stated in the same words, so that the name alone tells them apart.
        statements = [self._statement()] * count if rng.random() < 0.8 else [self._statement() for _ in facts]
        lines = self._haystack(max(characters - 90 * count, 0))
        for fact, shape in zip(facts, statements, strict=True):
            lines.insert(rng.randint(0, len(lines)), self._state(shape, *fact))
        if rng.random() < 0.6:
            name, _, what = rng.choice(facts)
            lines.insert(0, self._fill(self._pick("introductions"), x=name, t=what))
        for i in rng.sample(range(count), count):
            # A sentence asks only if it has the name before the number.
            asks = statements[i].find("{x}") < statements[i].find("{k}")
            lines.append(
                self._state(statements[i] if asks and rng.random() < 0.75 else self._pick("questions"), *facts[i])
            )
        return rng.choice((" ", " ", "\n")).join(lines)

    def _statement(self) -> str:
        """The shape of a sentence that states a number under a name, with `{x}`, `{k}` and perhaps `{t}` to fill."""
        if self.rng.random() < 0.7:
            return self._pick("statements")
        return self._fill(self._pick("invented"), x="{x}", k="{k}")

    def _haystack(self, characters: int) -> list[str]:
        """Sentences that are beside the point, about `characters` characters of them."""
        rng = self.rng
        kind = rng.random()
        if kind < PROSE_SHARE and self.prose:
            piece = rng.choice(self.prose)
            start = rng.randint(0, max(0, len(piece) - characters))
            return re.split(r"(?<=[.:\n])\s+", piece[start : start + characters].strip())
        # A few sentences over and over, or ever new ones.
        cycle = (
            [self._sentence() for _ in range(rng.randint(1, 6))] if kind < PROSE_SHARE + self.refrain_share else None
        )
        lines: list[str] = []
        length = 0
        while length < characters:
            lines.append(cycle[len(lines) % len(cycle)] if cycle else self._sentence())
            length += len(lines[-1]) + 1
        return lines

    def _sentence(self) -> str:
        rng = self.rng
        return self._fill(self._pick("sentences"), year=str(rng.randint(1000, 2100)), small=str(rng.randint(2, 999)))

    def _fill(self, shape: str, **chosen: str) -> str:
        pick = self._pick
        slots = {
            "a": pick("adjectives"), "a2": pick("adjectives"), "n": pick("nouns"), "n2": pick("nouns"),
            "v": pick("verbs"), "p": pick("places"), "P": pick("people"), "Q": pick("people"),
            "w": self._word(), "w2": self._word(), "w3": self._word(), "W": self._word().capitalize(),
        }  # fmt: skip
        return shape.format(**{**slots, **chosen})

    def _pick(self, kind: str) -> str:
        return self.rng.choice(self.wording[kind])

    def _state(self, shape: str, name: str, number: str, what: str) -> str:
        text = self._fill(shape, x=name, k=number, t=what)
        return text[0].upper() + text[1:] if self.rng.random() < 0.8 else text

    def _word(self) -> str:
        """A word of the built-in lists, of real text, or one that nobody has seen before."""
        kind = self.rng.random()
        if kind < 0.3:
            return self._pick("nouns")
        if kind < 0.7 and self.words:
            return self.rng.choice(self.words)
        return "".join(self._pick("syllables") for _ in range(self.rng.randint(2, 3)))

    def _thing(self) -> str:
        return self._pick("things") if self.rng.random() < 0.85 else self._word()

    def _names(self, count: int) -> list[str]:
        """`count` different names, mostly of two words; some share a word, so that both words must be compared."""
        rng = self.rng
        shared = self._word() if rng.random() < 0.3 else None
        names: list[str] = []
        while len(names) < count:
            first = self._pick("adjectives") if rng.random() < 0.4 else self._word()
            parts = [first, self._word()]
            if shared and rng.random() < 0.6:
                parts[rng.randint(0, 1)] = shared
            if rng.random() < 0.1:
                parts = parts[:1] if rng.random() < 0.5 else [*parts, self._word()]
            name = " ".join(parts)
            if name not in names:
                names.append(name.title() if rng.random() < 0.1 else name)
        return names

    def _number(self) -> str:
        """Three to seven digits, mostly five; never one that holds a reserved number."""
        while True:
            digits = self.rng.choice((3, 4, 5, 5, 5, 5, 5, 5, 6, 7))
            number = str(self.rng.randrange(10 ** (digits - 1), 10**digits))
            if not holds_reserved_number(number):
                return number
