"""A LLaMA's layers with another attention inside: what most methods change, and nothing else.

B rows, T queries, N keys, H heads, D their width, C the width of the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRotaryEmbedding,
    repeat_kv,
    rotate_half,
)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def through_layers(model: LlamaModel, states: Tensor, attend: Attend) -> Tensor:
    """The normalised states (B, T, C) that come of embeddings (B, T, C).

    attend: called in each layer with its number and its query, key and value (B, H, T, D), none of them rotated, keys
        and values repeated for grouped queries; returns (B, H, T, D).
    """
    for number, layer in enumerate(model.layers[: model.config.num_hidden_layers]):
        states = through_layer(layer, states, lambda *qkv, number=number: attend(number, *qkv))
    return model.norm(states)


def through_layer(
    layer: LlamaDecoderLayer,
    states: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    beside: Tensor | float = 0.0,
) -> Tensor:
    """One decoder layer of states (B, T, C).

    beside: (B, T, C), added to the states together with what the layer attends to.
    """
    attention = layer.self_attn
    query, key, value = project(attention, layer.input_layernorm(states))
    attended = attend(query, key, value).transpose(1, 2).flatten(2)
    states = states + attention.o_proj(attended) + beside
    return states + layer.mlp(layer.post_attention_layernorm(states))


def project(attention: LlamaAttention, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, T, D) of normalised states (B, T, C)."""
    query, key, value = (
        projection(states).unflatten(-1, (projection.out_features // attention.head_dim, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return query, repeat_kv(key, attention.num_key_value_groups), repeat_kv(value, attention.num_key_value_groups)


class Rotary:
    """The model's rotary positions for any integers, also below 0: `rotary(x, position)` rotates x (B, H, T, D).

    position: (T,), or whatever broadcasts to (B, H, T).
    """

    def __init__(self, embedding: LlamaRotaryEmbedding):
        self.embedding = embedding

    def __call__(self, x: Tensor, position: Tensor) -> Tensor:
        angle = position.to(x.device, torch.float32).unsqueeze(-1) * self.embedding.inv_freq.to(x.device, torch.float32)
        angle = torch.cat([angle, angle], dim=-1)
        scaling = self.embedding.attention_scaling
        return x * (angle.cos() * scaling).to(x) + rotate_half(x) * (angle.sin() * scaling).to(x)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention (B, H, T, D) of queries over keys (B, H, N, D), aligned at the end.

    mask: (T, N), True where a query sees a key; None: each sees itself and all before it.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    if mask is None:
        mask = causal_mask(queries, keys, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, N), True where a query sees a key: the last query sees all."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
