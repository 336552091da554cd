"""Documents to training rows: the split, mixtures, the cache of tokens, and what is refused."""

from pathlib import Path

import pytest
import torch
from documents import byte_tokenizer, whole_documents, write_jsonl
from transformers import PreTrainedTokenizerFast

import finetune.data.tokens
from finetune.arguments import DataArguments, UserError
from finetune.data.prepare import Rows, make_rows
from finetune.data.tokens import tokenise


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def rows_of(*sources: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, block_size: int = 8, **settings) -> Rows:
    settings = {"context_length": 64, "heldout_share": 0.2, "preprocessing_workers": 1, **settings}
    data = DataArguments(data=[str(source) for source in sources], **settings)
    return make_rows(data, tokenizer, block_size, None, seed)


def letters(rows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The first letter of each row."""
    return [tokenizer.decode(row["input_ids"][:1]) for row in rows]


def test_documents_are_joined_with_end_of_sequence_and_split_by_document(tmp_path: Path, tokenizer) -> None:
    texts = [f"document {i} " + "x" * (i % 7) for i in range(200)]
    rows = rows_of(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer, seed=3)
    parts = []
    for split in (rows.train, rows.heldout):
        tokens = torch.cat([row["input_ids"] for row in split]).tolist()
        parts.append({tokenizer.decode(ids) for ids in whole_documents(tokens)})
    train, heldout = parts
    assert train and heldout and not train & heldout
    assert train | heldout <= set(texts)


def test_a_document_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    file = write_jsonl(tmp_path / "a.jsonl", ["<landmark></s>" * 20] * 20)
    rows = rows_of(file, tokenizer=tokenizer, heldout_share=0.5)
    text = tokenizer.decode(torch.cat([rows.train[i]["input_ids"] for i in range(3)]), skip_special_tokens=True)
    assert "landmark" in text


def test_long_texts_are_tokenised_few_at_a_time(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(finetune.data.tokens, "BATCH_CHARACTERS", 100)
    taken = 0

    def texts():
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield "x" * 40

    documents = tokenise(texts(), tokenizer)
    assert next(documents).tolist() == [*tokenizer("x" * 40)["input_ids"], 0] and taken == 3
    assert sum(1 for _ in documents) == 49


def test_bad_rows_are_counted_only_when_asked(tmp_path: Path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 50] * 20)
    file.write_bytes(b"{\n" + file.read_bytes() + b'{"other": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1: not JSON \(1 more like it\); --skip_bad_rows"):
        rows_of(file, tokenizer=tokenizer)
    rows = rows_of(file, tokenizer=tokenizer, skip_bad_rows=True)
    assert rows.bad_rows == 2 and "2 bad rows skipped" in rows.describe()


def test_documents_that_fill_no_row_and_positions_that_no_row_can_have_are_refused(tmp_path: Path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "short.jsonl", ["a", "b", "c", "d"])
    with pytest.raises(UserError, match=r"hold \d+ tokens, fewer than one row of 56"):
        rows_of(file, tokenizer=tokenizer, heldout_share=0.5)
    with pytest.raises(UserError, match="--context_length 63: .* give 62 or 64"):
        rows_of(file, tokenizer=tokenizer, context_length=63)
    with pytest.raises(UserError, match="one document cannot be split"):
        rows_of(write_jsonl(tmp_path / "one.jsonl", ["a"]), tokenizer=tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no document in .*empty.jsonl"):
        rows_of(tmp_path / "empty.jsonl", tokenizer=tokenizer)


def test_documents_shorter_than_a_block_are_packed_together(tmp_path: Path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "short.jsonl", ["ab"] * 100)
    rows = rows_of(file, tokenizer=tokenizer, heldout_share=0.5)
    assert len(rows.train) == 50 * 3 // 56 and len(rows.heldout) == 50 * 3 // 56
    apart = rows_of(file, tokenizer=tokenizer, heldout_share=0.5, pack_documents="apart")
    assert apart.train[0]["position_ids"].tolist() == [0, 1, 2] * 21 + [0]


def test_a_mixture_takes_rows_in_its_shares_however_long_the_documents_are(tmp_path: Path, tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a" * 2000] * 30)
    write_jsonl(tmp_path / "b.jsonl", ["b" * 10] * 20_000)
    write_jsonl(tmp_path / "c.jsonl", ["never read"] * 50)
    rows = rows_of(tmp_path, tokenizer=tokenizer, mixture=["a=1", "b=3"])
    for part in (rows.train, rows.heldout):
        found = [letter for letter in letters(part, tokenizer) if letter in "ab"]
        assert found.count("b") / len(found) == pytest.approx(0.75, abs=0.05)
    assert len({row["input_ids"].numpy().tobytes() for row in rows.heldout}) > 1


def test_the_smaller_subset_of_a_mixture_comes_again_until_the_larger_was_there_once(tmp_path: Path, tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{i:056d}" for i in range(10)])
    write_jsonl(tmp_path / "b.jsonl", [f"{i:056d}" for i in range(1000, 1400)])
    rows = rows_of(tmp_path, tokenizer=tokenizer, mixture=["a=1", "b=1"])
    counts: dict[bytes, int] = {}
    for row in rows.train:
        key = row["input_ids"].numpy().tobytes()
        counts[key] = counts.get(key, 0) + 1
    from_b = 320 * 57 // 56
    assert len(counts) == from_b + 8 and sorted(counts.values())[from_b - 1] <= 2 and max(counts.values()) > 20


def test_tokens_are_made_once_and_again_only_if_what_shapes_them_changes(tmp_path: Path, monkeypatch) -> None:
    tokenizer, made = byte_tokenizer(), []
    original = finetune.data.tokens.read_shard
    monkeypatch.setattr(finetune.data.tokens, "read_shard", lambda *args: made.append(args) or original(*args))
    file = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])

    def again(tokenizer=tokenizer, **settings) -> bool:
        made.clear()
        rows_of(file, tokenizer=tokenizer, **settings)
        return bool(made)

    assert again()
    assert not again() and not again(context_length=128, block_size=16, seed=5, pack_documents="apart")
    write_jsonl(file, [f"document {i}!" for i in range(100)])
    assert again() and not again()
    other = byte_tokenizer()
    other.add_tokens(["document"])
    assert again(other) and not again()
    monkeypatch.setattr(finetune.data.tokens, "_code_version", lambda: "another")
    assert again()


def test_the_fingerprint_of_rows_names_everything_that_shapes_them(tmp_path: Path, tokenizer) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" * 9 for i in range(100)]) for name in "ab"]

    def name(tokenizer=tokenizer, **settings) -> str:
        return rows_of(*files, tokenizer=tokenizer, **settings).fingerprint

    before = name()
    assert name() == before
    other = byte_tokenizer()
    other.add_tokens(["document"])
    changes: list[dict] = [
        {"tokenizer": other}, {"block_size": 16}, {"context_length": 128}, {"seed": 1}, {"pack_documents": "apart"},
        {"heldout_share": 0.3}, {"mixture": ["a=1", "b=2"]}, {"mixture": ["a=1", "b=3"]},
    ]  # fmt: skip
    names = [name(**change) for change in changes]
    write_jsonl(files[0], ["other"] * 100)
    assert len({before, *names, name()}) == len(changes) + 2


def test_real_redpajama_rows_become_rows_of_every_kind(landmark_data: Path, tokenizer) -> None:
    common = {"tokenizer": tokenizer, "context_length": 512, "block_size": 64}
    mixture = [f"{name}=1" for name in ("arxiv", "github", "wikipedia")]
    joined = rows_of(landmark_data / "redpajama", **common, mixture=mixture)
    apart = rows_of(landmark_data / "redpajama", **common, mixture=mixture, pack_documents="apart")
    assert len(joined.train) > 1000 and len(apart.train) > 1000
    for rows, columns in ((joined, 504), (apart, 512)):
        assert all(column.shape == (columns,) for column in rows.train[7].values())
