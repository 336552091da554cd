"""What a memory must agree on with the model that opens it: the model's shape, its weights, how it was read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from landmark_llama.configuration import LandmarkLlamaConfig

# fields of the configuration that shape keys and values; those of retrieval are kept apart (`RetrievalSettings`)
SHAPING_FIELDS = (
    "block_size", "train_context_length", "landmark_token_id", "landmark_key", "landmark_query_rank",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
SAMPLES = 1024  # elements of a weight whose places count


def reader_of(model: nn.Module) -> nn.Module:
    """The layers inside `model` that read: a LandmarkLlamaModel, itself or inside a language or peft model.

    Raises:
        ValueError: there are none.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, LandmarkLlamaConfig) and hasattr(module, "embed_tokens") and hasattr(module, "layers"):
            return module
    raise ValueError(f"model: a {type(model).__name__} holds no landmark LLaMA: a memory is read by one")


def describe(reader: nn.Module) -> dict[str, Any]:
    """The fields that shape what `reader` (from `reader_of`) remembers, its dtype, and a digest of its weights."""
    fields = {name: getattr(reader.config, name) for name in SHAPING_FIELDS}
    dtype = str(reader.embed_tokens.weight.dtype).removeprefix("torch.")
    # as JSON gives it back
    return json.loads(json.dumps({**fields, "dtype": dtype, "weights": _digest(reader)}, default=str))


def differences(saved: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, a phrase each; the weights only where nothing else does."""
    names = [*SHAPING_FIELDS, "dtype"]
    found = [
        f"{name} is {saved.get(name)!r} in the memory and {model.get(name)!r} in the model"
        for name in names
        if saved.get(name) != model.get(name)
    ]
    if not found and saved.get("weights") != model.get("weights"):
        found.append("its weights are not those of the model")
    return found


@torch.no_grad()
def _digest(reader: nn.Module) -> str:
    """SHA-256 of each weight's name, shape, sum of its bits and some elements: any change of a weight changes it."""
    digest = hashlib.sha256()
    for name, weight in sorted(reader.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        if weight.is_meta:
            continue  # offloaded: only its shape is known
        flat = weight.detach().contiguous().view(-1)
        sample = flat[:: max(1, -(-len(flat) // SAMPLES))]
        digest.update(f"{_sum_of_bits(flat)} ".encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _sum_of_bits(flat: Tensor) -> int:
    """The sum of a tensor's bits, read as integers of 64 bits; memory's speed, and it wraps around."""
    words = flat.view(torch.uint8)
    words = words.clone() if words.storage_offset() % 8 else words
    whole = len(words) // 8 * 8
    total = words[whole:].sum(dtype=torch.int64)
    return int(total + words[:whole].view(torch.int64).sum()) if whole else int(total)
