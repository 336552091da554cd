"""A dense transformer, and how one is made to read more than it was trained on, without training it again.

Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), as LLaMA has it. It is trained on rows of `segment`
tokens that know nothing of each other. How it reads a long text is its `reading`:

plain     every token sees all tokens before it, at positions that it was never trained on
alone     each segment by itself, from position 0: what there is without any memory
yarn      plain, rotary positions stretched for the text's length: Peng et al., "YaRN" (arXiv 2309.00071)
dynamic   plain, the base of the rotary positions raised for the text's length (dynamic NTK)

The last two are transformers' own. Invariant: all readings agree on a text of one segment.
"""

import copy

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from comparisons.reader import Reader

READINGS = ("plain", "alone", "yarn", "dynamic")


class DenseReader(Reader):
    """LLaMA as it is: the memory is its cache of keys and values."""

    remembers_in_training = False

    def __init__(self, base: LlamaForCausalLM, segment: int, reading: str):
        super().__init__(base, segment)
        if reading not in READINGS:
            raise ValueError(f"reading={reading!r}: choose from {', '.join(READINGS)}")
        self.reading, self.trained = reading, base.config.max_position_embeddings

    def read(self, input_ids: Tensor, memory: DynamicCache | None) -> tuple[Tensor, DynamicCache | None]:
        if self.training or self.reading == "alone":
            return self.base.model(input_ids=input_ids, use_cache=False).last_hidden_state, None
        memory = DynamicCache(config=self.base.config) if memory is None else memory
        states = self.base.model(input_ids=input_ids, past_key_values=memory, use_cache=True).last_hidden_state
        return states, memory

    def losses(self, input_ids: Tensor) -> Tensor:
        self._scale(input_ids.shape[1] - 1)
        return super().losses(input_ids)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        self._scale(input_ids.shape[1])
        scores, state = super().prefill(input_ids)
        return scores, state if self.reading == "alone" else state[1]

    @torch.no_grad()
    def decode(self, token: Tensor, state: DynamicCache) -> tuple[Tensor, DynamicCache]:
        if self.reading == "alone":
            return super().decode(token, state)
        states, cache = self.read(token, state)
        return self.logits(states[:, -1]), cache

    def _scale(self, length: int) -> None:
        """Rotary positions for texts of `length` tokens, one scaling for the whole text."""
        if self.reading in ("plain", "alone"):
            return
        config, factor = copy.deepcopy(self.base.config), length / self.trained
        if factor > 1:
            scaling = {"rope_type": self.reading, "factor": factor, "original_max_position_embeddings": self.trained}
            config.rope_parameters = {**config.rope_parameters, **scaling}
        self.base.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.base.device)


def build(base: LlamaForCausalLM, segment: int = 512, reading: str = "plain") -> Reader:
    """The dense reader, trained on rows of `segment` tokens."""
    return DenseReader(base, segment, reading)
