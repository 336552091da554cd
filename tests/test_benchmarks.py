"""The benchmarks: rows of the promised form, failures kept apart, wrong results never timed, an honest table."""

from __future__ import annotations

import json
import mmap
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from documents import byte_tokenizer, write_jsonl

from benchmarks import checks, generation, measure, table, tokenisation, training
from benchmarks.models import (
    DENSE,
    DENSE_STATIC,
    ModelArguments,
    dense_config,
    landmark_config,
    load_model,
    random_text,
)

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "block_size": 4,
    "train_context_length": 32,
    "num_retrieved_blocks": 1,
    "threads": 1,
    "device": "cpu",
}
FIGURES = {"quantity", "implementation", "length", "median", "min", "max", "repetitions", "values", "ratio_to_dense"}
SURROUNDINGS = {"run", "benchmark", "model", "shape", "dtype", "machine", "versions"}


def tiny_flags() -> list[str]:
    return [part for name, value in TINY.items() for part in (f"--{name}", str(value))]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures without fresh processes: for tests of everything around the measurement."""

    def call(function, *args, threads):
        try:
            return function(*args)
        except ValueError as error:
            raise measure.MeasurementFailed(str(error)) from error

    monkeypatch.setattr(generation, "isolated", call)
    monkeypatch.setattr(training, "isolated", call)


def test_a_tiny_run_in_fresh_processes_writes_rows_of_the_promised_form(tmp_path):
    output = tmp_path / "results" / "generation.jsonl"
    flags = ["--lengths", "50", "--granularity", "head", "--decode_tokens", "16", "--repetitions", "2"]
    assert generation.main([*tiny_flags(), *flags, "--output", str(output)]) == 0
    rows = read_rows(output)
    dense = [(q, DENSE) for q in generation.QUANTITIES]
    dense.insert(2, ("decode_ms_per_token", DENSE_STATIC))
    landmark = [(q, "landmark head") for q in generation.QUANTITIES]
    # each implementation's as soon as it is measured
    assert [(row["quantity"], row["implementation"]) for row in rows] == dense + landmark
    for row in rows:
        assert (FIGURES | SURROUNDINGS) <= row.keys()
        assert (row["length"], row["repetitions"], len(row["values"])) == (50, 2, 2)
        assert 0 <= row["min"] <= row["median"] <= row["max"]
        assert row["machine"]["threads"] == 1 and row["versions"]["torch"] == torch.__version__
    medians = {(row["quantity"], row["implementation"]): row["median"] for row in rows}
    for row in rows:
        if row["quantity"] != "peak_memory_mib":
            quantity = row["quantity"]
            # the dense model at its fastest: with a cache that is not copied, where that makes a difference
            dense = min(medians[quantity, name] for name in (DENSE, DENSE_STATIC) if (quantity, name) in medians)
            assert row["ratio_to_dense"] == round(row["median"] / dense, 4)
    assert not output.with_suffix(".failed.jsonl").exists()


def test_a_second_run_keeps_the_rows_of_the_first(tmp_path, in_this_process):
    output = tmp_path / "training.jsonl"
    flags = [*tiny_flags(), "--batch_sizes", "1", "3", "--repetitions", "2", "--warmup_steps", "1"]
    assert training.main([*flags, "--output", str(output)]) == 0
    first = read_rows(output)
    assert [(row["batch"], row["implementation"]) for row in first] == [
        (batch, name) for batch in (1, 3) for name in (DENSE, "landmark")
    ]
    for row in first:
        assert (FIGURES | SURROUNDINGS) <= row.keys()
        assert (row["length"], row["ordinary_tokens"], row["repetitions"]) == (32, 24, 2)
    assert training.main([*flags, "--output", str(output)]) == 0
    assert read_rows(output)[: len(first)] == first


def test_a_prompt_that_takes_long_is_read_once_and_its_row_says_so(tmp_path, in_this_process, monkeypatch):
    measured = []

    def measure_once(self, name, length):
        measured.append((length, name))
        seconds = 100.0 if (name, length) == (DENSE, 9) else 1.0
        return {"prefill_seconds": seconds, "decode_ms_per_token": 2.0, "peak_memory_mib": 3.0, "decode_ms": [2.0] * 16}

    monkeypatch.setattr(generation.GenerationBenchmark, "_measure_once", measure_once)
    output = tmp_path / "rows.jsonl"
    flags = ["--lengths", "9", "7", "--granularity", "head", "--repetitions", "3", "--output", str(output)]
    assert generation.main([*tiny_flags(), *flags]) == 0
    turns = ["dense", "landmark head", "landmark head", "dense", "dense", "landmark head"]
    assert [name for length, name in measured if length == 7] == turns
    assert measured.count((9, DENSE)) == 1 and measured.count((9, "landmark head")) == 3
    for row in read_rows(output):
        once = (row["implementation"], row["length"]) == (DENSE, 9)
        assert row["repetitions"] == (1 if once else 3)
        assert ("note" in row) == once
    rows = {(row["quantity"], row["implementation"], row["length"]): row for row in read_rows(output)}
    assert rows["prefill_seconds", "landmark head", 9]["ratio_to_dense"] == 0.01


def test_what_fails_is_kept_apart_with_its_reason(tmp_path, in_this_process, monkeypatch):
    def measure_once(self, name, length):
        if name == DENSE:
            raise measure.MeasurementFailed("no memory left")
        return {"prefill_seconds": 1.0, "decode_ms_per_token": 2.0, "peak_memory_mib": 3.0, "decode_ms": [2.0] * 16}

    monkeypatch.setattr(generation.GenerationBenchmark, "_measure_once", measure_once)
    output = tmp_path / "rows.jsonl"
    flags = ["--lengths", "9", "--granularity", "head", "--output", str(output)]
    assert generation.main([*tiny_flags(), *flags]) == 1
    assert {row["implementation"] for row in read_rows(output)} == {"landmark head"}
    assert {row["ratio_to_dense"] for row in read_rows(output)} == {None}
    (failure,) = read_rows(output.with_suffix(".failed.jsonl"))
    assert (failure["implementation"], failure["length"], failure["reason"]) == (DENSE, 9, "no memory left")
    assert SURROUNDINGS <= failure.keys()


def test_a_wrong_result_is_never_timed(tmp_path, in_this_process, monkeypatch):
    def without_landmarks(query, key, value, *, block_size):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(checks, "landmark_attention", without_landmarks)
    monkeypatch.setattr(training, "measure", lambda *args: pytest.fail("timed all the same"))
    output = tmp_path / "rows.jsonl"
    assert training.main([*tiny_flags(), "--batch_sizes", "2", "--output", str(output)]) == 1
    assert read_rows(output) == []
    (failure,) = read_rows(output.with_suffix(".failed.jsonl"))
    assert "result is wrong: landmark_attention, output" in failure["reason"]


@pytest.mark.parametrize("granularity", ["head", "token_and_head", "token"])
def test_the_check_of_reading_accepts_every_granularity(granularity):
    args = ModelArguments(**TINY)
    assert checks.check_reading(args, landmark_config(args, granularity)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_check_of_attention_accepts_every_dtype(dtype):
    args = ModelArguments(**TINY, dtype=dtype)
    assert checks.check_attention(args, landmark_config(args, "head")) is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_preallocated_cache_gives_the_dense_models_logits_or_is_not_timed(monkeypatch, batch_size):
    args = ModelArguments(**TINY)
    what = (args, landmark_config(args, "head"), DENSE, 50, batch_size, 16, 20)
    measured = generation.measure(*what)
    assert len(measured["decode_ms"]) == len(measured["static"]["decode_ms"]) == 16
    move = generation.preallocated

    def forgetful(cache, model, room):
        static = move(cache, model, room)
        assert (
            type(static).__name__ == "StaticCache" and static.layers[0].keys.shape[2] == static.get_seq_length() + room
        )
        static.layers[1].values[:, :, :5] = 0
        return static

    monkeypatch.setattr(generation, "preallocated", forgetful)
    with pytest.raises(ValueError, match="logits with a StaticCache are off"):
        generation.measure(*what)


def test_the_check_of_reading_sees_a_result_that_depends_on_the_cut_into_calls(monkeypatch):
    args = ModelArguments(**TINY)
    shared = landmark_config(args, "head")  # its tokens choose together: right only where the cuts respect blocks
    monkeypatch.setattr(checks, "load_model", lambda args, config, name: load_model(args, shared, name))
    assert "against one call" in checks.check_reading(args, landmark_config(args, "token_and_head"))


def test_the_check_of_reading_sees_a_cache_that_reads_other_blocks(monkeypatch):
    from landmark_llama.reading.storage import DeviceStorage

    gather = DeviceStorage.gather
    monkeypatch.setattr(DeviceStorage, "gather", lambda self, blocks: gather(self, (blocks - 1).clamp_min(0)))
    args = ModelArguments(**TINY)
    assert "fits the table" in checks.check_reading(args, landmark_config(args, "token_and_head"))


def test_a_killed_or_failing_process_becomes_one_sentence():
    with pytest.raises(measure.MeasurementFailed, match="its process was killed"):
        measure.isolated(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(measure.MeasurementFailed, match="ValueError: invalid literal"):
        measure.isolated(int, "x")


def test_peak_memory_sees_what_was_freed_again_and_nothing_from_before():
    def take_and_free():
        # mapped, not allocated: a heap that earlier tests left resident would give room without growing
        with mmap.mmap(-1, 64 * 2**20) as memory:
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1

    take_and_free()
    peak = measure.PeakMemory("cpu")
    assert peak.mib() < 32
    take_and_free()
    assert 56 < peak.mib() < 96


def test_both_models_have_the_same_shape_and_read_no_landmark():
    args = ModelArguments(**TINY)
    config = landmark_config(args, "head")
    landmark, dense = (load_model(args, config, name) for name in ("landmark", DENSE))
    assert dense.config._attn_implementation == "sdpa"
    assert type(dense).__name__ == "LlamaForCausalLM" and dense_config(config).model_type == "llama"
    shapes = ({name: x.shape for name, x in model.state_dict().items()} for model in (landmark, dense))
    assert next(shapes) == next(shapes)
    assert config.landmark_token_id not in random_text(args, config, 1000)
    logits = torch.full((1, 1, args.vocab_size), -9.0)
    logits[..., config.landmark_token_id] = 9
    logits[..., 7] = -1
    assert generation._greedy(logits, config.landmark_token_id).tolist() == [[7]]


def test_a_saved_checkpoint_is_measured_with_its_own_weights_and_no_other_shape(tmp_path):
    args = ModelArguments(**TINY)
    config = landmark_config(args, "head")
    saved = load_model(args, config, "landmark")
    saved.save_pretrained(tmp_path / "model")
    given = ModelArguments(model=str(tmp_path / "model"), device="cpu")
    config = landmark_config(given, "token_and_head")
    assert config.retrieval_granularity == "token_and_head"
    for name in ("landmark", DENSE):
        weights = load_model(given, config, name).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())
    with pytest.raises(ValueError, match="--layers: --model .* has its own"):
        ModelArguments(model=str(tmp_path / "model"), layers=5)


def test_the_table_shows_the_lengths_where_dense_wins():
    surroundings = {
        "run": "now",
        "benchmark": "generation",
        "model": "random weights",
        "dtype": "float32",
        "machine": {"cpu": "some CPU", "threads": 2},
        "versions": {"torch": "2", "transformers": "5"},
        "shape": {
            "num_hidden_layers": 3,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "head_dim": 32,
            "block_size": 16,
            "train_context_length": 256,
            "num_retrieved_blocks": 4,
        },
    }
    rows = [
        {
            "quantity": "prefill_seconds",
            "implementation": name,
            "length": length,
            "median": median,
            "min": median,
            "max": 1.1 * median,
            "repetitions": 3,
            "ratio_to_dense": median / dense,
            **surroundings,
        }
        for length, dense, landmark in ((2048, 0.1, 0.2), (32768, 6.0, 2.0), (131072, 94.6, None))
        for name, median in ((DENSE, dense), ("landmark head", landmark))
        if median is not None
    ]
    text = table.markdown(rows)
    assert "| 2,048 | **0.1** | 0.2 (0.5×) |" in text
    assert "| 32,768 | 6 | **2** (3×) |" in text
    assert "| 131,072 | **94.6** | – |" in text
    assert text.endswith("The dense model is ahead in reading a prompt at 2,048 tokens.")
    for row in rows:
        row["quantity"] = "decode_ms_per_token"
    rows.append(rows[2] | {"implementation": DENSE_STATIC, "median": 1.0, "min": 1.0, "max": 1.0})
    text = table.markdown(rows)
    assert "| tokens | dense, SDPA | landmark, `head` | dense, SDPA, `StaticCache` |" in text
    assert text.endswith("The dense model is ahead in generating at 2,048, 32,768 tokens.")
    assert "some CPU, 2 threads" in text and "10%" in text


def test_the_table_names_the_line_that_is_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"run": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: is no row of results"):
        table.last_run(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="No such file"):
        table.last_run(tmp_path / "missing.jsonl")


def test_another_model_is_measured_in_the_same_run(tmp_path, in_this_process, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from benchmarks.models import dense_config\n"
        "def build(config):\n"
        "    assert config.block_size == 4\n"
        "    return LlamaForCausalLM(dense_config(config))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "rows.jsonl"
    flags = ["--lengths", "30", "--granularity", "head", "--repetitions", "1", "--output", str(output)]
    assert generation.main([*tiny_flags(), *flags, "--dense", "False", "--against", "elsewhere:build"]) == 0
    rows = read_rows(output)
    assert {row["implementation"] for row in rows} == {"landmark head", "against"}
    assert {row["ratio_to_dense"] for row in rows} == {None}
    with pytest.raises(ValueError, match="--against elsewhere:nothing: no such module:function"):
        generation.main([*tiny_flags(), "--against", "elsewhere:nothing"])


def test_tokenisation_is_measured_beside_plain_datasets_and_only_where_the_ids_agree(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])
    output = tmp_path / "tokenisation.jsonl"
    monkeypatch.setattr(tokenisation, "isolated", lambda function, *args: function(*args))
    monkeypatch.setattr(tokenisation, "write_data", lambda args, folder: [str(data)])
    flags = ["--tokenizer", str(tmp_path / "tokenizer"), "--data", str(data), "--processes", "1", "--repetitions", "2"]
    assert tokenisation.main([*flags, "--output", str(output)]) == 0
    rows = read_rows(output)
    assert [row["implementation"] for row in rows] == [tokenisation.PLAIN, tokenisation.OURS]
    assert all(row["tokens"] == sum(len(f"document {i}") + 1 for i in range(300)) for row in rows)
    monkeypatch.setattr(tokenisation, "ours", lambda *args: tokenisation.plain(*args).select(range(299)))
    assert tokenisation.main([*flags, "--output", str(tmp_path / "wrong.jsonl")]) == 1
    assert read_rows(tmp_path / "wrong.jsonl") == []
    assert "299 documents, not 300" in read_rows(tmp_path / "wrong.failed.jsonl")[0]["reason"]
