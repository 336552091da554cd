"""Qwen2 and Qwen2.5 with landmarks: queries, keys and values have biases."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from landmark_llama.configuration import Family, LandmarkConfig
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.modeling import LandmarkAttention, LandmarkDecoderLayer, LandmarkModel


class LandmarkQwen2Config(LandmarkConfig, Qwen2Config):
    """Configuration of a landmark Qwen2: Qwen2's fields and those of `LandmarkConfig`."""

    model_type = "landmark_qwen2"
    family = Family("qwen2", "Qwen2", "LandmarkQwen2")

    head_dim: int | None = None


class LandmarkQwen2Attention(LandmarkAttention, Qwen2Attention):
    """Qwen2's attention with landmarks."""


class LandmarkQwen2DecoderLayer(LandmarkDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's layer with landmark attention."""

    attention_class, mlp_class, norm_class = LandmarkQwen2Attention, Qwen2MLP, Qwen2RMSNorm


class LandmarkQwen2Model(LandmarkModel, Qwen2Model):
    """Qwen2's layers over landmarked rows, plain coordinates outside."""

    config_class, layer_class = LandmarkQwen2Config, LandmarkQwen2DecoderLayer
    _no_split_modules = ["LandmarkQwen2DecoderLayer"]


class LandmarkQwen2ForCausalLM(LandmarkForCausalLM, Qwen2ForCausalLM):
    """A Qwen2 language model that reads texts far longer than it was trained on."""

    config_class, model_class = LandmarkQwen2Config, LandmarkQwen2Model
    _no_split_modules = ["LandmarkQwen2DecoderLayer"]
