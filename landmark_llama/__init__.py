"""Landmark LLaMA: language models that read texts far longer than they were trained on, by landmark attention.

Importing the package registers its configurations and models with transformers' Auto classes.
"""

from landmark_llama import _versions  # noqa: F401  (first: it refuses versions that the rest cannot be imported with)

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from landmark_llama.adapters import landmark_lora_config, load_adapter
from landmark_llama.attention import landmark_attention
from landmark_llama.configuration import LandmarkLlamaConfig
from landmark_llama.families import (
    CLASSES,
    LandmarkMistralConfig,
    LandmarkMistralForCausalLM,
    LandmarkMistralModel,
    LandmarkQwen2Config,
    LandmarkQwen2ForCausalLM,
    LandmarkQwen2Model,
    LandmarkQwen3Config,
    LandmarkQwen3ForCausalLM,
    LandmarkQwen3Model,
    LandmarkSmolLM3Config,
    LandmarkSmolLM3ForCausalLM,
    LandmarkSmolLM3Model,
    from_dense,
)
from landmark_llama.modeling import LandmarkLlamaForCausalLM, LandmarkLlamaModel
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.tokenization import add_landmark_token, insert_landmarks, strip_landmarks

__version__ = "0.1.0"

__all__ = [
    "LandmarkCache",
    "LandmarkLlamaConfig",
    "LandmarkLlamaForCausalLM",
    "LandmarkLlamaModel",
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
    "add_landmark_token",
    "from_dense",
    "insert_landmarks",
    "landmark_attention",
    "landmark_lora_config",
    "load_adapter",
    "strip_landmarks",
]

for _class in CLASSES:
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModel.register(_class.config_class, _class.model_class, exist_ok=True)
    AutoModelForCausalLM.register(_class.config_class, _class, exist_ok=True)
