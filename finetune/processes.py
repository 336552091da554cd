"""The processes of a run: one for each GPU, and the main one prepares what the others read.

transformers' own `main_process_first` waits in a collective operation, which fails after `--ddp_timeout`, 1,800
seconds. Downloading a model and tokenising a large corpus take longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed

if TYPE_CHECKING:
    from transformers import TrainingArguments

from finetune.arguments import UserError

LONGEST = timedelta(days=30)  # gloo wants some limit


def refuse_data_parallel(run: TrainingArguments) -> None:
    """Raises `UserError` if one process sees several GPUs: the Trainer would split each batch over them in threads."""
    if run.n_gpu > 1:
        raise UserError(
            f"one process sees {run.n_gpu} GPUs: start one for each with accelerate launch --config_file "
            f"finetune/configs/accelerate/ddp.yaml --num_processes {run.n_gpu}, or use one: CUDA_VISIBLE_DEVICES=0"
        )


@contextmanager
def main_process_first(run: TrainingArguments) -> Iterator[None]:
    """Each machine's first process runs the body before the others do, which then find its files in the caches.

    Where it fails, the others stop waiting and meet the same error. All processes must enter.
    """
    if run.world_size == 1 or not torch.distributed.is_initialized():
        yield
        return
    # a group of its own: the limit of the default one holds for training
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST)
    first = run.local_process_index == 0
    try:
        if not first:
            torch.distributed.barrier(group=group)
        yield
    finally:
        if first:
            torch.distributed.barrier(group=group)
        torch.distributed.destroy_process_group(group)
