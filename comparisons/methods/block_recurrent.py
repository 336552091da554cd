"""Block-Recurrent Transformer: one layer also carries state vectors from block to block, through gates.

Hutchins et al., "Block-Recurrent Transformers", arXiv 2203.07852. All layers are Transformer-XL's, its segments the
blocks. In one of them the tokens also attend to `states` state vectors, and after the block these attend to themselves
and to the block's tokens; a gate, one number learned for each of a state's places, keeps of the old state what it
should and adds the new ("fixed gate", "skip" configuration: the states have no feed-forward layer). Tokens and states
share no queries; keys and values of the tokens serve both. Gradients flow back through all blocks of a row.

Invariant: if what tokens read of the states adds nothing, it is Transformer-XL; a closed gate changes no state.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from comparisons.layers import project, through_layer
from comparisons.methods.transformer_xl import XLReader
from comparisons.reader import Reader, detached


class States(nn.Module):
    """State vectors (B, S, C): how they begin, are read, and change."""

    def __init__(self, heads: int, head_dim: int, width: int, states: int, spread: float):
        super().__init__()
        self.head_dim = head_dim
        self.initial, self.place = (nn.Parameter(torch.randn(states, width) * spread) for _ in range(2))
        self.norm = LlamaRMSNorm(width)
        inner = heads * head_dim
        self.token_query, self.query, self.block_query, self.key, self.value = (
            nn.Linear(width, inner, bias=False) for _ in range(5)
        )
        self.to_tokens, self.to_states = nn.Linear(inner, width, bias=False), nn.Linear(2 * inner, width)
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread)
        self.gate = nn.Parameter(torch.ones(width))

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, N, D) of (B, N, H D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def normal(self, states: Tensor) -> Tensor:
        """What is attended to and from: states with their places, which tell them apart."""
        return self.norm(states + self.place)

    def read(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What is added to the tokens, of whose normalised inputs (B, T, C)."""
        normal = self.normal(states)
        key, value = self.heads(self.key(normal)), self.heads(self.value(normal))
        read = scaled_dot_product_attention(self.heads(self.token_query(tokens)), key, value)
        return self.to_tokens(read.transpose(1, 2).flatten(2))

    def change(self, states: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The states after a block with the tokens' keys and values (B, H, T, D)."""
        normal = self.normal(states)
        own = (self.heads(projection(normal)) for projection in (self.query, self.key, self.value))
        both = (
            scaled_dot_product_attention(*own),
            scaled_dot_product_attention(self.heads(self.block_query(normal)), key, value),
        )
        new = self.to_states(torch.cat([x.transpose(1, 2).flatten(2) for x in both], dim=-1))
        kept = self.gate.sigmoid()
        return states * kept + new * (1 - kept)


class BlockRecurrentReader(XLReader):
    """A layer remembers its inputs as Transformer-XL does, and the recurrent one its states (else None)."""

    def __init__(
        self, base: LlamaForCausalLM, segment: int, memory: int, states: int, number: int, backward_segments: int
    ):
        super().__init__(base, segment, memory)
        config = base.config
        self.number, self.backward_segments = range(config.num_hidden_layers)[number], backward_segments
        shape = config.num_attention_heads, config.head_dim, config.hidden_size
        self.states = States(*shape, states, config.initializer_range)

    def keep(self, number: int, past: tuple | None, states: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = super().keep(number, past and past[0], states)
        if number != self.number:
            return inputs, None
        layer = self.base.model.layers[number]
        _, key, value = project(layer.self_attn, layer.input_layernorm(states))
        return inputs, self.states.change(self.state(past, states), key, value)

    def state(self, past: tuple | None, states: Tensor) -> Tensor:
        """The state vectors that a segment begins with."""
        return self.states.initial.expand(len(states), -1, -1) if past is None else past[1]

    def seen(self, past: tuple[Tensor, Tensor | None]) -> Tensor:
        return past[0]

    def layer(self, number: int, past: tuple | None, states: Tensor) -> Tensor:
        if number != self.number:
            return super().layer(number, past, states)
        layer = self.base.model.layers[number]
        read = self.states.read(self.state(past, states), layer.input_layernorm(states))
        return through_layer(layer, states, lambda *qkv: self.attend(number, past, *qkv), read)

    def between(self, memory: list, segment: int) -> list:
        return memory if segment % self.backward_segments else detached(memory)


def build(
    base: LlamaForCausalLM,
    segment: int = 256,
    memory: int = 256,
    states: int = 64,
    layer: int = -2,
    backward_segments: int = 8,
) -> Reader:
    """Transformer-XL whose layer number `layer` carries `states` state vectors."""
    return BlockRecurrentReader(base, segment, memory, states, layer, backward_segments)
