"""The passkey task: a prompt of an exact token length that hides a number, and the judgement of the answer.

Lengths are counted in tokens of the model's own tokenizer, and include the special tokens that it puts in front of a
text (LLaMA's BOS). A landmark model inserts its landmarks by itself; they are not counted.

The parts of the prompt (task, needle, question) are tokenised whole; only filler is cut, at the end of its part and
between two tokens, so that every length is hit exactly with every tokenizer. Each part starts with the joiner and is
tokenised as the continuation of a word: SentencePiece then adds no space of its own at the joint, and a byte-level
vocabulary keeps `" word"` whole.
"""

import json
import random
import re
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from pathlib import Path

DEFAULT_TEMPLATE = Path(__file__).resolve().parent / "template.json"

FILLERS = ("filler prefix", "filler suffix")
PARTS = ("task", "filler prefix", "needle", "filler suffix", "question")
EXTRA_NEW_TOKENS = 4  # beyond the key's own: a longer number must be seen to be longer
PREDICTION_CHARACTERS = 40  # of an answer that holds no number

_NUMBER = re.compile(r"\s*([0-9]+(?:[.,][0-9]+)*)")


class InputError(ValueError):
    """What a user gave cannot be used; the message says what and why in one sentence."""


def is_benchmark_key(number: int) -> bool:
    """Whether `number` is kept for the benchmark: five digits, `number % 7 == 3`. The training corpus holds none."""
    return 10_000 <= number <= 99_999 and number % 7 == 3


@dataclass(frozen=True)
class Template:
    """The wording of a passkey prompt; `template.json` beside this file shows the fields.

    `needle` holds `{key}` at least once; `question` ends right before the answer. Keys are drawn from `key_range`, both
    ends included, or only from those that `is_benchmark_key` accepts. Further fields of a file are notes.
    """

    task: str
    filler: str
    needle: str
    question: str
    key_range: tuple[int, int]
    layout: tuple[str, ...]
    joiner: str
    benchmark_keys_only: bool = False

    def text(self, part: str, key: int) -> str:
        """The words of a part of the layout; of a filler part, one round of the filler."""
        if part in FILLERS:
            return self.filler
        return getattr(self, part).replace("{key}", str(key))


def load_template(path: str | Path = DEFAULT_TEMPLATE) -> Template:
    """Reads and checks a template file; InputError with file and field if it cannot be used."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"template {path}: cannot be read as a JSON file ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"template {path}: must be a JSON object with the fields of {DEFAULT_TEMPLATE.name}")
    try:
        return _checked_template(fields)
    except ValueError as error:
        raise InputError(f"template {path}: {error}") from error


def _checked_template(fields: dict) -> Template:
    required = [field.name for field in dataclass_fields(Template) if field.default is MISSING]
    for name in required:
        if name not in fields:
            raise ValueError(f"lacks the field {name!r} (needed: {', '.join(required)})")
    for name in ("task", "filler", "needle", "question", "joiner"):
        if not isinstance(fields[name], str) or not (fields[name] or name == "joiner"):
            raise ValueError(f"{name} must be a text that is not empty, not {fields[name]!r}")
        if ("{key}" in fields[name]) != (name == "needle"):
            raise ValueError("{key} must stand in needle, and nowhere else" + f": see {name}")
    only = fields.get("benchmark_keys_only", False)
    if only not in (True, False):
        raise ValueError(f"benchmark_keys_only must be true or false, not {only!r}")
    texts = {name: fields[name] for name in ("task", "filler", "needle", "question", "joiner")}
    template = Template(
        **texts, key_range=_checked_key_range(fields), layout=_checked_layout(fields), benchmark_keys_only=only
    )
    if template.benchmark_keys_only and not any(map(is_benchmark_key, range(*_half_open(template.key_range)))):
        raise ValueError(f"key_range={fields['key_range']} holds no benchmark key (five digits, key % 7 == 3)")
    return template


def _checked_layout(fields: dict) -> tuple[str, ...]:
    layout = fields["layout"]
    if not isinstance(layout, list) or any(part not in PARTS for part in layout) or len(set(layout)) != len(layout):
        raise ValueError(f"layout must list each of {', '.join(PARTS)} at most once, not {layout!r}")
    if "needle" not in layout or not set(layout) & set(FILLERS) or layout[-1:] != ["question"]:
        raise ValueError(f"layout must hold needle and a filler and end with question, not {layout!r}")
    needle = layout.index("needle")
    if "filler prefix" in layout[needle:] or "filler suffix" in layout[:needle]:
        raise ValueError(f"layout must have filler prefix before needle and filler suffix after it, not {layout!r}")
    return tuple(layout)


def _checked_key_range(fields: dict) -> tuple[int, int]:
    key_range = fields["key_range"]
    whole = isinstance(key_range, list) and len(key_range) == 2 and all(type(end) is int for end in key_range)
    if not whole or not 0 <= key_range[0] <= key_range[1]:
        raise ValueError(f"key_range must be [smallest, largest] of whole numbers from 0, not {key_range!r}")
    return tuple(key_range)


def _half_open(key_range: tuple[int, int]) -> tuple[int, int]:
    return key_range[0], key_range[1] + 1


def draw_key(template: Template, rng: random.Random) -> int:
    """A key of the template, every possible one being equally likely."""
    while True:
        key = rng.randrange(*_half_open(template.key_range))
        if is_benchmark_key(key) or not template.benchmark_keys_only:
            return key


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it hides. `depth` is the share of the filler's tokens that stand before the needle."""

    input_ids: list[int]
    key: int
    depth: float
    seed: int
    max_new_tokens: int


class PasskeyTask:
    """Makes prompts with one tokenizer and one wording.

        task = PasskeyTask(tokenizer, load_template())
        prompt = task.prompt(length=4096, seed=0)          # the depth is drawn, too
        correct, prediction = judge(tokenizer.decode(new_ids, skip_special_tokens=True), prompt.key)

    The filler is tokenised once and shared by all prompts.
    """

    def __init__(self, tokenizer, template: Template):
        self.tokenizer = tokenizer
        self.template = template
        self.special_ids = _leading_special_ids(tokenizer)
        self._encode_fixed = lru_cache(maxsize=64)(self._encode)
        self._filler_ids: dict[bool, list[int]] = {True: [], False: []}  # by: at the start of the prompt?

    def minimum_length(self) -> int:
        """Tokens that a prompt has without any filler: the most that any of a sample of keys needs."""
        rng = random.Random("sample of keys")
        return max(self._length_without_filler(draw_key(self.template, rng)) for _ in range(32))

    def _length_without_filler(self, key: int) -> int:
        return len(self.special_ids) + sum(len(ids) for ids in self._fixed_parts(key).values())

    def prompt(self, length: int, seed: int, depth: float | None = None) -> Prompt:
        """A prompt of exactly `length` tokens; equal arguments give equal prompts.

        depth: where the needle shall stand in the filler, 0 (start) to 1 (end); drawn from `seed` if None. What a whole
            number of tokens (and the layout) makes of it is the prompt's `depth`.
        InputError if `length` has no room for task, needle and question.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: must be between 0 (start of the filler) and 1 (its end)")
        rng = random.Random(f"passkey {seed} {length}")
        key = draw_key(self.template, rng)
        drawn_depth = rng.random()
        fixed = self._fixed_parts(key)
        room = length - self._length_without_filler(key)
        if room < 0:
            minimum = max(length - room, self.minimum_length())
            raise InputError(
                f"length={length}: task, needle and question alone need {minimum} tokens of this tokenizer"
            )
        before = self._filler_before_needle(drawn_depth if depth is None else depth, room)
        counts = {"filler prefix": before, "filler suffix": room - before}

        input_ids = list(self.special_ids)
        for i, part in enumerate(self.template.layout):
            input_ids += self._filler(counts[part], first=i == 0) if part in FILLERS else fixed[part]
        answer_tokens = len(self._encode_fixed(f" {key}", False))
        return Prompt(input_ids, key, before / room if room else 0.0, seed, answer_tokens + EXTRA_NEW_TOKENS)

    def _filler_before_needle(self, depth: float, room: int) -> int:
        """Filler tokens before the needle; all or none where the layout has filler on one side alone."""
        if "filler prefix" not in self.template.layout:
            return 0
        if "filler suffix" not in self.template.layout:
            return room
        return round(depth * room)

    def _fixed_parts(self, key: int) -> dict[str, list[int]]:
        """Token ids of the parts that are never cut, each with the joiner before it."""
        parts = {}
        for i, part in enumerate(self.template.layout):
            if part not in FILLERS:
                text = self.template.text(part, key)
                parts[part] = self._encode_fixed(text if i == 0 else self.template.joiner + text, i == 0)
        return parts

    def _filler(self, count: int, first: bool) -> list[int]:
        """The first `count` tokens of the filler, said again and again."""
        rounds = 16
        while len(self._filler_ids[first]) < count:
            rounds *= 2
            text = " ".join([self.template.filler] * rounds)
            self._filler_ids[first] = self._encode(text if first else self.template.joiner + text, first)
        return self._filler_ids[first][:count]

    def _encode(self, text: str, first: bool) -> list[int]:
        """Token ids of `text`, at the start of a prompt or as the continuation of a word, without special tokens."""
        whole = _plain_ids(self.tokenizer, text)
        if first:
            return whole
        for anchor in ("a", "the", "0"):  # one that this tokenizer does not merge with what follows
            head, joined = _plain_ids(self.tokenizer, anchor), _plain_ids(self.tokenizer, anchor + text)
            if joined[: len(head)] == head:
                return joined[len(head) :]
        return whole


def _plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _leading_special_ids(tokenizer) -> list[int]:
    """What the tokenizer puts in front of a text. What it would put at the end (EOS) has no place in a prompt."""
    plain, whole = _plain_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]


def judge(answer: str, key: int) -> tuple[bool, str]:
    """Whether a generated text gives `key`, and the prediction: the number it starts with, else its first characters.

    Right is the key with all its digits and no further one: white space before it and any text after it are allowed,
    but `48213.5` and `48213,000` are other numbers than 48213.
    """
    number = _NUMBER.match(answer)
    prediction = number.group(1) if number else answer[:PREDICTION_CHARACTERS]
    return prediction == str(key), prediction
