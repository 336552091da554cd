"""Whether Triton is there, which PyTorch brings on Linux with CUDA and not everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import warnings


@functools.cache
def triton_is_installed() -> bool:
    """Whether the GPU kernels can be used; warns once where they cannot."""
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        warnings.warn(
            "triton is not installed: landmark attention runs in PyTorch on this GPU, several times slower; "
            "pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
    return installed
