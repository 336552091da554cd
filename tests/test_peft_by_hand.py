"""peft used by hand: the configuration that trains the landmark's row, and the warning where it is not trained."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from landmark_llama import landmark_lora_config
from tests.tiny import LANDMARK, random_ids, tiny_model

WARNING = "the embedding row of the landmark token, 7, is not trained"


def train(model: torch.nn.Module) -> list[str]:
    """One step on random rows; the warnings that it gave."""
    ids = random_ids(2, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model(input_ids=ids, labels=ids)
    return [str(w.message) for w in caught if "landmark" in str(w.message)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_landmark_row_is_trained_saved_and_merged(tied: bool, tmp_path: Path) -> None:
    base = tiny_model(tie_word_embeddings=tied)
    before = base.get_input_embeddings().weight.clone()
    model = get_peft_model(base, landmark_lora_config(base.config, r=2))
    layer = base.model.layers[0]
    assert all(hasattr(linear, "lora_A") for linear in (layer.self_attn.q_proj, layer.mlp.down_proj))
    assert train(model) == []
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    logits = model.eval()(random_ids(1, 20)).logits
    again = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=tied), tmp_path).eval()
    torch.testing.assert_close(again(random_ids(1, 20)).logits, logits)
    merged = model.merge_and_unload()
    changed = (merged.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [LANDMARK]


@pytest.mark.parametrize("rows", [[9, 3], {"embed_tokens": [3, 9]}, [7, 3, 9]])
def test_further_rows_are_trained_beside_the_landmarks(rows: list | dict) -> None:
    config = landmark_lora_config(tiny_model().config, target_modules=["v_proj"], trainable_token_indices=rows)
    assert config.trainable_token_indices == {"embed_tokens": [3, LANDMARK, 9]}
    assert config.target_modules == {"v_proj"} and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("settings", [{}, {"trainable_token_indices": {"embed_tokens": [3]}}], ids=["none", "another"])
def test_training_without_the_landmark_row_warns_once(settings: dict) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2, **settings))
    (message,) = train(model)
    assert message.startswith(WARNING) and "landmark_lora_config" in message


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [LANDMARK]}])
def test_other_ways_to_train_the_row_do_not_warn(settings: dict) -> None:
    assert train(get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2, **settings))) == []


def test_a_model_that_trains_all_or_nothing_does_not_warn() -> None:
    assert train(tiny_model()) == []
    frozen = tiny_model().requires_grad_(False).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen(random_ids(1, 5))
