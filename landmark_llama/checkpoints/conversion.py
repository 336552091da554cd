"""Makes a landmark LLaMA from a vanilla LLaMA, and loads checkpoints with checks that transformers leaves out."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from landmark_llama.calibration import add_calibration
from landmark_llama.configuration import (
    BlockWeight,
    LandmarkKey,
    LandmarkLlamaConfig,
    LocalAttention,
    RetrievalGranularity,
)
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
    """Implements `LandmarkLlamaForCausalLM.from_llama`; see there. `settings`: fields of `LandmarkLlamaConfig`."""
    if "gguf_file" in from_pretrained:
        source, from_pretrained = _load_gguf(source, from_pretrained), {}
    if isinstance(source, LlamaForCausalLM):
        base, path = _checked_llama(source.config, type(source).__name__), None
        from_pretrained = {"dtype": source.dtype, **from_pretrained, "state_dict": source.state_dict()}
    else:
        base, path = _llama_config(source, from_pretrained), source
    fields = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    rank = settings.get("landmark_query_rank", 0)
    # placeholders: the landmark's row and the calibration are added below, once the model is loaded
    config = LandmarkLlamaConfig(**fields, **{**settings, "landmark_query_rank": 0}, landmark_token_id=0)
    landmark_token_id = add_landmark_token(tokenizer)
    model = model_class.from_pretrained(path, config=config, **from_pretrained)
    if isinstance(source, LlamaForCausalLM):
        model.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    _add_landmark_row(model, landmark_token_id)
    model.config.landmark_token_id = landmark_token_id
    add_calibration(model, rank)
    return model


def _load_gguf(path: str | PathLike[str], from_pretrained: dict[str, Any]) -> LlamaForCausalLM:
    """The LLaMA in a GGUF file, its weights no longer quantised."""
    config = AutoConfig.from_pretrained(path, gguf_file=from_pretrained["gguf_file"], **_hub_arguments(from_pretrained))
    _checked_llama(config, f"{path}, {from_pretrained['gguf_file']}")
    model = checked_load(LlamaForCausalLM.from_pretrained, path, config=config, **from_pretrained)
    if hasattr(model.config, "quantization_config"):  # of the file
        del model.config.quantization_config
    return model


def checked_load(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `load`, transformers' `from_pretrained`, and refuses what it would load without an error.

    Raises:
        OSError: the checkpoint is damaged or lacks weights. (transformers fills in random ones.)
        ValueError: `path` is an adapter or a vanilla LLaMA.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    if path is not None and (Path(path) / "adapter_config.json").is_file() and not any(Path(path).glob("model*")):
        raise ValueError(
            f"{path}: an adapter, not a whole model; load it with landmark_llama.load_adapter(path), or merge it into "
            "a whole model with python -m landmark_llama.merge"
        )
    if "config" not in kwargs:
        fields, _ = LandmarkLlamaConfig.get_config_dict(path, **_hub_arguments(kwargs))
        if fields.get("model_type") == "llama":
            raise ValueError(
                f"{path}: a LLaMA checkpoint, which has no landmark token; convert it with "
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
    return (model, info) if wants_info else model


def _llama_config(path: str | PathLike[str], from_pretrained: dict[str, Any]) -> LlamaConfig:
    folder = Path(path) / from_pretrained.get("subfolder", "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"{folder}: the folder holds no config.json, so it is not a checkpoint")
    return _checked_llama(AutoConfig.from_pretrained(path, **_hub_arguments(from_pretrained)), path)


def _checked_llama(config: PretrainedConfig, name: str | PathLike[str]) -> LlamaConfig:
    if config.model_type != "llama":
        raise ValueError(f"{name}: model_type is {config.model_type!r}, from_llama takes a 'llama' checkpoint")
    return config


def _hub_arguments(from_pretrained: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to find the configuration."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    return {name: from_pretrained[name] for name in names if name in from_pretrained}


@torch.no_grad()
def _add_landmark_row(model: LlamaForCausalLM, token_id: int) -> None:
    """Gives the landmark an embedding row and an output row; each is the mean of the other rows."""
    vocab_size = model.config.vocab_size
    if token_id >= vocab_size:
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in (embedding,) if head is embedding else (embedding, head):
        mean = mean_of_other_rows(weight[:vocab_size], token_id)
        # the tokenizer may hold further tokens that the checkpoint has no rows for: they get the mean, too
        weight[vocab_size:] = mean
        weight[token_id] = mean


def mean_of_other_rows(weight: torch.Tensor, token_id: int) -> torch.Tensor:
    """The mean (columns,) of all rows of `weight` (rows, columns) but row `token_id`, in its dtype."""
    others = torch.cat([weight[:token_id], weight[token_id + 1 :]]) if token_id < len(weight) else weight
    return others.float().mean(0).to(weight.dtype)


class FromLlamaMixin:
    """How a landmark LLaMA is made of a vanilla checkpoint, and loaded from its own."""

    @classmethod
    def from_llama(
        cls,
        source: str | PathLike[str] | LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 64,
        *,
        train_context_length: int | None = None,
        num_retrieved_blocks: int = 4,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention = "sliding",
        retrieval_granularity: RetrievalGranularity = "token_and_head",
        train_retrieved_blocks: int | None = None,
        landmark_key: LandmarkKey = "token",
        landmark_query_rank: int = 0,
        block_weight: BlockWeight = "landmark",
        num_sink_blocks: int = 0,
        predict_from_landmark: bool = False,
        **from_pretrained: Any,
    ) -> Any:
        """Makes a landmark LLaMA of a vanilla LLaMA checkpoint; fine-tune it before expecting it to find anything.

        The landmark token is added to `tokenizer` in place, its embedding row (and output row) is the mean of the
        others, every other weight stays bitwise as it was.

        Args:
            source: folder or hub id of a LLaMA checkpoint, or a loaded `LlamaForCausalLM` (left alone).
            tokenizer: the checkpoint's tokenizer; save it beside the model.
            block_size, ...: fields of `LandmarkLlamaConfig`.
            from_pretrained: for `LlamaForCausalLM.from_pretrained`: `dtype`, `device_map`, `revision`, ...
                With `gguf_file`, the name of a GGUF file in `source` (packages `gguf` and `accelerate`).

        Raises:
            ValueError: if the checkpoint is not a LLaMA, or its window cannot hold the settings.
            OSError: if the checkpoint is missing, truncated or incomplete.
        """
        return convert_llama(
            cls,
            source,
            tokenizer,
            {
                "block_size": block_size,
                "train_context_length": train_context_length,
                "num_retrieved_blocks": num_retrieved_blocks,
                "num_local_blocks": num_local_blocks,
                "local_attention": local_attention,
                "retrieval_granularity": retrieval_granularity,
                "train_retrieved_blocks": train_retrieved_blocks,
                "landmark_key": landmark_key,
                "landmark_query_rank": landmark_query_rank,
                "block_weight": block_weight,
                "num_sink_blocks": num_sink_blocks,
                "predict_from_landmark": predict_from_landmark,
            },
            from_pretrained,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a landmark checkpoint, as transformers does; a damaged or incomplete one raises an `OSError`."""
        return checked_load(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
