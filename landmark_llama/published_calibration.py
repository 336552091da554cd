"""A trained calibration as a small folder of its own: what makes a landmark LLaMA of a vanilla one that others have.

It holds `calibration.safetensors` (the calibration of each layer and the landmark's rows) and `calibration.json` (the
landmark settings that it was trained with, the shape of the model, a fingerprint of the base, digests). Everything
is checked before a model is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from landmark_llama.calibration import CALIBRATION, add_calibration, calibration_shapes
from landmark_llama.checkpoints.files import open_safetensors, read_json, staged
from landmark_llama.configuration import RETRIEVAL_SETTINGS, LandmarkLlamaConfig

RECORD, WEIGHTS = "calibration.json", "calibration.safetensors"
SETTINGS = (
    "block_size", "train_context_length", *RETRIEVAL_SETTINGS, "landmark_key", "landmark_query_rank", "block_weight",
    "num_sink_blocks", "num_question_blocks", "num_reranked_blocks", "predict_from_landmark",
)  # fmt: skip
INPUT_ROW, OUTPUT_ROW = "landmark_row", "landmark_output_row"


def base_fingerprint(model: LlamaForCausalLM) -> str:
    """SHA-256 of a landmark LLaMA's weights without its landmark's rows and its calibration.

    Weights are rounded to bfloat16 before, so that a base loaded in fp32 and in bfloat16 is the same one.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(model)):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_calibration(
    model: LlamaForCausalLM,
    folder: str | PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes the calibration of `model` and its landmark's rows into `folder`, which must not exist or be empty.

    Args:
        dtype: of the file.
        training: JSON values that say how it was made.

    Raises:
        ValueError: the model has no calibration, or the folder holds something.
    """
    if not model.config.landmark_query_rank:
        raise ValueError("landmark_query_rank=0: the model has no calibration to save")
    weights = {name: weight.detach().to("cpu", dtype).clone() for name, weight in _own_weights(model)}
    with staged(Path(folder)) as staging:
        save_file(weights, staging / WEIGHTS)
        record = {
            "settings": {name: getattr(model.config, name) for name in SETTINGS},
            "base_sha256": base_fingerprint(model),
            "weights_sha256": hashlib.sha256((staging / WEIGHTS).read_bytes()).hexdigest(),
            "training": dict(training or {}),
        }
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: str | PathLike[str]) -> dict[str, Any]:
    """The landmark settings that a calibration was trained with: arguments of `from_llama`.

    Raises:
        OSError: the folder or its record is missing or damaged.
    """
    return _settings(Path(folder), _record(Path(folder)))


@torch.no_grad()
def load_calibration(model: LlamaForCausalLM, folder: str | PathLike[str]) -> None:
    """Gives `model`, a landmark LLaMA made of the calibration's base, its calibration, landmark rows and settings.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the model was made of another base, or with another block size. It is left as it was.
    """
    folder = Path(folder)
    record = _record(folder)
    settings = _settings(folder, record)
    weights = _read_weights(folder, record)
    config = model.config
    if config.block_size != settings["block_size"]:
        raise ValueError(
            f"{folder}: was trained with block_size={settings['block_size']}, the model has {config.block_size}: "
            "convert it with from_llama(..., **read_settings(folder))"
        )
    for name in ("landmark_query_rank", "landmark_key"):
        if config.landmark_query_rank and getattr(config, name) != settings[name]:
            raise ValueError(
                f"{folder}: {name}={settings[name]!r}, the model has a calibration already, with "
                f"{name}={getattr(config, name)!r}: load it onto its base"
            )
    if base_fingerprint(model) != record["base_sha256"]:
        raise ValueError(f"{folder}: the calibration of another base: the model's own weights differ from its")
    trained_with = deepcopy(config)
    for name, value in settings.items():
        setattr(trained_with, name, value)
    try:
        trained_with.check()
    except ValueError as error:
        raise OSError(f"{folder / RECORD}: damaged: {error}") from error
    _check_shapes(folder, weights, model, trained_with)
    rank = settings.pop("landmark_query_rank")
    for name, value in settings.items():
        setattr(config, name, value)
    add_calibration(model, rank)
    for name, weight in _own_weights(model):
        weight.copy_(weights[name])


def _check_shapes(
    folder: Path, weights: dict[str, Tensor], model: LlamaForCausalLM, config: LandmarkLlamaConfig
) -> None:
    """Raises OSError unless `weights` are those of the calibration that a model of this configuration has."""
    shapes = {INPUT_ROW: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[OUTPUT_ROW] = (config.hidden_size,)
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{part}": shape for part, shape in calibration_shapes(config).items()}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != shapes:
        raise OSError(
            f"{folder / WEIGHTS}: damaged: its weights are not those of a calibration of rank "
            f"{config.landmark_query_rank} for landmark_key={config.landmark_key!r}"
        )


def _base_weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of the base; tied ones once."""
    row = model.config.landmark_token_id
    rows = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, weight in model.named_parameters():
        if CALIBRATION in name:
            continue
        if id(weight) in rows:
            weight = torch.cat([weight[:row], weight[row + 1 :]])
        yield name, weight.detach()


def _own_weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """What a calibration consists of: views of the model's weights, which can be written to."""
    row = model.config.landmark_token_id
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield INPUT_ROW, embedding[row]
    if head is not embedding:
        yield OUTPUT_ROW, head[row]
    for i, layer in enumerate(model.model.layers):
        for part, weight in layer.self_attn.landmark_calibration.named_parameters():
            yield f"layers.{i}.{part}", weight


def _record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise OSError(f"{folder}: there is no such folder")
    record = read_json(folder / RECORD)
    missing = {"settings", "base_sha256", "weights_sha256"} - set(record)
    if missing:
        raise OSError(f"{folder / RECORD}: damaged (no {min(missing)})")
    return record


def _settings(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    settings = record["settings"]
    if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
        raise OSError(f"{folder / RECORD}: damaged, or of another version: its settings are not {', '.join(SETTINGS)}")
    return settings


def _read_weights(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise OSError(f"{folder}: holds no {WEIGHTS}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["weights_sha256"]:
        raise OSError(f"{path}: damaged, or of another calibration: its digest is not the one in {RECORD}")
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
