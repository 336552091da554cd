"""LandmarkPeftModel: a peft model that trains, saves and checks the landmark's embedding row. Needs peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from landmark_llama.adapters.folder import (
    ADAPTER_WEIGHTS,
    EMBEDDING,
    LANDMARK_ROW,
    TOKENIZER_RECORD,
    Adapter,
    with_calibration,
)
from landmark_llama.calibration import LandmarkCalibration
from landmark_llama.language_model import LandmarkForCausalLM

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


class LandmarkPeftModel(PeftModelForCausalLM):
    """peft's model, which also trains the landmark's row and calibration, saves what it was made with, and checks it.

    Where input and output embedding are tied, the landmark's output row follows; an untied one stays the mean of the
    others that it was made as: the landmark is never predicted.

    Args:
        model: a landmark LLaMA; peft changes it in place.
        peft_config: which LoRA. `trainable_token_indices` is set here; the calibration joins `modules_to_save`.
        tokenizer_fingerprint: of the tokenizer with its landmark (`folder.tokenizer_fingerprint`).
    """

    def __init__(
        self, model: LandmarkForCausalLM, peft_config: LoraConfig, *, tokenizer_fingerprint: str, **kwargs: Any
    ) -> None:
        peft_config.trainable_token_indices = {EMBEDDING: [model.config.landmark_token_id]}
        peft_config.modules_to_save = with_calibration(model.config, peft_config.modules_to_save)
        super().__init__(model, peft_config, **kwargs)
        for name, module in self.named_modules():
            if isinstance(module, LandmarkCalibration) and "modules_to_save" in name.split("."):
                module.float()  # as peft does with the other weights that it trains
        self.tokenizer_fingerprint = tokenizer_fingerprint

    @classmethod
    def of(cls, model: LandmarkForCausalLM, adapter: Adapter, is_trainable: bool = False) -> LandmarkPeftModel:
        """`model` with `adapter` loaded; raises ValueError if its landmark row is the one that `model` starts with."""
        _refuse_untrained_row(model, adapter)
        config = LoraConfig.from_pretrained(adapter.folder)
        config.inference_mode = not is_trainable
        peft_model = cls(model, config, tokenizer_fingerprint=adapter.tokenizer_fingerprint)
        peft_model.load_adapter(adapter.folder, "default", is_trainable=is_trainable)
        return peft_model

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, by the names that weights are saved under: peft finds by them what to save.

        What wraps a layer, to recompute its activations or compiled, adds a part of its own to the layer's name.
        """
        for name, module in super().named_modules(*args, **kwargs):
            yield _without_wrappers(name), module

    def save_pretrained(
        self, save_directory: str | PathLike[str], *, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Saves what was trained, the landmark configuration and the tokenizer's fingerprint; not the tokenizer."""
        # by itself peft would save both embeddings whole, seeing that the vocabulary has grown
        kwargs["save_embedding_layers"] = False
        weights = kwargs.get("state_dict") or self.state_dict()
        if any(name != _without_wrappers(name) for name in weights):
            kwargs["state_dict"] = {_without_wrappers(name): weight for name, weight in weights.items()}
        super().save_pretrained(str(save_directory), is_main_process=is_main_process, **kwargs)
        if is_main_process:
            config = copy.deepcopy(self.config)
            if hasattr(config, "quantization_config"):  # how the base was held in training, no part of what was learnt
                del config.quantization_config
            config.save_pretrained(save_directory)
            record = {"tokenizer_sha256": self.tokenizer_fingerprint, "landmark_token_id": config.landmark_token_id}
            (Path(save_directory) / TOKENIZER_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def load_adapter(self, model_id: str | PathLike[str], adapter_name: str, **kwargs: Any) -> Any:
        """As peft's, which leaves alone what a file lacks; here every weight has to be there, and be known.

        Raises:
            OSError: a file is missing or damaged.
            ValueError: the adapter belongs to another model, tokenizer or landmark, or is not complete.
        """
        adapter = Adapter.read(model_id)
        adapter.check_base(self.config, "the model")
        adapter.check_fingerprint(self.tokenizer_fingerprint, "of the model")
        if adapter_name in self.peft_config:
            wanted = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False).keys()
            for problem, names in (("lacks", wanted - adapter.names), ("holds foreign", adapter.names - wanted)):
                if names:
                    raise ValueError(f"{model_id}: {problem} weights, {len(names)} of them, the first {min(names)}")
        return super().load_adapter(str(adapter.folder), adapter_name, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes none: a README in the folder is its owner's."""


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _refuse_untrained_row(model: LandmarkForCausalLM, adapter: Adapter) -> None:
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as weights:
        row = weights.get_tensor(LANDMARK_ROW)[0]
    start = model.get_input_embeddings().weight[model.config.landmark_token_id]
    if torch.equal(row.to(start), start):
        raise ValueError(
            f"{adapter.folder}: the landmark's embedding row is still the one that training starts from, and an "
            "untrained landmark finds nothing; was it trained at all?"
        )
