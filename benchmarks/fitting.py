"""How long a prompt may be for the memory at hand, so that no measurement is lost to a card that is too small."""

from __future__ import annotations

import os

import torch

from landmark_llama import LandmarkLlamaConfig

ROUNDED_TO = 8192  # tokens: lengths that are cut to fit are multiples of it, or of an eighth of what was asked for
KEPT_FREE = 0.06  # of the memory, for the context of CUDA, fragments, and what the allocator rounds up
SPARE_CAPACITY = 1 / 8  # of a landmark cache's room, beside what its prompt takes


def memory_of(device: str) -> int:
    """Bytes of memory of a GPU, or of the machine for a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def longest_fitting(
    length: int, config: LandmarkLlamaConfig, dtype: torch.dtype, batch: int, memory: int, *, dense: bool
) -> int:
    """`length` ordinary tokens, or as many fewer as fit `memory` bytes beside the weights; 0 if not even these do.

    dense: the dense model reads the prompt, too.
    """
    room = memory * (1 - KEPT_FREE) - weight_bytes(config, dtype)
    most = int(room / (batch * max(_token_bytes(config, dtype, dense=name) for name in {dense, False})))
    if most >= length:
        return length
    step = min(ROUNDED_TO, max(1, length // 8))
    return max(0, most // step * step)


def weight_bytes(config: LandmarkLlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of either model; norms are left out."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return (config.num_hidden_layers * layer + embeddings) * dtype.itemsize


def _token_bytes(config: LandmarkLlamaConfig, dtype: torch.dtype, *, dense: bool) -> float:
    """Bytes that a token of the prompt takes while a model reads it and generates from it."""
    stored = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    if dense:
        # the whole prompt goes through a layer at once: four tensors as wide as the MLP, six as the residual stream
        return (stored + 4 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize
    block = config.block_size
    # landmarks, their keys once more, spare room
    return stored * block / (block - 1) * (1 + SPARE_CAPACITY + 1 / (2 * block)) * dtype.itemsize
