"""Training landmarks alone: each layer's calibration learns what blocks weigh; every other weight stays as it is.

With `block_weight="exact"` landmarks only choose which blocks are read, and what they should choose is known without
any label (`docs/exact_weights.md`). So the model goes forward only: no gradient passes through it, and a step takes
about a third of the time of ordinary training and little memory beside the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.arguments import UserError
from finetune.trainer import LandmarkTrainer
from landmark_llama.attention.teaching import landmark_losses
from landmark_llama.calibration import LandmarkCalibration


def freeze_all_but_landmarks(model: PreTrainedModel) -> None:
    """Leaves the calibrations of `model` alone to be trained.

    Raises:
        UserError: it has none, or its landmarks do not choose alone.
    """
    config = model.config
    if config.block_weight != "exact":
        raise UserError(
            f"--landmarks_only true: the model has block_weight={config.block_weight!r}, whose landmarks learn from "
            "its loss: add --block_weight exact"
        )
    if not config.landmark_query_rank:
        raise UserError("--landmarks_only true: the model has nothing to train: add --landmark_query_rank 32")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LandmarkCalibration):
            module.requires_grad_(True)


class LandmarksOnlyTrainer(LandmarkTrainer):
    """Its loss, in training and evaluation, is the mean divergence of the layers' choices, in nats."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.model_accepts_loss_kwargs = False  # a mean over rows, whatever their tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **unused: Any
    ) -> Tensor | tuple[Tensor, Any]:
        with landmark_losses() as losses:
            outputs = model(input_ids=inputs["input_ids"], use_cache=False, logits_to_keep=1)
        loss = torch.stack(losses).mean()
        return (loss, outputs) if return_outputs else loss
