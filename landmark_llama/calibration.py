"""The calibration of landmarks: a small module of each attention layer, which says how it scores blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from landmark_llama.configuration import LandmarkConfig

CALIBRATION = "landmark_calibration"  # of an attention layer


class LandmarkCalibration(nn.Module):
    """What is added to a query where it scores landmarks, and to the prior that a landmark key is pooled around.

    Each is a linear map of the layer's input, of low rank: `up(down(hidden_states))`. That of the prior is only there
    where landmark keys are pooled. `up` starts as zero, so that an untrained calibration changes nothing.
    """

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__()
        for name, shape in calibration_shapes(config).items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, weight in self.named_parameters():
            if name.endswith("up"):
                init.zeros_(weight)
            else:
                init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., hidden_size) to (..., heads * head_dim) for the queries and (..., kv_heads * head_dim) for the priors.

        In the dtype of the weights, which peft keeps in fp32. The second is None where landmark keys are not pooled.
        """
        hidden_states = hidden_states.to(self.down.dtype)
        to_query = _low_rank(hidden_states, self.down, self.up)
        if not hasattr(self, "prior_up"):
            return to_query, None
        return to_query, _low_rank(hidden_states, self.prior_down, self.prior_up)


def _low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, down), up)


def calibration_shapes(config: LandmarkConfig) -> dict[str, tuple[int, int]]:
    """The shape of each weight of a layer's calibration, by its name; empty without one (`landmark_query_rank=0`)."""
    rank = config.landmark_query_rank
    if not rank:
        return {}
    shapes = {"down": (rank, config.hidden_size), "up": (config.num_attention_heads * config.head_dim, rank)}
    if config.landmark_key == "pooled":
        size = config.num_key_value_heads * config.head_dim
        shapes |= {"prior_down": (rank, config.hidden_size), "prior_up": (size, rank)}
    return shapes


class CalibratedAttention:
    """Goes in front of a dense attention, which gains, with `landmark_query_rank`, the calibration of its landmarks."""

    def __init__(self, config: LandmarkConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.landmark_calibration: LandmarkCalibration | None = None
        if config.landmark_query_rank:
            self.landmark_calibration = LandmarkCalibration(config)


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
        layer.self_attn.landmark_calibration = LandmarkCalibration(config).to(layer.input_layernorm.weight)
