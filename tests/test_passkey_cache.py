"""`--cache` of the evaluation commands: where a landmark model keeps what it reads changes no row."""

import math
from pathlib import Path

import pytest
import torch
from test_passkey_run import command, dense, landmark, rows_of, without_seconds  # noqa: F401

from eval_passkey import measure
from eval_passkey.models import find_subject, load_model
from eval_passkey.prompts import InputError
from eval_passkey.tasks import make_task
from eval_perplexity.methods import Method, Scorer
from landmark_llama import LandmarkCache
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage


def test_a_memory_in_files_gives_the_same_rows_and_leaves_no_file(landmark: Path, tmp_path: Path) -> None:  # noqa: F811
    few = ("--lengths", "300", "--samples", "2")
    for output, cache in ("device", "device"), ("files", f"file:{tmp_path / 'tier'}"):
        assert command(landmark, tmp_path / output, "--cache", cache, *few) == 0
    rows = [without_seconds(rows_of(tmp_path / output)) for output in ("device", "files")]
    assert rows[0] == rows[1]
    assert (tmp_path / "tier").is_dir() and not list((tmp_path / "tier").glob("*.bin"))


def test_a_long_prompt_says_how_far_it_is_read(landmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(measure, "CALL_BLOCKS", 8)
    subject = find_subject("--model", str(landmark), {})
    model = load_model("--model", subject, "float32", "cpu")
    cache, told = LandmarkCache(model.config, storage=HostStorage(budget=0)), []
    task = make_task("passkey", subject.tokenizer)
    row = measure.ask(model, task, 300, 0, cache=cache, progress=told.append)
    assert len(told) > 2 and sum(told) == row["prompt_tokens"] - 1


def test_text_may_retrieve_less_than_the_question(
    landmark: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "CALL_BLOCKS", 8)
    subject = find_subject("--model", str(landmark), {})
    model = load_model("--model", subject, "float32", "cpu")
    calls, forward = [], model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda ids=None, **how: calls.append((ids, how.get("num_retrieved_blocks"))) or forward(ids, **how),
    )
    ids = torch.tensor([make_task("passkey", subject.tokenizer).prompt(300, 0).input_ids])
    measure.read_prompt(model, ids, 8, LandmarkCache(model.config, storage=HostStorage(budget=0)), None, 0)
    window = model.config.train_context_length // model.config.block_size * (model.config.block_size - 1)
    assert [retrieved for _, retrieved in calls] == [0] * (len(calls) - 1) + [None] and len(calls) > 2
    assert torch.equal(torch.cat([piece for piece, _ in calls], dim=1), ids[:, :-1])
    assert calls[-1][0].shape[1] == window


def test_less_for_the_text_is_a_setting_of_the_rows(landmark: Path, tmp_path: Path) -> None:  # noqa: F811
    few = ("--lengths", "300", "--samples", "1", "--cache", "host")
    assert command(landmark, tmp_path, *few, "--reading_retrieved_blocks", "0") == 0
    with pytest.raises(InputError, match="reading_retrieved_blocks"):
        command(landmark, tmp_path, *few)
    with pytest.raises(InputError, match="--reading_retrieved_blocks -1: must not be negative"):
        command(landmark, tmp_path / "other", *few, "--reading_retrieved_blocks", "-1")
    with pytest.raises(InputError, match="--reading_retrieved_blocks 0: .* with --cache host or file:FOLDER alone"):
        command(landmark, tmp_path / "other", "--reading_retrieved_blocks", "0")


def test_a_name_of_no_cache_and_a_model_without_landmarks_are_refused(
    landmark: Path,  # noqa: F811
    dense: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="--cache disk: .* must be device, host, or file:FOLDER"):
        command(landmark, tmp_path / "output", "--cache", "disk")
    with pytest.raises(InputError, match="--cache host: needs a landmark model"):
        command(dense, tmp_path / "output", "--cache", "host")


def test_perplexity_is_that_of_the_device_to_the_bit(landmark: Path, tmp_path: Path) -> None:  # noqa: F811
    subject = find_subject("--model", str(landmark), {})
    ids = torch.randint(8, 60, (1, 301))
    losses = [
        Scorer("--model", subject, Method("landmark"), "float32", "cpu", storage).nll(ids, 200)
        for storage in (None, FileStorage(tmp_path, budget=0))
    ]
    assert losses[0] == losses[1] and math.isfinite(losses[0])
