"""Reading through the cache: the block table, its positions, and that how a text is cut into calls does not matter."""

from typing import Any

import pytest
import torch
from oracle import Oracle
from tiny import LANDMARKS, every_landmark, in_float64, logits_in_calls, ragged, random_ids, tiny_model
from tolerance import assert_as_accurate
from torch import Tensor

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.attention import landmark_attention_reference
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.choice import Choice, choose_blocks, rotate_to_distances
from landmark_llama.reading.storage import DeviceStorage

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GRANULARITIES = ("token_and_head", "head", "token")
MODES = [(local, granularity) for local in ("sliding", "chunked") for granularity in GRANULARITIES]
every_mode = pytest.mark.parametrize(("local_attention", "granularity"), MODES, ids=["-".join(mode) for mode in MODES])
CUTS = {
    "one_call": [],
    "token_by_token": [1] * 60,
    "mixed": [1, 2, 23, 1, 1, 7, 3, 14],
    "blocks": [3] * 20,
    "whole_windows": [24, 24],
}


def settings_of(local_attention: str, granularity: str) -> dict[str, str]:
    return {"local_attention": local_attention, "retrieval_granularity": granularity}


def read(oracle: Oracle, ids: Tensor, calls: list[int]) -> Tensor:
    rest = len(ids) - sum(calls)
    parts = ids.split([*calls, rest] if rest else calls)
    return torch.cat([oracle.read(part.tolist()) for part in parts])


@every_landmark
@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("cut", ["one_call", "mixed"])
def test_streaming_is_the_block_table_of_the_design_token_by_token(
    landmark: dict, local_attention: str, granularity: str, cut: str
) -> None:
    model, ids = tiny_model(**landmark), random_ids(55)
    settings = settings_of(local_attention, granularity)
    expected = read(Oracle(model, **settings), ids, CUTS[cut])
    actual = logits_in_calls(in_float64(model), ids.unsqueeze(0), CUTS[cut], **settings)[0]
    torch.testing.assert_close(actual, expected)
    in_float32 = logits_in_calls(model, ids.unsqueeze(0), CUTS[cut], **settings)[0]
    assert (in_float32.argmax(-1) == expected.argmax(-1)).all()


SHAPES = {
    "paper_prediction": {"predict_from_landmark": True},
    "one_block_retrieved": {"num_retrieved_blocks": 1},
    "many_blocks_retrieved": {"num_retrieved_blocks": 6},
    "no_local_block": {"num_local_blocks": 0},
    "one_local_block": {"num_local_blocks": 1, "num_retrieved_blocks": 3},
    "window_that_divides_nothing": {"train_context_length": 31, "max_position_embeddings": 31},
    "one_token_blocks": {"block_size": 2, "train_context_length": 14},
    "odd_blocks": {"block_size": 5, "train_context_length": 33},
    "multi_head": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "pooled_multi_head": {"num_key_value_heads": 4, **LANDMARKS["pooled_and_calibrated"]},
    "pooled_odd_blocks": {"block_size": 5, "train_context_length": 33, **LANDMARKS["pooled_and_calibrated"]},
    "pooled_one_token_blocks": {"block_size": 2, "train_context_length": 14, **LANDMARKS["pooled"]},
    "pooled_without_local_blocks": {"num_local_blocks": 0, **LANDMARKS["pooled_and_calibrated"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_block_table_holds_for_every_shape_of_window(shape: dict, local_attention: str) -> None:
    model, ids = tiny_model(local_attention=local_attention, **shape), random_ids(40, seed=3)
    calls = [25, 1, 1, 8]
    expected = read(Oracle(model), ids, calls)
    torch.testing.assert_close(logits_in_calls(in_float64(model), ids.unsqueeze(0), calls)[0], expected)


@every_landmark
@pytest.mark.parametrize("cut", [name for name in CUTS if name != "one_call"])
@pytest.mark.parametrize("predict_from_landmark", [False, True])
def test_any_chunking_gives_the_same_logits(landmark: dict, cut: str, predict_from_landmark: bool) -> None:
    model, ids = tiny_model(predict_from_landmark=predict_from_landmark, **landmark), random_ids(2, 90)
    exact = in_float64(model)
    reference = logits_in_calls(exact, ids, [])
    torch.testing.assert_close(logits_in_calls(exact, ids, CUTS[cut]), reference)
    plain = logits_in_calls(model, ids, [])
    chunked = logits_in_calls(model, ids, CUTS[cut])
    assert (chunked.argmax(-1) == plain.argmax(-1)).all()


def test_any_chunking_inside_a_call_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = in_float64(tiny_model()), random_ids(1, 200)
    expected = logits_in_calls(model, ids, [])
    for positions in (4, 20):
        monkeypatch.setattr("landmark_llama.reading.groups.CHUNK_POSITIONS", positions)
        torch.testing.assert_close(logits_in_calls(model, ids, []), expected)
        torch.testing.assert_close(logits_in_calls(model, ids, [55, 1, 31]), expected)


@every_mode
def test_what_queries_retrieve_is_gathered_in_bounded_parts(
    local_attention: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = in_float64(tiny_model(**settings_of(local_attention, granularity))), random_ids(2, 150)
    expected = logits_in_calls(model, ids, [])
    gather, gathered = DeviceStorage.gather, []

    def counted(storage: DeviceStorage, blocks: Tensor) -> tuple[Tensor, Tensor]:
        key, value = gather(storage, blocks)
        if blocks.dim() == 6:  # of choices; windows have fewer dimensions
            gathered.append(key.numel())
        return key, value

    monkeypatch.setattr(DeviceStorage, "gather", counted)
    torch.testing.assert_close(logits_in_calls(model, ids, []), expected)
    most = max(gathered)
    gathered.clear()
    monkeypatch.setattr("landmark_llama.reading.table.GATHERED_ELEMENTS", most // 3)
    torch.testing.assert_close(logits_in_calls(model, ids, []), expected)
    # queries that share one choice in one group stay together
    shared = local_attention == "chunked" and granularity == "head"
    assert max(gathered) <= (most if shared else most // 3)


@every_landmark
@pytest.mark.parametrize("num_retrieved_blocks", [2, 5])
def test_choices_shared_within_a_block_do_not_depend_on_calls_that_end_with_blocks(
    landmark: dict, num_retrieved_blocks: int
) -> None:
    model = in_float64(tiny_model(retrieval_granularity="head", num_retrieved_blocks=num_retrieved_blocks, **landmark))
    ids = random_ids(1, 90)
    expected = logits_in_calls(model, ids, [])
    for calls in ([3] * 30, [30, 3, 45], [60]):
        torch.testing.assert_close(logits_in_calls(model, ids, calls), expected)


@every_landmark
@every_mode
@pytest.mark.parametrize("predict_from_landmark", [False, True])
def test_streaming_equals_one_forward_over_everything_when_all_blocks_fit_the_table(
    landmark: dict, local_attention: str, granularity: str, predict_from_landmark: bool
) -> None:
    settings = settings_of(local_attention, granularity)
    # window of 8 blocks: 2 retrieved, 4 direct ones and the own one are all 7 blocks of a text of 21 tokens
    model = tiny_model(predict_from_landmark=predict_from_landmark, **settings, **landmark)
    exact, ids = in_float64(model), random_ids(2, 21)
    expected = exact(ids).logits
    # chunked, the last call begins when there are only as many blocks as are retrieved
    cuts = ([6, 15], [1, 4, 2, 14]) if local_attention == "chunked" else ([], [1] * 21, [5, 9, 7])
    for calls in cuts:
        torch.testing.assert_close(logits_in_calls(exact, ids, calls), expected)


def test_retrieving_as_many_blocks_as_there_are_equals_one_forward_over_everything() -> None:
    model, ids = in_float64(tiny_model(num_retrieved_blocks=5, num_local_blocks=0)), random_ids(2, 17)
    expected = model(ids).logits
    for granularity in GRANULARITIES:
        torch.testing.assert_close(logits_in_calls(model, ids, [], retrieval_granularity=granularity), expected)


@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
def test_changing_a_later_token_changes_no_earlier_logit(local_attention: str) -> None:
    model, ids = tiny_model(local_attention=local_attention), random_ids(1, 80)
    expected = model(ids).logits
    for place in (0, 2, 3, 40, 59, 60, 79):
        other = ids.clone()
        other[0, place] = 8 + (ids[0, place] - 7) % 50
        logits = model(other).logits
        torch.testing.assert_close(logits[:, :place], expected[:, :place], rtol=0, atol=0)
        assert not torch.equal(logits[:, place], expected[:, place])


def test_no_block_out_of_the_table_is_read() -> None:
    # without retrieval a token reads its own block and the local ones, so two layers reach twice as far and no farther
    model, ids = tiny_model(num_retrieved_blocks=0, num_local_blocks=1), random_ids(1, 60)
    other = ids.clone()
    other[0, :30] = random_ids(1, 30, seed=1)
    changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed[:36].all() and not changed[36:].any()


@every_mode
def test_positions_never_leave_the_training_context(
    local_attention: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    rotate = RotaryTable.rotate

    def observe(self: RotaryTable, x: Tensor, position: Tensor | slice) -> Tensor:
        assert len(self.cos) == 31
        # indexing with a negative number would not fail, so the numbers themselves are looked at
        place = position if isinstance(position, Tensor) else torch.arange(31)[position]
        seen.append((int(place.min()), int(place.max())))
        return rotate(self, x, position)

    def observe_distances(query: Tensor, position: Tensor, k: int, block_size: int, rotary: RotaryTable) -> Tensor:
        # rotated twice, so the sum is where a query stands
        seen.append((int(position.min()) + block_size, int(position.max()) + (k + 1) * block_size))
        return rotate_to_distances(query, position, k, block_size, rotary)

    monkeypatch.setattr(RotaryTable, "rotate", observe)
    monkeypatch.setattr("landmark_llama.reading.table.rotate_to_distances", observe_distances)
    model = tiny_model(train_context_length=31, **settings_of(local_attention, granularity))
    long = random_ids(2, 300)
    logits_in_calls(model, long, [100, 1, 1, 60, 2, 3])
    model(**ragged([long[0], long[1, :111], long[1, :2]]))
    model(long[:, :20])
    assert seen and min(low for low, _ in seen) >= 0 and max(high for _, high in seen) < 31


@every_mode
def test_rounding_noise_chooses_no_block_in_the_first_layer(
    local_attention: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # there a landmark's key is the same in every block, up to rounding, and the later of equal candidates are taken
    seen: list[tuple[Tensor, Tensor]] = []

    def observe(rotated: Tensor, landmarks: Tensor, candidates: Tensor, valid: Tensor, **settings: Any) -> Choice:
        if len(seen) % 2 == 0:  # the first of two layers: noise as larger shapes and other devices make it
            landmarks = landmarks * (1 + 1e-6 * torch.randn(landmarks.shape))
        choice = choose_blocks(rotated, landmarks, candidates, valid, **settings)
        seen.append((choice.block, candidates[:, None, None, :, None, None]))
        return choice

    monkeypatch.setattr("landmark_llama.reading.table.choose_blocks", observe)
    model = tiny_model(num_local_blocks=0, **settings_of(local_attention, granularity))
    logits_in_calls(model, random_ids(2, 140), [70, 1, 1, 1, 1, 1, 31])
    first_layer, k = seen[::2], model.config.num_retrieved_blocks
    assert max(int(candidates.max()) for _, candidates in first_layer) > 40
    for block, candidates in first_layer:
        assert ((block >= candidates - 2 * k) | (block < 0)).all()


@every_mode
def test_rounding_noise_changes_no_decoding_step_of_one_layer(local_attention: str, granularity: str) -> None:
    # the landmarks that are compared are noisy, those that are read are not: the same blocks give the same logits
    model = tiny_model(num_hidden_layers=1, num_local_blocks=0, **settings_of(local_attention, granularity))
    ids, logits = random_ids(2, 80), []
    for noise in (0.0, 1e-6):
        cache = LandmarkCache(model.config)
        with torch.no_grad():
            model(ids[:, :70], past_key_values=cache)
            cache.storages[0].landmark *= 1 + noise * torch.randn(cache.storages[0].landmark.shape)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 80)]
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*logits)


@every_mode
@pytest.mark.parametrize("predict_from_landmark", [False, True])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(
    local_attention: str, granularity: str, predict_from_landmark: bool
) -> None:
    model = in_float64(
        tiny_model(predict_from_landmark=predict_from_landmark, **settings_of(local_attention, granularity))
    )
    rows = [random_ids(length, seed=length) for length in (90, 1, 47, 3, 89, 20)]
    batch = ragged(rows)
    together = model(**batch, use_cache=True).logits
    for i, row in enumerate(rows):
        alone = model(row.unsqueeze(0), use_cache=True).logits[0]
        torch.testing.assert_close(together[i, -len(row) :], alone)


@every_landmark
def test_padding_anywhere_is_as_if_it_were_not_there(landmark: dict) -> None:
    model, ids = in_float64(tiny_model(**landmark)), random_ids(1, 70)
    mask = torch.rand(1, 70) > 0.4
    mask[0, -9:] = False
    expected = model(ids[:, mask[0]], use_cache=True).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=True).logits[:, mask[0]], expected)
    cache = LandmarkCache(model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, a:b], past_key_values=cache).logits for a, b in ((0, 31), (31, 70))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, mask[0]], expected)


@every_mode
def test_rows_that_are_all_padding_are_finite(local_attention: str, granularity: str) -> None:
    model = tiny_model(**settings_of(local_attention, granularity))
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[2, :-1] = 0
    cache = LandmarkCache(model.config)
    assert model(ids, attention_mask=mask, past_key_values=cache).logits.isfinite().all()
    more = torch.tensor([[9], [9], [9]])
    after = model(more, past_key_values=cache).logits
    assert after.isfinite().all()
    torch.testing.assert_close(after[1], model(more[1:2], use_cache=True).logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_mode
def test_low_precision_is_finite_everywhere(local_attention: str, granularity: str, dtype: torch.dtype) -> None:
    model = tiny_model(**settings_of(local_attention, granularity)).to(dtype)
    batch = ragged([random_ids(70), random_ids(1), random_ids(3), random_ids(2, seed=1)])
    for use_cache in (True, False):
        output = model(**batch, use_cache=use_cache)
        assert output.logits.dtype == dtype and output.logits.isfinite().all()
    assert logits_in_calls(model, random_ids(1, 20), [1] * 20).isfinite().all()
    assert model(random_ids(1, 20)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_local_blocks", [5, 0], ids=["direct", "retrieved"])
def test_reading_through_the_cache_is_as_accurate_as_plain_attention_in_low_precision(
    num_local_blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all blocks fit the table, so that the definition gives the reference, and the same in low precision the measure
    k = 5 - num_local_blocks
    low = tiny_model(num_retrieved_blocks=k, num_local_blocks=num_local_blocks).to(dtype)
    ids = random_ids(8, 17)

    def definition(*inputs: Tensor, kernels: bool, **settings: Any) -> Tensor:
        return landmark_attention_reference(*inputs, **settings)

    monkeypatch.setattr("landmark_llama.attention.whole_rows.landmark_attention", definition)
    reference = in_float64(low)(ids).logits.float()  # of the weights as they are in low precision
    assert_as_accurate(logits_in_calls(low, ids, [1, 9]), low(ids).logits, reference)


def copy_kv_heads(model: LandmarkLlamaForCausalLM) -> LandmarkLlamaForCausalLM:
    """The same model with a KV head of its own for each query head."""
    heads = {"num_key_value_heads": model.config.num_attention_heads}
    config = type(model.config)(**model.config.to_diff_dict() | heads)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    state = model.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].unflatten(0, (-1, model.config.head_dim))
            state[name] = heads.repeat_interleave(group, dim=0).flatten(0, 1)
    copied = LandmarkLlamaForCausalLM(config).eval()
    copied.load_state_dict(state)
    return copied


@every_mode
def test_grouped_query_equals_multi_head_with_copied_kv_heads(local_attention: str, granularity: str) -> None:
    grouped = tiny_model(**settings_of(local_attention, granularity))
    multi = in_float64(copy_kv_heads(grouped))
    assert multi.config.num_key_value_heads == 4
    grouped, ids = in_float64(grouped), random_ids(2, 60)
    for calls in ([], [20, 1, 1, 5]):
        expected = logits_in_calls(multi, ids, calls)
        torch.testing.assert_close(logits_in_calls(grouped, ids, calls), expected)
    torch.testing.assert_close(grouped(ids[:, :20]).logits, multi(ids[:, :20]).logits)


def test_settings_of_a_call_take_the_place_of_the_configurations() -> None:
    ids = random_ids(1, 60)
    model = in_float64(tiny_model())
    for settings in (
        {"num_retrieved_blocks": 1},
        {"num_local_blocks": 0},
        {"local_attention": "chunked"},
        {"retrieval_granularity": "head"},
        {"num_retrieved_blocks": 0, "retrieval_granularity": "token"},
    ):
        expected = in_float64(tiny_model(**settings))(ids).logits
        torch.testing.assert_close(model(ids, **settings).logits, expected, rtol=0, atol=0)
        changed = in_float64(tiny_model())
        for name, value in settings.items():
            setattr(changed.config, name, value)
        torch.testing.assert_close(changed(ids).logits, expected, rtol=0, atol=0)
        assert not torch.allclose(model(ids).logits, expected)
