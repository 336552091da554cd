"""A tiny base model and tokens for the tests of the methods on the bench."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from comparisons import methods
from comparisons.reader import Reader

VOCABULARY = 40


def base(layers: int = 2) -> LlamaForCausalLM:
    """A dense LLaMA of random weights, the same at every call, with two KV heads for its four."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def reader(module: str, segment: int = 16, layers: int = 2, **options) -> Reader:
    """A method's reader over that base."""
    return methods.build(module, base(layers), segment=segment, **options).eval()


def tokens(length: int, rows: int = 2) -> Tensor:
    """(rows, length)"""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def loss_of(model: Reader, length: int = 64, rows: int = 2) -> Tensor:
    """The loss of training rows of so many tokens, with the graph that it came by."""
    ids = tokens(length + 1, rows)
    return model.train()(ids[:, :-1], ids[:, 1:])["loss"]


@torch.no_grad()
def states_of(model: Reader, ids: Tensor, cut: int | None = None) -> Tensor:
    """States of a text (B, length), read in pieces of `cut` tokens (by default segments)."""
    memory, states = None, []
    for piece in ids.split(cut or model.segment, dim=1):
        found, memory = model.read(piece, memory)
        states.append(found)
    return torch.cat(states, dim=1)


@torch.no_grad()
def dense_states(ids: Tensor, layers: int = 2) -> Tensor:
    """Those of the base, read in one call."""
    return base(layers).model(input_ids=ids).last_hidden_state
