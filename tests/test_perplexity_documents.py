"""Texts for the perplexity test: what is read, how many bytes a token stands for, which tokens are scored."""

import json

import pytest
import torch
from byte_models import byte_tokenizer, some_text

from eval_passkey.prompts import InputError
from eval_perplexity.documents import Document, Protocol, beginning_of_text, encode, read_documents


def document(tokens: int, bos: int | None = 0, name: str = "d") -> Document:
    """Tokens 100, 101, ... of two bytes each."""
    return Document(name, name, "", torch.arange(100, 100 + tokens), torch.arange(tokens + 1).numpy() * 2, bos)


def scored(window) -> list[int]:
    return list(range(window.end - window.scored, window.end))


@pytest.mark.parametrize("merges", [(), (("Ġ", "a"), ("b", "c"), ("Ã", "©"))])
def test_the_bytes_of_all_tokens_are_those_of_the_text(merges):
    tokenizer = byte_tokenizer(merges=merges)
    for text in (some_text(1), "naïve €5", "日本", " a é bc", ""):
        ids, until = encode(tokenizer, text)
        assert len(until) == len(ids) + 1 and until[0] == 0 and until[-1] == len(text.encode("utf-8"))


def test_a_token_stands_for_its_own_bytes():
    ids, until = encode(byte_tokenizer(merges=(("Ġ", "a"), ("Ã", "©"))), "x aé€")
    assert len(ids) == 1 + 1 + 1 + 3
    # "x", " a", "é" whole, "€" in three tokens, all of it with the first
    assert until.tolist() == [0, 1, 3, 5, 8, 8, 8]


def test_a_space_that_the_tokenizer_leaves_out_of_a_words_place_belongs_to_the_word():
    from tokenizers import processors

    tokenizer = byte_tokenizer(bos=False, merges=(("Ġ", "a"),))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = tokenizer("x ab", return_offsets_mapping=True)
    assert encoded["offset_mapping"][1] == (2, 3)
    assert encode(tokenizer, "x ab")[1].tolist() == [0, 1, 3, 4]


def test_text_that_spells_a_special_token_stays_text():
    ids, until = encode(byte_tokenizer(), "a</s>b<s>")
    assert len(ids) == 9 and not (ids <= 1).any() and until[-1] == 9


def test_a_tokenizer_says_itself_whether_texts_begin_with_bos():
    assert beginning_of_text(byte_tokenizer()) == 0
    assert beginning_of_text(byte_tokenizer(bos=False)) is None


@pytest.mark.parametrize("bos", [0, None])
def test_equal_segments_score_every_token_once_at_every_length(bos):
    text = document(99, bos)
    protocol = Protocol("segments", (10, 20, 40))
    for length in protocol.lengths:
        windows = protocol.windows([text], length)
        tokens = [token for window in windows for token in scored(window)]
        assert tokens == list(range(text.first, text.first + 80))
        assert all(window.scored == window.length == length for window in windows)
        assert sum(window.bytes for window in windows) == 2 * 80


def test_in_front_of_a_segment_stands_bos_or_the_texts_own_token():
    with_bos, without = (Protocol("segments", (10,)).windows([document(25, bos)], 10)[1] for bos in (0, None))
    assert with_bos.input_ids.tolist() == [[0, *range(110, 120)]]
    assert without.input_ids.tolist() == [list(range(110, 121))]


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_sliding_by_a_stride_scores_no_token_twice_and_gives_each_its_context(stride):
    windows = Protocol("segments", (10, 20), stride).windows([document(40)], 10)
    tokens = [token for window in windows for token in scored(window)]
    assert tokens == list(range(len(tokens))) and len(tokens) > 40 - stride
    assert [window.scored for window in windows] == [10] + [stride] * (len(windows) - 1)
    assert all(window.input_ids.shape == (1, 11) for window in windows)


def test_the_last_tokens_are_the_same_at_every_length():
    texts = [document(95, name="a"), document(130, None, name="b"), document(39, name="c")]
    protocol = Protocol("last", (12, 20, 40), score_tokens=6)
    by_length = [protocol.windows(texts, length) for length in protocol.lengths]
    ends = [[(window.document.name, scored(window)) for window in windows] for windows in by_length]
    assert ends[0] == ends[1] == ends[2] and [name for name, _ in ends[0]] == ["a", "a", "b", "b", "b"]
    for windows in zip(*by_length, strict=True):
        assert len({tuple(window.input_ids[0, -6:].tolist()) for window in windows}) == 1
        assert len({window.bytes for window in windows}) == 1
        assert [window.input_ids.shape[1] for window in windows] == [13, 21, 41]


@pytest.mark.parametrize("score_tokens", [13, 20])
def test_more_tokens_than_a_length_are_scored_by_windows_of_that_length(score_tokens):
    texts = [document(95, name="a"), document(81, None, name="b")]
    protocol = Protocol("last", (6, 9, 40), score_tokens=score_tokens)
    wanted = [(window.document.name, token) for window in protocol.windows(texts, 40) for token in scored(window)]
    assert len(wanted) == 4 * score_tokens
    for length in (6, 9):
        windows = protocol.windows(texts, length)
        assert [(window.document.name, token) for window in windows for token in scored(window)] == wanted
        assert all(window.input_ids.shape == (1, length + 1) for window in windows)
        assert all(window.length - window.scored >= length // 2 for window in windows)  # tokens before each one
        assert sum(window.bytes for window in windows) == 2 * len(wanted)


def test_no_more_of_a_document_is_measured_than_was_asked_for():
    windows = Protocol("segments", (10, 20), tokens_per_document=45).windows([document(200)], 10)
    assert [window.end for window in windows] == [10, 20, 30, 40]


def test_files_and_folders_give_their_documents_in_order_and_none_twice(tmp_path):
    (tmp_path / "b").mkdir()
    texts = [some_text(seed, 60) for seed in range(4)]
    rows = [{"text": texts[1]}, {"text": "short"}, {"text": texts[0]}, {"text": texts[2]}]
    (tmp_path / "b/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b/README.txt").write_text("notes about the rows, " * 20)
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "c.txt").write_text(texts[3])
    found = read_documents([str(tmp_path)], byte_tokenizer(), shortest=50, most=9)
    assert [text.name for text in found] == ["a.txt", "rows.jsonl:1", "rows.jsonl:4", "c.txt"]
    assert [text.text for text in found] == texts
    assert len(read_documents([str(tmp_path)], byte_tokenizer(), shortest=50, most=2)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "nowhere.txt: there is no such file or folder"),
        ("picture.png", b"\x89PNG", "picture.png: not one of .jsonl"),
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "rows.jsonl, line 2: no `text` string"),
        ("latin.txt", b"caf\xe9", "latin.txt, line 1: not UTF-8"),
        ("short.txt", b"too short", "none of 1 documents has 50 tokens to score, the longest has 9; give longer texts"),
        ("empty.txt", b"", "none of 0 documents has 50 tokens"),
    ],
)
def test_what_cannot_be_read_gets_one_sentence(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_documents([str(tmp_path / name)], byte_tokenizer(), shortest=50, most=9)
    assert "\n" not in str(error.value) and str(error.value).startswith("--data ")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: the folder holds no .jsonl"):
        read_documents([str(tmp_path / "folder")], byte_tokenizer(), shortest=50, most=9)
