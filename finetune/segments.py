"""Rows longer than the window: trained on one segment after the other, with what was read before in a cache.

`docs/training_through_memory.md` says what a segment sees. Each one has its own backward, so that a step takes the
memory of one segment and the cache, however many there are.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from landmark_llama import LandmarkCache
from landmark_llama.configuration import LandmarkConfig

EVALUATED_WITH = "token_and_head"  # a choice that tokens share would look at those that are to be predicted


@dataclass(frozen=True)
class Segments:
    """How rows are cut: into `number` segments of `blocks` blocks that a model reads directly.

    Args:
        block_size: positions of a block, its landmark included.
        num_retrieved_blocks: how many of the blocks of earlier segments a query retrieves.
    """

    number: int
    blocks: int
    block_size: int
    num_retrieved_blocks: int

    @classmethod
    def of(cls, config: LandmarkConfig, number: int) -> "Segments":
        settings = config.segment_retrieval()
        return cls(number, settings.chunk_blocks, config.block_size, settings.num_retrieved_blocks)

    @property
    def positions(self) -> int:
        """Landmarked positions of a segment."""
        return self.blocks * self.block_size

    @property
    def tokens(self) -> int:
        """Ordinary tokens of a segment."""
        return self.blocks * (self.block_size - 1)

    def describe(self) -> str:
        return (
            f"a row is {self.number} segments of {self.tokens} tokens ({self.blocks} blocks), each of which retrieves "
            f"{self.num_retrieved_blocks} of the earlier blocks"
        )

    def cut(self, row: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A batch `input_ids` and `labels` (batch, number * tokens) as calls of a model, one for each segment.

        The labels of a segment have a column more, for what its last token predicts: the next segment's first.
        """
        places = range(0, row["input_ids"].shape[1], self.tokens)
        return [
            {
                "input_ids": row["input_ids"][:, start : start + self.tokens],
                "labels": row["labels"][:, start : start + self.tokens + 1],
            }
            for start in places
        ]


class SegmentTrainer(Trainer):
    """transformers' Trainer for rows of several segments.

    Args:
        segments: how rows are cut.
        settings: as the Trainer's.
    """

    def __init__(self, *, segments: Segments, **settings: Any) -> None:
        super().__init__(**settings)
        self.segments = segments

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of each segment of a batch of rows in turn; returns the loss of all."""
        calls = self.segments.cut(inputs)
        if num_items_in_batch is None:
            predicted = (inputs["labels"][:, 1:] != -100).sum()
            num_items_in_batch = predicted.to(self.args.device) * self.current_gradient_accumulation_steps
        sync_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        cache = LandmarkCache(self.model.config)
        losses = []
        for call in calls:
            # the processes' gradients are averaged once, after the last backward, as for accumulated batches
            together = sync_each or call is calls[-1]
            with nullcontext() if together else self.accelerator.no_sync(model):
                call["past_key_values"] = cache
                losses.append(super().training_step(model, call, num_items_in_batch))
        return torch.stack(losses).sum()

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any) -> Any:
        """Rows are streamed in evaluation, as long texts are, but with choices that look at no later token."""
        return super().prediction_step(model, {**inputs, "retrieval_granularity": EVALUATED_WITH}, *args, **settings)
