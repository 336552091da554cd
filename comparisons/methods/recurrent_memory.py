"""Recurrent Memory Transformer: memory tokens are read before a segment and written after it.

Bulatov, Kuratov & Burtsev, "Recurrent Memory Transformer", arXiv 2207.06881 (and arXiv 2304.11062 for long texts). The
model's input is [memory; segment; memory]; the states of the last `memory` places are the memory that the next segment
begins with. The model itself is unchanged, and the memory is all that passes between segments. Gradients flow back
through `backward_segments` segments. Training follows a curriculum: rows are cut into texts of one segment first, then
of two, and so on, in equal shares of the training.

Invariant: without memory tokens it is the dense model that reads each segment by itself.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from comparisons.reader import Reader, detached


class RecurrentMemoryReader(Reader):
    """The memory: (B, memory, C), in the place of embeddings."""

    def __init__(self, base: LlamaForCausalLM, segment: int, memory: int, backward_segments: int, stages: int):
        super().__init__(base, segment)
        self.backward_segments, self.stages = backward_segments, stages
        self.initial = nn.Parameter(torch.randn(memory, base.config.hidden_size) * base.config.initializer_range)

    def read(self, input_ids: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if memory is None:
            memory = self.initial.expand(len(input_ids), -1, -1)
        count = memory.shape[1]
        inputs = torch.cat([memory, self.base.model.embed_tokens(input_ids), memory], dim=1)
        states = self.base.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states[:, count : count + input_ids.shape[1]], states[:, count + input_ids.shape[1] :]

    def between(self, memory: Tensor, segment: int) -> Tensor | None:
        """No memory where the curriculum's text ends; no gradient every `backward_segments` segments."""
        if segment % (1 + int(self.progress * self.stages)) == 0 and self.progress < 1 - 1 / self.stages:
            return None
        return memory if segment % self.backward_segments else detached(memory)


def build(
    base: LlamaForCausalLM, segment: int = 480, memory: int = 16, backward_segments: int = 4, stages: int = 4
) -> Reader:
    """Segments of `segment` tokens with `memory` tokens before and after them.

    stages: of the curriculum; the last one reads whole rows as one text. 1: no curriculum.
    """
    return RecurrentMemoryReader(base, segment, memory, backward_segments, stages)
