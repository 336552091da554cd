"""What the models tell transformers about themselves, and what a saved one gets beside its weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from landmark_llama.calibration import LandmarkCalibration
from landmark_llama.hub import InstalledClass
from landmark_llama.model_card import model_card, write_card


class LandmarkPreTrained(InstalledClass):
    """What both models tell transformers: they attend by themselves, and none of its attention backends can do it."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LandmarkCalibration):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False


class SavedWithCard:
    """Adds a model card to what `save_pretrained` writes."""

    def save_pretrained(self, save_directory: str | PathLike[str], is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers', with a model card, README.md, where the folder has none that somebody wrote."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        whole = (Path(save_directory) / "config.json").is_file()  # or an adapter alone was saved
        if is_main_process and whole:
            write_card(save_directory, model_card(self.config))
