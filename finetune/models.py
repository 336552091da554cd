"""Loads the tokenizer and the model that a run starts from: a checkpoint, dense or with landmarks, or a configuration."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.arguments import DataArguments, ModelArguments, UserError

LANDMARK_SETTINGS = (
    "num_retrieved_blocks",
    "num_local_blocks",
    "local_attention",
    "retrieval_granularity",
    "predict_from_landmark",
)


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, embedded: tuple[Path, Path] | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, of `tokenizer_name`, or one trained on the embedded corpus.

    Raises:
        UserError: there is none.
    """
    if model_args.tokenizer_name == "embedded":
        from finetune.tokenizer import to_fast_tokenizer, train_sentencepiece

        with embedded[0].open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(8000), strict=False)]
        return to_fast_tokenizer(train_sentencepiece(texts, data_args.vocabulary_size), data_args.context_length)
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no tokenizer could be loaded: {_first_line(error)}") from error


def load_model(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model to train: with landmarks (converted from a dense checkpoint where needed) or dense.

    Adds the landmark token to `tokenizer` where the model has landmarks.

    Raises:
        UserError: there is no such checkpoint, it is no LLaMA, or its landmark settings cannot work.
    """
    dense = model_args.attention == "dense"
    if model_args.config_name:
        config = _read_config(model_args.config_name)
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = LlamaForCausalLM(config)
    else:
        model = _read_checkpoint(model_args.model_name_or_path)
    model = model.to(getattr(torch, model_args.dtype))
    is_landmark = hasattr(model.config, "landmark_token_id")
    if dense and is_landmark:
        raise UserError(
            f"{model_args.model_name_or_path}: a checkpoint with landmarks cannot be trained with --attention dense"
        )
    if dense:
        return model
    return _with_landmarks(model, is_landmark, model_args, data_args, tokenizer)


def _with_landmarks(model, is_landmark, model_args, data_args, tokenizer) -> PreTrainedModel:
    from landmark_llama import LandmarkLlamaForCausalLM

    settings = {name: getattr(model_args, name) for name in LANDMARK_SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        if not is_landmark:
            return LandmarkLlamaForCausalLM.from_llama(
                model,
                tokenizer,
                block_size=model_args.block_size,
                train_context_length=data_args.context_length,
                **settings,
            )
        model.config.update({"train_context_length": data_args.context_length, **settings})
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def _read_config(name: str) -> LlamaConfig:
    try:
        config = LlamaConfig.from_json_file(name) if name.endswith(".json") else AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--config_name {name}: {_first_line(error)}") from error
    if config.model_type != "llama":
        raise UserError(f"--config_name {name}: model_type {config.model_type!r} is not a LLaMA configuration")
    return config


def _read_checkpoint(name: str) -> PreTrainedModel:
    try:
        import landmark_llama  # noqa: F401 (registers landmark checkpoints with the Auto classes)

        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: no checkpoint could be loaded: {_first_line(error)}") from error
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"--model_name_or_path {name}: {type(model).__name__} is not a LLaMA")
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
