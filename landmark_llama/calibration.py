"""The calibration of the queries that score landmarks: a small module of each attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init


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
