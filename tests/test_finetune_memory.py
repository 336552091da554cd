"""The estimate of a run's memory: against sums done by hand, and against what is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LANDMARK, random_ids, tiny_model
from transformers import LlamaConfig

from finetune.memory import Batch, Estimate, Plan, Weights, activations, estimate, layer_activations, warning

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
    assert whole.gradients == 2 * ALL and whole.weights == size.weights


def test_zero3_spreads_sixteen_bytes_a_weight() -> None:
    size = estimate(LLAMA2_7B, FULL, ROWS, Plan(devices=8, sharding="zero3", residual_bytes=2))
    assert size.weights + size.gradients + size.optimiser == pytest.approx(16 * ALL / 8, rel=1e-6)


def test_an_adapter_leaves_the_base_in_sixteen_bits_alone() -> None:
    adapter = 32 * (4 * 2 * 16 * 4096 + 3 * 16 * (4096 + 11008)) + 4096
    weights = Weights(adapter, 4 * adapter, 2 * ALL, LAYER, EMBEDDINGS)
    size = estimate(LLAMA2_7B, weights, ROWS, Plan(residual_bytes=2))
    assert (size.weights, size.gradients, size.optimiser) == (2 * ALL + 4 * adapter, 4 * adapter, 8 * adapter)
    assert size.gradients + size.optimiser == pytest.approx(0.48e9, rel=0.01)


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
