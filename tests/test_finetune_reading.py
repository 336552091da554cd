"""Reading files of every format, whole and damaged; finding them, and the subsets of a mixture."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from documents import write_jsonl

from finetune.arguments import UserError
from finetune.data.reading import read_file
from finetune.data.sources import SHARD_BYTES, Subset, find_subsets, parse_mixture, read_shard

TEXTS = ["one", "two\u2028lines\x85", "drei ü", ""]


def read(*sources: Path, mixture: tuple[str, ...] = ()) -> list[str]:
    """The texts of one subset; a bad row fails the test."""
    (subset,) = find_subsets([str(source) for source in sources], list(mixture))
    return texts_of(subset)


def texts_of(subset: Subset) -> list[str]:
    outcomes = [outcome for shard in subset.shards() for outcome in read_shard(shard, subset.in_rows)]
    assert [problem for _, problem in outcomes if problem] == []
    return [text for text, _ in outcomes]


def problems_of(path: Path) -> list[str]:
    return [problem for _, problem in read_file(str(path)) if problem]


def compressed(content: bytes, suffix: str) -> bytes:
    """Two members or frames, as `cat a.gz b.gz` and `zstd` make them."""
    zstandard = pytest.importorskip("zstandard")
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    return b"".join(map(gzip.compress if suffix == ".gz" else zstandard.compress, halves))


@pytest.fixture(params=[".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet", ".dat"])
def file(request, tmp_path: Path) -> Path:
    """The same four documents in every format; `.dat` says nothing, and holds compressed JSON lines."""
    path = tmp_path / f"a{request.param}"
    if request.param == ".parquet":
        datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]}).to_parquet(path)
        return path
    content = write_jsonl(tmp_path / "plain" / "a.jsonl", TEXTS).read_bytes()
    suffix = ".zst" if request.param == ".dat" else path.suffix
    path.write_bytes(content if request.param == ".jsonl" else compressed(content, suffix))
    return path


def test_every_format_gives_the_same_documents(file: Path) -> None:
    assert read(file) == TEXTS


def test_compression_is_told_by_content_where_the_name_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(compressed(b'{"text": "a"}\n{"text": "b"}\n', ".gz"))
    assert read(path) == ["a", "b"]


def test_a_folder_is_searched_and_its_notes_are_left_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "LICENSE").write_text("not data")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "1.txt").write_text("a whole book\nin lines")
    assert read(tmp_path) == ["a", "b", "a whole book\nin lines"]
    assert read(tmp_path / "notes.txt") == ["not data"]


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\nline ü".encode())
    (tmp_path / "empty.txt").write_text(" \n")
    assert read(tmp_path) == ["line\r\nline ü"]
    (tmp_path / "a.txt").write_bytes(b"good\ncaf\xe9")
    assert problems_of(tmp_path / "a.txt") == [f"{tmp_path / 'a.txt'}, line 2: not UTF-8 (byte 9 of the file)"]


def test_rows_are_read_for_their_text_alone_and_redpajama_v2_calls_it_raw_content(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a", "meta": {"x": 1}}\n\n{"raw_content": "b", "url": "u"}\n{"text": "c", "meta": "y"}')
    assert read(path) == ["a", "b", "c"]
    datasets.Dataset.from_dict({"raw_content": ["d"]}).to_parquet(tmp_path / "v2.parquet")
    assert read(tmp_path / "v2.parquet") == ["d"]


def test_a_line_longer_than_what_is_read_at_once_stays_whole(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y", "z" * (1 << 20)]
    assert read(write_jsonl(tmp_path / "long.jsonl", texts)) == texts


BAD_LINES = {
    "not JSON": b'{"text": "cut o',
    "no `text` string": b'{"meta": {}}',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "no `text` string ": b'["text"]',
    "no `text` string  ": b'{"text": 7}',
}


@pytest.mark.parametrize("problem", BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_and_those_around_it_are_read(problem: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + BAD_LINES[problem] + b'\n{"text": "also good"}\n')
    outcomes = list(read_file(str(path)))
    assert [text for text, _ in outcomes] == ["good", None, "also good"]
    assert outcomes[1][1].startswith(f"{path}, line 3: {problem.strip()}")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_a_compressed_file_that_breaks_off_is_named_after_its_last_whole_line(
    suffix: str, share: float, tmp_path: Path
) -> None:
    texts = [os.urandom(3000).hex() for _ in range(1000)]
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    path = tmp_path / f"a{suffix}"
    whole = compressed(content, path.suffix)
    path.write_bytes(whole[: int(len(whole) * share)])
    outcomes = list(read_file(str(path)))
    good = [text for text, _ in outcomes[:-1]]
    assert good == texts[: len(good)] and 0 < len(good) < len(texts)
    assert f"{path}: cannot be read (after line {len(good)}" in outcomes[-1][1]


def test_a_damaged_compressed_or_parquet_file_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.parquet"):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd not what it says")
        (problem,) = problems_of(tmp_path / name)
        assert name in problem and "\n" not in problem
    whole = tmp_path / "c.parquet"
    datasets.Dataset.from_dict({"text": ["a"] * 1000}).to_parquet(whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    assert "c.parquet: cannot be read" in problems_of(whole)[0]


def test_a_file_that_vanished_after_it_was_found_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (subset,) = find_subsets([str(path)], [])
    path.unlink()
    assert list(read_shard(subset.shards()[0])) == [(None, f"{path}: the file was there and is gone")]


def test_missing_empty_and_unknown_sources_are_refused_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        find_subsets([str(tmp_path)], [])
    with pytest.raises(UserError, match="no such file or folder"):
        find_subsets([str(tmp_path / "missing.jsonl")], [])
    with pytest.raises(UserError, match="--data some/name: no such file or folder, and no hub data set"):
        find_subsets(["some/name"], [])
    (tmp_path / "a.md").write_text("# x")
    with pytest.raises(UserError, match=r"not one of \.jsonl"):
        find_subsets([str(tmp_path / "a.md")], [])


def test_a_hub_data_set_is_read_at_the_commit_that_its_name_stands_for(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        rows = [{"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}}, {"text": "b", "meta": {}}, {"text": None}]
        return iter(rows)

    class Api:
        def dataset_info(self, name):
            assert name == "some/name"
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (subset,) = find_subsets(["some/name:de"], [])
    problem = "some/name:de, row 3: no `text` string"
    assert list(read_shard(subset.shards()[0])) == [("a", None), ("b", None), (None, problem)]
    assert asked == [(("some/name", "de"), {"split": "train", "streaming": True, "revision": "abc"})]
    (subset,) = find_subsets(["some/name"], ["c4=1"])
    assert list(read_shard(subset.shards()[0], subset.in_rows)) == [("a", None)]


def test_subsets_are_files_by_name_or_folder(tmp_path: Path) -> None:
    # RedPajama's sample, and RedPajama itself
    for name in ("arxiv_sample", "cc_2019-30_sample", "cc_2023-06_sample", "c4_sample", "book/book", "wikipedia/wiki"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    mixture = ["arxiv=1", "cc=4", "book=2.5", "wikipedia=2.5"]
    subsets = find_subsets([str(tmp_path)], mixture)
    assert {s.name: s.weight for s in subsets} == {"arxiv": 0.1, "cc": 0.4, "book": 0.25, "wikipedia": 0.25}
    names = ["arxiv_sample"], ["cc_2019-30_sample", "cc_2023-06_sample"], ["book/book"], ["wikipedia/wiki"]
    assert [texts_of(subset) for subset in subsets] == list(names)
    assert read(tmp_path / "arxiv_sample.jsonl", mixture=("arxiv=1",)) == ["arxiv_sample"]
    with pytest.raises(UserError, match="--mixture books: no file of"):
        find_subsets([str(tmp_path)], ["books=1", "cc=1"])
    with pytest.raises(UserError, match="--mixture cc_2019-30: .*belongs to cc, too"):
        find_subsets([str(tmp_path)], ["cc=1", "cc_2019-30=1"])


def test_where_no_file_has_the_name_slimpajamas_rows_say_what_they_belong_to(tmp_path: Path) -> None:
    names = ["RedPajamaArXiv", "RedPajamaC4", "RedPajamaCommonCrawl", "RedPajamaArXiv"]
    rows = [{"text": f"{i}", "meta": {"redpajama_set_name": name}} for i, name in enumerate(names)]
    (tmp_path / "chunk1").mkdir()
    (tmp_path / "chunk1" / "train_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subsets = find_subsets([str(tmp_path)], ["arxiv=1", "common_crawl=2", "RedPajamaC4=1"])
    assert [texts_of(subset) for subset in subsets] == [["0", "3"], ["2"], ["1"]]


@pytest.mark.parametrize("entry", ["arxiv", "arxiv=", "=1", "arxiv=-1", "arxiv=0", "arxiv=nan", "arxiv=inf", "a=b=c"])
def test_a_weight_that_is_no_positive_number_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match=f"--mixture {entry}: expected NAME=WEIGHT"):
        parse_mixture([entry])


def test_small_files_are_read_in_one_shard_and_large_ones_in_several() -> None:
    small = Subset("", 1.0, tuple((f"{i}", 1000, 0) for i in range(5000)))
    assert len(small.shards()) == 1
    large = Subset("", 1.0, tuple((f"{i}", SHARD_BYTES // 2, 0) for i in range(21)))
    assert [len(shard) for shard in large.shards()] == [2] * 10 + [1]
    assert [stamp for shard in large.shards() for stamp in shard] == list(large.stamps)


def test_real_redpajama_rows_of_every_subset_are_read(landmark_data: Path) -> None:
    files = list((landmark_data / "redpajama").glob("*.jsonl"))
    mixture = [f"{file.stem}=1" for file in files]
    assert len(files) == 6
    for subset, file in zip(find_subsets([str(landmark_data / "redpajama")], mixture), files, strict=True):
        assert len(texts_of(subset)) == len(file.read_bytes().splitlines())
    assert len(read(landmark_data / "books")) >= 3
