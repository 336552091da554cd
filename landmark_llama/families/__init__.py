"""The families of decoders that have landmark models, and which one a checkpoint belongs to (`docs/families.md`)."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel

from landmark_llama.checkpoints.conversion import read_config
from landmark_llama.configuration import LandmarkConfig
from landmark_llama.families.mistral import LandmarkMistralConfig, LandmarkMistralForCausalLM, LandmarkMistralModel
from landmark_llama.families.qwen2 import LandmarkQwen2Config, LandmarkQwen2ForCausalLM, LandmarkQwen2Model
from landmark_llama.families.qwen3 import LandmarkQwen3Config, LandmarkQwen3ForCausalLM, LandmarkQwen3Model
from landmark_llama.families.smollm3 import LandmarkSmolLM3Config, LandmarkSmolLM3ForCausalLM, LandmarkSmolLM3Model
from landmark_llama.modeling import LandmarkLlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from landmark_llama.language_model import LandmarkForCausalLM

__all__ = [
    "FAMILIES",
    "LandmarkMistralConfig",
    "LandmarkMistralForCausalLM",
    "LandmarkMistralModel",
    "LandmarkQwen2Config",
    "LandmarkQwen2ForCausalLM",
    "LandmarkQwen2Model",
    "LandmarkQwen3Config",
    "LandmarkQwen3ForCausalLM",
    "LandmarkQwen3Model",
    "LandmarkSmolLM3Config",
    "LandmarkSmolLM3ForCausalLM",
    "LandmarkSmolLM3Model",
    "from_dense",
    "landmark_class",
]

CLASSES = (
    LandmarkLlamaForCausalLM,
    LandmarkMistralForCausalLM,
    LandmarkQwen2ForCausalLM,
    LandmarkQwen3ForCausalLM,
    LandmarkSmolLM3ForCausalLM,
)
FAMILIES: dict[str, type[LandmarkForCausalLM]] = {x.config_class.family.dense_type: x for x in CLASSES}


def landmark_class(config: PretrainedConfig, name: str | PathLike[str] = "config") -> type[LandmarkForCausalLM]:
    """The class of the landmark models of a family.

    Args:
        config: of a dense model or of one with landmarks.
        name: of the checkpoint, for the message.

    Raises:
        ValueError: there is no such family.
    """
    dense_type = config.family.dense_type if isinstance(config, LandmarkConfig) else config.model_type
    if dense_type not in FAMILIES:
        raise ValueError(
            f"{name}: model_type {dense_type!r} is not a LLaMA, nor another decoder that can have landmarks: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[dense_type]


def from_dense(
    source: str | PathLike[str] | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *args: Any, **settings: Any
) -> LandmarkForCausalLM:
    """Makes a landmark model of a dense one, whatever its family: `from_dense` of that family's class.

    Args:
        source: folder or hub id of a dense checkpoint, or a loaded dense model (left alone).
        tokenizer: the checkpoint's tokenizer, which gains the landmark token.
        args, settings: as for `LandmarkLlamaForCausalLM.from_dense`.

    Raises:
        ValueError: no family has the checkpoint, or its window cannot hold the settings.
        OSError: the checkpoint is missing, truncated or incomplete.
    """
    loaded = isinstance(source, PreTrainedModel)
    config = source.config if loaded else read_config(source, settings)
    model_class = landmark_class(config, type(source).__name__ if loaded else source)
    return model_class.from_dense(source, tokenizer, *args, **settings)
