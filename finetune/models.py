"""Loads the tokenizer and the model that a run starts from: a checkpoint (dense or not) or a configuration."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from finetune.adapters import four_bit
from finetune.arguments import DEFAULT_BLOCK_SIZE, DataArguments, ModelArguments, UserError
from landmark_llama.calibration import add_calibration
from landmark_llama.checkpoints.conversion import checked_load
from landmark_llama.configuration import LandmarkConfig
from landmark_llama.families import from_dense, landmark_class
from landmark_llama.language_model import LandmarkForCausalLM

LANDMARK_SETTINGS = (
    "num_retrieved_blocks",
    "num_local_blocks",
    "local_attention",
    "retrieval_granularity",
    "train_retrieved_blocks",
    "landmark_key",
    "landmark_query_rank",
    "block_weight",
    "num_sink_blocks",
    "num_question_blocks",
    "num_reranked_blocks",
    "predict_from_landmark",
)
TOKENIZER_DOCUMENTS = 8000  # as many documents of the embedded corpus are enough for its tokenizer


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, embedded: tuple[Path, Path] | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, of `tokenizer_name`, or one trained on the embedded corpus.

    Raises:
        UserError: there is none, or it has no end-of-sequence token.
    """
    if model_args.tokenizer_name == "embedded":
        from finetune.demo.tokenizer import to_fast_tokenizer, train_sentencepiece

        with embedded[0].open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(TOKENIZER_DOCUMENTS), strict=False)]
        positions = _read_config(model_args).max_position_embeddings
        return to_fast_tokenizer(train_sentencepiece(texts, data_args.demo.vocabulary_size), positions)
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # loaders raise many kinds, none of which is worth a traceback
        raise UserError(f"{name}: no tokenizer could be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no end-of-sequence token, which documents are joined with")
    return tokenizer


def load_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """The model to train: dense, or with landmarks (made of a dense one where needed).

    Adds the landmark token to `tokenizer` where the model has landmarks. `load_in_4bit`: hold its linear layers in 4
    bits, for an adapter to be trained on.

    Raises:
        UserError: there is no such checkpoint, it is no decoder that can have landmarks, or its settings cannot work.
    """
    dtype = getattr(torch, model_args.dtype)
    config = _read_config(model_args)
    known = config.vocab_size - getattr(config, "num_padded_tokens", 0)
    if model_args.model_name_or_path and len(tokenizer) > known:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} tokens, more than the {known} "
            f"of {model_args.model_name_or_path}: give the checkpoint's own tokenizer"
        )
    settings = {name: getattr(model_args, name) for name in LANDMARK_SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings["train_context_length"] = data_args.context_length
    if model_args.attention == "landmark":
        tokenizer.model_max_length = VERY_LARGE_INTEGER  # no text is too long; a LLaMA's tokenizer would warn of it
    weights = {"dtype": dtype}
    if load_in_4bit:
        weights["quantization_config"] = four_bit(dtype)
    if isinstance(config, LandmarkConfig):
        model = _load_landmark(model_args, config, settings, weights)
    else:
        model = _load_dense(model_args, config, tokenizer, settings, weights)
    if model_args.attention == "landmark":
        model.config.kernels = model_args.kernels
    if model_args.pad_vocabulary_to_multiple_of:
        pad_vocabulary(model, model_args.pad_vocabulary_to_multiple_of)
    return model


@torch.no_grad()
def pad_vocabulary(model: LandmarkForCausalLM, multiple: int) -> None:
    """Rows of zeros behind both embeddings, up to a multiple of so many, which matrix products like."""
    config = model.config
    tokens = config.vocab_size - config.num_padded_tokens
    rows = -(-tokens // multiple) * multiple
    if rows != config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    config.num_padded_tokens = rows - tokens
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight[tokens:] = 0


def _load_dense(
    model_args: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict,
    weights: dict,
) -> PreTrainedModel:
    """A dense model, from a checkpoint or with random weights, and a landmark one made of it unless it stays dense."""
    name = model_args.model_name_or_path
    if model_args.config_name:
        config.vocab_size = len(tokenizer)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, token, getattr(tokenizer, token))
        model, weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(weights["dtype"]), {}
    elif model_args.attention == "dense":
        # a landmark model checks that its weights are complete; a dense one has to be checked, too
        load = partial(checked_load, AutoModelForCausalLM.from_pretrained)
        model = _load(load, name, config=config, **weights)
    if model_args.attention == "dense":
        return model
    try:
        block_size = model_args.block_size or DEFAULT_BLOCK_SIZE
        source = model if model_args.config_name else name
        return from_dense(source, tokenizer, block_size=block_size, **settings, **weights)
    except ValueError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # as above
        raise _no_checkpoint(name, error) from error


def _load_landmark(
    model_args: ModelArguments, config: LandmarkConfig, settings: dict, weights: dict
) -> LandmarkForCausalLM:
    """A landmark checkpoint, to be trained on; its block size stays what it is."""
    name = model_args.model_name_or_path
    if model_args.attention == "dense":
        raise UserError(f"{name}: has landmarks and cannot be trained with --attention dense")
    if model_args.block_size not in (None, config.block_size):
        raise UserError(f"--block_size {model_args.block_size}: {name} has blocks of {config.block_size}")
    rank = settings.pop("landmark_query_rank", config.landmark_query_rank)
    for key, value in settings.items():
        setattr(config, key, value)
    try:
        config.check()
        model = _load(landmark_class(config).from_pretrained, name, config=config, **weights)
        add_calibration(model, rank)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def _read_config(model_args: ModelArguments) -> PreTrainedConfig:
    flag = "--config_name" if model_args.config_name else "--model_name_or_path"
    name = model_args.config_name or model_args.model_name_or_path
    try:
        if name.endswith(".json"):
            config = AutoConfig.for_model(**{"model_type": "llama", **json.loads(Path(name).read_text("utf-8"))})
        else:
            config = AutoConfig.from_pretrained(name)
    except Exception as error:  # as above
        raise UserError(f"{flag} {name}: no configuration could be loaded: {_first_line(error)}") from error
    try:
        landmark_class(config, f"{flag} {name}")
    except ValueError as error:
        raise UserError(str(error)) from error
    if model_args.config_name and isinstance(config, LandmarkConfig):
        raise UserError(f"{flag} {name}: give the dense model's own configuration; landmark settings are flags")
    return config


def _load(load: Callable[..., PreTrainedModel], name: str, **settings) -> PreTrainedModel:
    try:
        return load(name, **settings)
    except Exception as error:  # as above
        raise _no_checkpoint(name, error) from error


def _no_checkpoint(name: str, error: Exception) -> UserError:
    return UserError(f"--model_name_or_path {name}: no checkpoint could be loaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
