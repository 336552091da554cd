"""Mistral with landmarks: LLaMA's layers; a sliding window bounds the training context."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)

from landmark_llama.configuration import Family, LandmarkConfig
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.modeling import LandmarkAttention, LandmarkDecoderLayer, LandmarkModel


class LandmarkMistralConfig(LandmarkConfig, MistralConfig):
    """Configuration of a landmark Mistral: Mistral's fields and those of `LandmarkConfig`."""

    model_type = "landmark_mistral"
    family = Family("mistral", "Mistral", "LandmarkMistral")


class LandmarkMistralAttention(LandmarkAttention, MistralAttention):
    """Mistral's attention with landmarks."""


class LandmarkMistralDecoderLayer(LandmarkDecoderLayer, MistralDecoderLayer):
    """Mistral's layer with landmark attention."""

    attention_class, mlp_class, norm_class = LandmarkMistralAttention, MistralMLP, MistralRMSNorm


class LandmarkMistralModel(LandmarkModel, MistralModel):
    """Mistral's layers over landmarked rows, plain coordinates outside."""

    config_class, layer_class = LandmarkMistralConfig, LandmarkMistralDecoderLayer
    _no_split_modules = ["LandmarkMistralDecoderLayer"]


class LandmarkMistralForCausalLM(LandmarkForCausalLM, MistralForCausalLM):
    """A Mistral language model that reads texts far longer than it was trained on."""

    config_class, model_class = LandmarkMistralConfig, LandmarkMistralModel
    _no_split_modules = ["LandmarkMistralDecoderLayer"]
