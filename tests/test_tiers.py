"""Storages in slower tiers: whatever tier blocks live in, and however few stay on the device, the bits are the same."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import every_landmark, logits_in_calls, ragged, random_ids, tiny_model
from torch import Tensor

from landmark_llama import LandmarkCache
from landmark_llama.reading.held_blocks import HeldBlocks
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage, TieredStorage, storage_named
from landmark_llama.reading.tiers import HostTier

pytestmark = pytest.mark.usefixtures("poisoned_memory", "general_steps")

# a record of the tiny model has 2 * 4 * 8 numbers, 256 bytes; two layers share the budget
BUDGETS = {"nothing held": 0, "some blocks held": 24 * 256, "all held": 1 << 20}


KINDS = [("host", "nothing held"), ("host", "all held"), ("file", "nothing held"), ("file", "some blocks held")]


@pytest.fixture(params=KINDS, ids=", ".join)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> HostStorage:
    kind, budget = request.param
    return HostStorage(budget=BUDGETS[budget]) if kind == "host" else FileStorage(tmp_path, budget=BUDGETS[budget])


@every_landmark
@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
def test_logits_of_turns_are_those_of_the_device(storage: HostStorage, landmark: dict, local_attention: str) -> None:
    model, ids, turns = tiny_model(local_attention=local_attention, **landmark), random_ids(1, 120), [1, 50, 2, 7, 3, 1]
    expected = logits_in_calls(model, ids, turns)
    cache = LandmarkCache(model.config, storage=storage)
    assert torch.equal(logits_in_calls(model, ids, turns, cache), expected)


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@torch.no_grad()
def test_a_left_padded_batch_reads_what_it_reads_on_the_device(storage: HostStorage, granularity: str) -> None:
    model = tiny_model(retrieval_granularity=granularity)
    first, later = ragged([random_ids(n, seed=n) for n in (70, 31, 4)]), random_ids(3, 9)

    def read(cache: LandmarkCache) -> list[Tensor]:
        return [model(**first, past_key_values=cache).logits, model(later, past_key_values=cache).logits]

    expected = read(LandmarkCache(model.config))
    for logits, wanted in zip(read(LandmarkCache(model.config, storage=storage)), expected, strict=True):
        assert torch.equal(logits, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-17),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: (cache.batch_repeat_interleave(2), cache.crop(-2), cache.reorder_cache(torch.arange(5, -1, -1))),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "reorder", "select", "repeat", "all of them", "reset"],
)
@every_landmark
@torch.no_grad()
def test_changed_rows_go_on_as_on_the_device(storage: HostStorage, landmark: dict, change: Callable) -> None:
    model, texts = tiny_model(**landmark), ragged([random_ids(n, seed=n) for n in (60, 31, 8)])
    logits = []
    for cache in LandmarkCache(model.config), LandmarkCache(model.config, storage=storage):
        model(**texts, past_key_values=cache)
        change(cache)
        rows = 3 if cache._real is None else len(cache._real)
        # rows that were one and now differ, inside a block and beyond it
        more = [random_ids(rows, n, seed=n) for n in (1, 1, 30)]
        logits.append(torch.cat([model(ids, past_key_values=cache).logits for ids in more], dim=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}], ids=str)
def test_generated_tokens_are_those_of_the_device(storage: HostStorage, settings: dict) -> None:
    model, prompts = tiny_model(), ragged([random_ids(50), random_ids(23)])
    expected = model.generate(**prompts, max_new_tokens=12, **settings)
    cache = LandmarkCache(model.config, storage=storage)
    assert torch.equal(model.generate(**prompts, max_new_tokens=12, past_key_values=cache, **settings), expected)


def test_generate_offloads_its_blocks_where_it_is_asked_to() -> None:
    model, prompts = tiny_model(), ragged([random_ids(50), random_ids(23)])
    output = model.generate(
        **prompts, max_new_tokens=12, cache_implementation="offloaded", return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, model.generate(**prompts, max_new_tokens=12))
    assert all(storage.resident is None for storage in output.past_key_values.storages)


@torch.no_grad()
def test_a_fork_goes_on_by_itself(storage: HostStorage) -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_model().config, storage=storage)
    model(random_ids(1, 50), past_key_values=cache)
    fork = copy.deepcopy(cache)
    more = random_ids(1, 30, seed=1)
    expected = model(more, past_key_values=cache).logits
    model(random_ids(1, 10, seed=2), past_key_values=cache)
    assert torch.equal(model(more, past_key_values=fork).logits, expected)


@torch.no_grad()
def test_what_a_budget_holds_is_not_fetched_again() -> None:
    model, ids = tiny_model(), random_ids(1, 200)
    held = {}
    for name, budget in BUDGETS.items():
        cache = LandmarkCache(model.config, storage=HostStorage(budget=budget))
        logits_in_calls(model, ids, [1] * 200, cache)
        held[name] = [layer.storage.held for layer in cache.layers]
    missed = {name: sum(layer.missed for layer in layers) for name, layers in held.items()}
    assert missed["nothing held"] == sum(layer.asked for layer in held["nothing held"])
    assert missed["nothing held"] > 2 * missed["some blocks held"]
    assert missed["all held"] <= 4  # page 0, which stands for blocks that are not there
    assert all(len(layer.content) == 12 for layer in held["some blocks held"])


def test_the_blocks_used_last_are_held() -> None:
    shape = (2, 1, 2)
    tier = HostTier(shape, torch.float32, torch.device("cpu"))
    tier.reserve(9)
    tier.write(torch.arange(9), torch.arange(9.0).view(9, 1, 1, 1).expand(9, *shape))
    held = HeldBlocks(tier, 3, shape, torch.float32, torch.device("cpu"))
    held.expect(9)
    for wanted, missed in [
        ([0, 1, 2], 3),
        ([0, 2], 0),
        ([5], 1),  # in the place of 1
        ([0, 2, 5], 0),
        ([1, 2], 1),  # in the place of 0, which with 5 was used before 2
        ([1, 2, 3, 4, 5], 3),  # more than there is room for: nothing moves, but 1, 2 and one of 0 and 5 were held
        ([1, 2], 0),
    ]:
        before = held.missed
        table, row = held.find(torch.tensor(wanted))
        assert table[row, 0, 0, 0].tolist() == wanted
        assert held.missed - before == missed or wanted == [1, 2, 3, 4, 5]


def test_one_landmark_stands_for_all_where_they_tie() -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_model().config, storage=HostStorage())
    model(random_ids(1, 200), past_key_values=cache)
    assert cache.storages[0].landmark.shape[2] == 1 and cache.storages[1].landmark.shape[2] > 60


class ForgetfulTier:
    """A tier that notes its device and remembers nothing: what lies on the meta device cannot be copied."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def reserve(self, records: int) -> None:
        pass

    def read(self, records: Tensor) -> Tensor:
        return torch.zeros(len(records), *self.shape, dtype=self.dtype)

    def write(self, records: Tensor, content: Tensor) -> None:
        assert content.device == self.device


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_the_tier_of_a_layer_goes_with_the_device_of_its_keys(budget: int) -> None:
    for device in ("cpu", "meta"):
        storage = TieredStorage(4, ForgetfulTier, lambda: budget)
        keys = torch.zeros(2, 19, 2, 8, device=device)
        storage.write(keys, keys, torch.tensor([0, 3]))
        storage.write(keys[:, :1], keys[:, :1], torch.tensor([19, 22]))
        blocks = storage.gather(torch.zeros(2, 1, 3, dtype=torch.long))
        found = storage.device, storage.held.tier.device, storage.held.content.device, *(x.device for x in blocks)
        assert {x.type for x in (*found, storage.landmarks(2).device)} == {device}
        assert blocks[0].shape == (2, 2, 3, 4, 8)


@torch.no_grad()
def test_layers_that_are_fetched_for_each_call_keep_their_tiers() -> None:
    from accelerate import cpu_offload

    model, ids = tiny_model(), random_ids(1, 80)
    expected = logits_in_calls(model, ids, [50])
    cpu_offload(model, execution_device=torch.device("cpu"))
    cache = LandmarkCache(model.config, storage=HostStorage(budget=0))
    assert torch.equal(logits_in_calls(model, ids, [50], cache), expected)


def test_a_flag_names_a_storage(tmp_path: Path) -> None:
    assert storage_named("device")(4).resident is None  # nothing is written yet
    assert isinstance(storage_named("host"), HostStorage)
    assert storage_named(f"file:{tmp_path}").folder.path == tmp_path
    for name in ("disk", "file:", "host:3"):
        with pytest.raises(ValueError, match=f"cache '{name}': must be device, host, or file:FOLDER"):
            storage_named(name)


def test_a_budget_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=-1: bytes to keep"):
        HostStorage(budget=-1)
