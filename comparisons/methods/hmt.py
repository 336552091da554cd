"""Hierarchical Memory Transformer: each segment leaves one memory, and recalls the ones that matter to it.

He et al., "HMT: Hierarchical Memory Transformer for Efficient Long Context Language Processing", arXiv 2405.06067.
Three memories: the last tokens of the segment before (sensory), the state that each segment leaves (short-term), and
all such states of the text (long-term). The backbone summarises a piece of text into one state; cross attention with it
as the query mixes the states of past segments into one, the recalled memory. The segment is then read as
[sensory; recalled; segment; recalled], and the state of the last place is its own memory.

The paper summarises the first half of the segment itself, whose tokens would then be predicted by what knows them; here
the last half of the segment before is summarised instead, so that no token sees a later one.

Invariant: with one memory to recall from and no sensory tokens it is the Recurrent Memory Transformer with one token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from comparisons.reader import Reader, detached


class Memories(NamedTuple):
    """What a segment leaves: the states of past segments (B, segments, C), and its own tokens (B, T)."""

    states: Tensor
    tokens: Tensor


class HierarchicalReader(Reader):
    """The memory: `Memories`, of at most `recalled` segments."""

    def __init__(self, base: LlamaForCausalLM, segment: int, sensory: int, recalled: int, backward_segments: int):
        super().__init__(base, segment)
        self.sensory, self.recalled, self.backward_segments = sensory, recalled, backward_segments
        width, spread = base.config.hidden_size, base.config.initializer_range
        self.initial = nn.Parameter(torch.randn(1, width) * spread)
        self.prompt = nn.Parameter(torch.randn(1, width) * spread)  # what asks for a summary
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def read(self, input_ids: Tensor, memory: Memories | None) -> tuple[Tensor, Memories]:
        embed, rows = self.base.model.embed_tokens, len(input_ids)
        sensory = input_ids[:, :0] if memory is None else memory.tokens[:, max(0, self.segment - self.sensory) :]
        recalled = self.initial.expand(rows, 1, -1) if memory is None else self.recall(memory)
        inputs = torch.cat([embed(sensory), recalled, embed(input_ids), recalled], dim=1)
        states = self.base.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        past = states[:, :0] if memory is None else memory.states
        left = torch.cat([past, states[:, -1:]], dim=1)[:, -self.recalled :]
        return states[:, sensory.shape[1] + 1 : -1], Memories(left, input_ids)

    def recall(self, memory: Memories) -> Tensor:
        """(B, 1, C): past states, mixed by how well they go with the summary of what was read last."""
        summary = self.summarise(memory.tokens[:, self.segment // 2 :])
        scores = self.query(summary) @ self.key(memory.states).transpose(1, 2)
        return (scores * memory.states.shape[-1] ** -0.5).softmax(-1) @ memory.states

    def summarise(self, tokens: Tensor) -> Tensor:
        """(B, 1, C): the state after the tokens (B, T) and the prompt."""
        prompt = self.prompt.expand(len(tokens), 1, -1)
        inputs = torch.cat([prompt, self.base.model.embed_tokens(tokens), prompt], dim=1)
        return self.base.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]

    def between(self, memory: Memories, segment: int) -> Memories:
        return memory if segment % self.backward_segments else detached(memory)


def build(
    base: LlamaForCausalLM, segment: int = 480, sensory: int = 30, recalled: int = 300, backward_segments: int = 4
) -> Reader:
    """Segments of `segment` tokens after the last `sensory` ones; `recalled` memories at most are kept."""
    return HierarchicalReader(base, segment, sensory, recalled, backward_segments)
