"""Tiny models of each family beside LLaMA, and what a dense one makes of rows that hold their landmarks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_tokenization import word_tokenizer
from tiny import BASE, LANDMARK, WINDOW, in_float64, sharpen
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from landmark_llama import add_landmark_token, insert_landmarks
from landmark_llama.attention import landmark_attention_reference
from landmark_llama.families import FAMILIES
from landmark_llama.language_model import LandmarkForCausalLM

# what makes a family's tiny model more than a LLaMA
CASES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
}
every_family = pytest.mark.parametrize("family", CASES)


def dense_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A dense model of the family, in evaluation mode."""
    config = AutoConfig.for_model(family, **{**BASE, **CASES[family], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    sharpen(model, seed)
    return model


def landmark_model(family: str, seed: int = 0, **settings: Any) -> LandmarkForCausalLM:
    """A landmark model with the weights of `dense_model`."""
    config = FAMILIES[family].config_class(**{**BASE, **CASES[family], **WINDOW, **settings})
    model = FAMILIES[family](config).eval()
    sharpen(model, seed)
    return model


def save_dense(family: str, folder: Path, **settings: Any) -> Path:
    """A dense checkpoint of five words, with its tokenizer."""
    dense_model(family, **{"vocab_size": 5, **settings}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_landmark(family: str, folder: Path, **settings: Any) -> Path:
    """A landmark checkpoint of five words and the landmark, with its tokenizer."""
    tokenizer = word_tokenizer()
    landmark_token_id = add_landmark_token(tokenizer)
    settings = {"vocab_size": len(tokenizer), "landmark_token_id": landmark_token_id, **settings}
    landmark_model(family, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ExactRotary(nn.Module):
    """The dense model's rotary embedding, in float64."""

    def __init__(self, theta: float, half: int) -> None:
        super().__init__()
        self.frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.cat(2 * [position_ids.unsqueeze(-1) * self.frequency], dim=-1)
        return angle.cos(), angle.sin()


def dense_in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a dense model that computes everything in float64."""
    layer = model.model.layers[0].self_attn
    model.config.train_context_length, model.config.head_dim = 1, layer.head_dim  # which `in_float64` asks for
    copy = in_float64(model)
    copy.model.rotary_emb = ExactRotary(model.config.rope_parameters["rope_theta"], layer.head_dim // 2)
    return copy


def attend_by_definition(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Landmark attention as one of transformers' attention functions, for rows that hold their landmarks."""
    block_size = WINDOW["block_size"]
    output = landmark_attention_reference(query, key, value, block_size=block_size, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("landmark_definition", attend_by_definition)


@torch.no_grad()
def logits_by_definition(dense: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of ordinary tokens `ids` (batch, length): the dense model's own layers, over rows with landmarks."""
    dense.set_attn_implementation("landmark_definition")
    landmarked = insert_landmarks(ids, WINDOW["block_size"], LANDMARK)
    logits = dense(input_ids=landmarked, use_cache=False).logits
    return logits[(landmarked != LANDMARK)].unflatten(0, ids.shape)
