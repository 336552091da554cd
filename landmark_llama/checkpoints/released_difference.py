"""Recovers a model from the weight difference that the paper published: the fp32 tuned weights minus LLaMA's.

Adding the base back does not give the tuned weights exactly: the difference was rounded, and the sum is rounded again.
The only checksum is the sum of all weights, which misses errors that cancel. This library's own format is exact and
checks every tensor: see `weight_difference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.checkpoints.files import Checkpoint, check_base_shape
from landmark_llama.configuration import LandmarkLlamaConfig

CHECKSUM = "checksum_psum.txt"
FIRST_RELEASE = 49798.7656  # sum of the weights that the paper released first, without a checksum file
TOLERANCE = 0.01  # the released code's tolerance


@dataclass(frozen=True)
class ReleasedDifference:
    """A difference and its base. Their tensor names and shapes have been checked."""

    difference: Checkpoint
    base: Checkpoint
    names: tuple[str, ...]

    @classmethod
    def open(cls, difference: Checkpoint, base: Checkpoint, meta: Mapping[str, Tensor]) -> ReleasedDifference:
        """Checks that the base fits. `meta`: a meta tensor for each weight to recover.

        Raises:
            ValueError: the base lacks one of these weights, or it has another shape. (It may have fewer token rows.)
        """
        for name, tensor in meta.items():
            check_base_shape(name, tensor, base, base.meta.get(name))
        return cls(difference, base, tuple(meta))

    def recovered(self, name: str) -> Tensor:
        """A weight of the tuned model, in fp32."""
        base, difference = self.base.read(name).float(), self.difference.read(name).float()
        # the released code subtracted the mean of the base's rows from the rows of added tokens
        if added := len(difference) - len(base):
            base = torch.cat([base, base.mean(0, keepdim=True).expand(added, -1)])
        return difference.add_(base)

    def check_sum(self, config: LandmarkLlamaConfig) -> str:
        """Compares the sum of all recovered weights with the sum stored beside the difference.

        Returns:
            The finding, as a sentence for the user.

        Raises:
            OSError: the stored sum is damaged.
            ValueError: the sums differ.
        """
        total = sum(self.recovered(name).sum(dtype=torch.float64).item() for name in self.names)
        # the stored sum includes the model's rotary frequencies; the difference holds zeros in their place
        layers = sum(name.endswith("inv_freq") for name in self.difference.meta)
        total += layers * rotary_frequencies(config).sum().item()
        path = self.difference.folder / CHECKSUM
        only = "this is all that can be checked: the format has no checksums, and adding is not exact"
        if not path.is_file():
            first = ", like the first released weights" if abs(total - FIRST_RELEASE) <= TOLERANCE else ""
            return f"warning: the weights sum to {total:.4f}{first}; there is no {CHECKSUM} to compare with, and {only}"
        try:
            expected = float(path.read_text())
        except ValueError as error:
            raise OSError(f"{path}: damaged: it holds no number") from error
        if not abs(total - expected) <= TOLERANCE:
            raise ValueError(
                f"{self.base.folder}: not the base that the difference was made from, or a weight file is damaged: "
                f"the recovered weights sum to {total:.4f}, {CHECKSUM} says {expected:.4f}"
            )
        return f"warning: the weights sum to {total:.4f} as {CHECKSUM} says; {only}"


def rotary_frequencies(config: LandmarkLlamaConfig) -> Tensor:
    """The released code's rotary frequencies (head_dim // 2,), for a RoPE base of 10,000."""
    return 10_000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
