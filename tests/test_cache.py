"""The cache: several turns at any alignment, cropping, reordering, rows that do not know of each other."""

import pytest
import torch
from tiny import every_landmark, in_float64, logits_in_calls, ragged, random_ids, tiny_config, tiny_model
from transformers import DynamicCache, LlamaConfig

from landmark_llama import LandmarkCache

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@every_landmark
@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
@pytest.mark.parametrize("turns", [[1, 2, 3, 4, 50], [11, 12, 13, 24], [3, 3, 3, 51], [59, 1], [2] * 30], ids=str)
def test_turns_may_end_and_begin_anywhere_in_a_block(landmark: dict, turns: list[int], local_attention: str) -> None:
    # chunked attention does depend on the calls: there the same turns without padding are the measure
    model, ids = in_float64(tiny_model(local_attention=local_attention, **landmark)), random_ids(1, 60)
    expected = logits_in_calls(model, ids, [] if local_attention == "sliding" else turns)
    cache, padded = LandmarkCache(model.config), []
    for turn in ids.split(turns, dim=1):
        batch = ragged([turn[0], random_ids(turn.shape[1] + 2, seed=1)])
        logits = model(**batch, past_key_values=cache).logits
        padded.append(logits[0, -turn.shape[1] :])
    torch.testing.assert_close(torch.cat(padded), expected[0])
    assert cache.get_seq_length() == 60 + 2 * len(turns)


@every_landmark
@pytest.mark.parametrize("removed", [1, 2, 3, 4, 17, 50])
def test_what_is_cropped_is_forgotten(landmark: dict, removed: int) -> None:
    model, ids = in_float64(tiny_model(**landmark)), random_ids(2, 50)
    more = random_ids(2, 20, seed=1)
    expected = logits_in_calls(model, torch.cat([ids[:, : 50 - removed], more], dim=1), [])[:, -20:]
    for crop in (-removed, 50 - removed):
        if crop == 0:
            continue  # 0 columns to remove
        cache = LandmarkCache(model.config)
        model(ids, past_key_values=cache)
        cache.crop(crop)
        assert cache.get_seq_length() == 50 - removed
        torch.testing.assert_close(model(more, past_key_values=cache).logits, expected)


def test_cropping_counts_columns_padding_included() -> None:
    model = in_float64(tiny_model())
    rows = [random_ids(20), random_ids(9)]
    cache = LandmarkCache(model.config)
    model(**ragged(rows), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 15 and cache.ordinary_tokens(2).tolist() == [15, 4]
    cache.crop(3)
    assert cache.ordinary_tokens(2).tolist() == [3, 0]
    cache.crop(100)
    cache.crop(0)
    assert cache.get_seq_length() == 3
    with pytest.raises(ValueError, match="tokens_to_remove=-4"):
        cache.crop(-4)


@every_landmark
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_become_what_other_rows_were(landmark: dict, change, rows: list[int]) -> None:
    model = in_float64(tiny_model(**landmark))
    texts = [random_ids(length, seed=length) for length in (60, 31, 4)]
    more = random_ids(len(rows), 10, seed=9)
    cache = LandmarkCache(model.config)
    model(**ragged(texts), past_key_values=cache)
    change(cache)
    logits = model(more, past_key_values=cache).logits
    for i, row in enumerate(rows):
        alone = model(torch.cat([texts[row], more[i]]).unsqueeze(0), use_cache=True).logits
        torch.testing.assert_close(logits[i], alone[0, -10:])


def test_a_reset_cache_is_a_new_one() -> None:
    model, ids = in_float64(tiny_model()), random_ids(1, 50)
    cache = LandmarkCache(model.config)
    expected = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
    cache.reset()
    model(random_ids(3, 5), past_key_values=cache)


def test_a_fork_of_a_cache_leaves_the_first_alone() -> None:
    import copy

    model, ids = in_float64(tiny_model()), random_ids(1, 50)
    cache = LandmarkCache(model.config)
    model(ids, past_key_values=cache)
    fork = copy.deepcopy(cache)
    more = random_ids(1, 10, seed=1)
    expected = model(more, past_key_values=cache).logits
    model(random_ids(1, 10, seed=2), past_key_values=cache)
    torch.testing.assert_close(model(more, past_key_values=fork).logits, expected)


def test_a_cache_of_another_batch_is_refused() -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_config())
    model(random_ids(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, input_ids has 3"):
        model(random_ids(3, 5), past_key_values=cache)


def test_only_a_landmark_cache_serves_and_only_for_a_landmark_model() -> None:
    with pytest.raises(ValueError, match="DynamicCache cannot hold landmark blocks"):
        tiny_model()(random_ids(1, 5), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="LandmarkLlamaConfig, got LlamaConfig"):
        LandmarkCache(LlamaConfig())


def test_a_call_that_fails_leaves_the_cache_as_it_was() -> None:
    model, ids = in_float64(tiny_model()), random_ids(1, 50)
    cache = LandmarkCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([[99]]), past_key_values=cache)
    with pytest.raises(ValueError, match="landmark"):
        model(torch.tensor([[7]]), past_key_values=cache)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(random_ids(1, 30, seed=3), past_key_values=cache)
    hook.remove()
    more = random_ids(1, 10, seed=1)
    expected = model(torch.cat([ids, more], dim=1), use_cache=True).logits[:, -10:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, expected)


def test_storage_of_another_kind_is_used_where_it_is_given() -> None:
    from landmark_llama.reading.storage import DeviceStorage

    made = []

    class Observed(DeviceStorage):
        def __init__(self, block_size: int) -> None:
            super().__init__(block_size)
            made.append(block_size)

    model = tiny_model()
    cache = LandmarkCache(model.config, storage=Observed)
    model(random_ids(1, 50), past_key_values=cache)
    assert made == [4, 4] and all(isinstance(layer.storage, Observed) for layer in cache.layers)


def test_ordinary_tokens_are_counted_row_by_row_whatever_happens_to_the_rows() -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_config())
    model(**ragged([random_ids(20), random_ids(9), random_ids(13)]), past_key_values=cache)
    for _ in range(3):
        model(random_ids(3, 1), past_key_values=cache)
    assert cache.ordinary_tokens(3).tolist() == [23, 12, 16]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-2)
    assert cache.ordinary_tokens(3).tolist() == [14, 21, 21]
    cache.reset()
    assert cache.ordinary_tokens(2).tolist() == [0, 0]
