"""`finetune/run.py --landmarks_only`: the calibration learns to choose blocks, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_run import base, data, flags  # noqa: F401
from transformers import LlamaForCausalLM

from finetune.arguments import UserError
from finetune.run import main
from landmark_llama.calibration import CALIBRATION

ALONE = [
    "--landmarks_only", "true", "--block_weight", "exact", "--landmark_key", "pooled", "--landmark_query_rank", "4",
    "--num_local_blocks", "1", "--num_sink_blocks", "1", "--logging_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def choosy(base: Path, tmp_path_factory) -> Path:  # noqa: F811
    """`base` with queries and keys so large that blocks differ in what they weigh."""
    folder = tmp_path_factory.mktemp("choosy")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_calibration_changes_and_its_divergence_falls(choosy: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    main(flags(choosy, data, tmp_path / "run", *ALONE, "--max_steps", "25", "--learning_rate", "5e-2"))
    before, after = weights_of(choosy), weights_of(tmp_path / "run")
    for name, weight in before.items():
        assert torch.equal(after[name][: len(weight)], weight), name
    calibration = {name: weight for name, weight in after.items() if CALIBRATION in name}
    assert len(calibration) == 2 * 4 and all(weight.abs().max() > 0 for weight in calibration.values())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["trained_parameters"] == sum(weight.numel() for weight in calibration.values())
    assert "perplexity" not in metrics
    main(flags(choosy, data, tmp_path / "none", *ALONE, "--max_steps", "1", "--learning_rate", "1e-9"))
    untrained = json.loads((tmp_path / "none" / "metrics.json").read_text())
    assert metrics["landmark_divergence"] < 0.9 * untrained["landmark_divergence"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| held-out landmark divergence | {metrics['landmark_divergence']:.4f} |" in card


def test_accumulated_gradients_are_those_of_one_batch(choosy: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """The step of four rows, taken two by two, is as large as that of two: a mean over rows, not a sum."""
    norms = []
    for steps in ("1", "2"):
        folder = tmp_path / steps
        accumulate = ("--gradient_accumulation_steps", steps, "--max_steps", "1", "--save_steps", "1")
        main(flags(choosy, data, folder, *ALONE, *accumulate))
        state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
        norms.append(next(entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry))
    assert norms[1] < 1.5 * norms[0]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--block_weight", "landmark"], "block_weight"),
        (["--landmark_query_rank", "0"], "landmark_query_rank"),
        (["--segments", "2"], "--segments 2"),
        (["--lora_rank", "2"], "--lora_rank 2"),
        (["--pack_documents", "apart"], "--pack_documents apart"),
        (["--gradient_checkpointing", "true"], "--gradient_checkpointing"),
    ],
    ids=["landmark_weights", "no_rank", "segments", "lora", "apart", "checkpointing"],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    more: list[str],
    named: str,
    choosy: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=named) as error:
        main(flags(choosy, data, tmp_path / "run", *ALONE, *more))
    assert "\n" not in str(error.value)
