"""Which GPU kernels can run here: whether Triton is installed, and which queries the kernels take."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


@torch.compiler.assume_constant_result
def triton_is_installed() -> bool:
    """Whether Triton is installed: PyTorch brings it on Linux with CUDA, not everywhere. Warns once where it is not."""
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


def kernels_run_on(device: torch.device) -> bool:
    """Whether the kernels can run on `device`, as far as that does not depend on what they compute."""
    return device.type == "cuda" and triton_is_installed()


def kernels_take_rows(query: Tensor) -> bool:
    """Whether the training kernels take `query` (..., head_dim); where not, PyTorch does."""
    return kernels_run_on(query.device) and not unsupported(query)


def unsupported(query: Tensor) -> str | None:
    """Why no kernel takes `query` (..., head_dim), or None. Needs Triton."""
    if not query.is_cuda and not _interpreted():
        return f"query is on {query.device}: the Triton kernels run on CUDA devices"
    return unsupported_rows(query.dtype, query.shape[-1])


def unsupported_rows(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel takes rows of `head_dim` elements of `dtype`, or None."""
    if dtype not in DTYPES:
        return f"query is {dtype}: the Triton kernels support float16, bfloat16 and float32"
    if head_dim > MAX_HEAD_DIM:
        return f"query has head_dim {head_dim}: the Triton kernels support at most {MAX_HEAD_DIM}"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    import triton

    return triton.knobs.runtime.interpret
