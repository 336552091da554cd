"""The paper's own weight difference: in fp32, the tuned weights minus a LLaMA's, with the tuned weights' sum.

It cannot be undone exactly (a sum of two rounded numbers is rounded again), and the sum of all weights says little: it
misses what cancels out. `weight_difference.py` is what this library makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.checkpoints.files import Checkpoint, check_base_shape
from landmark_llama.configuration import LandmarkLlamaConfig

CHECKSUM = "checksum_psum.txt"
FIRST_RELEASE = 49798.7656  # the sum of the first weights that the paper released, which came without a file of it
TOLERANCE = 0.01  # the released code's own


@dataclass(frozen=True)
class ReleasedDifference:
    """A difference and the base that it is to be added to; their names and shapes fit each other."""

    difference: Checkpoint
    base: Checkpoint
    names: tuple[str, ...]

    @classmethod
    def open(cls, difference: Checkpoint, base: Checkpoint, shapes: Mapping[str, Tensor]) -> ReleasedDifference:
        """`shapes`: tensors without memory, of the names and shapes of the recovered weights.

        Raises:
            ValueError: the base's weights are not of these names and shapes, its vocabulary's rows aside.
        """
        for name, tensor in shapes.items():
            check_base_shape(name, tensor, base, base.shapes.get(name))
        return cls(difference, base, tuple(shapes))

    def recovered(self, name: str) -> Tensor:
        """A weight of the tuned model, in fp32; rows of tokens that were added differ from the mean of the base's."""
        base, difference = self.base.read(name).float(), self.difference.read(name).float()
        if added := len(difference) - len(base):
            base = torch.cat([base, base.mean(0, keepdim=True).expand(added, -1)])
        return difference.add_(base)

    def check_sum(self, config: LandmarkLlamaConfig) -> str:
        """Compares the sum of all recovered weights with the one stored beside the difference.

        Returns what was found, in words.

        Raises:
            ValueError: the sums differ.
        """
        total = sum(self.recovered(name).sum(dtype=torch.float64).item() for name in self.names)
        # the released model counts its rotary frequencies, whose difference is 0, among its weights
        layers = sum(name.endswith("inv_freq") for name in self.difference.shapes)
        total += layers * rotary_frequencies(config).sum().item()
        path = self.difference.folder / CHECKSUM
        only = "this is all that can be checked: the format has no checksums, and adding is not exact"
        if not path.is_file():
            first = " as the first released weights do" if abs(total - FIRST_RELEASE) <= TOLERANCE else ""
            return f"warning: the weights sum to {total:.4f}{first}; there is no {CHECKSUM} to compare with, and {only}"
        try:
            expected = float(path.read_text())
        except ValueError as error:
            raise OSError(f"{path}: damaged, it holds no number") from error
        if not abs(total - expected) <= TOLERANCE:
            raise ValueError(
                f"{self.base.folder}: not the base that the difference was made from, or a file of weights is damaged: "
                f"the recovered weights sum to {total:.4f}, {CHECKSUM} says {expected:.4f}"
            )
        return f"warning: the weights sum to {total:.4f} as {CHECKSUM} says; {only}"


def rotary_frequencies(config: LandmarkLlamaConfig) -> Tensor:
    """What the released code rotates by: base 10,000, shape (head_dim // 2,)."""
    return 10_000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
