"""`cache.save(folder)` and `LandmarkCache.load(folder, model)`: a memory outlives its process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from landmark_llama.configuration import RetrievalSettings
from landmark_llama.reading.mapped import MappedStorage
from landmark_llama.reading.storage import BlockStorage, DeviceStorage
from landmark_llama.saved.fingerprint import describe, differences, reader_of
from landmark_llama.saved.folder import Manifest, Shape, read_manifest, writing

WRITTEN_AT_ONCE = 64 << 20  # bytes of blocks that are gathered to be written


class SavedMixin:
    """Saving and loading, for a `LandmarkCache`, which has `storages`, `layers` and `ordinary_tokens`."""

    _reader: weakref.ref[nn.Module] | None = None  # the model that read last
    _read_with: frozenset[RetrievalSettings] = frozenset()

    def read_by(self, reader: nn.Module, settings: RetrievalSettings) -> None:
        """Notes that `reader` has read, and how: what a saved memory is checked against."""
        if self._reader is None or self._reader() is not reader:
            self._reader = weakref.ref(reader)
        if settings not in self._read_with:
            self._read_with |= {settings}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what was read to a new folder (`saved/folder.py`), to be opened by `load`.

        The cache stays as it is. A process that is killed while it saves leaves no memory, rather than half of one.

        Raises:
            ValueError: nothing was read, or the model that read is gone.
            OSError: the folder holds something already, or cannot be written to.
        """
        reader = None if self._reader is None else self._reader()
        if reader is None:
            raise ValueError("save: no model has read into this cache, or it is gone: save while the model is loaded")
        with writing(folder) as writer:
            if writer.manifest is not None:
                raise FileExistsError(f"{folder}: holds a memory already; give a new folder")
            state = manifest_of(self, reader)
            first, complete = 0, complete_blocks(state)
            for added in collect(self.storages, first, complete):
                writer.append(state, added)
            writer.commit(state, tail_of(self.storages, complete, state))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        mapped: bool | None = None,
        storage: Callable[[int], BlockStorage] | None = None,
        verify: bool = False,
    ) -> SavedMixin:
        """Opens a saved memory, for the model that read it.

        The cache counts columns from 0: give `model` and `generate` the ids of what follows the text, without the text.
        What is added stays in this process, and the folder as it is; several processes may open it at once.
        `cache.crop(-cache.get_seq_length())` goes back to what was saved.

        Args:
            model: a landmark LLaMA with the weights, the dtype and the retrieval settings of the one that read.
            mapped: keep the blocks in their file, from which they are read as they are needed; opening takes no time.
                False: copy them to the model's device. By default, True on a CPU.
            storage: as of `LandmarkCache`: copy them there, for example to `HostStorage(budget=2**30)`.
            verify: read all files and compare their checksums.

        Raises:
            OSError: the folder is missing or holds no memory, or a file is missing, cut or (with `verify`) changed.
            ValueError: another model read it, or read it in another way; says what differs. Or `mapped` and `storage`
                contradict each other.
        """
        if mapped and storage is not None:
            raise ValueError("mapped=True: leaves the blocks in their file, and storage copies them: give one of both")
        folder, reader = Path(folder), reader_of(model)
        manifest = read_manifest(folder)
        check_model(folder, manifest, reader)
        if verify:
            manifest.check(folder)
        cache = cls(reader.config) if storage is None else cls(reader.config, storage=storage)
        open_blocks(cache, folder, manifest, reader, mapped, copied=storage is not None)
        return cache


def manifest_of(cache: SavedMixin, reader: nn.Module) -> Manifest:
    """What `cache`, read by `reader`, will say of itself once it is saved."""
    storage = cache.storages[0]
    key, _ = storage.gather(torch.zeros(len(cache.ordinary_counts), 1, 1, dtype=torch.long, device=_device(reader, 0)))
    bias = storage.biases(0)
    return Manifest(
        model=describe(reader),
        read_with=[x._asdict() for x in sorted(cache._read_with)],
        shape=Shape(len(cache.storages), key.shape[0], key.shape[1], storage.block_size, key.shape[-1]),
        dtype=_name(key.dtype),
        bias_dtype=None if bias is None else _name(bias.dtype),
        ordinary=cache.ordinary_counts.tolist(),
    )


def complete_blocks(state: Manifest) -> int:
    """Blocks that every row has completed."""
    return min(state.ordinary) // (state.shape.block_size - 1)


def collect(storages: Sequence[BlockStorage], first: int, stop: int) -> Iterator[dict[str, Tensor]]:
    """Blocks `first` to `stop` of all layers as rows of the growing files, some at a time."""
    while first < stop:
        key, _ = _gather(storages[0], first, first + 1)
        number = max(1, WRITTEN_AT_ONCE // (2 * len(storages) * key.nbytes))
        end = min(stop, first + number)
        # (blocks, layers, 2, rows, kv_heads, block_size, head_dim)
        blocks = torch.stack([torch.stack(_gather(x, first, end)) for x in storages]).movedim(4, 0).contiguous()
        added = {"blocks": blocks, "landmarks": blocks[:, :, 0, :, :, -1].contiguous()}
        if storages[0].biases(0) is not None:
            added["biases"] = torch.stack([x.biases(end)[:, :, first:].cpu() for x in storages]).movedim(3, 0)
        yield added
        first = end


def tail_of(storages: Sequence[BlockStorage], first: int, state: Manifest) -> dict[str, Tensor]:
    """The blocks from `first` on, which some row has not completed; what was never written is zero."""
    block_size = state.shape.block_size
    ordinary = torch.tensor(state.ordinary)
    length = ordinary + ordinary // (block_size - 1) - first * block_size  # (rows,)
    stop = first - (-int(length.max()) // block_size)
    if stop <= first:
        return {}
    position = torch.arange((stop - first) * block_size).view(-1, block_size)
    unwritten = position >= length[:, None, None]  # (rows, blocks, block_size)
    # (layers, 2, rows, kv_heads, blocks, block_size, head_dim)
    blocks = torch.stack([torch.stack(_gather(x, first, stop)) for x in storages])
    tail = {"blocks": blocks.masked_fill(unwritten[None, None, :, None, :, :, None], 0)}
    if storages[0].biases(0) is not None:
        biases = torch.stack([x.biases(stop)[:, :, first:].cpu() for x in storages])
        tail["biases"] = biases.masked_fill(unwritten[None, :, None, :, -1], 0)
    return tail


def check_model(folder: Path, manifest: Manifest, reader: nn.Module) -> None:
    """Raises ValueError, saying what differs, unless `reader` may go on from the memory in `folder`."""
    found = differences(manifest.model, describe(reader))
    if found:
        raise ValueError(f"{folder}: was read by another model: {'; '.join(found)}")
    settings = reader.config.retrieval()._asdict()
    read_with = [RetrievalSettings(**given)._asdict() for given in manifest.read_with]
    if settings not in read_with:
        known = read_with[0] if read_with else {}
        found = [f"{name}={known.get(name)!r}, not {value!r}" for name, value in settings.items()]
        found = [text for text, name in zip(found, settings, strict=True) if known.get(name) != settings[name]]
        raise ValueError(
            f"{folder}: was read with {'; '.join(found)}: set these fields of model.config, or give other settings to "
            "generate once the memory is open"
        )


def open_blocks(
    cache: SavedMixin,
    folder: Path,
    manifest: Manifest,
    reader: nn.Module,
    mapped: bool | None = None,
    copied: bool = False,
) -> None:
    """Gives `cache` the blocks of the memory in `folder`; arguments as of `SavedMixin.load`.

    copied: to the storages that `cache` has.
    """
    saved, landmarks = manifest.read(folder, "blocks"), manifest.read(folder, "landmarks")
    pooled = manifest.bias_dtype is not None
    biases = manifest.read(folder, "biases") if pooled else None
    tail = manifest.read_tail(folder)
    s = manifest.shape
    empty = torch.empty(s.layers, 2, s.rows, s.kv_heads, 0, s.block_size, s.head_dim, dtype=saved.dtype)
    blocks, tail_biases = tail.get("blocks", empty), tail.get("biases")
    if pooled and tail_biases is None:
        tail_biases = biases.new_empty(s.layers, s.rows, s.kv_heads, 0)
    for i, layer in enumerate(cache.layers):
        device = _device(reader, i)
        landmark = landmarks[:, i].permute(1, 2, 0, 3)
        bias, tail_bias = (biases[:, i].permute(1, 2, 0), tail_biases[i]) if pooled else (None, None)
        if copied:
            _copy(layer.storage, saved[:, i], bias, blocks[i], tail_bias, device)
        elif mapped if mapped is not None else device.type == "cpu":
            layer.storage = MappedStorage(saved, landmark, bias, blocks[i], tail_bias, i, device)
        else:
            layer.storage = _on_device(saved[:, i], landmark, bias, blocks[i], tail_bias, device)
        layer.is_initialized = True
    cache.begin_after(torch.tensor(manifest.ordinary))
    cache._reader = weakref.ref(reader)
    cache._read_with = frozenset(RetrievalSettings(**settings) for settings in manifest.read_with)


def _copy(
    storage: BlockStorage,
    saved: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    tail_bias: Tensor | None,
    device: torch.device,
) -> None:
    """Writes the blocks of one layer to `storage`, some at a time; arguments as of `MappedStorage`."""
    blocks, _, rows, kv_heads, block_size, head_dim = saved.shape
    storage.expect(blocks + tail.shape[3])
    at_once = max(1, WRITTEN_AT_ONCE // (saved[:1].numel() * saved.element_size()))
    parts = [part.permute(1, 2, 3, 0, 4, 5) for part in saved.split(at_once)] if blocks else []
    first = 0
    for part in [*parts, tail] if tail.shape[3] else parts:  # (2, rows, kv_heads, blocks, block_size, head_dim)
        key, value = (x.flatten(2, 3).transpose(1, 2).to(device) for x in part)
        storage.write(key, value, torch.full((rows,), first * block_size, device=device))
        first += part.shape[3]
    if bias is not None and first:  # landmark keys are pooled already: they stand in their places among the keys
        bias = torch.cat([bias, tail_bias], dim=2).to(device)
        storage.bias = torch.nn.functional.pad(bias, (0, storage.capacity - first))


def _on_device(
    saved: Tensor, landmark: Tensor, bias: Tensor | None, tail: Tensor, tail_bias: Tensor | None, device: torch.device
) -> DeviceStorage:
    """The blocks of one layer, copied; arguments as of `MappedStorage`."""
    storage = DeviceStorage(saved.shape[-2])
    blocks, _, rows, kv_heads, block_size, head_dim = saved.shape
    both = [torch.empty(rows, kv_heads, blocks + tail.shape[3], block_size, head_dim, dtype=saved.dtype, device=device)
            for _ in range(2)]  # fmt: skip
    for which, whole in enumerate(both):
        whole[:, :, :blocks] = saved[:, which].permute(1, 2, 0, 3, 4).to(device)
        whole[:, :, blocks:] = tail[which].to(device)
    storage.key, storage.value = both
    storage.landmark = torch.cat([landmark.to(device), tail[0, ..., -1, :].to(device)], dim=2)
    storage.bias = None if bias is None else torch.cat([bias.to(device), tail_bias.to(device)], dim=2)
    return storage


def _gather(storage: BlockStorage, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values (rows, kv_heads, blocks, block_size, head_dim) of blocks `first` to `stop`, on the CPU."""
    landmarks = storage.landmarks(0)
    blocks = torch.arange(first, stop, device=landmarks.device).expand(len(landmarks), 1, -1)
    return tuple(x.cpu() for x in storage.gather(blocks))


def _device(reader: nn.Module, layer: int) -> torch.device:
    """Where a layer computes, also if accelerate brings its weights there only when they are needed."""
    module = reader.layers[layer]
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return module.input_layernorm.weight.device if device is None else torch.device(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
