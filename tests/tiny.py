"""Tiny landmark models for tests. Their weights are large enough for sharp attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from landmark_llama import LandmarkCache, LandmarkLlamaConfig, LandmarkLlamaForCausalLM
from landmark_llama.attention.rotary import RotaryTable

LANDMARK = 7  # in the middle of the vocabulary: nothing may rely on it being the last id
VOCABULARY = 61
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"landmark_token_id": LANDMARK, "block_size": 4, "num_retrieved_blocks": 2}  # 8 blocks, 4 of them local

# how blocks are scored: by the landmark token's key, by a pooled one, and each with a query of the landmarks' own
LANDMARKS = {
    "token": {},
    "calibrated": {"landmark_query_rank": 3},
    "pooled": {"landmark_key": "pooled"},
    "pooled_and_calibrated": {"landmark_key": "pooled", "landmark_query_rank": 3},
}
every_landmark = pytest.mark.parametrize("landmark", LANDMARKS.values(), ids=LANDMARKS.keys())


def sharpen(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws all weights anew, so that activations are near 1 and attention scores spread by about 2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
            else:
                gain = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
                weight.copy_(noise * gain * (1.4 if "q_proj" in name or "k_proj" in name else 1.0))


def tiny_config(**settings: Any) -> LandmarkLlamaConfig:
    return LandmarkLlamaConfig(**{**BASE, **WINDOW, **settings})


def tiny_model(seed: int = 0, **settings: Any) -> LandmarkLlamaForCausalLM:
    model = LandmarkLlamaForCausalLM(tiny_config(**settings)).eval()
    sharpen(model, seed)
    return model


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A vanilla LLaMA of the same shape."""
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **settings})).eval()
    sharpen(model, seed)
    return model


def random_ids(*shape: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Random ids of ordinary tokens: neither padding nor the landmark nor BOS."""
    ids = torch.randint(8, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    assert not (ids == LANDMARK).any()
    return ids


def in_float64(model: LandmarkLlamaForCausalLM) -> LandmarkLlamaForCausalLM:
    """A copy, with default RoPE, that computes everything in float64, also the norms and the RoPE table."""
    copy = type(model)(model.config).eval().double()
    copy.load_state_dict(model.state_dict())
    for name, module in list(copy.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            copy.set_submodule(name, norm)
    half, theta = model.config.head_dim // 2, model.config.rope_parameters["rope_theta"]
    position = torch.arange(model.config.train_context_length, dtype=torch.float64)
    angle = position.unsqueeze(1) * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    copy.model._rotary = RotaryTable(angle.cos(), angle.sin())
    return copy.double()


@torch.no_grad()
def logits_in_calls(
    model: LandmarkLlamaForCausalLM, ids: Tensor, calls: list[int], cache: LandmarkCache | None = None, **settings: Any
) -> Tensor:
    """Logits of `ids` (batch, length), read through one cache in calls of these lengths, and one call for the rest."""
    cache = LandmarkCache(model.config) if cache is None else cache
    rest = ids.shape[1] - sum(calls)
    parts = ids.split([*calls, rest] if rest else calls, dim=1)
    return torch.cat([model(part, past_key_values=cache, **settings).logits for part in parts], dim=1)


def ragged(rows: list[Tensor], pad: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of rows (length,) of different lengths."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
