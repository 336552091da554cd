"""Landmark attention, by this project's own library.

Mohtashami & Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", arXiv 2305.16300.
Each block of tokens ends in a landmark whose score says how much the block matters. Training rows attend to all of
their blocks through grouped softmax; a longer text is read through a table of blocks: the nearest ones, and for each
token and head the `k` blocks whose landmarks score highest. Positions never leave those of training.

`landmark_key: pooled`, `landmark_query_rank` (docs/landmark_keys.md) and `block_weight: exact` (docs/exact_weights.md)
are this project's own options. With exact weights a dense model is read as it is, without training: `weights: dense`.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from comparisons.reader import Reader
from landmark_llama import LandmarkCache, LandmarkLlamaConfig, LandmarkLlamaForCausalLM

_OF_A_FILE = ("model_type", "architectures", "transformers_version")


class LandmarkReader(Reader):
    """The memory is the library's cache; a text is read by one call, which streams through it."""

    remembers_in_training = False

    def __init__(self, base: LandmarkLlamaForCausalLM, segment: int, stream: bool):
        super().__init__(base, segment)
        self.stream = stream

    def read(self, input_ids: Tensor, memory: LandmarkCache | None) -> tuple[Tensor, LandmarkCache | None]:
        if self.training:  # rows by themselves
            return self.base.model(input_ids=input_ids).last_hidden_state, None
        memory = LandmarkCache(self.base.config) if memory is None else memory
        return self.base.model(input_ids=input_ids, past_key_values=memory).last_hidden_state, memory

    @torch.no_grad()
    def losses(self, input_ids: Tensor) -> Tensor:
        cache = LandmarkCache(self.base.config) if self.stream else None
        states = self.base.model(input_ids=input_ids[:, :-1], past_key_values=cache).last_hidden_state
        pieces = zip(states.split(self.segment, dim=1), input_ids[:, 1:].split(self.segment, dim=1), strict=True)
        losses = [
            cross_entropy(self.logits(piece).transpose(1, 2).float(), target, reduction="none")
            for piece, target in pieces
        ]
        return torch.cat(losses, dim=1)

    def logits(self, states: Tensor) -> Tensor:
        """Landmarks are never predicted; they are the last row of the vocabulary."""
        return self.base.lm_head(states)[..., : self.base.config.landmark_token_id]

    def fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return _with_landmark(weights, self.base.config.landmark_token_id)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, LandmarkCache]:
        cache = LandmarkCache(self.base.config)
        output = self.base.model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1)
        return self.logits(output.last_hidden_state[:, -1]), cache

    @torch.no_grad()
    def decode(self, token: Tensor, state: LandmarkCache) -> tuple[Tensor, LandmarkCache]:
        states, cache = self.read(token, state)
        return self.logits(states[:, -1]), cache


def build(
    base: LlamaForCausalLM, segment: int = 512, block_size: int = 51, k: int = 4, stream: bool = False, **settings
) -> Reader:
    """The landmark model of a dense one: same weights, one more row in the embedding.

    Args:
        segment: ordinary tokens of a training row.
        block_size: positions of a block, its landmark included.
        k: blocks that are retrieved.
        stream: also read what fits a training row through the table of blocks, as the paper does, not as in training.
        settings: further fields of `LandmarkLlamaConfig`.
    """
    fields = {name: value for name, value in base.config.to_dict().items() if name not in _OF_A_FILE}
    vocabulary = base.config.vocab_size
    fields |= {"vocab_size": vocabulary + 1, "landmark_token_id": vocabulary, "block_size": block_size}
    fields |= {"num_retrieved_blocks": k, "train_context_length": segment + segment // (block_size - 1)}
    with torch.random.fork_rng(devices=[]):
        model = LandmarkLlamaForCausalLM(LandmarkLlamaConfig(**fields | settings))
    foreign = model.load_state_dict(_with_landmark(base.state_dict(), vocabulary), strict=False).unexpected_keys
    if foreign:
        raise ValueError(f"base: has weights that a landmark LLaMA has not, the first being {foreign[0]}")
    return LandmarkReader(model, segment, stream)


def _with_landmark(weights: dict[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """The same weights; where they are those of a dense model, the landmark gets the mean row."""
    rows = ("embed_tokens.weight", "lm_head.weight")
    return {
        name: torch.cat([weight, weight.mean(dim=0, keepdim=True)])
        if name.endswith(rows) and len(weight) == vocabulary
        else weight
        for name, weight in weights.items()
    }
