"""Whether Triton is there, which PyTorch brings on Linux with CUDA and not everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch


@torch.compiler.assume_constant_result
def triton_is_installed() -> bool:
    """Whether the GPU kernels can be used; warns once where they cannot."""
    return _find_triton()


@functools.cache
def _find_triton() -> bool:
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        warnings.warn(
            "triton is not installed: landmark attention runs in PyTorch on this GPU, several times slower; "
            "pip install triton",
            RuntimeWarning,
            stacklevel=4,
        )
    return installed
