"""Reading documents and packing them into rows, good input and bad."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.arguments import DataArguments, UserError
from finetune.data import IGNORED_LABEL, PackedRows, make_rows
from finetune.reading import read_documents
from landmark_llama.tokenization import landmarked_length, plain_length, strip_landmarks

LANDMARK = 300


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after `</s>` (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts), encoding="utf-8")
    return path


def packed(documents: list[list[int]], row_tokens: int, block_size: int, landmark: int | None) -> PackedRows:
    tokenised = datasets.Dataset.from_dict({"input_ids": documents, "length": [len(d) for d in documents]})
    length = row_tokens if landmark is None else landmarked_length(row_tokens, block_size)
    return PackedRows(tokenised, row_tokens, length, block_size, landmark)


def random_documents(seed: int, count: int = 40, longest: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, 200, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(("row_tokens", "block_size"), [(30, 4), (31, 4), (7, 16), (64, 16), (1, 2), (500, 8)])
def test_packed_rows_hold_every_token_in_order_and_lose_only_what_fills_no_row(
    row_tokens: int, block_size: int
) -> None:
    documents = random_documents(seed=row_tokens)
    joined = [token for document in documents for token in document]
    rows = packed(documents, row_tokens, block_size, landmark=None)
    assert len(rows) == len(joined) // row_tokens
    tokens = torch.cat([rows[i]["input_ids"] for i in range(len(rows))])
    assert tokens.tolist() == joined[: len(rows) * row_tokens]
    assert rows[0]["labels"].tolist() == joined[:row_tokens]


@pytest.mark.parametrize("context_length", [8, 9, 10, 12, 61, 62, 64])
def test_landmark_rows_have_exactly_the_asked_positions_and_the_tokens_of_the_dense_rows(context_length: int) -> None:
    documents = random_documents(seed=1)
    row_tokens = plain_length(context_length, 4)
    dense, landmark = (packed(documents, row_tokens, 4, which) for which in (None, LANDMARK))
    assert len(dense) == len(landmark) > 0
    for plain, landmarked in zip(dense, landmark, strict=True):
        assert landmarked["input_ids"].shape == landmarked["labels"].shape == (context_length,)
        assert torch.equal(strip_landmarks(landmarked["input_ids"], 4, LANDMARK), plain["input_ids"])
        is_landmark = landmarked["input_ids"] == LANDMARK
        assert (landmarked["labels"][is_landmark] == IGNORED_LABEL).all()
        assert torch.equal(landmarked["labels"][~is_landmark], landmarked["input_ids"][~is_landmark])


def test_documents_are_joined_with_end_of_sequence_and_split_by_document(tmp_path: Path, tokenizer) -> None:
    texts = [f"document {i} " + "x" * (i % 7) for i in range(200)]
    data = DataArguments(data=[str(write_jsonl(tmp_path / "a.jsonl", texts))], context_length=64, heldout_share=0.2)
    rows = make_rows(data, tokenizer, 8, LANDMARK, None, seed=3)
    parts = []
    for split in (rows.train, rows.heldout):
        tokens = torch.cat([strip_landmarks(row["input_ids"], 8, LANDMARK) for row in split]).tolist()
        parts.append({tokenizer.decode(ids) for ids in _between_ends(tokens)})
    train, heldout = parts
    assert train and heldout and not train & heldout
    assert train | heldout <= set(texts)


def _between_ends(tokens: list[int]) -> list[list[int]]:
    """The whole documents in a stream of tokens: all but the last, which may be cut."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents.append([]) if token == 0 else documents[-1].append(token)
    return documents[:-1]


def test_a_document_that_spells_a_special_token_stays_text(tmp_path: Path, tokenizer) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    data = DataArguments(
        data=[str(write_jsonl(tmp_path / "a.jsonl", ["<landmark></s>" * 20] * 20))],
        context_length=64,
        heldout_share=0.5,
    )
    rows = make_rows(data, tokenizer, 8, tokenizer.convert_tokens_to_ids("<landmark>"), None, seed=0)
    text = tokenizer.decode(torch.cat([rows.train[i]["input_ids"] for i in range(3)]), skip_special_tokens=True)
    assert "landmark" in text


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_jsonl_zstandard_and_parquet_files_of_a_folder_give_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    texts = ["one", "two\u2028lines\x85", "drei ü", ""]
    plain = write_jsonl(tmp_path / "b.jsonl", texts)
    (tmp_path / "c").mkdir()
    # Two frames, as `zstd` writes when files are joined.
    half = len(plain.read_bytes().splitlines(keepends=True)[0])
    frames = [zstandard.compress(part) for part in (plain.read_bytes()[:half], plain.read_bytes()[half:])]
    (tmp_path / "c" / "b.jsonl.zst").write_bytes(b"".join(frames))
    datasets.Dataset.from_dict({"text": texts, "other": [1, 2, 3, 4]}).to_parquet(tmp_path / "c" / "d.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    documents, bad = read_documents([str(tmp_path)])
    assert documents["text"] == texts * 3 and bad == 0
    assert read_documents([str(plain)])[0]["text"] == texts


def test_rows_of_several_shapes_are_read_for_their_text_alone(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "a", "meta": {"x": 1}}\n\n{"text": "b", "pred": "0.5", "meta": "y"}\n')
    assert read_documents([str(file)])[0]["text"] == ["a", "b"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["old"])
    assert read_documents([str(file)])[0]["text"] == ["old"]
    write_jsonl(file, ["newer"])
    assert read_documents([str(file)])[0]["text"] == ["newer"]


BAD_LINES = {
    "not JSON": b'{"text": "cut o',
    "no `text` string": b'{"meta": {}}',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "no `text` string ": b'["text"]',
    "no `text` string  ": b'{"text": 7}',
}


@pytest.mark.parametrize("problem", BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_or_counted(problem: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + BAD_LINES[problem] + b'\n{"text": "also good"}\n')
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: {problem.strip()}.*--skip_bad_rows"):
        read_documents([str(file)])
    documents, bad = read_documents([str(file)], skip_bad_rows=True)
    assert documents["text"] == ["good", "also good"] and bad == 1


def test_a_damaged_compressed_or_parquet_file_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.parquet"):
        (tmp_path / name).write_bytes(b"\x00 not what it says")
        with pytest.raises(UserError, match=name):
            read_documents([str(tmp_path / name)])


def test_missing_empty_and_unknown_sources_are_refused_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        read_documents([str(tmp_path)])
    with pytest.raises(UserError, match="no such file or folder"):
        read_documents([str(tmp_path / "missing.jsonl")])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"not one of \.jsonl"):
        read_documents([str(tmp_path / "a.txt")])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no document in"):
        read_documents([str(tmp_path / "empty.jsonl")])


def test_documents_that_fill_no_row_and_positions_that_no_row_can_have_are_refused(tmp_path: Path, tokenizer) -> None:
    file = str(write_jsonl(tmp_path / "short.jsonl", ["a", "b", "c", "d"]))
    with pytest.raises(UserError, match=r"hold \d+ tokens, fewer than one row of 56"):
        make_rows(DataArguments(data=[file], context_length=64, heldout_share=0.5), tokenizer, 8, LANDMARK, None, 0)
    with pytest.raises(UserError, match="--context_length 63: .* give 62 or 64"):
        make_rows(DataArguments(data=[file], context_length=63, heldout_share=0.5), tokenizer, 8, LANDMARK, None, 0)
    with pytest.raises(UserError, match="one document cannot be split"):
        one = str(write_jsonl(tmp_path / "one.jsonl", ["a"]))
        make_rows(DataArguments(data=[one], context_length=64), tokenizer, 8, LANDMARK, None, 0)


def test_documents_shorter_than_a_block_are_packed_together(tmp_path: Path, tokenizer) -> None:
    file = str(write_jsonl(tmp_path / "short.jsonl", ["ab"] * 100))
    rows = make_rows(DataArguments(data=[file], context_length=64, heldout_share=0.5), tokenizer, 8, LANDMARK, None, 0)
    assert len(rows.train) == 50 * 3 // 56 and len(rows.heldout) == 50 * 3 // 56


def test_real_redpajama_rows_of_every_subset_are_read(landmark_data: Path) -> None:
    documents, bad = read_documents([str(landmark_data / "redpajama")], workers=2)
    lines = sum(len(file.read_bytes().splitlines()) for file in (landmark_data / "redpajama").glob("*.jsonl"))
    assert bad == 0 and len(documents) == lines
