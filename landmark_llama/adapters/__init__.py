"""LoRA adapters with a trained landmark: configuring and loading them. Imports no peft until then."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

from landmark_llama.adapters.folder import EMBEDDING, Adapter, is_adapter, with_calibration
from landmark_llama.tokenization import add_landmark_token

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from landmark_llama.adapters.peft_model import LandmarkPeftModel
    from landmark_llama.configuration import LandmarkConfig

__all__ = ["is_adapter", "landmark_lora_config", "load_adapter"]


def landmark_lora_config(config: LandmarkConfig, **settings: Any) -> LoraConfig:
    """A peft configuration that trains the landmark's embedding row beside LoRA matrices, for `peft.get_peft_model`.

    The calibration of the landmarks' queries, if the model has one, is trained whole.

    Args:
        config: of the model, `model.config`.
        settings: for `peft.LoraConfig`. By default LoRA goes on all linear layers (`target_modules="all-linear"`), and
            the landmark's row is the only one that is trained; rows given in `trainable_token_indices` are trained too.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ImportError("landmark_lora_config needs peft, which is not installed: pip install peft") from error
    rows = settings.pop("trainable_token_indices", None) or []
    rows = dict(rows) if isinstance(rows, dict) else {EMBEDDING: rows}
    rows[EMBEDDING] = sorted({*rows.get(EMBEDDING, []), config.landmark_token_id})
    settings["modules_to_save"] = with_calibration(config, settings.get("modules_to_save"))
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings}, trainable_token_indices=rows
    )


def load_adapter(
    folder: str | PathLike[str],
    base: str | PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    is_trainable: bool = False,
    **from_pretrained: Any,
) -> LandmarkPeftModel:
    """The base model with an adapter on it, ready to generate (or to be trained on).

    Args:
        folder: the adapter, a local folder or a hub id.
        base: what it was trained on, a folder, a hub id or a loaded model, vanilla or with landmarks; by default the
            checkpoint that the adapter names.
        tokenizer: the one that texts will be encoded with, if it is not the adapter's own; it gains the landmark token.
        is_trainable: whether the adapter's weights ask for gradients.
        from_pretrained: for the base: `dtype`, `device_map`, `quantization_config`, ...

    Raises:
        ImportError: peft is not installed.
        OSError: a file is missing or damaged.
        ValueError: the adapter lacks its landmark row, which may also never have been trained, or belongs to another
            base, vocabulary, landmark id or tokenizer.
    """
    try:
        from landmark_llama.adapters.peft_model import LandmarkPeftModel
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("load_adapter needs peft, which is not installed: pip install peft") from error
    adapter = Adapter.read(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(adapter.folder)
    if (landmark_token_id := add_landmark_token(tokenizer)) != adapter.config.landmark_token_id:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: its landmark is token {landmark_token_id}, that of the adapter "
            f"{folder} token {adapter.config.landmark_token_id}; take the tokenizer in the adapter's folder"
        )
    adapter.check_tokenizer(tokenizer)
    model = adapter.make_base(base or adapter.base, tokenizer, **from_pretrained)
    return LandmarkPeftModel.of(model, adapter, is_trainable)
