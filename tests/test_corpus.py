"""The embedded corpus and its tokenizer: what the training text may not hold, and what it must."""

import json
import random
import re
from pathlib import Path

import pytest

from eval_passkey import ruler
from eval_passkey.names import is_benchmark_key, pool
from eval_passkey.passkey import PARTS, TEMPLATES, load_template
from finetune.demo.corpus import make_corpus, prose_documents, write_corpus
from finetune.demo.retrieval_documents import RetrievalWriter, holds_reserved_number, is_reserved_number
from finetune.demo.tokenizer import to_fast_tokenizer, train_sentencepiece

DOCUMENTS = 3000
OWN_TEMPLATES = [TEMPLATES["once"], TEMPLATES["twice"]]
FIVE_DIGITS = re.compile(r"(?=([0-9]{5}))")


@pytest.fixture(scope="session")
def corpus() -> tuple[list[dict], list[dict]]:
    return make_corpus(DOCUMENTS, retrieval_share=0.8, seed=5)


@pytest.fixture(scope="session")
def text(corpus: tuple[list[dict], list[dict]]) -> str:
    """All of the training and held-out text, and all real text that any corpus draws from."""
    documents = [document for split in corpus for document in split] + prose_documents()
    return "\n".join(document["text"] for document in documents)


@pytest.fixture(scope="session")
def processor(corpus: tuple[list[dict], list[dict]]):
    return train_sentencepiece([document["text"] for document in corpus[0][:600]], vocabulary_size=600)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.fixture(scope="session")
def known_runs(text: str) -> set[tuple[str, ...]]:
    """Four words in a row, anywhere in the training text."""
    return runs_of_four_words(text)


def runs_of_four_words(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return set(zip(words, words[1:], words[2:], words[3:], strict=False))


@pytest.mark.parametrize("path", TEMPLATES.values(), ids=lambda path: path.stem)
@pytest.mark.parametrize("part", [part for part in PARTS if part != "filler suffix"])
def test_no_four_words_in_a_row_of_the_passkey_prompt_occur_in_the_training_text(
    part: str, path: Path, known_runs: set[tuple[str, ...]]
) -> None:
    wording = load_template(path).text(part, key=12345)
    # "is written down under" and the like would be a coincidence; there is none.
    assert runs_of_four_words(wording) and not runs_of_four_words(wording) & known_runs


@pytest.mark.parametrize("kind", ["needles", "tracking", "key_value", "line_retrieval"])
def test_no_four_words_in_a_row_of_the_other_tasks_occur_in_the_training_text(
    kind: str, known_runs: set[tuple[str, ...]]
) -> None:
    texts = re.findall(r'"([^"]+)"', re.sub(r"\\.|{\w+}", " qqq ", json.dumps(pool(kind))))
    assert len(texts) > 12
    for wording in texts:
        assert not runs_of_four_words(wording) & known_runs, wording


@pytest.mark.parametrize("kind", ["niah", "tracking"])
def test_no_phrase_of_rulers_tasks_occurs_in_the_training_text(kind: str, text: str) -> None:
    known = " ".join(words_of(text))  # "one of the special" is in it, by chance
    phrases = [phrase for sentence in ruler.wording(kind).values() for phrase in re.split(r"{\w+}", sentence)]
    long = [phrase for phrase in phrases if len(words_of(phrase)) > 4]
    assert len(long) >= 4
    for phrase in long:
        assert " ".join(words_of(phrase)) not in known


def test_no_name_of_the_other_tasks_occurs_in_the_training_text(text: str) -> None:
    words = words_of(text)
    adjectives, nouns = set(pool("adjectives")), set(pool("nouns"))
    assert not [pair for pair in zip(words, words[1:], strict=False) if pair[0] in adjectives and pair[1] in nouns]


@pytest.mark.parametrize("path", OWN_TEMPLATES, ids=lambda path: path.stem)
def test_the_name_in_the_passkey_prompt_occurs_nowhere_in_the_training_text(path: Path, text: str) -> None:
    template = load_template(path)
    name = re.search(r"^the (\w+ \w+) number is", template.needle.lower())[1]
    assert name in template.question.lower() and name not in " ".join(words_of(text))


def test_no_benchmark_key_occurs_in_the_training_text_not_even_inside_a_longer_number(text: str) -> None:
    fives = {int(match[1]) for match in FIVE_DIGITS.finditer(text)}
    assert len(fives) > 1000
    assert not [number for number in fives if is_benchmark_key(number)]


def test_the_corpus_and_the_benchmark_agree_on_the_reserved_numbers() -> None:
    assert [n for n in range(200_000) if is_reserved_number(n)] == [n for n in range(200_000) if is_benchmark_key(n)]
    assert holds_reserved_number("x9100060") and is_benchmark_key(10006) and not holds_reserved_number("100050")


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    first, second, other = (make_corpus(200, seed=seed) for seed in (3, 3, 4))
    assert first == second and first != other


def test_no_held_out_text_is_in_the_training_text(corpus: tuple[list[dict], list[dict]]) -> None:
    train, heldout = ({document["text"] for document in split} for split in corpus)
    assert len(heldout) >= 50 and not train & heldout
    sources = [{d["meta"]["source"] for d in split if d["meta"]["set"] == "python"} for split in corpus]
    assert sources[1] and not sources[0] & sources[1]


def test_the_corpus_holds_the_asked_share_of_retrieval_documents(corpus: tuple[list[dict], list[dict]]) -> None:
    train = corpus[0]
    share = sum(document["meta"]["set"] == "retrieval" for document in train) / len(train)
    assert share == pytest.approx(0.8, abs=0.01)


def test_a_hidden_number_that_is_asked_for_was_stated_before_under_the_same_name() -> None:
    writer = RetrievalWriter(random.Random(1), [], [])
    for _ in range(200):
        document = writer._hidden(600)
        last = re.findall(r"\d{3,7}", document)[-1]
        assert len(re.findall(rf"(?<!\d){last}(?!\d)", document)) >= 2


def test_a_corpus_file_appears_under_its_name_only_when_complete(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, 50)
    assert not list(tmp_path.glob("*.jsonl"))
    monkeypatch.undo()
    train, heldout = write_corpus(tmp_path, 50)
    rows = [json.loads(line) for path in (train, heldout) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) <= 50 and all(set(row) == {"text", "meta"} for row in rows)


def test_the_fast_tokenizer_gives_the_ids_of_sentencepiece_on_real_text(processor) -> None:
    tokenizer = to_fast_tokenizer(processor, model_max_length=512)
    texts = [document["text"] for document in prose_documents()[:300]]
    texts += [
        "",
        " ",
        "  two  spaces ",
        "tab\tand\r\nreturn",
        "Ünïcödé 漢字 \U0001f600",
        "12345678",
        "\x00\ufeff\u2028",
        "▁",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == [processor.bos_id(), *processor.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_the_fast_tokenizer_gives_the_ids_of_sentencepiece_on_web_text(processor, landmark_data: Path) -> None:
    tokenizer = to_fast_tokenizer(processor, model_max_length=512)
    for file in sorted((landmark_data / "redpajama").glob("*.jsonl")):
        for line in file.read_bytes().splitlines()[:20]:
            text = json.loads(line)["text"][:20_000]
            encoded = tokenizer(text, split_special_tokens=True)["input_ids"]
            assert encoded == [processor.bos_id(), *processor.encode(text)], file.name


@pytest.mark.parametrize("number", ["7", "42", "902", "90210", "1234567"])
def test_numbers_stand_in_pairs_of_digits_whatever_is_around_them(processor, number: str) -> None:
    tokenizer = to_fast_tokenizer(processor, model_max_length=512)
    pairs = [number[i : i + 2] for i in range(0, len(number), 2)]
    for before, after in ((" ", ""), ("x", "."), ("(", ")"), ("\n", " ")):
        tokens = tokenizer(f"is{before}{number}{after}").tokens()
        assert [token for token in tokens if token.isdigit()] == pairs


def test_no_end_of_sequence_is_added(processor) -> None:
    tokens = to_fast_tokenizer(processor, model_max_length=512)("is").tokens()
    assert tokens[0] == "<s>" and "</s>" not in tokens
