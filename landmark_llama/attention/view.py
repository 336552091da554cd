"""What a view is: how the columns of one call attend, in every layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable


class View(Protocol):
    """How the columns of a call attend."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer_idx: int,
        rotary: RotaryTable,
        scale: float,
        landmark_query: Tensor | None = None,
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: (batch, columns, heads, head_dim), not rotated.
            key, value: (batch, columns, kv_heads, head_dim), not rotated.
            landmark_query: the shape of `query`, not rotated: what scores landmarks in its place. None: `query` does.
            landmark_prior: (batch, columns, kv_heads, head_dim), not rotated, where landmark keys are pooled: that of a
                landmark's column is the query that its block is pooled around.

        Returns:
            (batch, columns, heads, head_dim).
        """
