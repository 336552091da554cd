"""The estimate of a run's memory: against sums done by hand, and against what is measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_ids, tiny_model
from transformers import LlamaConfig, Trainer, TrainingArguments

from finetune.memory import Batch, Estimate, Plan, Weights, estimate, layer_activations, warning
from finetune.optimisers import optimiser_bytes

LLAMA2_7B = LlamaConfig(vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
LAYER = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096  # 202,383,360
EMBEDDINGS = 2 * 32001 * 4096 + 4096
ALL = 32 * LAYER + EMBEDDINGS
FULL = Weights(trained=ALL, trained_bytes=4 * ALL, frozen_bytes=0, largest_layer=LAYER, embeddings=EMBEDDINGS)
ROWS = Batch(rows=2, positions=512, tokens=504)


def test_all_weights_of_7b_on_one_device_take_sixteen_bytes_each() -> None:
    size = estimate(LLAMA2_7B, FULL, ROWS, Plan())
    assert (size.weights, size.gradients, size.optimiser, size.gathered) == (4 * ALL, 4 * ALL, 8 * ALL, 0)
    assert size.weights + size.gradients + size.optimiser == pytest.approx(107.8e9, rel=1e-3)


def test_ddp_holds_the_gradients_twice() -> None:
    one, eight = (estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=devices)) for devices in (1, 8))
    assert eight.gradients == 2 * one.gradients and eight.weights == one.weights


def test_fsdp_spreads_all_but_what_it_gathers() -> None:
    size = estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=8, sharding="fsdp", residual_bytes=2))
    assert size.weights == size.gradients == -(-4 * ALL // 8) and size.optimiser == ALL
    assert size.gathered == 2 * (3 * LAYER + EMBEDDINGS)  # two layers, the gradient of one, both embeddings, in bf16
    whole = estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=8, sharding="fsdp", residual_bytes=2, whole_gradients=True))
    assert whole.gradients == 4 * ALL and whole.weights == size.weights


def test_zero3_spreads_sixteen_bytes_a_weight() -> None:
    size = estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=8, sharding="zero3", residual_bytes=2))
    assert size.weights + size.gradients + size.optimiser == pytest.approx(16 * ALL / 8, rel=1e-6)


def test_an_adapter_leaves_the_base_in_sixteen_bits_alone() -> None:
    adapter = 32 * (4 * 2 * 16 * 4096 + 3 * 16 * (4096 + 11008)) + 4096
    weights = Weights(adapter, 4 * adapter, 2 * ALL, LAYER, EMBEDDINGS)
    size = estimate(LLAMA2_7B, weights, ROWS, Plan(residual_bytes=2))
    assert (size.weights, size.gradients, size.optimiser) == (2 * ALL + 4 * adapter, 4 * adapter, 8 * adapter)
    assert size.gradients + size.optimiser == pytest.approx(0.48e9, rel=0.01)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimiser_keeps_what_is_estimated(optim: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=640).to(dtype).train()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), optim=optim, learning_rate=1e-3, use_cpu=True))
    optimiser = trainer.create_optimizer()
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    states = [value for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = sum(value.nbytes for value in states if value.dim())  # without the step's number
    assert optimiser_bytes(model, optim) == kept


def test_quantised_states_take_a_byte_but_for_embeddings_and_small_weights() -> None:
    model = tiny_model(vocab_size=640)
    embedding, head = 640 * 32, 640 * 32
    small = sum(weight.numel() for weight in model.parameters()) - embedding - head
    assert optimiser_bytes(model, "adamw_bnb_8bit") == 8 * (embedding + small) + 2 * (1 + 1 / 64) * head
    assert optimiser_bytes(model, "lion_8bit") == 4 * (embedding + small) + (1 + 1 / 64) * head
    assert optimiser_bytes(model, "paged_adamw_32bit") == optimiser_bytes(model, "galore_adamw")
    assert optimiser_bytes(model.requires_grad_(False), "adamw_torch") == 0
    assert optimiser_bytes(tiny_model(), "sgd", "momentum=0.9") == optimiser_bytes(tiny_model(), "adagrad")


def test_the_estimate_of_a_run_knows_its_optimiser() -> None:
    adam, sgd = (estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=8, sharding="fsdp"), size) for size in (None, 0))
    assert sgd.optimiser == 0 and sgd.total == adam.total - ALL


def test_the_description_is_one_line_and_the_warning_says_what_to_do() -> None:
    size = Estimate(
        weights=27_000_000_000, gradients=27_000_000_000, optimiser=54_000_000_000, activations=0, gathered=0
    )
    assert size.describe(80_000_000_000) == (
        "memory of each device, estimated: 108 GB of 80 (weights 27, gradients 27, optimiser 54)"
    )
    assert warning(size, 130_000_000_000, Plan()) is None and warning(size, None, Plan()) is None
    text = warning(size, 110_000_000_000, Plan())
    assert "--gradient_checkpointing true" in text and "FSDP" in text and "\n" not in text
    assert "checkpointing" not in warning(size, 80_000_000_000, Plan(checkpointing=True, sharding="fsdp", devices=2))


def test_weights_are_sorted_by_what_becomes_of_them() -> None:
    model = tiny_model()
    layer, rest = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32, 2 * 61 * 32 + 32
    assert Weights.of(model) == Weights(2 * layer + rest, 4 * (2 * layer + rest), 0, layer, rest)
    adapted = get_peft_model(model.bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
    pairs = 2 * 2 * (32 + 32)
    expected = Weights(pairs, 4 * pairs, 2 * (2 * layer + rest), layer + pairs // 2, rest)
    assert Weights.of(adapted) == expected


def kept_for_backward(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of what a forward of `model`'s layers keeps for its backward, beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tensors = []  # none is freed, so that no address is there twice
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (note(x), tensors.append(x))[0], lambda x: x):
        model.model(ids)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_layer_keeps_what_is_estimated(precision: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 344, "block_size": 16, "max_position_embeddings": 256}
    ids = random_ids(2, 240)
    kept = []
    for layers in (1, 3):
        model = tiny_model(num_hidden_layers=layers, **shape).train()
        model = model.bfloat16() if precision == "bf16" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            kept.append(kept_for_backward(model, ids))
    compute, residual = {"fp32": (4, 4), "autocast": (2, 4), "bf16": (2, 2)}[precision]
    estimated = layer_activations(model.config, Batch(2, 256, 240), compute, residual)
    assert estimated == pytest.approx((kept[1] - kept[0]) / 2, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["whole", "checkpointing"])
def test_a_run_peaks_near_its_estimate(checkpointing: str) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    # freed memory goes back to the system at once, so that the peak is one of use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, str(script), checkpointing], capture_output=True, text=True, check=True, env=environment
    )
    measured, estimated = map(int, result.stdout.split())
    assert 0.75 < estimated / measured < 1.33
