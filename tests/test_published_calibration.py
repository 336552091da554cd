"""A calibration saved as a folder of its own: it makes the same model again, and refuses any other base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.published_calibration import RECORD, WEIGHTS, load_calibration, read_settings, save_calibration
from tests.test_tokenization import word_tokenizer
from tests.tiny import random_ids, tiny_llama

TRAINED = {
    "num_retrieved_blocks": 2, "num_local_blocks": 1, "landmark_key": "pooled", "landmark_query_rank": 2,
    "block_weight": "exact", "num_sink_blocks": 1,
}  # fmt: skip


def convert(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> LandmarkLlamaForCausalLM:
    torch.manual_seed(seed)
    base = tiny_llama(seed=seed).to(dtype)
    return LandmarkLlamaForCausalLM.from_llama(base, word_tokenizer(), 4, **settings).eval()


@pytest.fixture
def trained(tmp_path: Path) -> tuple[LandmarkLlamaForCausalLM, Path]:
    """A model whose calibration and landmark row were trained, and the folder that they were saved to."""
    model = convert(**TRAINED)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.self_attn.landmark_calibration.parameters():
                weight.normal_()
        model.get_input_embeddings().weight[model.config.landmark_token_id].normal_()
    save_calibration(model, tmp_path / "calibration", torch.float32, {"tokens": 5})
    return model, tmp_path / "calibration"


def test_a_saved_calibration_makes_the_same_model_of_the_same_base(trained: tuple) -> None:
    model, folder = trained
    again, ids = convert(), random_ids(1, 100)
    assert not torch.equal(again(ids).logits, model(ids).logits)
    load_calibration(again, folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {name: getattr(again.config, name) for name in TRAINED} == TRAINED
    other_way = convert(**{name: value for name, value in read_settings(folder).items() if name != "block_size"})
    load_calibration(other_way, folder)
    assert torch.equal(other_way(ids).logits, model(ids).logits)


def test_a_base_in_bfloat16_is_the_same_base(trained: tuple) -> None:
    _, folder = trained
    model = convert(dtype=torch.bfloat16)
    load_calibration(model, folder)
    assert model.model.layers[0].self_attn.landmark_calibration.up.dtype == torch.bfloat16


def test_a_calibration_of_another_base_changes_nothing(trained: tuple) -> None:
    _, folder = trained
    model, ids = convert(seed=1), random_ids(1, 100)
    before = model(ids).logits
    with pytest.raises(ValueError, match="calibration: the calibration of another base"):
        load_calibration(model, folder)
    assert torch.equal(model(ids).logits, before) and model.config.landmark_query_rank == 0


def test_a_damaged_calibration_is_refused_in_one_sentence(trained: tuple, tmp_path: Path) -> None:
    _, folder = trained
    model = convert()
    with pytest.raises(OSError, match="nowhere: there is no such folder"):
        load_calibration(model, tmp_path / "nowhere")
    weights, record = (folder / WEIGHTS).read_bytes(), json.loads((folder / RECORD).read_text())
    (folder / WEIGHTS).write_bytes(weights[:-1] + b"\1")
    with pytest.raises(OSError, match=f"{WEIGHTS}: damaged, or of another calibration"):
        load_calibration(model, folder)
    (folder / WEIGHTS).write_bytes(weights)
    record["settings"]["num_sink_blocks"] = 9
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(OSError, match="num_sink_blocks=9"):
        load_calibration(model, folder)
    assert model.config.num_sink_blocks == 0 and model.config.landmark_query_rank == 0
    (folder / RECORD).write_text("{}")
    with pytest.raises(OSError, match=f"{RECORD}: damaged"):
        load_calibration(model, folder)


def test_a_model_without_a_calibration_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="landmark_query_rank=0: the model has no calibration to save"):
        save_calibration(convert(), tmp_path / "calibration")
    assert not list(tmp_path.iterdir())
