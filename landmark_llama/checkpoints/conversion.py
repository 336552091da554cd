"""Makes a landmark model of a dense one, and loads checkpoints with checks that transformers leaves out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from landmark_llama.calibration import add_calibration
from landmark_llama.configuration import (
    BlockWeight,
    Family,
    LandmarkConfig,
    LandmarkKey,
    LocalAttention,
    RetrievalGranularity,
)
from landmark_llama.tokenization import add_landmark_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of `from_pretrained` that say where to find the configuration.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")

Model = TypeVar("Model", bound=PreTrainedModel)


def convert_dense(
    model_class: type[Model],
    source: str | PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    from_pretrained: dict[str, Any],
) -> Model:
    """Implements `FromDenseMixin.from_dense`; see there. `settings`: fields of `LandmarkConfig`."""
    family = model_class.config_class.family
    if "gguf_file" in from_pretrained:
        source, from_pretrained = load_gguf(source, family, **from_pretrained), {}
    if isinstance(source, PreTrainedModel):
        base, path = _checked(source.config, family, type(source).__name__), None
        from_pretrained = {"dtype": source.dtype, **from_pretrained, "state_dict": source.state_dict()}
    else:
        base, path = _checked(read_config(source, from_pretrained), family, source), source
    fields = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    rank = settings.get("landmark_query_rank", 0)
    # placeholders: the landmark's row and the calibration are added below, once the model is loaded
    config = model_class.config_class(**fields, **{**settings, "landmark_query_rank": 0}, landmark_token_id=0)
    landmark_token_id = add_landmark_token(tokenizer)
    model = model_class.from_pretrained(path, config=config, **from_pretrained)
    if isinstance(source, PreTrainedModel):
        model.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    _add_landmark_row(model, landmark_token_id)
    model.config.landmark_token_id = landmark_token_id
    add_calibration(model, rank)
    return model


def read_config(path: str | PathLike[str], from_pretrained: dict[str, Any]) -> PretrainedConfig:
    """The configuration in a folder, a hub id or, with `gguf_file` in `from_pretrained`, a GGUF file.

    Raises:
        OSError: `path` is a folder without a configuration.
    """
    where = {name: from_pretrained[name] for name in (*HUB_ARGUMENTS, "gguf_file") if name in from_pretrained}
    folder = Path(path) / from_pretrained.get("subfolder", "")
    if "gguf_file" not in where and folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"{folder}: the folder holds no config.json, so it is not a checkpoint")
    return AutoConfig.from_pretrained(path, **where)


def _checked(config: PretrainedConfig, family: Family, name: str | PathLike[str]) -> PretrainedConfig:
    if config.model_type != family.dense_type:
        raise ValueError(
            f"{name}: model_type is {config.model_type!r}, {family.from_dense} takes a {family.dense_type!r} checkpoint"
            "; landmark_llama.from_dense takes any family's (docs/families.md)"
        )
    return config


def load_gguf(path: str | PathLike[str], family: Family, gguf_file: str, **from_pretrained: Any) -> PreTrainedModel:
    """The dense model in a GGUF file of a folder or hub id, its weights not quantised: it can be trained and saved.

    family: of which model it must be, `LandmarkLlamaConfig.family` for a LLaMA.

    Raises:
        ValueError: the file holds a model of another kind.
    """
    settings = {**from_pretrained, "gguf_file": gguf_file}
    config = _checked(read_config(path, settings), family, f"{path}, {gguf_file}")
    model = checked_load(AutoModelForCausalLM.from_pretrained, path, config=config, **settings)
    if hasattr(model.config, "quantization_config"):  # of the file
        del model.config.quantization_config
    # the object that was loaded still counts as quantised
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=model.dtype)


def checked_load(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `load`, transformers' `from_pretrained`, and refuses what it would load without an error.

    Raises:
        OSError: the checkpoint is damaged or lacks weights. (transformers fills in random ones.)
        ValueError: `path` is an adapter.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    if path is not None and (Path(path) / "adapter_config.json").is_file() and not any(Path(path).glob("model*")):
        raise ValueError(
            f"{path}: an adapter, not a whole model; load it with landmark_llama.load_adapter(path), or merge it into "
            "a whole model with python -m landmark_llama.merge"
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


@torch.no_grad()
def _add_landmark_row(model: PreTrainedModel, token_id: int) -> None:
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


class FromDenseMixin:
    """How a landmark model is made of a dense checkpoint of its family, and loaded from its own."""

    @classmethod
    def from_dense(
        cls,
        source: str | PathLike[str] | PreTrainedModel,
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
        num_question_blocks: int = 0,
        num_reranked_blocks: int = 0,
        predict_from_landmark: bool = False,
        **from_pretrained: Any,
    ) -> Any:
        """Makes a landmark model of a dense checkpoint of its family; fine-tune it before it can find anything.

        The landmark token is added to `tokenizer` in place, its embedding row (and output row) is the mean of the
        others, every other weight stays bitwise as it was.

        Args:
            source: folder or hub id of a dense checkpoint, or a loaded dense model (left alone).
            tokenizer: the checkpoint's tokenizer; save it beside the model.
            block_size, ...: fields of `LandmarkConfig`.
            from_pretrained: for the dense class's `from_pretrained`: `dtype`, `device_map`, `revision`, ...
                With `gguf_file`, the name of a GGUF file in `source` (packages `gguf` and `accelerate`).

        Raises:
            ValueError: if the checkpoint is of another family, or its window cannot hold the settings.
            OSError: if the checkpoint is missing, truncated or incomplete.
        """
        return convert_dense(
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
                "num_question_blocks": num_question_blocks,
                "num_reranked_blocks": num_reranked_blocks,
                "predict_from_landmark": predict_from_landmark,
            },
            from_pretrained,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a landmark checkpoint, as transformers does; a damaged or incomplete one raises an `OSError`."""
        load = super().from_pretrained
        if "config" not in kwargs and pretrained_model_name_or_path is not None:
            load = partial(_load_own, cls.config_class, load)
        return checked_load(load, pretrained_model_name_or_path, *args, **kwargs)


def _load_own(
    config_class: type[LandmarkConfig], load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls `load`, and refuses a checkpoint that is dense, or of another family."""
    names = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    model_type, family = config_class.get_config_dict(path, **names)[0].get("model_type"), config_class.family
    if model_type == family.dense_type:
        raise ValueError(
            f"{path}: a {family.name} checkpoint, which has no landmark token; convert it with {family.conversion}"
        )
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else object
    if model_type != config_class.model_type and issubclass(known, LandmarkConfig):
        raise ValueError(
            f"{path}: model_type is {model_type!r}, not {config_class.model_type!r}; load it with AutoModelForCausalLM"
        )
    return load(path, *args, **kwargs)


class FromLlamaMixin(FromDenseMixin):
    """`from_dense` by its older name."""

    from_llama = FromDenseMixin.__dict__["from_dense"]
