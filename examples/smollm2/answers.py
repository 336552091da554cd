"""Answers of both models to the same questions about short documents, side by side: to be read, not to be counted.

The documents are topics of the documentation that comes with Python, which everyone has and may quote.
"""

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

from eval_passkey.models import Subject, load_model
from eval_passkey.results import ResultsFolder
from examples.smollm2.ask import ask

QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "What should a reader remember of this text? Answer in two sentences.",
    "Give a short example of what this text describes.",
)
_CHARACTERS = range(1000, 8000)
FIELDS = ("document", "question", "landmark", "dense")


def documents(count: int) -> list[tuple[str, str]]:
    """Names and texts of topics, evenly spread over their sizes."""
    topics = sorted(pydoc_data.topics.topics.items(), key=lambda topic: (len(topic[1]), topic[0]))
    short = [topic for topic in topics if len(topic[1]) in _CHARACTERS]
    count = min(count, len(short))
    return [short[i * len(short) // count] for i in range(count)]


def answer(
    landmark: Subject, dense: Subject, count: int, folder: Path, dtype: str, max_new_tokens: int = 60,
    on_row: Callable[[dict], None] | None = None,
) -> None:  # fmt: skip
    """Rows of the documents that have none yet, in `folder`.

    Raises:
        InputError: a tokenizer has no chat template.
    """
    identity = {"fingerprint": landmark.fingerprint, "settings": {"dense": dense.fingerprint, "dtype": dtype}}
    results = ResultsFolder(folder, identity, fields=FIELDS)
    results.on_row = on_row
    done = {row["document"] for row in results.rows}
    missing = [(i, *document) for i, document in enumerate(documents(count)) if document[0] not in done]
    if missing:
        models = {"landmark": landmark, "dense": dense}
        loaded = {name: load_model("--model", subject, dtype, "cpu") for name, subject in models.items()}
        for i, name, text in missing:
            row: dict = {"document": name, "question": QUESTIONS[i % len(QUESTIONS)]}
            for who, model in loaded.items():
                (said,) = ask(model, models[who].tokenizer, text, [row["question"]], max_new_tokens)
                row |= {"tokens": said.tokens, who: said.text, f"{who}_seconds": said.seconds}
            results.append(row)
    results.close()
