"""Triton kernels without a GPU: the kernel tests of a file, run once more through Triton's interpreter.

Whether kernels are compiled or interpreted is decided when triton is imported. So the tests that run kernels are
skipped in a process without a GPU, and a test of the same file runs them, interpreted, in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: this test runs in the interpreter instead"
)
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def run_in_interpreter(file: str, expression: str) -> None:
    """Runs the tests of a file that match pytest's `-k` expression, interpreted; fails if one fails or none runs."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", expression],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
