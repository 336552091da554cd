"""What a model retrieves while it reads and writes: the blocks that each step, layer and head chose, and their weights.

    with record_retrieved(model) as retrieved:
        model.generate(**inputs, past_key_values=cache)
    retrieved[3].block      # of the fourth step: (layers, batch, heads, k)

Nothing is recorded, and nothing computed for it, outside of such a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from landmark_llama.attention.windows import upcast
from landmark_llama.reading.choice import Choice
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.saved.fingerprint import reader_of


class RetrievedStep(NamedTuple):
    """What one call retrieved for the last token of each row: in generation, for the token that comes next.

    block: (layers, batch, heads, k), integer, on the CPU: the blocks chosen, in order; -1 where fewer than k exist. k
        is 0 for a call that was not read through the cache.
    weight: the same shape: the share of a head's attention that each of them got. What the shares of a head lack to 1
        went to the blocks that it reads directly.
    score: for each layer (batch, heads, candidates), what the heads compared when they chose; where that was not asked
        for, or nothing was compared, as in a first layer whose landmarks are all alike, None.
    """

    block: Tensor
    weight: Tensor
    score: tuple[Tensor | None, ...] = ()


class Recorder:
    """Collects the steps of one model; made by `record_retrieved`."""

    def __init__(self, reader: nn.Module, scores: bool = False) -> None:
        self.config, self.scores, self.steps = reader.config, scores, []
        self._layers: list[RetrievedStep | None] = []
        self._scores: list[Tensor | None] = []

    def begin(self, *call: object) -> None:
        """A call begins."""
        self._layers = [None] * self.config.num_hidden_layers
        self._scores = [None] * self.config.num_hidden_layers

    def end(self, reader: nn.Module, given: object, output: object) -> None:
        """A call ends: its step is complete."""
        batch, heads = output.last_hidden_state.shape[0], self.config.num_attention_heads
        k = max((x.block.shape[-1] for x in self._layers if x is not None), default=0)
        block = torch.full((len(self._layers), batch, heads, k), -1)
        weight = torch.zeros(block.shape)
        for layer, found in enumerate(self._layers):
            if found is not None:
                block[layer], weight[layer] = found[:2]
        self.steps.append(RetrievedStep(block, weight, tuple(self._scores)))

    def add(self, layer: int, block: Tensor, weight: Tensor, rows: Tensor | None = None) -> None:
        """Notes the blocks (batch, kv_heads, group, k) of a layer and their weights, of all rows or some.

        rows: (batch,), boolean: whether a row has tokens in this chunk of the call.
        """
        weight = weight.float().masked_fill(block < 0, 0)
        new = RetrievedStep(*(x.flatten(1, 2).cpu() for x in (block, weight)))
        old = self._layers[layer]
        if rows is not None and not rows.all() and old is not None:
            rows = rows.cpu()[:, None, None]
            new = RetrievedStep(*(torch.where(rows, x, y) for x, y in zip(new[:2], old[:2], strict=True)))
        self._layers[layer] = new

    def add_scores(self, layer: int, score: Tensor) -> None:
        """Notes what the heads of a layer compare, (batch, heads, candidates)."""
        self._scores[layer] = score.float().cpu()


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def recorder() -> Recorder | None:
    """Who records in this block; None outside of `record_retrieved`."""
    return _recorder.get()


@contextlib.contextmanager
def record_retrieved(model: nn.Module, scores: bool = False) -> Iterator[list[RetrievedStep]]:
    """Records what `model` retrieves, a `RetrievedStep` a call, in the list that it gives.

    scores: also what the heads compare, of calls with one token on a CPU.
    On a GPU, PyTorch then attends, as the kernels do not tell the weights.
    """
    reader = reader_of(model)
    found = Recorder(reader, scores)
    hooks = reader.register_forward_pre_hook(found.begin), reader.register_forward_hook(found.end)
    token = _recorder.set(found)
    try:
        yield found.steps
    finally:
        _recorder.reset(token)
        for hook in hooks:
            hook.remove()


Report = Callable[[Choice | None, Tensor | None, Tensor], None]


def report_of_chunk(
    layer: int, groups: QueryGroups, storage: BlockStorage, exact_weights: bool = False
) -> Report | None:
    """What is told the choice of a chunk's queries in a layer, if anybody records.

    exact_weights: blocks weigh what their tokens do.
    """
    found = _recorder.get()
    if found is None:
        return None

    def report(choice: Choice | None, scoring: Tensor | None, lse: Tensor) -> None:
        """The queries that weigh the blocks (batch, kv_heads, group, groups, queries, k + 1, head_dim), rotated and
        scaled, and the logsumexp over their direct blocks (batch, kv_heads, group, groups, queries).
        """
        if choice is None:
            return
        length = groups.valid.flatten(1).sum(1)  # (batch,)
        last = (length - 1).clamp_min(0)
        if not found.config.predict_from_landmark:
            # the landmark after a block's last token predicts nothing
            is_landmark = (groups.start + last) % storage.block_size == storage.block_size - 1
            last = (last - is_landmark.long()).clamp_min(0)
        row = torch.arange(len(last), device=last.device)
        query = groups.slot.expand(len(last), -1)[row, last]  # (batch,), counted over groups and queries
        shape = (*lse.shape, choice.block.shape[-1])
        one = Choice(*(x.expand(shape).flatten(3, 4)[row, :, :, query] for x in choice))  # (batch, kv_heads, group, k)
        rotated = one.at_their_distances(scoring.flatten(3, 4)[row, :, :, query])
        block = one.block.clamp_min(0)
        key = upcast(storage.gather(block)[0])  # (batch, kv_heads, group, k, block_size, head_dim)
        score = torch.einsum("...nd,...d->...n", key, upcast(rotated))
        bias = None if exact_weights else storage.gather_biases(block)
        score = score[..., :-1].logsumexp(-1) if exact_weights else score[..., -1]
        score = (score if bias is None else score + bias).masked_fill(one.block < 0, -torch.inf)
        direct = lse.flatten(3, 4)[row, :, :, query].unsqueeze(-1)
        total = torch.logaddexp(direct, score.logsumexp(-1, keepdim=True))
        found.add(layer, one.block, (score - total).exp(), length > 0)

    return report
