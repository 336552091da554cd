"""Decoding steps as CUDA graphs: the layers of a call of one token a row, recorded once, then replayed.

A step of a large model is hundreds of short kernels, and a GPU is done with each of them before the host has launched
the next; a graph is launched as one. It holds the addresses of what it reads and writes: a step's inputs are copied
into tensors of its own, and when the cache has moved, it is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.reading.table import Table, kernels_take

STEP_COLUMNS = 2  # most columns of a step: a token, and the landmark if it completes its block

Layers = Callable[[Tensor, Table], Tensor]  # states (batch, columns, hidden_size) to the same
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records `step`; returns its replay and the tensor that holds its output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


class DecodingGraphs:
    """The recorded steps of one `LandmarkCache`.

    Args:
        record: records a step; returns its replay and its output. None: `record_cuda_graph`.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record_cuda_graph if record is None else record
        self._addresses: Hashable = None  # of the cache when the steps were recorded
        self._steps: dict[Hashable, _Step | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingGraphs:
        """An empty recorder: recorded steps hold the old cache's addresses, and a CUDA graph cannot be copied."""
        return DecodingGraphs(self._record)

    @staticmethod
    def can_record(storages: Sequence[BlockStorage], dtype: torch.dtype, rotary: RotaryTable) -> bool:
        """Whether steps over `storages` can be recorded: the kernels read all of them."""
        return all(kernels_take(storage, dtype, rotary) for storage in storages)

    def run(self, layers: Layers, states: Tensor, table: Table, *, rotary: RotaryTable) -> Tensor:
        """`layers(states, table)`, replayed if it can be. The next call overwrites the result.

        A kind of step is recorded when it comes for the second time: the first compiles its kernels.
        """
        if not _is_step(states, table) or not self.can_record(table.storages, states.dtype, rotary):
            return layers(states, table)
        # with the capacity: memory that was given back may be taken again for another shape
        addresses = tuple((_addresses(storage), storage.capacity) for storage in table.storages)
        if addresses != self._addresses:
            self._addresses, self._steps = addresses, {}
        groups = table.groups
        tensors = (states, *(x for x in groups if isinstance(x, Tensor)))
        # the host's numbers that a layer's work depends on, beside the shapes
        kind = (table.settings, groups.window, groups.one_block, groups.candidates > 0, *(x.shape for x in tensors))
        if kind not in self._steps:
            self._steps[kind] = None
            return layers(states, table)
        if self._steps[kind] is None:
            self._steps[kind] = _Step(layers, states, table, self._record)
        return self._steps[kind](states, groups)


class _Step:
    """One recorded kind of step, with its own inputs and output."""

    def __init__(self, layers: Layers, states: Tensor, table: Table, record: Recorder) -> None:
        self.states = states.clone()
        self.groups = QueryGroups(*(x.clone() if isinstance(x, Tensor) else x for x in table.groups))
        recorded = replace(table, groups=self.groups)
        self.replay, self.output = record(lambda: layers(self.states, recorded))

    def __call__(self, states: Tensor, groups: QueryGroups) -> Tensor:
        for into, x in zip((self.states, *self.groups), (states, *groups), strict=True):
            if isinstance(into, Tensor):
                into.copy_(x)
        self.replay()
        return self.output


def _addresses(storage: BlockStorage) -> tuple[int, ...]:
    landmarks = (of(storage.capacity) for of in (storage.landmarks, storage.biases))
    return tuple(x.data_ptr() for x in (*storage.resident, *landmarks) if x is not None)


def _is_step(states: Tensor, table: Table) -> bool:
    """Whether a call is a step, all of it on one GPU, that neither waits for the device nor makes room."""
    return (
        table.kernels
        and states.shape[1] <= STEP_COLUMNS
        and table.settings.granularity != "token"  # whose blocks PyTorch chooses
        and all(storage.capacity and storage.device == states.device for storage in table.storages)
        and all(table.groups.stop <= storage.capacity * storage.block_size for storage in table.storages)
    )
