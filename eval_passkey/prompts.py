"""Prompts of an exact token length: parts that are never cut, and a haystack cut to fill what they leave.

Lengths are counted in tokens of the model's own tokenizer, and include the special tokens that it puts in front of a
text (LLaMA's BOS), or those of its chat template. A landmark model inserts its landmarks by itself; they are not
counted.

The parts of a prompt (task, needles, question) are tokenised whole; only the haystack is cut, between two tokens, so
that every length is hit exactly with every tokenizer. Each part starts with the joiner and is tokenised as the
continuation of a word: SentencePiece then adds no space of its own at the joint, and a byte-level vocabulary keeps
`" word"` whole.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

EXTRA_NEW_TOKENS = 4  # beyond the answer's own: a longer number must be seen to be longer
PREDICTION_CHARACTERS = 400  # of an answer are kept in its row
_SAMPLED = 32  # prompts that the minimum length is taken from
_CONTENT = "USER-CONTENT"  # stands for the user's turn while the chat template is taken apart


class InputError(ValueError):
    """What a user gave cannot be used; the message says what and why in one sentence."""


class NoRoomError(ValueError):
    """A prompt needs `tokens` and more were not allowed."""

    def __init__(self, tokens: int):
        super().__init__(f"the prompt needs {tokens} tokens")
        self.tokens = tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it hides. `depth` is the share of the haystack's tokens before the needle that is asked for.

    needle: where that needle's tokens begin and end; None where it does not stand by itself between haystack.
    """

    input_ids: list[int]
    answers: tuple[str, ...]
    depth: float
    seed: int
    max_new_tokens: int
    needle: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """The answers in one text."""
        return ", ".join(self.answers)


@dataclass(frozen=True)
class Hidden:
    """A prompt in words, before anything is measured in tokens.

    parts: the texts in order; None where haystack goes, which is cut after each of `cuts`.
    question, answer_start: the end of the prompt, and how the answer begins; the model goes on from there.
    cuts: ascending shares of the haystack, one fewer than there are None.
    before: how many pieces of haystack stand before the needle that is asked for.
    depth: of what is asked for, where it does not follow from `before`.
    """

    parts: list[str | None]
    question: str
    answer_start: str
    answers: tuple[str, ...]
    cuts: list[float]
    before: int
    joiner: str = "\n"
    depth: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth: `recall` is the share of the expected answers in it, `correct` means all of them."""

    correct: bool
    prediction: str
    recall: float


class Haystack(Protocol):
    """Where the tokens beside the point come from."""

    def split(self, room: int, cuts: list[float], rng: random.Random, first: bool) -> list[list[int]]:
        """`room` tokens in `len(cuts) + 1` pieces, cut after about those shares; `first`: they begin the prompt."""

    def describe(self) -> dict:
        """JSON values that name it in the results."""


class Encoder:
    """Token ids of a prompt's parts with one tokenizer, inside its chat template if asked for.

    With `chat_template` everything up to the question is the user's turn, and the answer's start begins the model's.
    InputError if the tokenizer has no chat template, or one that changes what the user says.
    """

    def __init__(self, tokenizer, chat_template: bool = False):
        self.tokenizer = tokenizer
        self.in_chat = chat_template
        head, self._turn = _chat_frame(tokenizer) if chat_template else ("", "")
        kept = head.rstrip(" ")  # a word takes the space before it along
        self._lead = head[len(kept) :]
        self.start: list[int] = _plain_ids(tokenizer, kept) if chat_template else _leading_special_ids(tokenizer)
        self._opens = not kept  # whether the first part is the beginning of a text
        self.cached = lru_cache(maxsize=8192)(self.encode)

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids of `text`, at the start of a text or as the continuation of a word, without special tokens."""
        whole = _plain_ids(self.tokenizer, text)
        if first:
            return whole
        for anchor in ("a", "the", "0"):  # one that this tokenizer does not merge with what follows
            head, joined = _plain_ids(self.tokenizer, anchor), _plain_ids(self.tokenizer, anchor + text)
            if joined[: len(head)] == head:
                return joined[len(head) :]
        return whole

    def parts(self, hidden: Hidden) -> list[list[int] | None]:
        """Token ids of every part, question and answer's start last; None where haystack goes."""
        ending = hidden.question
        if self.in_chat:
            ending += self._turn
        elif hidden.answer_start:
            ending += f" {hidden.answer_start}"
        ids: list[list[int] | None] = []
        for i, text in enumerate([*hidden.parts, ending]):
            if text is None:
                ids.append(None)
            elif i == 0:
                ids.append(self.cached(self._lead + text, self._opens))
            else:
                ids.append(self.cached(hidden.joiner + text, False))
        if self.in_chat and hidden.answer_start:
            ids.append(self.cached(hidden.answer_start, False))
        return ids

    def fixed_length(self, hidden: Hidden) -> int:
        """Tokens of the prompt without any haystack."""
        return len(self.start) + sum(len(ids) for ids in self.parts(hidden) if ids is not None)

    def new_tokens(self, answers: tuple[str, ...]) -> int:
        """Tokens that an answer may take: several answers may be said with words between them."""
        needed = len(self.cached(" " + ", ".join(answers), False))
        return needed * (1 if len(answers) == 1 else 2) + EXTRA_NEW_TOKENS

    def prompt(self, length: int, seed: int, hidden: Hidden, haystack: Haystack, rng: random.Random) -> Prompt:
        """`hidden` in exactly `length` tokens; NoRoomError if it takes more without any haystack."""
        parts = self.parts(hidden)
        room = length - len(self.start) - sum(len(ids) for ids in parts if ids is not None)
        if room < 0:
            raise NoRoomError(length - room)
        pieces = haystack.split(room, hidden.cuts, rng, first=hidden.parts[0] is None and self._opens)
        depth = sum(map(len, pieces[: hidden.before])) / room if room else 0.0
        rest, passed, needle = iter(pieces), 0, None
        input_ids = list(self.start)
        for i, ids in enumerate(parts):
            begin = len(input_ids)
            input_ids += next(rest) if ids is None else ids
            if ids is None:
                passed += 1
            elif needle is None and 0 < passed == hidden.before and i + 1 < len(parts):
                needle = begin, len(input_ids)
        depth = depth if hidden.depth is None else hidden.depth
        return Prompt(input_ids, hidden.answers, depth, seed, self.new_tokens(hidden.answers), needle)


class Task:
    """One kind of question. A subclass says what a prompt hides (`hide`) and how it is described in the results.

    task = make_task("passkey", tokenizer)
    prompt = task.prompt(length=4096, seed=0)          # the depth is drawn, too
    verdict = task.judge(tokenizer.decode(new_ids, skip_special_tokens=True), prompt)
    """

    kind: str

    def __init__(self, name: str, encoder: Encoder, haystack: Haystack):
        self.name, self.encoder, self.haystack = name, encoder, haystack

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """What a prompt of `length` tokens hides, all choices made by `rng`; at the share `depth` if it is given."""
        raise NotImplementedError

    def describe(self) -> dict:
        """JSON values: what two results must share to be results of the same task."""
        return {"kind": self.kind, "haystack": self.haystack.describe()}

    def judge(self, answer: str, prompt: Prompt) -> Verdict:
        """RULER's string match (arXiv 2404.06654): the share of the expected answers that occur in the answer."""
        said = answer.lower()
        found = sum(expected.lower() in said for expected in prompt.answers)
        recall = found / len(prompt.answers)
        return Verdict(found == len(prompt.answers), answer.strip()[:PREDICTION_CHARACTERS], recall)

    def minimum_length(self) -> int:
        """Tokens that a prompt has without any haystack: the most that any of a sample of prompts needs."""
        rng = random.Random("a sample of prompts")
        return max(self.encoder.fixed_length(self.hide(rng, 0, None)) for _ in range(_SAMPLED))

    def prompt(self, length: int, seed: int, depth: float | None = None) -> Prompt:
        """A prompt of exactly `length` tokens; equal arguments give equal prompts.

        depth: where in the haystack to hide what is asked for, 0 (start) to 1 (end); drawn from `seed` if None. What a
            whole number of tokens (and the layout) makes of it is the prompt's `depth`.
        InputError if `length` has no room for task, needles and question.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: must be between 0 (start of the haystack) and 1 (its end)")
        rng = random.Random(f"{self.kind} {seed} {length}")
        hidden = self.hide(rng, length, depth)
        try:
            return self.encoder.prompt(length, seed, hidden, self.haystack, rng)
        except NoRoomError as error:
            raise InputError(
                f"length={length}: task, needle and question alone need {max(error.tokens, self.minimum_length())} "
                f"tokens of this tokenizer ({self.name})"
            ) from error


def drawn_length(length: int, seed: int, spread: int) -> int:
    """The exact length of a prompt of the named `length`: up to `spread - 1` tokens shorter.

    Any `spread` consecutive seeds from a multiple of it on get every length once, in an order of their own.
    """
    turn, place = divmod(seed, spread)
    return length - random.Random(f"length {length} {turn}").sample(range(spread), spread)[place]


def _chat_frame(tokenizer) -> tuple[str, str]:
    """What the chat template puts before the user's words, and between them and the model's."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat_template true: the tokenizer has no chat template; leave it out")
    turns = [{"role": "user", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, which may raise anything
        raise InputError(f"--chat_template true: the tokenizer's chat template fails ({error})") from error
    if text.count(_CONTENT) != 1:
        raise InputError("--chat_template true: the tokenizer's chat template does not say what the user says once")
    head, tail = text.split(_CONTENT)
    return head, tail


def _plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _leading_special_ids(tokenizer) -> list[int]:
    """What the tokenizer puts in front of a text. What it would put at the end (EOS) has no place in a prompt."""
    plain, whole = _plain_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]
