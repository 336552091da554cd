"""What `benchmarks/gpu.sh` runs: rehearsed on a CPU, at sizes that fit, and the figures of the kernels' benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import checks, fitting, generation, kernels, measure
from benchmarks.models import DENSE, LANDMARK, ModelArguments, landmark_config
from landmark_llama import LandmarkCache
from landmark_llama.attention import availability, whole_rows
from landmark_llama.reading import decoding_graphs

ROOT = Path(__file__).resolve().parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
SEVEN_BILLION = {
    "vocab_size": 32001,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layers": 32,
    "heads": 32,
    "head_dim": 128,
    "block_size": 64,
    "train_context_length": 4096,
    "num_retrieved_blocks": 8,
    "num_local_blocks": 8,
    "dtype": "bfloat16",
    "device": "cpu",
}
GRANULARITIES = ("landmark head", "landmark token_and_head")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@without_gpu
@pytest.mark.slow
def test_every_step_of_the_gpu_run_is_rehearsed_without_one(tmp_path):
    pytest.importorskip("triton")
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation-gpu.jsonl", "kernels-gpu.jsonl"]
    rows = read_rows(tmp_path / "kernels-gpu.jsonl")
    for quantity, names in (
        ("forward_seconds", (kernels.FLASH, kernels.CUDNN, LANDMARK)),
        ("forward_backward_seconds", (kernels.FLASH, kernels.CUDNN, LANDMARK)),
        ("reading_seconds", (kernels.FLASH, kernels.CUDNN, *GRANULARITIES)),
    ):
        assert tuple(row["implementation"] for row in rows if row["quantity"] == quantity) == names
    rows = read_rows(tmp_path / "generation-gpu.jsonl")
    last = [row for row in rows if row["run"] == rows[-1]["run"]]
    first = rows[: len(rows) - len(last)]
    assert {row["implementation"] for row in first} == {DENSE, "dense static", *GRANULARITIES}
    assert {row["implementation"] for row in last} == {"landmark head"}
    assert all(row["cuda_graphs"] for row in rows)


@without_gpu
def test_a_rehearsal_goes_through_the_kernels_and_fails_where_they_do(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import rehearse
    from landmark_llama.reading import table_triton

    for module, name in (
        (availability, "kernels_run_on"),
        (whole_rows, "_on_gpu"),
        (decoding_graphs, "record_cuda_graph"),
        (generation, "isolated"),
        (kernels, "sdpa_kernel"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # given back when the test ends

    def broken(*args, **kwargs):
        raise RuntimeError("a kernel that does not compile")

    monkeypatch.setattr(table_triton, "_attend_in_tiles", broken)
    flags = ["--heads", "1", "--head_dim", "8", "--block_size", "4", "--num_retrieved_blocks", "1", "--rate_size", "16"]
    flags += ["--lengths", "5", "--tokens", "5", "--reading_lengths", "9", "--repetitions", "1", "--dtype", "float16"]
    with pytest.raises(RuntimeError, match="does not compile"):
        rehearse.main(["benchmarks/kernels.py", *flags, "--output", str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_a_large_model_is_checked_at_a_size_that_fits(kv_heads):
    args = ModelArguments(**SEVEN_BILLION, kv_heads=kv_heads)
    for granularity in ("head", "token_and_head"):
        small, config = checks.checked_shape(args, landmark_config(args, granularity))
        assert (config.num_attention_heads, config.num_hidden_layers, config.head_dim) == (4, 2, 128)
        assert config.num_key_value_heads == 4 * kv_heads // 32 and config.hidden_size == 512
        assert (config.block_size, config.retrieval_granularity) == (64, granularity)
        # the whole table must fit the window, which is otherwise no longer than it must be
        assert config.retrieval()[:2] == (8, 8) and config.train_context_length == 18 * 64
        assert (small.dtype, small.device) == (args.dtype, args.device)


def test_a_small_checkpoint_is_checked_as_it_is_and_a_large_one_by_its_shape():
    small = {"hidden_size": 64, "heads": 4, "head_dim": 16}
    args = ModelArguments(**small, device="cpu")
    config = landmark_config(args, "head")
    args.model = "checkpoint"
    assert checks.checked_shape(args, config) == (args, config)
    config.train_context_length = 4096
    checked, shape = checks.checked_shape(args, config)
    assert checked.model is None and shape.train_context_length == 1024
    config.landmark_key = "pooled"
    assert checks.checked_shape(args, config)[1].landmark_key == "pooled"


GIB = 2**30


@pytest.mark.parametrize(("dense", "memory", "longest"), [(True, 80, 98304), (True, 140, 131072), (False, 80, 106496)])
def test_prompts_are_as_long_as_the_cards_memory_lets_them_be(dense, memory, longest):
    config = landmark_config(ModelArguments(**SEVEN_BILLION), "head")
    assert fitting.longest_fitting(131072, config, torch.bfloat16, 1, memory * GIB, dense=dense) == longest
    assert fitting.longest_fitting(32768, config, torch.bfloat16, 1, memory * GIB, dense=dense) == 32768
    assert fitting.longest_fitting(32768, config, torch.bfloat16, 1, 8 * GIB, dense=dense) == 0


def test_what_a_token_takes_in_a_cache_is_what_is_counted():
    from tiny import random_ids, tiny_model

    model = tiny_model()
    cache = model(random_ids(1, 90), past_key_values=LandmarkCache(model.config)).past_key_values
    stored = sum(x.nbytes for storage in cache.storages for x in (storage.key, storage.value, storage.landmark))
    counted = 90 * fitting._token_bytes(model.config, torch.float32, dense=False)
    assert 0.9 < counted / stored < 1.1
    weights = sum(x.nbytes for x in model.parameters())
    assert 0.9 < fitting.weight_bytes(model.config, torch.float32) / weights <= 1


def test_a_length_that_does_not_fit_is_cut_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "memory_of", lambda device: 3_000_000)
    measured = []
    monkeypatch.setattr(generation.GenerationBenchmark, "_is_right", lambda self, name: True)
    monkeypatch.setattr(
        generation.GenerationBenchmark, "_measure_length", lambda self, length, *_: measured.append(length)
    )
    flags = ["--vocab_size", "40", "--hidden_size", "16", "--layers", "1", "--heads", "2", "--head_dim", "8"]
    flags += ["--intermediate_size", "16", "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")]
    assert generation.main([*flags, "--lengths", "100", "8000", "--fit_memory", "True"]) == 0
    assert measured[0] == 100 and 100 < measured[1] < 8000 and not measured[1] % 1000
    assert f"have room for {measured[1]} tokens" in capsys.readouterr().err
    monkeypatch.setattr(generation, "memory_of", lambda device: 10_000)
    assert generation.main([*flags, "--lengths", "100", "--fit_memory", "True"]) == 1 and len(measured) == 2
    assert "room for 0 tokens" in read_rows(tmp_path / "rows.failed.jsonl")[0]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_the_kernels_benchmark_says_in_one_sentence_that_it_needs_a_gpu(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert kernels.main(["--output", str(output)]) == 2
    assert capsys.readouterr().err == "benchmarks: no GPU was found, and the kernels run on nothing else\n"
    assert not output.exists()


def test_the_kernels_benchmark_refuses_another_implementation_that_is_not_there():
    with pytest.raises(ValueError, match="--against nowhere:at_all: no such module:function"):
        kernels.main(["--against", "nowhere:at_all"])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reading_is_timed_over_the_whole_prompt_and_what_fails_is_kept_apart(tmp_path, monkeypatch, kv_heads):
    monkeypatch.setattr(kernels, "CHUNK_POSITIONS", 16)
    shape = {"heads": 2, "kv_heads": kv_heads, "head_dim": 8, "block_size": 4, "num_local_blocks": 2}
    args = kernels.Arguments(**shape, repetitions=1, device="cpu")  # where cuDNN will not do
    read = []
    attend = kernels.attend_through_table

    def counted(query, storage, groups, **settings):
        read.append(query.shape[1])
        return attend(query, storage, groups, **settings)

    monkeypatch.setattr(kernels, "attend_through_table", counted)
    results = measure.ResultsFile(tmp_path / "rows.jsonl", {})
    kernels.measure_reading(args, 50, ["head", "token_and_head"], kernels.Rates(1e9, 1e9), results)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["implementation"] for row in rows] == ["flash", "landmark head", "landmark token_and_head"]
    assert {row["quantity"] for row in rows} == {"reading_seconds"} and all(row["ratio_to_floor"] > 1 for row in rows)
    assert rows[1]["floor_seconds"] == rows[2]["floor_seconds"] != rows[0]["floor_seconds"]
    assert read[:4] == [16, 16, 16, 2] and set(read) == {16, 2}
    (failed,) = read_rows(tmp_path / "rows.failed.jsonl")
    assert failed["implementation"] == "cudnn"


def test_the_floor_of_attention_is_the_slower_of_operations_and_bytes():
    args = kernels.Arguments(heads=2, head_dim=8)
    rates = kernels.Rates(operations_per_second=1.0, bytes_per_second=1e9)
    assert rates.floor(args, length=4, batch=3, backward=False) == 2 * 3 * 2 * 4 * 4 * 8
    rates = kernels.Rates(operations_per_second=1e9, bytes_per_second=1.0)
    tensor = 3 * 2 * 4 * 8 * 2  # bytes of one in bfloat16
    assert rates.floor(args, length=4, batch=3, backward=False) == 4 * tensor
    assert rates.floor(args, length=4, batch=3, backward=True) == 12 * tensor


def test_the_floor_of_reading_counts_every_landmark_and_the_blocks_of_the_table():
    args = kernels.Arguments(heads=3, head_dim=8, block_size=4, num_retrieved_blocks=2, num_local_blocks=1)
    landmarks = 2 * 3 * 8 * (40 * 10 / 2)  # 40 queries score 5 landmarks each, on average
    table = 4 * 3 * 8 * 40 * (2 + 1 + 0.5) * 4  # scores and values of two, one, and half of the own block
    rates = kernels.Rates(operations_per_second=1.0, bytes_per_second=1e9)
    assert rates.reading_floor(args, 40) == landmarks + table
