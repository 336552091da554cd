"""A short test without a network: the last word of passages of held-out texts, as in LAMBADA. It is not lm-eval's.

A passage is a few sentences of a text of the user's. Its last word has stood in an earlier sentence of it, so that the
context helps, and is none that the text says all the time. A model is right if each token of the word is its most
likely one. Passages are shorter than the window of a landmark model: what is compared is what conversion and training
do to short texts.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval_passkey.models import Subject, load_model, versions
from eval_passkey.prompts import InputError
from eval_passkey.report import wilson_interval
from eval_passkey.results import ResultsFolder
from eval_perplexity.documents import Document, beginning_of_text

_SENTENCE = re.compile(r"[^.!?]+[.!?]+[”’\"')]*\s*")
_LAST_WORD = re.compile(r"(.*\s)([A-Za-z]{4,})[.!?]+[”’\"')]*\s*", re.DOTALL)
_FEWEST_SENTENCES, _MOST_SENTENCES = 3, 8
_RARE = 1000  # words of the text to one such word
_EDGE = 0.05  # of a text, at either end: title pages and licences
FIELDS = ("passage", "correct", "nll", "tokens")


@dataclass(frozen=True)
class Passage:
    """A context that ends with a space, and the word that follows; `name` says where it stands."""

    name: str
    context: str
    word: str


def passages(documents: Sequence[Document], count: int, least: int = 200, most: int = 800) -> list[Passage]:
    """Up to `count` passages, evenly spread over the texts, of `least` to `most` characters.

    Raises:
        InputError: the texts hold none.
    """
    found: list[list[Passage]] = [list(_of_document(document, least, most)) for document in documents]
    share = -(-count // max(1, sum(map(bool, found))))
    chosen = [some[i * len(some) // min(share, len(some))] for some in found for i in range(min(share, len(some)))]
    if not chosen:
        raise InputError("--data: holds no passage whose last word stands in an earlier sentence; give longer texts")
    return chosen[:count]


def _of_document(document: Document, least: int, most: int):
    """Passages that do not overlap."""
    text = document.text[int(_EDGE * len(document.text)) : int((1 - _EDGE) * len(document.text))]
    sentences = _SENTENCE.findall(" ".join(text.split()))
    words = Counter(re.findall("[A-Za-z]+", text))
    most_often = words.total() / _RARE
    start = 0
    while start < len(sentences):
        for end in range(start + _FEWEST_SENTENCES, min(start + _MOST_SENTENCES, len(sentences)) + 1):
            passage = "".join(sentences[start:end])
            last = _LAST_WORD.fullmatch(passage)
            earlier = re.findall("[A-Za-z]+", "".join(sentences[start : end - 1]))
            if least <= len(passage) <= most and last and last[2] in earlier and words[last[2]] <= most_often:
                yield Passage(f"{document.digest}:{start}", last[1], last[2])
                start = end
                break
        else:
            start += 1


@torch.no_grad()
def score(model, tokenizer, passage: Passage) -> dict:
    """Whether the word is what the model would say, and the nats of its tokens."""
    bos = beginning_of_text(tokenizer)
    before = tokenizer(passage.context.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    word = tokenizer(" " + passage.word, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([([] if bos is None else [bos]) + before + word], device=model.device)
    logits = model(ids, logits_to_keep=len(word) + 1).logits[0, :-1].float()
    target = ids[0, -len(word) :]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    return {
        "passage": passage.name,
        "correct": bool((logits.argmax(-1) == target).all()),
        "nll": round(nll, 5),
        "tokens": len(word),
        "read": ids.shape[1],
    }


def measure(
    subject: Subject, some: Sequence[Passage], folder: Path, dtype: str, on_row: Callable[[dict], None] | None = None
) -> None:
    """Rows of the passages that have none yet, and a summary, in `folder`."""
    identity = {"fingerprint": subject.fingerprint, "settings": {"dtype": dtype}}
    results = ResultsFolder(folder, identity, fields=FIELDS)
    results.on_row = on_row
    done = {row["passage"] for row in results.rows}
    missing = [passage for passage in some if passage.name not in done]
    model = load_model("--model", subject, dtype, "cpu") if missing else None
    for passage in tqdm(missing, desc=f"last words, {folder.name}", mininterval=10, dynamic_ncols=True):
        results.append(score(model, subject.tokenizer, passage))
    right, count = sum(row["correct"] for row in results.rows), len(results.rows)
    low, high = wilson_interval(right, count)
    summary = {"samples": count, "correct": right, "ci_low": low, "ci_high": high}
    summary["nats_a_word"] = sum(row["nll"] for row in results.rows) / max(1, count)
    results.write_summary({"rows": [summary], "model": subject.name, "versions": versions()})
    results.close()
