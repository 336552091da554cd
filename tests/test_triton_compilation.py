"""Kernels compiled for GPUs that are not there: within the registers and the shared memory of the chips."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
from triton_compilation import MEMORY

SCRIPT = Path(__file__).with_name("triton_compilation.py")

# Bytes of memory that a thread may use for registers it lacks, by kernel and capability; of any other kernel none. In
# the training kernels they are loop invariants, read outside the innermost loops but for a few.
SPILLS = {
    "forward_kernel": {80: 128},
    "query_gradient_kernel": {80: 32},
    "key_gradient_kernel": {80: 128, 90: 16},
    "choose_kernel": {80: 16},
    "choose_shared_kernel": {80: 16},
    "attend_kernel": {80: 64, 90: 112},
}
WIDE_HEADS = {"query_gradient_kernel": {90: 64}, "key_gradient_kernel": {80: 640}}  # of 256
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    # by another assembler, ptxas 13.4, and with less shared memory
    SPILLS["forward_kernel"][90], SPILLS["key_gradient_kernel"][90] = 16, 160
KERNELS = {"training": 3, "inference": 7}  # how many there are
LOADS_AHEAD = ("forward_kernel", "query_gradient_kernel", "attend_kernel", "normalise_kernel", "choose_shared_kernel")


def compiled(family: str, capability: int, *shapes: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), family, str(capability), *shapes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("training", "7b"),
        ("training", "narrow"),
        ("training", "published"),
        ("training", "wide"),
        ("training_landmarks", "7b"),
        ("training_exact", "7b"),
        ("inference", "7b"),
        ("inference_landmarks", "7b"),
        ("inference_exact", "7b"),
    ],
)
def test_kernels_fit_the_chips(family: str, shape: str, capability: int) -> None:
    rows = compiled(family, capability, shape)
    assert len({row["kernel"] for row in rows}) == KERNELS[family.partition("_")[0]]
    limits = SPILLS | (WIDE_HEADS if shape == "wide" else {})
    for row in rows:
        assert row["shared"] <= MEMORY[capability], row
        assert row["spills"] <= limits.get(row["kernel"], {}).get(capability, 0), row
    if shape == "7b":  # each has a loop in which loads overlap the work
        assert {row["kernel"] for row in rows if max(row["waits"], default=0)} == {
            row["kernel"] for row in rows if row["kernel"] in LOADS_AHEAD
        }
