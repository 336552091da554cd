"""What prompts hide, drawn from pools that no training text holds: numbers, names, and the wordings around them."""

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_WORDINGS = Path(__file__).resolve().parent / "wordings.json"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_benchmark_key(number: int) -> bool:
    """Whether `number` is kept for the benchmark: five digits, `number % 7 == 3`. The training corpus holds none."""
    return 10_000 <= number <= 99_999 and number % 7 == 3


def holds_benchmark_key(number: int) -> bool:
    """Whether any five neighbouring digits of `number` are a benchmark key; the training corpus holds none of these."""
    digits = str(number)
    return any(is_benchmark_key(int(digits[i : i + 5])) for i in range(len(digits) - 4))


def draw_key(rng: random.Random) -> str:
    """A benchmark key, every one being equally likely."""
    return str(rng.randrange(10_006, 100_000, 7))


def draw_numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """`count` different numbers of that many digits, at least five, each holding a benchmark key."""
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if holds_benchmark_key(number):
            numbers[str(number)] = None
    return list(numbers)


def names(rng: random.Random, separator: str = " ") -> Iterator[str]:
    """Different names without end: of two words, of three once half of those with two are taken."""
    adjectives, nouns = pool("adjectives"), pool("nouns")
    seen: set[str] = set()
    while True:
        words = [rng.choice(adjectives), rng.choice(nouns)]
        if 2 * len(seen) >= len(adjectives) * len(nouns):
            words.insert(0, rng.choice(adjectives))
        name = separator.join(words)
        if name not in seen:
            seen.add(name)
            yield name


def draw_labels(rng: random.Random, count: int) -> list[str]:
    """`count` different labels of five capital letters, as RULER's variables have."""
    labels: dict[str, None] = {}
    while len(labels) < count:
        labels["".join(rng.choices(_LETTERS, k=5))] = None
    return list(labels)


def pool(kind: str) -> list:
    """A list of `wordings.json`: adjectives, nouns, or the wordings of a task."""
    return _pools()[kind]


@cache
def _pools() -> dict[str, list]:
    return json.loads(_WORDINGS.read_text(encoding="utf-8"))
