"""Decoding steps as CUDA graphs: the layers of a call of one token a row, recorded once, then replayed.

A step of a large model is hundreds of short kernels, and a GPU is done with each of them before the host has launched
the next; a graph is launched as one. It holds the addresses of what it reads and writes: a step's inputs are copied
into tensors of its own, and when the cache has moved, it is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.configuration import RetrievalSettings
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.reading.table import kernels_take

STEP_COLUMNS = 2  # most columns of a step: a token, and the landmark where it ends its block

Layers = Callable[[Tensor, QueryGroups], Tensor]  # states (batch, columns, hidden_size) to the same
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays `step`, and the tensor that then holds its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


class DecodingGraphs:
    """The recorded steps of one `LandmarkCache`.

    Args:
        record: makes of a step what does it again with the same tensors.
    """

    def __init__(self, record: Recorder = record_cuda_graph) -> None:
        self._record = record
        self._addresses: Hashable = None  # where the cache stood when the steps were recorded
        self._steps: dict[Hashable, _Step | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingGraphs:
        """No steps: they belong to the memory of the cache that is copied, and a CUDA graph cannot be."""
        return DecodingGraphs(self._record)

    def run(
        self,
        layers: Layers,
        states: Tensor,
        groups: QueryGroups,
        *,
        storages: Sequence[BlockStorage],
        settings: RetrievalSettings,
        rotary: RotaryTable,
    ) -> Tensor:
        """`layers(states, groups)`, replayed where it can be. Overwritten by the next call.

        A kind of step is recorded when it comes for the second time: the first compiles its kernels.
        """
        if not _can_be_recorded(states, groups, storages, settings, rotary):
            return layers(states, groups)
        # the capacity, too: memory that was given back may be taken again for another shape
        addresses = tuple((x.key.data_ptr(), x.value.data_ptr(), x.capacity) for x in storages)
        if addresses != self._addresses:
            self._addresses, self._steps = addresses, {}
        tensors = (states, *(x for x in groups if isinstance(x, Tensor)))
        # the numbers of the host that a layer's work depends on, beside the shapes
        kind = (settings, groups.window, groups.one_block, groups.candidates > 0, *(x.shape for x in tensors))
        if kind not in self._steps:
            self._steps[kind] = None
            return layers(states, groups)
        if self._steps[kind] is None:
            self._steps[kind] = _Step(layers, states, groups, self._record)
        return self._steps[kind](states, groups)


class _Step:
    """One recorded kind of step, with its own inputs and output."""

    def __init__(self, layers: Layers, states: Tensor, groups: QueryGroups, record: Recorder) -> None:
        self.states = states.clone()
        self.groups = QueryGroups(*(x.clone() if isinstance(x, Tensor) else x for x in groups))
        self.replay, self.output = record(lambda: layers(self.states, self.groups))

    def __call__(self, states: Tensor, groups: QueryGroups) -> Tensor:
        for into, x in zip((self.states, *self.groups), (states, *groups), strict=True):
            if isinstance(into, Tensor):
                into.copy_(x)
        self.replay()
        return self.output


def _can_be_recorded(
    states: Tensor,
    groups: QueryGroups,
    storages: Sequence[BlockStorage],
    settings: RetrievalSettings,
    rotary: RotaryTable,
) -> bool:
    """Whether a call is a step, all of it on one GPU, in which nothing waits for the device or makes room."""
    return (
        states.shape[1] <= STEP_COLUMNS
        and settings.granularity != "token"  # whose blocks PyTorch chooses
        and all(kernels_take(storage, states.dtype, rotary) for storage in storages)
        and all(storage.key.device == states.device for storage in storages)
        and all(groups.stop <= storage.capacity * storage.block_size for storage in storages)
    )
