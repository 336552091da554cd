"""The pass key: one number hidden in a long text and asked for at its end, in the paper's wording or another one."""

import json
import random
import re
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path

from eval_passkey.haystack import Filler
from eval_passkey.names import is_benchmark_key
from eval_passkey.prompts import Encoder, Haystack, Hidden, InputError, Prompt, Task, Verdict

_FOLDER = Path(__file__).resolve().parent
TEMPLATES = {name: _FOLDER / f"template_{name}.json" for name in ("paper", "twice", "once")}
DEFAULT_TEMPLATE = TEMPLATES["paper"]

FILLERS = ("filler prefix", "filler suffix")
PARTS = ("task", "filler prefix", "needle", "filler suffix", "question")
_TEXTS = ("task", "filler", "needle", "question", "answer_start", "joiner")
_MAY_BE_EMPTY = ("joiner", "answer_start")
_PREDICTION_CHARACTERS = 40  # of an answer that holds no number

_NUMBER = re.compile(r"\s*([0-9]+(?:[.,][0-9]+)*)")


@dataclass(frozen=True)
class Template:
    """The wording of a passkey prompt; `template_paper.json` beside this file shows the fields.

    `needle` holds `{key}` at least once; `question` and `answer_start`, with a space between them, end right before the
    answer (in a chat template, `answer_start` begins the model's turn). Keys are drawn from `key_range`, both ends
    included, or only from those that `is_benchmark_key` accepts. Further fields of a file are notes.
    """

    task: str
    filler: str
    needle: str
    question: str
    key_range: tuple[int, int]
    layout: tuple[str, ...]
    joiner: str
    benchmark_keys_only: bool = False
    answer_start: str = ""

    def text(self, part: str, key: int | str) -> str:
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
    texts = {name: fields.get(name, "") for name in _TEXTS}
    for name, text in texts.items():
        if not isinstance(text, str) or not (text or name in _MAY_BE_EMPTY):
            raise ValueError(f"{name} must be a text that is not empty, not {text!r}")
        if ("{key}" in text) != (name == "needle"):
            raise ValueError("{key} must stand in needle, and nowhere else" + f": see {name}")
    only = fields.get("benchmark_keys_only", False)
    if only not in (True, False):
        raise ValueError(f"benchmark_keys_only must be true or false, not {only!r}")
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


class PasskeyTask(Task):
    """Hides one number, in the wording of a template; its haystack is the template's filler unless another is given."""

    kind = "passkey"

    def __init__(self, name: str, encoder: Encoder, template: Template, haystack: Haystack | None = None):
        super().__init__(name, encoder, haystack or Filler(encoder, template.filler, template.joiner))
        self.template = template

    def describe(self) -> dict:
        """The wording, and the haystack where it is not the wording's own."""
        fields = vars(self.template).items()
        wording = {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
        return {**super().describe(), "template": wording}

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """A number, and where it shall stand; all haystack before or after it where the layout has it on one side."""
        template = self.template
        key = str(draw_key(template, rng))
        drawn = rng.random()
        parts = [None if part in FILLERS else template.text(part, key) for part in template.layout[:-1]]
        return Hidden(
            parts,
            template.question,
            template.answer_start,
            (key,),
            cuts=[drawn if depth is None else depth] if parts.count(None) == 2 else [],
            before=int("filler prefix" in template.layout),
            joiner=template.joiner,
        )

    def judge(self, answer: str, prompt: Prompt) -> Verdict:
        """Stricter than RULER's match: nothing but the whole number may begin the answer (`judge`)."""
        correct, prediction = judge(answer, prompt.key)
        return Verdict(correct, prediction, float(correct))


def judge(answer: str, key: str) -> tuple[bool, str]:
    """Whether a generated text gives `key`, and the prediction: the number it starts with, else its first characters.

    Right is the key with all its digits and no further one: white space before it and any text after it are allowed,
    but `48213.5` and `48213,000` are other numbers than 48213.
    """
    number = _NUMBER.match(answer)
    prediction = number.group(1) if number else answer[:_PREDICTION_CHARACTERS]
    return prediction == key, prediction
