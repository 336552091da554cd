"""Adapters of a model with calibrated landmark queries: the calibration is trained, saved, loaded and merged, too."""

from pathlib import Path

import pytest
import torch
from checkpoints import refusal
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_adapters import IDS, SETTINGS, logits
from test_tokenization import word_tokenizer
from tiny import in_float64, tiny_llama
from tolerance import assert_as_accurate
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.arguments import DataArguments, ModelArguments, UserError
from finetune.checkpoints.saved import find_loss, trained_weights
from finetune.models import load_model
from landmark_llama import LandmarkLlamaForCausalLM, landmark_lora_config, load_adapter, merge, weight_difference
from landmark_llama.adapters.folder import ADAPTER_WEIGHTS, tokenizer_fingerprint
from landmark_llama.adapters.peft_model import LandmarkPeftModel
from landmark_llama.calibration import CALIBRATION, add_calibration

POOLED = {**SETTINGS, "landmark_key": "pooled"}
BASES = {"vanilla": None, "uncalibrated": 0, "calibrated": 3}
every_base = pytest.mark.parametrize("rank", BASES.values(), ids=BASES.keys())


def make_base(folder: Path, rank: int | None) -> Path:
    """A checkpoint with its tokenizer: vanilla, or with landmarks and a calibration of `rank`."""
    model, tokenizer = tiny_llama(vocab_size=5), word_tokenizer()
    if rank is not None:
        model = LandmarkLlamaForCausalLM.from_llama(model, tokenizer, **POOLED, landmark_query_rank=rank)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> LandmarkPeftModel:
    """An adapter after three large steps, with a calibration of rank 3, saved in `folder`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if "landmark_llama" in (base / "config.json").read_text():
        model = LandmarkLlamaForCausalLM.from_pretrained(base, dtype=dtype)
        add_calibration(model, 3)
    else:
        model = LandmarkLlamaForCausalLM.from_llama(base, tokenizer, dtype=dtype, **POOLED, landmark_query_rank=3)
    config = LoraConfig(r=2, base_model_name_or_path=str(base), target_modules="all-linear", task_type="CAUSAL_LM")
    model = LandmarkPeftModel(model, config, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)).train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=0.05)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@every_base
def test_a_calibration_is_trained_saved_loaded_and_merged_with_its_adapter(rank: int | None, tmp_path: Path) -> None:
    base, folder = make_base(tmp_path / "base", rank), tmp_path / "adapter"
    trained = train_adapter(base, folder)
    assert find_loss(folder, trained_weights(trained)) is None
    calibration = {name: x for name, x in load_file(folder / ADAPTER_WEIGHTS).items() if CALIBRATION in name}
    assert len(calibration) == 2 * 4 and all(x.abs().max() > 0.1 for x in calibration.values())
    loaded = load_adapter(folder)
    assert torch.equal(logits(loaded), logits(trained))
    assert loaded.config.landmark_key == "pooled" and loaded.config.landmark_query_rank == 3
    merge.main([str(folder), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.landmark_query_rank == 3
    assert_as_accurate(logits(trained), logits(merged), logits(in_float64(merged)))
    with torch.no_grad():
        for layer in merged.model.layers:
            layer.self_attn.landmark_calibration.up.zero_()
    assert (logits(merged) - logits(trained)).abs().max() > 0.01


def test_in_bf16_a_calibration_is_trained_in_fp32(tmp_path: Path) -> None:
    model = train_adapter(make_base(tmp_path / "base", None), tmp_path / "adapter", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert logits(model).isfinite().all()


def test_an_adapter_without_its_calibration_is_refused(tmp_path: Path) -> None:
    train_adapter(make_base(tmp_path / "base", 0), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    lost = next(name for name in weights if CALIBRATION in name)
    del weights[lost]
    save_file(weights, tmp_path / "adapter" / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    assert lost in refusal(merge.main, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="save it again"):
        load_adapter(tmp_path / "adapter")


def test_a_base_with_a_calibration_of_another_rank_is_refused(tmp_path: Path) -> None:
    train_adapter(make_base(tmp_path / "base", 0), tmp_path / "adapter")
    with pytest.raises(ValueError, match="landmark_query_rank is 2, not 3"):
        load_adapter(tmp_path / "adapter", make_base(tmp_path / "other", 2))


def test_the_configuration_for_peft_trains_a_calibration_where_there_is_one(tmp_path: Path) -> None:
    for rank, expected in ((0, None), (3, [CALIBRATION])):
        model = LandmarkLlamaForCausalLM.from_pretrained(make_base(tmp_path / str(rank), rank))
        config = landmark_lora_config(model.config)
        assert (config.modules_to_save and sorted(config.modules_to_save)) == expected


def test_a_calibrated_model_has_no_weight_difference_and_says_why(tmp_path: Path) -> None:
    make_base(tmp_path / "base", None)
    make_base(tmp_path / "tuned", 3)
    message = refusal(weight_difference.main, "make", *(tmp_path / name for name in ("tuned", "base", "difference")))
    assert "landmark_query_rank=3" in message


def test_a_landmark_checkpoint_is_given_a_calibration_to_be_trained_and_keeps_the_one_it_has(tmp_path: Path) -> None:
    for rank in (0, 3):
        base = make_base(tmp_path / str(rank), rank)
        data, tokenizer = DataArguments(context_length=32), AutoTokenizer.from_pretrained(base)
        model = load_model(ModelArguments(model_name_or_path=str(base), landmark_query_rank=3), data, tokenizer)
        expected = LandmarkLlamaForCausalLM.from_pretrained(base)
        torch.testing.assert_close(logits(model), logits(expected))
        assert all(layer.self_attn.landmark_calibration.up.shape == (32, 3) for layer in model.model.layers)
    with pytest.raises(UserError, match="landmark_query_rank=5"):
        load_model(ModelArguments(model_name_or_path=str(base), landmark_query_rank=5), data, tokenizer)
