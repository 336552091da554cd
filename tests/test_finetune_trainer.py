"""Steps whose loss or gradient is not finite: what they leave alone, what is said of them, when they end a run."""

import json
import re
import socket
from functools import partial
from pathlib import Path

import drills
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune_run import base, data, flags, same_weights  # noqa: F401
from transformers import AutoTokenizer, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from finetune.arguments import UserError, parse_arguments
from finetune.checkpoints.output import METRICS, checkpoints
from finetune.run import main

LORA_LAYER = "base_model.model.model.layers.1"
EVERY_STEP = ("--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "10")


@pytest.fixture
def break_loss(monkeypatch: pytest.MonkeyPatch):
    """`drills.break_loss`, undone after the test."""
    monkeypatch.setattr(Trainer, "compute_loss", Trainer.compute_loss)
    return drills.break_loss


def log_of(output: Path) -> list[dict]:
    return json.loads((checkpoints(output)[-1] / TRAINER_STATE_NAME).read_text())["log_history"]


def same_optimizer(first: Path, second: Path) -> bool:
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (first, second)]
    assert states[0]
    return all(
        torch.equal(value, states[1][weight][name])
        for weight, state in states[0].items()
        for name, value in state.items()
    )


@pytest.mark.parametrize("accumulation", ["1", "2"])
@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments_and_the_next_ones_do(
    amount: float,
    accumulation: str,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    break_loss,
    capsys: pytest.CaptureFixture,
) -> None:
    batches = []

    def at_step_3(step: int, batch: dict) -> bool:
        if step == 3:
            batches.append(batch["input_ids"])
        return step == 3 and len(batches) == 1  # the first of the step's batches

    break_loss(at_step_3, amount)
    more = ("--max_nan_steps", "1", "--gradient_accumulation_steps", accumulation)
    main(flags(base, data, tmp_path, *EVERY_STEP, *more))
    before, after, later = (tmp_path / f"checkpoint-{step}" for step in (2, 3, 4))
    assert same_weights(before, after) and same_optimizer(before, after)
    assert not same_weights(after, later) and not same_optimizer(after, later)
    assert len(batches) == int(accumulation)
    lines = capsys.readouterr().err.splitlines()
    (place,) = [
        i for i, line in enumerate(lines) if line.startswith("step 3: the loss is not finite; the step is left")
    ]
    rows = [json.loads(line) for line in lines[place + 1 :] if line.startswith('  "')]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in batches[0]]
    assert len(rows) == 2 and all(len(row) > 10 and text.startswith(row) for row, text in zip(rows, texts, strict=True))
    losses = [entry["step"] for entry in log_of(tmp_path) if "loss" in entry]
    assert losses == [1, 2, 4, 5, 6]
    metrics = json.loads((tmp_path / METRICS).read_text())
    assert metrics["steps"] == 6 and metrics["steps_skipped"] == 1


def test_a_gradient_that_is_not_finite_is_left_out_like_a_loss(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    compute_loss = Trainer.compute_loss

    def steep(self, model, *args, **settings):
        loss = compute_loss(self, model, *args, **settings)
        weight = model.get_input_embeddings().weight
        return loss + (0 * weight).sum().sqrt() if self.state.global_step == 2 else loss  # 0, by a slope of infinity

    monkeypatch.setattr(Trainer, "compute_loss", steep)
    main(flags(base, data, tmp_path, *EVERY_STEP, "--max_nan_steps", "1", "--max_steps", "4"))
    assert same_weights(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    assert not same_weights(tmp_path / "checkpoint-3", tmp_path / "checkpoint-4")
    assert "step 3: the gradient is not finite; the step is left out" in capsys.readouterr().err


def test_a_step_over_several_segments_is_left_out_as_a_whole(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    break_loss,
) -> None:
    segments = []

    def last_of_step_2(step: int, _: dict) -> bool:
        segments.append(step)
        return segments[-3:] == [2, 2, 2]

    break_loss(last_of_step_2)
    more = ("--segments", "3", "--retrieval_granularity", "head", "--max_nan_steps", "1", "--max_steps", "3")
    main(flags(base, data, tmp_path, *EVERY_STEP, *more))
    assert segments == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert same_weights(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    assert not same_weights(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")


def test_the_mean_of_the_logged_losses_is_that_of_the_steps_that_were_taken(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    break_loss,
) -> None:
    break_loss(lambda step, _: step == 2)
    for name, every in (("each", "1"), ("mean", "3")):
        more = ("--max_steps", "3", "--save_steps", "3", "--logging_steps", every, "--max_nan_steps", "1")
        main(flags(base, data, tmp_path / name, *more))
    each, mean = ([entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("each", "mean"))
    assert len(each) == 2 and mean == pytest.approx([sum(each) / 2], rel=1e-6)


def test_one_step_too_many_ends_the_run_before_anything_is_harmed_and_resuming_counts_on(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    break_loss,
) -> None:
    break_loss(lambda step, _: step in (2, 5))
    with pytest.raises(
        UserError, match='the loss is not finite at step 2, in the rows that begin ".*--max_nan_steps 1'
    ):
        main(flags(base, data, tmp_path, *EVERY_STEP))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(UserError, match="the loss is not finite at step 5, .*--max_nan_steps 2"):
        main(flags(base, data, tmp_path, *EVERY_STEP, "--max_nan_steps", "1"))
    with pytest.raises(UserError, match="at step 5, .*--max_nan_steps 2"):  # the checkpoint knows of step 2
        main(flags(base, data, tmp_path, *EVERY_STEP, "--max_nan_steps", "1"))
    assert checkpoints(tmp_path)[-1].name == "checkpoint-4"
    for name, weight in load_file(checkpoints(tmp_path)[-1] / "model.safetensors").items():
        assert weight.isfinite().all(), name
    main(flags(base, data, tmp_path, *EVERY_STEP, "--max_nan_steps", "2"))
    assert json.loads((tmp_path / METRICS).read_text())["steps_skipped"] == 2


@pytest.mark.slow
def test_all_processes_leave_out_a_step_that_is_broken_in_one(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = flags(base, data, tmp_path / "run", *EVERY_STEP, "--max_nan_steps", "1", "--max_steps", "4")
    printed = [tmp_path / f"printed_{rank}" for rank in range(2)]
    processes = [
        drills.start(arguments, printed[rank], partial(drills.join_two_processes, rank, port, 3)) for rank in range(2)
    ]
    for process, file in zip(processes, printed, strict=True):
        process.join(120)
        assert process.exitcode == 0, file.read_text()
    assert same_weights(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-3")
    assert not same_weights(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-4")
    told = printed[0].read_text()
    assert re.search(r'^step 3: the loss is not finite; .* begin:\n  ".*"\n  ".*"\n(?!  )', told, re.MULTILINE)
    assert "not finite" not in printed[1].read_text()
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry] == [1, 2, 4]


def test_a_number_of_steps_below_zero_is_refused(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--max_nan_steps -1: must be 0 or more"):
        parse_arguments(flags(base, data, tmp_path, "--max_nan_steps", "-1"))


def test_no_pickled_arguments_are_saved(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    main(flags(base, data, tmp_path, "--max_steps", "2"))
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize(
    ("adapter", "file", "lost"),
    [
        ((), "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        (
            ("--lora_rank", "2"),
            "adapter_model.safetensors",
            "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight",
        ),
    ],
    ids=["all", "lora"],
)
@pytest.mark.parametrize("cut", [False, True])
def test_a_trained_weight_that_was_not_saved_ends_the_run_and_nothing_counts_as_finished(
    cut: bool,
    adapter: tuple[str, ...],
    file: str,
    lost: str,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Trainer.save_model

    def lose(self: Trainer, output_dir: str, *args) -> None:
        save(self, output_dir, *args)
        weights = load_file(Path(output_dir) / file)
        weight = weights.pop(lost)
        save_file(weights | ({lost: weight[1:].clone()} if cut else {}), Path(output_dir) / file)

    monkeypatch.setattr(Trainer, "save_model", lose)
    with pytest.raises(RuntimeError, match=f"checkpoint-2: 1 of the [0-9]+ trained weights .* {lost} of shape"):
        main(flags(base, data, tmp_path, *adapter))
    with pytest.raises(RuntimeError, match="model.partial: 1 of the"):
        main(flags(base, data, tmp_path, *adapter, "--save_strategy", "no"))
    assert not checkpoints(tmp_path) and not (tmp_path / METRICS).exists() and not (tmp_path / file).exists()
