"""Temp-LoRA: an adapter that is trained on what was just read and thrown away at the end of the text.

Wang et al., "With Greater Text Comes Greater Necessity: Inference-Time Training Helps Long Text Generation", arXiv
2401.11504. A dense model reads a text in segments, each with the `context` tokens before it. When a segment is
complete, a low-rank adapter is trained on it for `steps` steps: the text is remembered in weights, and keys and
values of what lies further back are dropped. Each text has an adapter of its own, none at its beginning. Here the
optimiser (Adam) begins anew with each segment; the paper's goes on.

Invariant: the first segment, and all of them with 0 steps, are what the dense model reads in a window; rows of a batch
do not change each other; a repeated text becomes likelier than without the adapter.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from comparisons.adapters import Change, changed, linear_layers, new_change
from comparisons.reader import Reader

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


class Learnt(NamedTuple):
    """The memory: the last `context` tokens (B, up to context), and the adapter, one for each row; None before any."""

    context: Tensor
    adapter: dict[str, Change] | None


class TempLoraReader(Reader):
    """Trained as a dense model; learns while it reads."""

    remembers_in_training = False

    def __init__(self, base: LlamaForCausalLM, segment: int, context: int, rank: int, steps: int, learning_rate: float):
        super().__init__(base, segment)
        self.context, self.rank, self.steps, self.learning_rate = context, rank, steps, learning_rate
        self.layers = linear_layers(base, ADAPTED)

    def read(self, input_ids: Tensor, memory: Learnt | None) -> tuple[Tensor, Learnt | None]:
        if self.training:  # rows by themselves
            return self.base.model(input_ids=input_ids, use_cache=False).last_hidden_state, None
        memory = Learnt(input_ids[:, :0], None) if memory is None else memory
        states = self._states(memory, input_ids)
        adapter = memory.adapter
        if self.steps and input_ids.shape[1] == self.segment:  # a segment that is read again to decode is not complete
            adapter = self._learn(memory, input_ids)
        return states, Learnt(torch.cat([memory.context, input_ids], dim=1)[:, -self.context :], adapter)

    def _states(self, memory: Learnt, input_ids: Tensor) -> Tensor:
        """States of `input_ids` (B, T) behind their context."""
        ids = torch.cat([memory.context, input_ids], dim=1)
        with changed(self.layers, memory.adapter or {}, scale=1.0):
            states = self.base.model(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, memory.context.shape[1] :]

    def _learn(self, memory: Learnt, input_ids: Tensor) -> dict[str, Change]:
        """The adapter after a few steps on a segment. Only the segment's own tokens are predicted."""
        rows, ids = len(input_ids), torch.cat([memory.context[:, -1:], input_ids], dim=1)
        before = memory._replace(context=memory.context[:, :-1])
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(0)  # reading a text twice gives the same
        start = memory.adapter or {name: new_change(layer, self.rank, rows) for name, layer in self.layers.items()}
        torch.random.set_rng_state(generator_state)
        adapter = {name: tuple(x.detach().clone().requires_grad_() for x in change) for name, change in start.items()}
        weights = [x for change in adapter.values() for x in change]
        optimiser = torch.optim.Adam(weights, lr=self.learning_rate, eps=1e-5)  # no step on noise
        with torch.enable_grad():
            for _ in range(self.steps):
                scores = self.logits(self._states(before._replace(adapter=adapter), ids[:, :-1]))
                # the mean of a row, summed over rows: no row's step depends on how many others there are
                loss = cross_entropy(scores.transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(1).sum()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimiser.step()
        return {name: tuple(x.detach() for x in change) for name, change in adapter.items()}


def build(
    base: LlamaForCausalLM,
    segment: int = 256,
    context: int = 256,
    rank: int = 8,
    steps: int = 2,
    learning_rate: float = 1e-3,
) -> Reader:
    """Segments of `segment` tokens behind `context` more: together what the dense model was trained on."""
    return TempLoraReader(base, segment, context, rank, steps, learning_rate)
