"""The calibration of the queries that score landmarks: a small module of each attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention

from landmark_llama.configuration import LandmarkLlamaConfig


class LandmarkCalibration(nn.Module):
    """What is added to a query where it scores landmarks: `up(down(hidden_states))`, of low rank.

    `up` starts as zero, so that an untrained calibration changes nothing.

    Args:
        hidden_size: of the layer's input.
        rank: of the map.
        query_size: heads * head_dim.
    """

    def __init__(self, hidden_size: int, rank: int, query_size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.up = nn.Parameter(torch.empty(query_size, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., query_size)."""
        return nn.functional.linear(nn.functional.linear(hidden_states, self.down), self.up)


class CalibratedAttention(LlamaAttention):
    """LLaMA's projections and, with `landmark_query_rank`, the calibration of its queries."""

    def __init__(self, config: LandmarkLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.landmark_calibration: LandmarkCalibration | None = None
        if config.landmark_query_rank:
            self.calibrate(config.landmark_query_rank)

    def calibrate(self, rank: int) -> None:
        """Gives the layer a new calibration, which changes nothing until it is trained."""
        sizes = self.config.hidden_size, rank, self.config.num_attention_heads * self.head_dim
        self.landmark_calibration = LandmarkCalibration(*sizes).to(self.q_proj.weight.device, self.q_proj.weight.dtype)


def add_calibration(model: LlamaForCausalLM, rank: int) -> None:
    """Gives each layer of a landmark LLaMA a new calibration, as `landmark_query_rank=rank` does in a new model."""
    model.config.landmark_query_rank = rank
    model.config.check()
    for layer in model.model.layers:
        layer.self_attn.calibrate(rank)
