"""Reads an adapter's folder (LoRA with a trained landmark row) and checks that it belongs to a model and tokenizer.

The folder holds peft's two files, the tokenizer, `config.json` (the whole landmark configuration used in training) and
`landmark_adapter.json` (a fingerprint of the tokenizer). This file does not import peft, so that reading and merging
an adapter does not need it (`docs/adapters.md`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from landmark_llama.calibration import CALIBRATION, add_calibration, calibration_shapes
from landmark_llama.checkpoints.files import local_folder
from landmark_llama.configuration import RETRIEVAL_SETTINGS, LandmarkConfig
from landmark_llama.families import landmark_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from landmark_llama.language_model import LandmarkForCausalLM

ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_RECORD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "landmark_adapter.json",
)
EMBEDDING = "embed_tokens"
PREFIX = "base_model.model."  # of an adapter's weights, before the model's own names
LANDMARK_ROW = f"{PREFIX}model.{EMBEDDING}.token_adapter.trainable_tokens_delta"
# Fields in which a base must equal the model that the adapter was trained on.
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "tie_word_embeddings",
)  # fmt: skip
LANDMARK_SETTINGS = (
    *RETRIEVAL_SETTINGS, "train_context_length", "train_retrieved_blocks", "landmark_key", "block_weight",
    "num_sink_blocks", "num_question_blocks", "num_reranked_blocks", "predict_from_landmark",
)  # fmt: skip


def is_adapter(folder: str | PathLike[str]) -> bool:
    """Whether a local folder holds an adapter instead of a whole model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def with_calibration(config: LandmarkConfig, modules_to_save: Iterable[str] | None) -> list[str] | None:
    """peft's `modules_to_save`, with the calibration of a model that has one."""
    names = {*(modules_to_save or ()), *([CALIBRATION] if config.landmark_query_rank else ())}
    return sorted(names) or None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's vocabulary, that is, of its tokens and their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter's folder; the weights are listed but not loaded."""

    folder: Path
    peft: dict[str, Any]  # adapter_config.json
    config: LandmarkConfig
    tokenizer_fingerprint: str
    names: frozenset[str]  # of its tensors

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> Adapter:
        """Reads an adapter from a local folder or hub id, and checks that it has a trained landmark row.

        Raises:
            OSError: a file is missing or damaged.
            ValueError: the landmark's embedding row was not trained or not saved.
        """
        path = local_folder(folder)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "config.json", TOKENIZER_RECORD):
            if not (path / name).is_file():
                raise OSError(f"{folder}: holds no {name}, so it is no adapter of a landmark LLaMA")
        try:
            peft, record = (json.loads((path / name).read_text("utf-8")) for name in (ADAPTER_CONFIG, TOKENIZER_RECORD))
            fingerprint = record["tokenizer_sha256"]
            config = AutoConfig.from_pretrained(path)
            with safe_open(path / ADAPTER_WEIGHTS, "pt") as weights:
                shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(f"{path / ADAPTER_WEIGHTS}: truncated or damaged ({error})") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise OSError(f"{folder}: {ADAPTER_CONFIG} or {TOKENIZER_RECORD} is damaged ({error!r})") from error
        if not isinstance(config, LandmarkConfig):
            raise ValueError(f"{folder}: config.json is of a {config.model_type!r}, not of a landmark LLaMA")
        adapter = cls(path, peft, config, fingerprint, frozenset(shapes))
        adapter._check_landmark_row(shapes)
        for name, shape in adapter.calibration().items():
            if shapes.get(PREFIX + name) != shape:
                raise ValueError(f"{folder}: {ADAPTER_WEIGHTS} lacks {PREFIX + name} of shape {shape}: save it again")
        return adapter

    @property
    def base(self) -> str:
        """The checkpoint that the adapter was trained on: a folder or a hub id."""
        return self.peft["base_model_name_or_path"]

    def calibration(self) -> dict[str, tuple[int, int]]:
        """The shape of each weight of the calibration, by its name in the model; empty if the model has none."""
        return {
            f"model.layers.{layer}.self_attn.{CALIBRATION}.{part}": shape
            for layer in range(self.config.num_hidden_layers)
            for part, shape in calibration_shapes(self.config).items()
        }

    def _check_landmark_row(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the landmark's embedding row, and no other, was trained and saved."""
        trained_rows = self.peft.get("trainable_token_indices")
        trained_rows = trained_rows.get(EMBEDDING) if isinstance(trained_rows, dict) else trained_rows
        if trained_rows != [self.config.landmark_token_id]:
            raise ValueError(
                f"{self.folder}: trained the embedding rows {trained_rows or 'of no token'}, not the one of its "
                f"landmark, {self.config.landmark_token_id}; an untrained landmark finds nothing: train it with "
                "finetune/run.py"
            )
        if shapes.get(LANDMARK_ROW) != (1, self.config.hidden_size):
            raise ValueError(
                f"{self.folder}: {ADAPTER_WEIGHTS} lacks the landmark's embedding row ({LANDMARK_ROW} of shape "
                f"(1, {self.config.hidden_size})), without which the model finds nothing: save the adapter again, with "
                "the save_pretrained of a model made by landmark_llama.load_adapter or finetune/run.py"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError unless `tokenizer`, with its landmark token, has the vocabulary used in training."""
        self.check_fingerprint(tokenizer_fingerprint(tokenizer), tokenizer.name_or_path)

    def check_fingerprint(self, fingerprint: str, name: str) -> None:
        """The same for a tokenizer's fingerprint. `name` is the tokenizer's, for the message."""
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"tokenizer {name}: its vocabulary is not the one that the adapter {self.folder} was trained with; "
                "take the tokenizer in the adapter's folder"
            )

    def check_base(self, config: PretrainedConfig, name: str | PathLike[str]) -> None:
        """Raises ValueError unless a model of this configuration, landmark or vanilla, can be the adapter's base."""
        own, remedy = self.config, f"the adapter {self.folder} was trained on {self.base}: give that"
        is_vanilla = not isinstance(config, LandmarkConfig)
        model_type = own.family.dense_type if is_vanilla else own.model_type
        if config.model_type != model_type:
            raise ValueError(f"{name}: model_type is {config.model_type!r}, not {model_type!r}; {remedy}")
        for field in SHAPE if is_vanilla else (*SHAPE, "landmark_token_id", "vocab_size", "block_size"):
            found = getattr(config, field, None)
            if field == "head_dim" and found is None:  # which some families leave to their models
                found = config.hidden_size // config.num_attention_heads
            if found != getattr(own, field):
                raise ValueError(f"{name}: {field} is {found}, not {getattr(own, field)}; {remedy}")
        rank = getattr(config, "landmark_query_rank", 0)
        if rank not in (0, own.landmark_query_rank):
            raise ValueError(f"{name}: landmark_query_rank is {rank}, not {own.landmark_query_rank}; {remedy}")
        # adding the landmark either used a spare embedding row or appended one
        appended = config.vocab_size == own.landmark_token_id == own.vocab_size - 1
        if is_vanilla and config.vocab_size != own.vocab_size and not appended:
            raise ValueError(
                f"{name}: its vocabulary of {config.vocab_size} tokens is not that of {own.vocab_size} with landmark "
                f"{own.landmark_token_id}; {remedy}"
            )

    def make_base(
        self,
        source: str | PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        **from_pretrained: Any,
    ) -> LandmarkForCausalLM:
        """The landmark model that the adapter is put on: `source`, with the adapter's landmark settings.

        source: a folder, a hub id or a loaded model; dense or with landmarks.
        """
        settings = {name: getattr(self.config, name) for name in LANDMARK_SETTINGS}
        rank = self.config.landmark_query_rank
        model_class = landmark_class(self.config, self.folder)
        is_loaded = isinstance(source, PreTrainedModel)
        config = source.config if is_loaded else AutoConfig.from_pretrained(source)
        self.check_base(config, type(source).__name__ if is_loaded else source)
        if not isinstance(config, LandmarkConfig):
            settings["landmark_query_rank"] = rank
            return model_class.from_dense(source, tokenizer, self.config.block_size, **settings, **from_pretrained)
        for name, value in settings.items():
            setattr(config, name, value)
        if not is_loaded:
            source = model_class.from_pretrained(source, config=config, **from_pretrained)
        add_calibration(source, rank)
        return source
