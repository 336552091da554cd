"""Names, wordings and fillers of the tests: nothing of them may stand in what the demo is trained on."""

import json
import re
from pathlib import Path

import pytest

from eval_passkey.names import pool
from eval_passkey.passkey import TEMPLATES, load_template

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("needles", "tracking", "key_value", "line_retrieval")


@pytest.fixture(scope="module")
def training_words() -> set[str]:
    """Words of the list that the demo's corpus is made of."""
    (path,) = (ROOT / "finetune").rglob("wording.json")
    shapes = [text for texts in json.loads(path.read_text(encoding="utf-8")).values() for text in texts]
    return {word for text in shapes for word in re.findall(r"[a-z]+", text.lower())}


def test_no_word_of_a_name_is_among_the_words_of_the_training_corpus(training_words):
    adjectives, nouns = pool("adjectives"), pool("nouns")
    assert len(training_words) > 400 and len(adjectives) > 150 and len(nouns) > 300
    assert not training_words & {*adjectives, *nouns}


def test_words_of_names_are_single_lower_case_and_said_once():
    words = [*pool("adjectives"), *pool("nouns")]
    assert len(set(words)) == len(words) and all(re.fullmatch(r"[a-z]{3,13}", word) for word in words)


def test_names_in_the_own_wordings_of_the_pass_key_are_no_words_of_the_corpus_together(training_words):
    for name in ("once", "twice"):
        words = re.findall(r"[a-z]+", load_template(TEMPLATES[name]).needle.lower())
        assert "lantern" in words and "lantern" not in training_words


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_has_its_places_for_names_and_values(kind):
    places = {
        "needles": {"needle": ["name", "value"]},
        "tracking": {
            "first": ["name", "value"], "hop": ["name", "before"],
            "question": ["count", "value"], "answer_start": ["value"],
        },
        "key_value": {"question": ["name"], "answer_start": ["name"]},
        "line_retrieval": {"record": ["name", "value"], "question": ["name"], "answer_start": ["name"]},
    }[kind]  # fmt: skip
    assert len(pool(kind)) >= 3
    for wording in pool(kind):
        assert set(wording) == {"opening", *places, *(("one", "many") if kind == "needles" else ())}
        for field, slots in places.items():
            assert sorted(re.findall(r"{(\w+)}", wording[field])) == sorted(slots), wording
        for field in ("one", "many") if kind == "needles" else ():
            question, answer_start = wording[field]
            assert "{names}" in question and "{names}" in answer_start
            assert ("{count}" in question) == (field == "many")
