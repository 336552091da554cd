"""The calibration of the queries that score landmarks: a small module of each attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from landmark_llama.configuration import LandmarkConfig

CALIBRATION = "landmark_calibration"  # of an attention layer


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

    @classmethod
    def of(cls, config: LandmarkConfig) -> LandmarkCalibration:
        return cls(config.hidden_size, config.landmark_query_rank, config.num_attention_heads * config.head_dim)

    def reset_parameters(self) -> None:
        init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., query_size), in the dtype of the weights, which peft keeps in fp32."""
        return nn.functional.linear(nn.functional.linear(hidden_states.to(self.down.dtype), self.down), self.up)


class CalibratedAttention:
    """Goes in front of a dense attention, which gains, with `landmark_query_rank`, the calibration of its queries."""

    def __init__(self, config: LandmarkConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.landmark_calibration: LandmarkCalibration | None = None
        if config.landmark_query_rank:
            self.landmark_calibration = LandmarkCalibration.of(config)


def add_calibration(model: PreTrainedModel, rank: int) -> None:
    """Gives each layer of a loaded landmark model a new calibration, which changes nothing until it is trained.

    Raises:
        ValueError: `rank` is negative, or the model has a calibration already, of another rank.
    """
    config = model.config
    if config.landmark_query_rank == rank:
        return
    if config.landmark_query_rank:
        raise ValueError(f"landmark_query_rank={rank}: the model's own is {config.landmark_query_rank}, which stays")
    config.landmark_query_rank = rank
    config.check()
    for layer in model.model.layers:
        # in the place and dtype of a weight that is never quantised
        layer.self_attn.landmark_calibration = LandmarkCalibration.of(config).to(layer.input_layernorm.weight)
