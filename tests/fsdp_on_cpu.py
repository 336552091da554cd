"""Runs `finetune/run.py` with FSDP on CPU processes. Accelerate allows FSDP only on GPUs, so these pose as GPUs."""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.arguments import parse_arguments
from finetune.run import finetune

if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    assert arguments[2].device.type == "cpu" and arguments[2].world_size > 1
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    finetune(*arguments)
