"""What an answer was read from: the blocks that weighed most, as text with its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from landmark_llama.memories.asking import Memory
from landmark_llama.reading.trace import RetrievedStep

AROUND = 24  # tokens shown before and after a passage


@dataclass(frozen=True)
class Passage:
    """One block of a memory.

    weight: its share of all attention, the mean over steps, layers and heads.
    before, after: some of the text around it.
    source: the file; None where the memory was saved without its text. line, character: where it begins there, the
        line from 1 and the character from 0 (-1 where it is not known).
    first, last: its tokens, counted over the memory.
    """

    block: int
    weight: float
    before: str
    text: str
    after: str
    source: str | None
    line: int
    character: int
    first: int
    last: int

    @property
    def place(self) -> str:
        """In words."""
        return f"tokens {self.first:,} to {self.last:,}" if self.source is None else f"{self.source}, line {self.line}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weight": round(self.weight, 6)}


def block_weights(steps: Sequence[RetrievedStep], blocks: int, *, first_layer: int) -> Tensor:
    """The weights of a memory's `blocks` by step and layer, (steps, layers, blocks), the mean over heads and rows.

    first_layer: layers before it are left out (their weights are 0 here): in the first layer all landmark tokens' keys
        are equal, so that it takes the latest blocks, whatever they say.
    """
    layers = steps[0].block.shape[0]
    weights = torch.zeros(len(steps), layers, blocks)
    for into, step in zip(weights, steps, strict=True):
        block, weight = step.block.flatten(1), step.weight.flatten(1)
        weight = weight.masked_fill((block < 0) | (block >= blocks), 0)
        into.scatter_add_(1, block.clamp(0, max(blocks - 1, 0)), weight / max(1, step.block[0, ..., 0].numel()))
    weights[:, :first_layer] = 0
    return weights


def first_layer_that_chooses(model: Any) -> int:
    """0 where the first layer's landmarks can be told apart, else 1."""
    config = model.config
    return 0 if config.landmark_key == "pooled" or config.num_hidden_layers == 1 else 1


def text_blocks(memory: Memory) -> int:
    """Blocks of the text, at least one; without the last if the question goes on in it."""
    return max(1, max(memory.manifest.ordinary) // (memory.manifest.shape.block_size - 1))


def heaviest(memory: Memory, steps: Sequence[RetrievedStep], number: int = 5) -> list[Passage]:
    """The passages that weighed most while `steps` were made, the heaviest first."""
    if not steps:
        return []
    weights = block_weights(steps, text_blocks(memory), first_layer=first_layer_that_chooses(memory.model))
    mean = weights[:, first_layer_that_chooses(memory.model) :].mean((0, 1))
    found = mean.topk(min(number, len(mean)))
    return [
        passage(memory, block, weight)
        for weight, block in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        if weight > 0
    ]


def passage(memory: Memory, block: int, weight: float = 0.0) -> Passage:
    """A block of the memory as text."""
    size = memory.manifest.shape.block_size - 1
    first, last = block * size, min((block + 1) * size, max(memory.manifest.ordinary)) - 1
    tokens = memory.tokens
    if not len(tokens):
        return Passage(block, weight, "", "", "", None, 0, -1, first, last)
    _, character, line = tokens[first].tolist()
    parts = tokens[max(0, first - AROUND) : first], tokens[first : last + 1], tokens[last + 1 : last + 1 + AROUND]
    before, text, after = _decode_side_by_side(memory.tokenizer, [part[:, 0].tolist() for part in parts])
    return Passage(block, weight, before, text, after, _source(memory, first), line, character, first, last)


def _decode_side_by_side(tokenizer: PreTrainedTokenizerBase, parts: list[list[int]]) -> list[str]:
    """The texts of parts that follow each other: many tokenizers drop a space in front of what they decode."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    texts, ids, done = [], [], ""
    for part in parts:
        ids = ids + part
        whole = decode(ids)
        # a part may end inside a character
        texts.append(whole[len(done) :] if whole.startswith(done) else decode(part))
        done = whole
    return texts


def _source(memory: Memory, token: int) -> str | None:
    """The name of the text that holds a token."""
    name = None
    for entry in memory.manifest.sources:
        if entry["first"] > token:
            break
        name = entry["name"]
    return name
