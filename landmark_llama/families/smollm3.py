"""SmolLM3 with landmarks: some layers have no rotary positions."""

from __future__ import annotations

import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3MLP,
    SmolLM3RMSNorm,
)

from landmark_llama.attention.rotary import RotaryTable, StillTable
from landmark_llama.configuration import Family, LandmarkConfig
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.modeling import LandmarkAttention, LandmarkDecoderLayer, LandmarkModel


class LandmarkSmolLM3Config(LandmarkConfig, SmolLM3Config):
    """Configuration of a landmark SmolLM3: SmolLM3's fields and those of `LandmarkConfig`."""

    model_type = "landmark_smollm3"
    family = Family("smollm3", "SmolLM3", "LandmarkSmolLM3")

    head_dim: int | None = None

    def check_model(self) -> None:
        """As `LandmarkConfig.check_model`; the first layer needs positions, or pooled keys."""
        super().check_model()
        if not self.no_rope_layers[0] and self.landmark_key == "token":
            raise ValueError(
                "no_rope_layers[0]=0: in a first layer without positions the keys of all landmarks are the same, so "
                "none can be chosen; set landmark_key='pooled'"
            )


class LandmarkSmolLM3Attention(LandmarkAttention, SmolLM3Attention):
    """SmolLM3's attention with landmarks."""

    def _rotary(self, rotary: RotaryTable) -> RotaryTable:
        return rotary if self.use_rope else rotary.still


class LandmarkSmolLM3DecoderLayer(LandmarkDecoderLayer, SmolLM3DecoderLayer):
    """SmolLM3's layer with landmark attention."""

    attention_class, mlp_class, norm_class = LandmarkSmolLM3Attention, SmolLM3MLP, SmolLM3RMSNorm


class LandmarkSmolLM3Model(LandmarkModel, SmolLM3Model):
    """SmolLM3's layers over landmarked rows, plain coordinates outside."""

    config_class, layer_class = LandmarkSmolLM3Config, LandmarkSmolLM3DecoderLayer
    _no_split_modules = ["LandmarkSmolLM3DecoderLayer"]

    def _rotary_table(self, device: torch.device) -> RotaryTable:
        """The table, with the one of layers without RoPE."""
        rotary = super()._rotary_table(device)
        if rotary.still is None:
            rotary.still = StillTable.like(rotary)
        return rotary


class LandmarkSmolLM3ForCausalLM(LandmarkForCausalLM, SmolLM3ForCausalLM):
    """A SmolLM3 language model that reads texts far longer than it was trained on."""

    config_class, model_class = LandmarkSmolLM3Config, LandmarkSmolLM3Model
    _no_split_modules = ["LandmarkSmolLM3DecoderLayer"]
