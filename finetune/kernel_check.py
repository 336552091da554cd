"""A run on a GPU begins with a check of its attention kernels: one row, in every layer, against PyTorch."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.arguments import UserError
from landmark_llama.kernel_check import KernelsDifferError, check_kernels


class KernelCheck(TrainerCallback):
    """Compares them when training begins, on the first held-out row. Does nothing where PyTorch computes all.

    Raises:
        UserError: the kernels compute something else.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        row = torch.as_tensor(self.trainer.eval_dataset[0]["input_ids"], device=args.device)
        try:
            layers = check_kernels(self.trainer.model, row.unsqueeze(0))
        except KernelsDifferError as error:
            raise UserError(
                f"the attention kernels compute wrongly on {_device_name(args.device)}: {error}; --kernels false "
                "trains with PyTorch in their place, more slowly"
            ) from error
        if layers and state.is_world_process_zero:
            print(f"the attention kernels were compared with PyTorch in {layers} layers: they agree", flush=True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
