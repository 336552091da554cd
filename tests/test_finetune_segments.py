"""Runs of `finetune/run.py` on rows of several segments: the same steps, the memory of one segment, whole runs."""

import contextlib
import io
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_finetune_run import Interruption, base, data, flags, interrupt_at_save, same_weights  # noqa: F401
from tiny import random_ids, tiny_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from finetune.checkpoints.output import METRICS
from finetune.run import main
from finetune.segments import Segments, SegmentTrainer
from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM

# rows of 3 segments of 5 blocks, beside 2 retrieved ones: 35 tokens each
SEGMENTS = ("--segments", "3", "--retrieval_granularity", "head")


class Finished(NamedTuple):
    """A run that nothing interrupted: where it is, and what it printed."""

    output: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base: Path, data: Path) -> Finished:  # noqa: F811
    output, printed = tmp_path_factory.mktemp("segments") / "finished", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(flags(base, data, output, *SEGMENTS))
    return Finished(output, printed.getvalue())


def trainer_of(model: LandmarkLlamaForCausalLM, number: int, tmp_path: Path) -> SegmentTrainer:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = SegmentTrainer(segments=Segments.of(model.config, number), model=model, args=arguments)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_a_step_adds_up_the_segments_of_a_row(tmp_path: Path) -> None:
    model, ids = tiny_model().train(), random_ids(2, 45)
    trainer = trainer_of(model, 3, tmp_path)
    assert trainer.segments.tokens == 15 and trainer.segments.positions == 20
    trainer.current_gradient_accumulation_steps = 2
    losses = [trainer.training_step(model, {"input_ids": ids, "labels": ids}, items) for items in (None, 2 * 88)]
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    cache = LandmarkCache(model.config)
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(15, dim=1)], dim=1)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach() / 2)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, msg=name)


class Held:
    """What autograd keeps for a backward that is still to come, in bytes: now, and at the peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def keep(self, x: Tensor) -> list[Tensor]:
        box, size = _Box([x.detach()]), x.untyped_storage().nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self.drop, size)
        return box

    def drop(self, size: int) -> None:
        self.now -= size


class _Box(list):
    """A list that weak references can be made to."""


def test_the_processes_of_a_run_average_their_gradients_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, averages, seen = tiny_model().train(), random_ids(2, 45), [True], []
    trainer = trainer_of(model, 3, tmp_path)
    backward = trainer.accelerator.backward

    @contextlib.contextmanager
    def no_sync(_: torch.nn.Module) -> Iterator[None]:
        averages.append(False)
        yield
        averages.append(True)

    def recorded(loss: Tensor) -> None:
        seen.append(averages[-1])
        backward(loss)

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    monkeypatch.setattr(trainer.accelerator, "backward", recorded)
    trainer.training_step(model, {"input_ids": ids, "labels": ids})
    assert seen == [False, False, True]


def test_a_step_of_four_segments_holds_what_one_holds(tmp_path: Path) -> None:
    peaks = {}
    for number in (2, 4):
        model, ids = tiny_model().train(), random_ids(4, 15 * number)
        trainer, held = trainer_of(model, number, tmp_path), Held()
        with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda box: box[0]):
            trainer.training_step(model, {"input_ids": ids, "labels": ids})
        assert held.now == 0
        peaks[number] = held.peak
    one, ids = Held(), random_ids(4, 15)
    with torch.autograd.graph.saved_tensors_hooks(one.keep, lambda box: box[0]):
        tiny_model().train()(ids, labels=ids).loss.backward()
    assert peaks[4] < 1.1 * peaks[2] and peaks[4] < 1.5 * one.peak


def test_rows_are_evaluated_without_looking_ahead(tmp_path: Path) -> None:
    model, ids = tiny_model(retrieval_granularity="head"), random_ids(2, 75)
    trainer = trainer_of(model, 5, tmp_path)
    loss, _, _ = trainer.prediction_step(model, {"input_ids": ids, "labels": ids}, prediction_loss_only=True)
    each, shared = (model(ids, labels=ids, retrieval_granularity=how).loss for how in ("token_and_head", "head"))
    torch.testing.assert_close(loss, each)
    assert not torch.isclose(each, shared)


def test_a_run_says_what_its_rows_are(finished: Finished) -> None:
    metrics = json.loads((finished.output / METRICS).read_text())
    assert metrics["ordinary_tokens_per_row"] == 105 and math.isfinite(metrics["eval_loss"])
    assert "3 segments of 35 tokens (5 blocks), each of which retrieves 2 of the earlier blocks" in finished.printed
    assert "evaluated with retrieval_granularity token_and_head" in finished.printed
    config = LandmarkLlamaForCausalLM.from_pretrained(finished.output).config
    assert config.train_context_length == 64 and config.retrieval_granularity == "head"


def test_an_interrupted_run_resumes_bit_for_bit(
    finished: Finished,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_at_save(monkeypatch, 2, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path, *SEGMENTS))
    monkeypatch.undo()
    main(flags(base, data, tmp_path, *SEGMENTS))
    assert same_weights(tmp_path, finished.output)


def test_adapters_streamed_data_and_recomputed_layers_go_together_with_segments(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []
    step = Trainer.training_step

    def recorded(self: Trainer, model: torch.nn.Module, inputs: dict, *args: object) -> Tensor:
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", recorded)
    more = ("--lora_rank", "4", "--streaming", "true", "--gradient_checkpointing", "true")
    main(flags(base, data, tmp_path, *SEGMENTS, "--train_retrieved_blocks", "4", "--max_steps", "2", *more))
    assert shapes == [(2, 21)] * 6  # 3 blocks beside 4 retrieved ones
    metrics = json.loads((tmp_path / METRICS).read_text())
    assert metrics["ordinary_tokens_per_row"] == 63 and math.isfinite(metrics["train_loss"])
