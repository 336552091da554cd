"""Noise on landmark keys in training, so that landmarks tell their blocks apart by more than a hair.

In a row of a few blocks a landmark need not score much higher than the others: what its block passes on can be made up
for by larger values. Among thousands of blocks it is then not among the best. With noise on the scores only a landmark
that is well ahead is read reliably (as in the noisy top-k gating of mixtures of experts: Shazeer et al., 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LandmarkNoise(NamedTuple):
    """Gaussian noise on the landmark keys of one call.

    scale: expected length of the noise on a key, as a share of the key's own.
    landmark: (batch, columns), boolean: where landmarks stand.
    """

    scale: float
    landmark: Tensor

    def add_to(self, key: Tensor) -> Tensor:
        """Keys (batch, columns, kv_heads, head_dim), each landmark's with noise of its own."""
        spread = key.detach().norm(dim=-1, keepdim=True) * (self.scale * key.shape[-1] ** -0.5)
        return torch.where(self.landmark[..., None, None], torch.addcmul(key, torch.randn_like(key), spread), key)
