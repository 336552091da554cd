"""Noise on landmark keys in the first part of a run (`landmark_llama/noise.py`)."""

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from landmark_llama.modeling import LandmarkLlamaModel


class LandmarkNoiseSchedule(TrainerCallback):
    """Noise of `scale` in the first `share` of a run's steps, none after them.

    The last steps teach what noise drowns: keys whose tokens' meaning lies in another block.
    """

    def __init__(self, scale: float, share: float) -> None:
        self.scale, self.share = scale, share

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_
    ) -> None:
        noise = self.scale if state.global_step < self.share * state.max_steps else 0.0
        for module in model.modules():
            if isinstance(module, LandmarkLlamaModel):
                module.landmark_noise = noise
