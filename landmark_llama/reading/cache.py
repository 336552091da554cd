"""LandmarkCache: what a landmark LLaMA remembers of the text it has read, as a transformers `Cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from landmark_llama.configuration import LandmarkConfig
from landmark_llama.reading.approximate import ApproximateLandmarks, IndexKind
from landmark_llama.reading.decoding_graphs import DecodingGraphs
from landmark_llama.reading.saved import SavedMixin
from landmark_llama.reading.storage import BlockStorage, DeviceStorage, Prior


class LandmarkCacheLayer(CacheLayerMixin):
    """One layer's blocks. Positions are counted by the cache; the layer only stores what it is given."""

    is_croppable = True

    def __init__(self, storage: BlockStorage) -> None:
        super().__init__()
        self.storage = storage

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        start: Tensor,
        stop: int | None = None,
        prior: Prior | None = None,
    ) -> BlockStorage:
        """Stores (batch, length, kv_heads, head_dim) from positions `start` (batch,) on; returns the storage."""
        self.storage.write(key_states, value_states, start, stop, prior)
        return self.storage

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.storage.select_rows(beam_idx)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage takes its shape from the first keys that it is given."""

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        raise NotImplementedError("a LandmarkCache masks by blocks and has no dense mask: use it with a landmark LLaMA")

    def get_seq_length(self) -> NoReturn:
        raise NotImplementedError("lengths are counted by the cache: LandmarkCache.get_seq_length()")

    def get_max_length(self) -> int:
        return -1


class LandmarkCache(SavedMixin, Cache):
    """Keys, values and landmarks of everything a batch has read, by row, layer and block.

    Rows are independent: each one's tokens are numbered from its first real one, and what `attention_mask` hides is
    never stored. The cache may be used over several calls and turns that end anywhere inside a block.

    Args:
        config: of the model it is for.
        storage: makes the storage of one layer, given the block size: `DeviceStorage`, by default, or where there is
            more room `HostStorage()` or `FileStorage(folder)` (`docs/memory_tiers.md`).
        index: on a CPU, choose among many blocks approximately, by an index of the package faiss, `"hnsw"` or `"ivf"`
            (`docs/memory_tiers.md`); None: exactly.
        cuda_graphs: on a GPU, record the layers of a decoding step and replay them, which spares the host the launching
            (`docs/reading_on_a_gpu.md`). The model's weights must stay where they are while the cache is used.
            Elsewhere it changes nothing.

    Example:

        cache = LandmarkCache(model.config)
        model(first_ids, past_key_values=cache)                              # reads, in calls of any length
        model.generate(all_ids, past_key_values=cache, max_new_tokens=20)    # goes on where the cache ends
        cache.crop(-20)                                                      # forgets the last 20 columns
        cache.save("novel")                                                  # LandmarkCache.load("novel", model)
    """

    def __init__(
        self,
        config: LandmarkConfig,
        storage: Callable[[int], BlockStorage] = DeviceStorage,
        *,
        index: IndexKind | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if not isinstance(config, LandmarkConfig):
            raise ValueError(
                "config: a LandmarkCache is made from a landmark model's, such as a LandmarkLlamaConfig, got "
                f"{type(config).__name__}"
            )
        self.block_size = config.block_size
        if index is not None and (config.block_weight == "exact" or config.retrieval_granularity == "token"):
            raise ValueError(
                f"index={index!r}: needs block_weight='landmark' and a choice for each head, not "
                f"block_weight={config.block_weight!r}, retrieval_granularity={config.retrieval_granularity!r}; "
                "leave it out to compare all landmarks"
            )
        self._make_storage, self._index = storage, index
        self.graphs = DecodingGraphs() if cuda_graphs else None
        self._first_ties = config.landmark_key == "token"  # layer 0's landmark keys depend on their positions alone
        super().__init__(layers=self._new_layers(config.num_hidden_layers))
        self.aligned_block: tuple | None = None  # kept from one decoding step to the next (`reading/aligned.py`)
        self._real: Tensor | None = None  # (batch, columns) boolean, on the CPU: which columns held an ordinary token
        self._ordinary: Tensor | None = None  # (batch,): how many; summing them at each step takes long in long texts
        self._saved: Tensor | int = 0  # (batch,): of them, those of a saved memory, which stand before all columns

    @property
    def ordinary_counts(self) -> Tensor | None:
        """Ordinary tokens each row has seen, (batch,), on the CPU; None before the first call."""
        return self._ordinary

    @property
    def storages(self) -> list[BlockStorage]:
        """The blocks of each layer."""
        return [layer.storage for layer in self.layers]

    def ordinary_tokens(self, batch: int) -> Tensor:
        """Ordinary tokens each row has seen: (batch,), on the CPU. Raises ValueError if the cache has other rows."""
        if self._real is None:
            return torch.zeros(batch, dtype=torch.long)
        if len(self._real) != batch:
            raise ValueError(
                f"the cache holds {len(self._real)} rows, input_ids has {batch}: use one cache for one batch"
            )
        return self._ordinary

    def begin_after(self, ordinary: Tensor) -> None:
        """Begins at column 0 behind `ordinary` (batch,) tokens, which the storages hold already."""
        self._real = torch.zeros(len(ordinary), 0, dtype=torch.bool)
        self._saved = self._ordinary = ordinary

    def expect(self, positions: int) -> None:
        """Announces that the longest row will soon hold `positions` landmarked positions."""
        for layer in self.layers:
            layer.storage.expect(-(-positions // self.block_size))

    def advance(self, real: Tensor) -> None:
        """Counts the columns of a call, once every layer has stored them. `real`: (batch, columns), boolean."""
        real = real.cpu()
        for layer in self.layers:
            layer.is_initialized = True
        if self._real is None:
            self._real, self._ordinary = real, real.sum(1)
        else:
            self._real = torch.cat([self._real, real], dim=1)
            self._ordinary = self._ordinary + real.sum(1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` seen, padding included: what `generate` slices by."""
        return 0 if self._real is None else self._real.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns; a positive number is the length to keep, as it once was."""
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if keep < 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: the cache holds {length} columns only")
        if self._real is not None:
            # what is stored beyond a row's length is never read, and overwritten by what comes next
            self._real = self._real[:, :keep]
            self._ordinary = self._real.sum(1) + self._saved

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        if self._real is not None:
            self._real, self._ordinary = self._real[beam_idx.cpu()], self._ordinary[beam_idx.cpu()]
            self._saved = self._saved if isinstance(self._saved, int) else self._saved[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows `indices`, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, the copies side by side."""
        if self._real is not None:
            self.reorder_cache(torch.arange(len(self._real)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        number, self.layers = len(self.layers), []  # dropped first: new ones may need their room
        self.layers = self._new_layers(number)
        self._real, self._ordinary, self._saved = None, None, 0

    def _new_layers(self, number: int) -> list[LandmarkCacheLayer]:
        storages = [self._make_storage(self.block_size) for _ in range(number)]
        storages[0].landmarks_tie = self._first_ties
        for storage in storages if self._index is not None else ():
            storage.repeated = ApproximateLandmarks(self._index)
        return [LandmarkCacheLayer(storage) for storage in storages]
