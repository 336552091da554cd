"""Rows from a stream: the same every time, mixed and shuffled, in bounded memory; whole runs on them."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from documents import byte_tokenizer, whole_documents, write_jsonl
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import finetune.data.sources
from finetune.arguments import DataArguments, UserError
from finetune.checkpoints.output import METRICS
from finetune.data.prepare import Rows, make_rows
from finetune.run import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Every file a shard of its own."""
    monkeypatch.setattr(finetune.data.sources, "SHARD_BYTES", 1)


def stream_of(source: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **settings) -> Rows:
    defaults = {"context_length": 64, "heldout_share": 0.2, "shuffle_buffer": 10, "max_heldout_rows": 20}
    data = DataArguments(data=[str(source)], streaming=True, **{**defaults, **settings})
    return make_rows(data, tokenizer, 8, None, seed)


def first(rows: Rows, count: int) -> list[torch.Tensor]:
    return [row["input_ids"] for row in itertools.islice(rows.train, count)]


def decoded(rows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows]


def write_numbered(folder: Path, files: int = 4, documents: int = 40) -> None:
    """Documents that fill a row of 56 tokens each, all different: `file-document`."""
    for file in range(files):
        texts = [f"{file:027d}-{i:027d}" for i in range(documents)]
        write_jsonl(folder / f"{file}.jsonl", texts)


def test_a_stream_is_the_same_every_time_and_another_with_another_seed(tmp_path, tokenizer, small_shards) -> None:
    write_numbered(tmp_path)
    once, again, other = (first(stream_of(tmp_path, tokenizer, seed), 100) for seed in (1, 1, 2))
    assert all(map(torch.equal, once, again)) and not all(map(torch.equal, once, other))
    rows = stream_of(tmp_path, tokenizer, 1)
    assert all(map(torch.equal, first(rows, 50), first(rows, 50)))


def test_a_stream_shuffles_files_and_rows_and_reads_all_before_it_starts_again(
    tmp_path, tokenizer, small_shards
) -> None:
    write_numbered(tmp_path)
    rows = stream_of(tmp_path, tokenizer, seed=4)
    texts = decoded(first(rows, 400), tokenizer)
    assert texts[:20] != sorted(texts[:20])
    held_out = len(set(texts))
    assert 100 < held_out < 150  # of 160 documents, a fifth is held out
    counts = Counter(texts)
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("kind", ["join", "whole", "apart"])
def test_rows_of_a_stream_are_those_that_are_stored(kind: str, tmp_path: Path, tokenizer) -> None:
    files = (tmp_path / "train.jsonl", tmp_path / "heldout.jsonl")
    for file in files:
        write_jsonl(file, [f"{file.stem} document {i} " + "x" * (i % 90) for i in range(60)])
    data = DataArguments(data=["embedded"], context_length=64, preprocessing_workers=1, pack_documents=kind)
    stored = make_rows(data, tokenizer, 8, files, seed=0)
    stream = make_rows(dataclasses.replace(data, streaming=True, shuffle_buffer=1), tokenizer, 8, files, seed=0)
    once = itertools.islice(stream.train, len(stored.train))
    for streamed, rows in ((once, stored.train), (stream.heldout, stored.heldout)):
        assert len(rows) > 20
        for row, expected in zip(streamed, rows, strict=True):
            assert row.keys() == expected.keys()
            for name, column in row.items():
                assert column.dtype == torch.long and torch.equal(column, expected[name])


def test_held_out_documents_are_never_trained_on(tmp_path: Path, tokenizer) -> None:
    texts = [f"document {i} " + "x" * (i % 7) for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    rows = stream_of(tmp_path, tokenizer, seed=3, shuffle_buffer=1)
    heldout, train = (
        {tokenizer.decode(ids) for ids in whole_documents(torch.cat(part).tolist())}
        for part in (
            [row["input_ids"] for row in rows.heldout],
            first(rows, 300),
        )
    )
    train, heldout = train & set(texts), heldout & set(texts)
    assert len(train) > 150 and len(heldout) > 20 and not train & heldout


def test_a_streamed_mixture_keeps_its_shares_when_a_subset_runs_out(tmp_path: Path, tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{i}" + "a" * 300 for i in range(20)])
    write_jsonl(tmp_path / "b.jsonl", [f"{i}" + "b" * 300 for i in range(500)])
    rows = stream_of(tmp_path, tokenizer, mixture=["a=1", "b=3"], shuffle_buffer=50, heldout_share=0.4)
    from_b = ["b" in text for text in decoded(first(rows, 1000), tokenizer)]
    assert sum(from_b) / 1000 == pytest.approx(0.75, abs=0.05)
    assert {"b" in text for text in decoded((row["input_ids"] for row in rows.heldout), tokenizer)} == {True, False}


def test_workers_of_a_loader_share_the_files(tmp_path: Path, tokenizer, small_shards) -> None:
    write_numbered(tmp_path)
    rows = stream_of(tmp_path, tokenizer, shuffle_buffer=1)
    loader = DataLoader(rows.train, batch_size=4, num_workers=2)
    seen = [set(), set()]
    for number, batch in zip(range(20), loader, strict=False):
        seen[number % 2] |= {text[:27] for text in decoded(batch["input_ids"], tokenizer) if text[27] == "-"}
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_a_stream_reads_no_further_than_it_must(tmp_path: Path, tokenizer, small_shards, monkeypatch) -> None:
    write_numbered(tmp_path, files=20)
    rows = stream_of(tmp_path, tokenizer, max_heldout_rows=2, shuffle_buffer=8)
    opened = []
    sources = finetune.data.sources
    original = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda name, *rest: opened.append(name) or original(name, *rest))
    first(rows, 20)
    assert 1 <= len(opened) <= 10  # of 20: so many are read in turn


def test_a_damaged_row_or_vanished_file_stops_a_stream_unless_it_may_be_skipped(
    tmp_path: Path, tokenizer, small_shards, caplog
) -> None:
    write_numbered(tmp_path, files=2)
    path = tmp_path / "1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:30], b"{cut\n", *lines[30:]]))
    with pytest.raises(UserError, match=r"1.jsonl, line 31: not JSON; --skip_bad_rows"):
        first(stream_of(tmp_path, tokenizer), 100)
    rows = stream_of(tmp_path, tokenizer, skip_bad_rows=True)
    assert len(first(rows, 200)) == 200  # each file several times
    assert [record.getMessage() for record in caplog.records] == [f"skipped: {path}, line 31: not JSON"]
    assert rows.bad_rows == 1
    path.unlink()
    first(rows, 70)
    assert caplog.records[-1].getMessage() == f"skipped: {path}: the file was there and is gone"
    assert rows.bad_rows == 2


def test_a_compressed_file_that_breaks_off_stops_a_stream_unless_it_may_be_skipped(
    tmp_path: Path, tokenizer, small_shards
) -> None:
    zstandard = pytest.importorskip("zstandard")
    write_numbered(tmp_path, files=1)
    path = tmp_path / "broken.jsonl.zst"
    content = b"".join(json.dumps({"text": os.urandom(400).hex()}).encode() + b"\n" for _ in range(300))
    path.write_bytes(zstandard.compress(content)[:90_000])
    problem = rf"{path}: cannot be read \(after line \d+"
    with pytest.raises(UserError, match=problem):
        first(stream_of(tmp_path, tokenizer), 4000)
    rows = stream_of(tmp_path, tokenizer, skip_bad_rows=True)
    assert len(first(rows, 4000)) == 4000
    assert rows.bad_rows == 1 and re.match(problem, *rows.problems)


def test_streams_that_fill_no_row_are_refused_at_once(tmp_path: Path, tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["short"] * 3)
    with pytest.raises(UserError, match="a.jsonl: the held-out documents fill no row of 56 tokens: .* --heldout_share"):
        stream_of(tmp_path, tokenizer, heldout_share=0.5)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """A tiny dense LLaMA with random weights."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_numbered(folder)
    return folder


def flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(base), "--data", str(data), "--output_dir", str(output), "--block_size", "8",
        "--context_length", "64", "--num_retrieved_blocks", "2", "--max_steps", "6", "--save_steps", "2",
        "--logging_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--max_heldout_rows", "4", "--heldout_share", "0.1", "--cpu_threads", "1", "--use_cpu", "true",
        "--streaming", "true", "--shuffle_buffer", "16", "--mixture", "0=1", "1=1", "2=1", *more,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_streamed_run_that_was_interrupted_resumes_bit_for_bit(base, data, tmp_path, monkeypatch) -> None:
    main(flags(base, data, tmp_path / "whole"))
    original, calls = Trainer._save_optimizer_and_scheduler, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(flags(base, data, tmp_path / "cut"))
    monkeypatch.undo()
    main(flags(base, data, tmp_path / "cut"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    metrics = json.loads((tmp_path / "whole" / METRICS).read_text())
    assert metrics["steps"] == 6 and metrics["train_rows"] is None and metrics["eval_rows"] == 4


def test_a_stream_without_max_steps_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--streaming true needs --max_steps"):
        main(flags(base, data, tmp_path, "--max_steps", "-1"))


@pytest.mark.parametrize("left", [3, 0])
@pytest.mark.parametrize("skip", ["false", "true"])
def test_files_that_vanish_while_a_run_streams_them_end_it_or_are_counted(
    left: int, skip: str, base: Path, tmp_path: Path, small_shards, monkeypatch
) -> None:
    write_numbered(tmp_path / "data")
    step = Trainer.training_step

    def step_and_delete(self, *args, **settings):
        for file in sorted((tmp_path / "data").iterdir())[left:]:
            file.unlink()
        return step(self, *args, **settings)

    monkeypatch.setattr(Trainer, "training_step", step_and_delete)
    arguments = flags(base, tmp_path / "data", tmp_path / "run")
    del arguments[arguments.index("--mixture") :]  # one subset of all files
    arguments += ["--skip_bad_rows", skip, "--max_steps", "40", "--save_steps", "100"]
    arguments += ["--per_device_train_batch_size", "8"]
    if skip == "false":
        with pytest.raises(UserError, match=r"data/\d.jsonl: the file was there and is gone; --skip_bad_rows"):
            main(arguments)
    elif left == 0:
        with pytest.raises(UserError, match=r"--data: no row is left to read at step \d+: put the files back"):
            main(arguments)
    else:
        main(arguments)
        metrics = json.loads((tmp_path / "run" / METRICS).read_text())
        assert metrics["steps"] == 40 and metrics["bad_rows_skipped"] == 1


@pytest.mark.slow
def test_two_processes_share_a_stream_as_one_reads_it_that_accumulates_their_batches(base, data, tmp_path) -> None:
    main(flags(base, data, tmp_path / "one", "--gradient_accumulation_steps", "2"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [*launch, str(ROOT / "finetune" / "run.py"), *flags(base, data, tmp_path / "two")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    one, two = (json.loads((tmp_path / name / METRICS).read_text()) for name in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
