"""Vanilla LLaMA -> landmark LLaMA, and loading that refuses what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from landmark_llama.configuration import LandmarkLlamaConfig
from landmark_llama.tokenization import add_landmark_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = TypeVar("Model", bound=LlamaForCausalLM)


def convert_llama(
    model_class: type[Model],
    source: str | PathLike[str] | LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    from_pretrained: dict[str, Any],
) -> Model:
    """What `LandmarkLlamaForCausalLM.from_llama` documents. `settings`: fields of `LandmarkLlamaConfig`."""
    if isinstance(source, LlamaForCausalLM):
        base, path = _checked_llama(source.config, type(source).__name__), None
        from_pretrained = {"dtype": source.dtype, **from_pretrained, "state_dict": source.state_dict()}
    else:
        base, path = _llama_config(source, from_pretrained), source
    fields = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    rank = settings.get("landmark_query_rank", 0)
    # any id serves until the landmark has a row of its own; no checkpoint has the weights of a calibration
    config = LandmarkLlamaConfig(**fields, **{**settings, "landmark_query_rank": 0}, landmark_token_id=0)
    landmark_token_id = add_landmark_token(tokenizer)
    model = model_class.from_pretrained(path, config=config, **from_pretrained)
    if isinstance(source, LlamaForCausalLM):
        model.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    _add_row(model, landmark_token_id)
    model.config.landmark_token_id = landmark_token_id
    if rank:
        add_calibration(model, rank)
    return model


def add_calibration(model: LlamaForCausalLM, rank: int) -> None:
    """Gives each layer of a landmark LLaMA a new calibration of its landmarks' queries."""
    model.config.landmark_query_rank = rank
    model.config.check()
    for layer in model.model.layers:
        layer.self_attn.calibrate(rank)


def checked_load(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls transformers' `from_pretrained`; raises `OSError` for a checkpoint that is damaged or lacks weights."""
    with_info = kwargs.pop("output_loading_info", False)
    if path is not None and (Path(path) / "adapter_config.json").is_file() and not any(Path(path).glob("model*")):
        raise ValueError(
            f"{path}: an adapter, not a whole model; load it with landmark_llama.load_adapter(path), or make a whole "
            "model of it with python -m landmark_llama.merge"
        )
    if "config" not in kwargs:
        fields, _ = LandmarkLlamaConfig.get_config_dict(path, **_hub_arguments(kwargs))
        if fields.get("model_type") == "llama":
            raise ValueError(
                f"{path}: a LLaMA checkpoint, which has no landmark token; make a landmark LLaMA of it with "
                "LandmarkLlamaForCausalLM.from_llama(path, tokenizer)"
            )
    try:
        model, info = load(path, *args, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise OSError(
            f"{path}: a weight file is truncated or damaged ({error}); fetch or save the checkpoint again"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise OSError(f"{path}: the checkpoint lacks {len(missing)} of the model's weights, among them {missing[0]}")
    return (model, info) if with_info else model


def _llama_config(path: str | PathLike[str], from_pretrained: dict[str, Any]) -> LlamaConfig:
    folder = Path(path) / from_pretrained.get("subfolder", "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"{folder}: the folder holds no config.json, so it is no checkpoint")
    return _checked_llama(AutoConfig.from_pretrained(path, **_hub_arguments(from_pretrained)), path)


def _checked_llama(config: PretrainedConfig, name: str | PathLike[str]) -> LlamaConfig:
    if config.model_type != "llama":
        raise ValueError(f"{name}: model_type is {config.model_type!r}, from_llama takes a 'llama' checkpoint")
    return config


def _hub_arguments(from_pretrained: dict[str, Any]) -> dict[str, Any]:
    """What says which configuration is meant, among the arguments of `from_pretrained`."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    return {name: from_pretrained[name] for name in names if name in from_pretrained}


@torch.no_grad()
def _add_row(model: LlamaForCausalLM, token_id: int) -> None:
    """Gives `token_id` an embedding row and an output row: the means of the others."""
    vocab_size = model.config.vocab_size
    if token_id >= vocab_size:
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in (embedding,) if head is embedding else (embedding, head):
        mean = mean_of_other_rows(weight[:vocab_size], token_id)
        # rows between the old vocabulary and the landmark belong to tokens that the checkpoint never knew
        weight[vocab_size:] = mean
        weight[token_id] = mean


def mean_of_other_rows(weight: torch.Tensor, token_id: int) -> torch.Tensor:
    """What a new landmark's row starts as: the mean (columns,) of the rows of `weight` but `token_id`, in its dtype."""
    others = torch.cat([weight[:token_id], weight[token_id + 1 :]]) if token_id < len(weight) else weight
    return others.float().mean(0).to(weight.dtype)
