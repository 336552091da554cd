"""Loading a landmark model and its tokenizer for a command, and what identifies the tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from landmark_llama.adapters import is_adapter, load_adapter
from landmark_llama.configuration import LandmarkLlamaConfig, RetrievalSettings
from landmark_llama.saved.folder import Manifest


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, settings: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A landmark model, or an adapter on its base, ready to read; and its tokenizer.

    Args:
        name: a folder or a hub id.
        device: by default a GPU if there is one.
        settings: fields of the configuration to set, those of retrieval.

    Raises:
        OSError: there is no such model, or a file of it is missing or damaged.
        ValueError: it is no landmark model, lacks weights, or the settings do not fit it.
    """
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{name}: there is no such folder")
    logging.disable_progress_bar()  # of the weights: it takes the place of the text's
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_adapter(name):
        model = load_adapter(name, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, LandmarkLlamaConfig):
            raise ValueError(
                f"{name}: a {config.model_type!r} model has no landmarks: make one that has with "
                "LandmarkLlamaForCausalLM.from_llama, and train it (finetune/run.py)"
            )
        model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(f"{name}: lacks {len(missing)} weights, the first being {missing[0]}")
    for setting, value in (settings or {}).items():
        setattr(model.config, setting, value)
    model.config.check()
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(rules.encode()).hexdigest()


def settings_of(state: Manifest) -> dict[str, Any]:
    """The fields of a configuration that a memory was read with."""
    if not state.read_with:
        return {}
    read = RetrievalSettings(**state.read_with[0])
    settings = {
        "num_retrieved_blocks": read.num_retrieved_blocks,
        "local_attention": read.local_attention,
        "retrieval_granularity": read.granularity,
        "num_sink_blocks": read.num_sink_blocks,
        "num_question_blocks": read.num_question_blocks,
        "num_reranked_blocks": read.num_reranked_blocks,
        "block_weight": "exact" if read.exact_weights else "landmark",
    }
    return settings if read.chunked else {**settings, "num_local_blocks": read.num_direct_blocks}
