"""Runs a benchmark as on a GPU, without one: Triton's interpreter computes the kernels, on tensors of the CPU.

    python benchmarks/rehearse.py benchmarks/kernels.py --dtype float16 --lengths 32 ...     # or generation.py

For `gpu.sh --rehearse`: what would fail on the GPU, and does not need one to fail, fails here. The figures mean
nothing. All goes the way it goes on a GPU, with these exceptions: the device is the CPU, measurements run in this
process, cuDNN's attention is PyTorch's, and a CUDA graph is replayed by doing again what it recorded.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from torch import Tensor

from benchmarks import generation, kernels
from benchmarks.measure import MeasurementFailed, exit_with
from landmark_llama.attention import availability, whole_rows
from landmark_llama.reading import decoding_graphs

BENCHMARKS = {"kernels": kernels, "generation": generation}


def main(argv: list[str]) -> int:
    """Rehearses the benchmark whose file is the first argument. Returns its exit code."""
    script, *flags = argv
    availability.kernels_run_on = lambda device: True
    whole_rows._on_gpu = lambda query: True
    decoding_graphs.record_cuda_graph = _repeat
    generation.isolated = _in_this_process
    kernels.sdpa_kernel = lambda backend: contextlib.nullcontext()
    return BENCHMARKS[Path(script).stem].main([*flags, "--device", "cpu"])


def _repeat(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Stands for `decoding_graphs.record_cuda_graph`."""
    output = step()
    return lambda: output.copy_(step()), output


def _in_this_process(function: Callable[..., Any], *args: Any, threads: int) -> Any:
    """Stands for `measure.isolated`, whose fresh processes would take no kernels."""
    try:
        return function(*args)
    except Exception as error:
        raise MeasurementFailed(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
