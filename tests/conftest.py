"""Shared by all tests: one thread per process, fixed seeds, the folder of real files, poisoned uninitialised memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from landmark_llama.reading.aligned import AlignedStep

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; this must be set before transformers imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tiny tensors gain nothing from more threads, and several workers run at once

LANDMARK_DATA = Path(os.environ.get("LANDMARK_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def landmark_data() -> Path:
    """The folder of real files: the environment variable LANDMARK_DATA, by default `../shared/data`."""
    if not LANDMARK_DATA.is_dir():
        pytest.skip(f"no real files at {LANDMARK_DATA}: set LANDMARK_DATA")
    return LANDMARK_DATA.resolve()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors (`torch.empty` and the like) with NaN, so that reading before writing shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def general_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoding step is a `DecodingStep`: the aligned one, for blocks on the device alone, rounds otherwise."""
    monkeypatch.setattr(AlignedStep, "of", classmethod(lambda cls, *given: None))
