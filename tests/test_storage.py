"""Where blocks live: what is written is what is read, and nothing is copied as a whole at a step of decoding."""

import pytest
import torch
from tiny import random_ids, tiny_model

from landmark_llama import LandmarkCache
from landmark_llama.reading.storage import DeviceStorage

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCK, KV_HEADS, HEAD_DIM = 4, 2, 8


def filled(lengths: list[list[int]]) -> tuple[DeviceStorage, list[torch.Tensor], list[torch.Tensor]]:
    """A storage after writes of `lengths` (writes, rows), and the keys and values of each row that it should hold."""
    storage, rows = DeviceStorage(BLOCK), len(lengths[0])
    start = torch.zeros(rows, dtype=torch.long)
    keys = [torch.zeros(0, KV_HEADS, HEAD_DIM) for _ in range(rows)]
    values = [torch.zeros(0, KV_HEADS, HEAD_DIM) for _ in range(rows)]
    for brought in lengths:
        # rows that bring less write padding behind their end, which the next write replaces
        key, value = (torch.randn(rows, max(brought), KV_HEADS, HEAD_DIM) for _ in range(2))
        storage.write(key, value, start)
        for row, length in enumerate(brought):
            keys[row] = torch.cat([keys[row], key[row, :length]])
            values[row] = torch.cat([values[row], value[row, :length]])
        start += torch.tensor(brought)
    return storage, keys, values


@pytest.mark.parametrize("lengths", [[[9]], [[1], [1], [1], [1], [1]], [[3, 7], [9, 2], [1, 1], [60, 31]]], ids=str)
def test_what_is_written_is_what_is_read(lengths: list[list[int]]) -> None:
    storage, keys, values = filled(lengths)
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        whole = len(key) // BLOCK
        blocks = torch.arange(whole).expand(len(keys), 1, -1)
        stored_key, stored_value = storage.gather(blocks)
        for stored, expected in ((stored_key, key), (stored_value, value)):
            expected = expected[: whole * BLOCK].unflatten(0, (whole, BLOCK)).permute(2, 0, 1, 3)
            assert torch.equal(stored[row], expected)
        assert torch.equal(storage.landmarks(whole)[row], key[BLOCK - 1 : whole * BLOCK : BLOCK].transpose(0, 1))


def test_blocks_are_read_per_head_in_any_shape() -> None:
    storage, keys, _ = filled([[40, 40]])
    blocks = torch.randint(0, 10, (2, KV_HEADS, 3, 5))
    key, _ = storage.gather(blocks)
    assert key.shape == (2, KV_HEADS, 3, 5, BLOCK, HEAD_DIM)
    block = int(blocks[1, 0, 2, 4])
    assert torch.equal(key[1, 0, 2, 4], keys[1][block * BLOCK : (block + 1) * BLOCK, 0])


def test_rows_are_selected_repeated_and_dropped() -> None:
    storage, keys, values = filled([[24, 24, 24]])
    storage.select_rows(torch.tensor([2, 0, 0, 2]))
    key, value = storage.gather(torch.arange(6).expand(4, 1, 6))
    for row, source in enumerate([2, 0, 0, 2]):
        assert torch.equal(key[row].flatten(1, 2), keys[source].transpose(0, 1))
        assert torch.equal(value[row].flatten(1, 2), values[source].transpose(0, 1))
        assert torch.equal(storage.landmarks(6)[row], keys[source][BLOCK - 1 :: BLOCK].transpose(0, 1))


def test_room_that_was_never_written_is_finite() -> None:
    storage, _, _ = filled([[5]])
    for x in storage.gather(torch.arange(storage.capacity).view(1, 1, -1)):
        assert x.isfinite().all()


@pytest.mark.slow
def test_no_step_of_decoding_copies_the_whole_memory() -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_model().config)
    with torch.no_grad():
        model(random_ids(1, 30), past_key_values=cache)
        storage = cache.layers[1].storage
        grown, before = [], (storage.key.data_ptr(), storage.value.data_ptr(), storage.landmark.data_ptr())
        for step in range(250):
            model(random_ids(1, 1, seed=step), past_key_values=cache)
            now = (storage.key.data_ptr(), storage.value.data_ptr(), storage.landmark.data_ptr())
            if now != before:
                grown.append(storage.capacity)
                before = now
    # 280 tokens take 94 blocks; capacity doubles from the 10 of the first call
    assert 1 <= len(grown) <= 4
    assert all(later >= 2 * earlier for earlier, later in zip(grown, grown[1:], strict=False))
    assert storage.capacity <= 2 * 94


def test_reading_a_long_prompt_makes_room_once_and_for_some_tokens_to_come(monkeypatch) -> None:
    monkeypatch.setattr("landmark_llama.reading.groups.CHUNK_POSITIONS", 300)
    model, cache = tiny_model(), LandmarkCache(tiny_model().config)
    storage, capacities = cache.layers[0].storage, []
    for name in ("write", "write_token"):
        write = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *args, w=write: (w(*args), capacities.append(storage.capacity)))
    blocks = 400
    with torch.no_grad():
        model(random_ids(1, blocks * (model.config.block_size - 1)), past_key_values=cache)
        for step in range(20):
            model(random_ids(1, 1, seed=step), past_key_values=cache)
    assert len(capacities) > 21, "the prompt must take several chunks for this test to mean anything"
    assert set(capacities) == {blocks + blocks // 8}


def test_landmarks_are_read_without_a_copy() -> None:
    storage, _, _ = filled([[24]])
    assert storage.landmarks(5).data_ptr() == storage.landmark.data_ptr()


@pytest.mark.parametrize("shape", [(3, 1, KV_HEADS, HEAD_DIM), (1, 1, 3, HEAD_DIM), (1, 1, KV_HEADS, 4)])
def test_another_batch_or_model_is_refused(shape: tuple[int, ...]) -> None:
    storage, _, _ = filled([[24]])
    with pytest.raises(ValueError, match="one cache for one batch and model"):
        storage.write(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))
