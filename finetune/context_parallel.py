"""Rows longer than one device holds: trained by several processes together, each with its part of the columns.

The processes of a group read their own batches, as always, and work through them together, one after the other. So a
step has the rows that it would have without, and its loss and gradients are the same within rounding; a process holds
the activations of one part (`docs/distributed.md`).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from landmark_llama.attention.context_parallel import ContextShard


@dataclass(frozen=True)
class ContextParallel:
    """The processes that hold rows together, and how rows are cut."""

    group: dist.ProcessGroup
    block_size: int

    @classmethod
    def of(cls, size: int, block_size: int) -> "ContextParallel":
        """Groups of `size` neighbouring processes; every process must call it."""
        group, _ = dist.new_subgroups(size)
        return cls(group, block_size)

    def parts(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """This process's parts of the batches of all processes of the group, as calls of a model.

        Args:
            batch: this process's own `input_ids` and `labels` (rows, columns), all processes' of one shape.
        """
        shard = ContextShard.of(self.group, batch["input_ids"].shape[1], self.block_size)
        ids, labels = (self._of_all(batch[name]) for name in ("input_ids", "labels"))
        return [
            # a column more, for what the part's last token predicts: the next part's first
            {"input_ids": shard.cut(x), "labels": shard.cut(y, more=1), "context_shard": shard, "use_cache": False}
            for x, y in zip(ids, labels, strict=True)
        ]

    def _of_all(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return found


class ContextParallelTrainer(Trainer):
    """transformers' Trainer for rows that several processes hold together.

    Args:
        context: which processes.
        settings: as the Trainer's.
    """

    def __init__(self, *, context: ContextParallel, **settings: Any) -> None:
        super().__init__(**settings)
        self.context = context

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int) -> Tensor:
        """Forward and backward of this process's part of each batch of the group; returns the loss of all parts."""
        parts = self.context.parts(self._prepare_inputs(inputs))
        sync_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        for i, part in enumerate(parts):
            # the processes' gradients are added up once, after the last backward, as for accumulated batches
            together = sync_each or i == len(parts) - 1
            with nullcontext() if together else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any
    ) -> tuple[Tensor, None, None]:
        """The loss of this process's own rows."""
        inputs, losses = self._prepare_inputs(inputs), []
        for part in self.context.parts(inputs):
            with self.compute_loss_context_manager():
                losses.append(model(**part, num_items_in_batch=1).loss)
        of_all = torch.stack(losses)
        dist.all_reduce(of_all, group=self.context.group)
        return of_all[self.context.group.rank()] / (inputs["labels"][:, 1:] != -100).sum(), None, None
