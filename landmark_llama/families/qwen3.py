"""Qwen3 with landmarks: queries and keys are normalised, each head by itself, before they are rotated."""

from __future__ import annotations

from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from landmark_llama.configuration import Family, LandmarkConfig
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.modeling import LandmarkAttention, LandmarkDecoderLayer, LandmarkModel


class LandmarkQwen3Config(LandmarkConfig, Qwen3Config):
    """Configuration of a landmark Qwen3: Qwen3's fields and those of `LandmarkConfig`."""

    model_type = "landmark_qwen3"
    family = Family("qwen3", "Qwen3", "LandmarkQwen3")


class LandmarkQwen3Attention(LandmarkAttention, Qwen3Attention):
    """Qwen3's attention with landmarks."""

    def _query(self, hidden_states: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.q_norm(super()._query(hidden_states, shape))

    def _key(self, hidden_states: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.k_norm(super()._key(hidden_states, shape))


class LandmarkQwen3DecoderLayer(LandmarkDecoderLayer, Qwen3DecoderLayer):
    """Qwen3's layer with landmark attention."""

    attention_class, mlp_class, norm_class = LandmarkQwen3Attention, Qwen3MLP, Qwen3RMSNorm


class LandmarkQwen3Model(LandmarkModel, Qwen3Model):
    """Qwen3's layers over landmarked rows, plain coordinates outside."""

    config_class, layer_class = LandmarkQwen3Config, LandmarkQwen3DecoderLayer
    _no_split_modules = ["LandmarkQwen3DecoderLayer"]


class LandmarkQwen3ForCausalLM(LandmarkForCausalLM, Qwen3ForCausalLM):
    """A Qwen3 language model that reads texts far longer than it was trained on."""

    config_class, model_class = LandmarkQwen3Config, LandmarkQwen3Model
    _no_split_modules = ["LandmarkQwen3DecoderLayer"]
