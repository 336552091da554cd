"""Landmarks that tell blocks apart: pooled keys, a query and a bias of the landmarks' own, the calibration."""

import math

import pytest
import torch
from test_attention import every_shape, random_inputs, weights_by_definition
from tiny import LANDMARKS, every_landmark, in_float64, random_ids, tiny_config, tiny_llama, tiny_model
from tolerance import assert_as_accurate
from torch import Tensor
from transformers import AutoModelForCausalLM

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM, landmark_attention
from landmark_llama.attention import availability, blockwise, landmark_attention_reference
from landmark_llama.attention.pooling import pool_block, pool_rows, prior_of_heads
from landmark_llama.attention.reference import landmark_attention_weights
from landmark_llama.reading import table

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = {"query": (True, False), "bias": (False, True), "query_and_bias": (True, True)}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def inputs_with_landmarks(
    shape: tuple[int, ...], form: tuple[bool, bool], dtype: torch.dtype = torch.float64, gain: float = 2.0
) -> list[Tensor | None]:
    """Query, key, value, and a query and a bias of the landmarks' own, as far as `form` wants them."""
    query, key, value = random_inputs(shape, dtype, gain=gain)
    generator = torch.Generator().manual_seed(1)
    scoring = (gain * torch.randn(query.shape, generator=generator, dtype=torch.float64)).to(dtype)
    bias = torch.randn(2, shape[1], shape[3] // shape[4], generator=generator, dtype=torch.float64).float().to(dtype)
    return [query, key, value, scoring if form[0] else None, bias if form[1] else None]


def forward_and_gradients(attention, inputs: list[Tensor | None], grad: Tensor, **settings) -> list[Tensor]:
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, scoring, bias = inputs
    output = attention(query, key, value, landmark_query=scoring, landmark_bias=bias, **settings)
    output.backward(grad.to(output.dtype))
    # without an earlier block, the definition never touches what scores landmarks
    return [output.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x is not None)]


@every_shape
@every_form
def test_the_fast_form_is_the_definition_forward_and_backward(
    shape: tuple[int, ...], form: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_with_landmarks(shape, form)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = forward_and_gradients(landmark_attention_reference, inputs, grad, block_size=shape[4])
    for small in (blockwise.LARGEST_PLAIN_SCORE, 0.0):
        monkeypatch.setattr(blockwise, "LARGEST_PLAIN_SCORE", small)
        actual = forward_and_gradients(landmark_attention, inputs, grad, block_size=shape[4])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@every_form
@pytest.mark.parametrize("blocks", [(1, 0), (2, 1)], ids=str)
def test_a_query_that_retrieves_chooses_by_the_landmarks_scores(
    blocks: tuple[int, int], form: tuple[bool, bool]
) -> None:
    inputs = inputs_with_landmarks((4, 2, 70, 150, 16, 8), form)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    settings = {"block_size": 16, "num_retrieved_blocks": blocks[0], "num_direct_blocks": blocks[1]}
    actual = forward_and_gradients(landmark_attention, inputs, grad, **settings)
    expected = forward_and_gradients(landmark_attention_reference, inputs, grad, **settings)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_the_definition(dtype: torch.dtype, form: tuple[bool, bool]) -> None:
    gain = 1.0 if dtype == torch.float32 else 2.0
    inputs = inputs_with_landmarks((6, 2, 203, 203, 16, 8), form, dtype, gain)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64).to(dtype)
    actual = forward_and_gradients(landmark_attention, inputs, grad, block_size=16)
    plain = forward_and_gradients(landmark_attention_reference, inputs, grad, block_size=16)
    exact = [None if x is None else x.double() for x in inputs]
    reference = forward_and_gradients(landmark_attention_reference, exact, grad.double(), block_size=16)
    for a, p, r in zip(actual, plain, reference, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, p, r)


def test_the_backward_is_the_derivative_of_the_forward() -> None:
    inputs = tuple(x[:1].clone().requires_grad_() for x in inputs_with_landmarks((4, 2, 9, 13, 4, 3), (True, True)))

    def attend(query: Tensor, key: Tensor, value: Tensor, scoring: Tensor, bias: Tensor) -> Tensor:
        return landmark_attention(query, key, value, block_size=4, landmark_query=scoring, landmark_bias=bias)

    assert torch.autograd.gradcheck(attend, inputs)


@every_shape
def test_the_query_itself_in_the_landmarks_place_and_no_bias_change_nothing(shape: tuple[int, ...]) -> None:
    query, key, value, _, bias = inputs_with_landmarks(shape, (True, True))
    expected = landmark_attention(query, key, value, block_size=shape[4])
    settings = {"block_size": shape[4], "landmark_query": query, "landmark_bias": torch.zeros_like(bias)}
    torch.testing.assert_close(landmark_attention(query, key, value, **settings), expected)


def test_the_landmarks_scores_are_those_of_loops() -> None:
    query, key, _, scoring, bias = inputs_with_landmarks((2, 2, 23, 23, 5, 4), (True, True))
    weights = landmark_attention_weights(query, key, block_size=5, landmark_query=scoring, landmark_bias=bias)
    # block shares of a row: what its landmark's exponential is beside those of the own block
    own = (query[0, 0, 21] @ key[0, 0, 20:22].T / 2).exp().sum()
    landmark = (scoring[0, 0, 21] @ key[0, 0, 4:20:5].T / 2 + bias[0, 0]).exp()
    share = weights[0, 0, 21, :20].unflatten(0, (4, 5)).sum(-1)
    torch.testing.assert_close(share, landmark / (own + landmark.sum()))
    loops = weights_by_definition(query[0, 0], key[0, 0], 5)
    inside = torch.tensor(loops[21][:20], dtype=torch.float64).unflatten(0, (4, 5))
    torch.testing.assert_close(
        weights[0, 0, 21, :20].unflatten(0, (4, 5)) / share.unsqueeze(-1), inside / inside.sum(-1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda scoring, bias: (scoring[:, :2], bias), "landmark_query"),
        (lambda scoring, bias: (scoring.float(), bias), "landmark_query"),
        (lambda scoring, bias: (scoring, bias[..., :-1]), "landmark_bias"),
        (lambda scoring, bias: (scoring, bias.long()), "landmark_bias"),
    ],
)
def test_landmark_inputs_that_do_not_fit_are_refused_by_name(change, named: str) -> None:
    query, key, value, *landmarks = inputs_with_landmarks((4, 2, 9, 13, 4, 8), (True, True))
    scoring, bias = change(*landmarks)
    with pytest.raises(ValueError, match=named):
        landmark_attention(query, key, value, block_size=4, landmark_query=scoring, landmark_bias=bias)


def test_around_its_prior_a_pooled_key_scores_a_block_as_all_its_keys_do() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(3, 7, 8, generator=generator, dtype=torch.float64)
    prior = 2 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    step = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    pooled, bias = pool_block(key, prior, scale=0.5)
    assert (bias >= 0).all() and (bias <= math.log(7)).all()

    def error(size: float) -> Tensor:
        query = prior + size * step
        mass = (0.5 * torch.einsum("cjd,cd->cj", key, query)).logsumexp(-1)
        return mass - (0.5 * (query * pooled).sum(-1) + bias)

    torch.testing.assert_close(error(0.0), torch.zeros(3, dtype=torch.float64))
    assert (error(0.1) >= 0).all()  # the mass is convex: a first-order expansion lies below it
    assert (error(0.01) < error(0.1) / 50).all()  # and its error is of second order


def test_where_every_query_is_the_prior_landmark_attention_is_ordinary_attention() -> None:
    _, key, value = random_inputs((2, 2, 21, 21, 5, 8))
    query = key.new_ones(2, 2, 21, 8)
    pooled, bias = pool_rows(key, query, 5, 8**-0.5)
    weights = landmark_attention_weights(query, pooled, block_size=5, landmark_bias=bias)
    ordinary = (torch.arange(21) % 5 != 4) & torch.ones(21, 21).tril().bool()
    scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~ordinary, -torch.inf)
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_pooled_keys_of_rows_are_those_of_their_blocks_and_all_else_stays() -> None:
    query, key, _ = random_inputs((4, 2, 23, 23, 5, 8))
    pooled, bias = pool_rows(key, prior_of_heads(query.transpose(1, 2), 2).transpose(1, 2), 5, 0.3)
    assert pooled.shape == key.shape and bias.shape == (2, 2, 4)
    ordinary = torch.arange(23) % 5 != 4
    assert torch.equal(pooled[:, :, ordinary], key[:, :, ordinary])
    for head, block in ((0, 0), (1, 3)):
        prior = query[:, 2 * head : 2 * head + 2, 5 * block + 4].mean(1)
        one, its_bias = pool_block(key[:, head, 5 * block : 5 * block + 4], prior, 0.3)
        torch.testing.assert_close(pooled[:, head, 5 * block + 4], one)
        torch.testing.assert_close(bias[:, head, block], its_bias)


@pytest.mark.parametrize("landmark_key", ["token", "pooled"])
def test_a_calibration_changes_nothing_until_it_is_trained(landmark_key: str) -> None:
    plain = tiny_model(landmark_key=landmark_key)
    model = LandmarkLlamaForCausalLM(tiny_config(landmark_key=landmark_key, landmark_query_rank=3)).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("landmark_calibration" in name for name in missing)
    for length in (24, 70):
        ids = random_ids(2, length)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    model.train()(ids[:, :24], labels=ids[:, :24]).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.landmark_calibration.up.grad.abs().max() > 0


@every_landmark
def test_every_weight_learns(landmark: dict) -> None:
    model, ids = tiny_model(**landmark).train(), random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@every_landmark
def test_copied_kv_heads_change_nothing(landmark: dict) -> None:
    model = tiny_model(**landmark)
    copied = LandmarkLlamaForCausalLM(tiny_config(num_key_value_heads=4, **landmark)).eval()
    state = model.state_dict()
    if landmark.get("landmark_key") == "pooled":  # heads that share a key have one prior, so their queries must be one
        for name in [name for name in state if "q_proj" in name]:
            state[name] = state[name].unflatten(0, (2, 2, -1))[:, :1].expand(-1, 2, -1, -1).flatten(0, 2)
        model.load_state_dict(state)
    for name in [name for name in state if "k_proj" in name or "v_proj" in name or "prior_up" in name]:
        state[name] = state[name].unflatten(0, (2, 1, -1)).expand(-1, 2, -1, -1).flatten(0, 2)
    copied.load_state_dict(state)
    model, copied = in_float64(model), in_float64(copied)
    for length in (20, 60):
        ids = random_ids(2, length)
        torch.testing.assert_close(copied(ids).logits, model(ids).logits)


def test_in_the_first_layer_pooled_landmarks_do_not_tie() -> None:
    model, ids = in_float64(tiny_model(landmark_key="pooled", num_hidden_layers=1)), random_ids(1, 60)
    cache = model(ids, use_cache=True).past_key_values
    landmarks = cache.layers[0].storage.landmarks(19)
    assert (landmarks[:, :, 1:] - landmarks[:, :, :1]).abs().amax(-1).min() > 0.1


def test_saving_and_loading_gives_the_same_model(tmp_path) -> None:
    model, ids = tiny_model(**LANDMARKS["pooled_and_calibrated"]), random_ids(1, 60)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.landmark_key == "pooled" and loaded.config.landmark_query_rank == 3
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_converted_model_starts_with_an_untrained_calibration() -> None:
    from documents import byte_tokenizer

    settings = {"block_size": 4, "train_context_length": 32, "num_retrieved_blocks": 2}
    llama, ids = tiny_llama(), random_ids(2, 60)
    plain = LandmarkLlamaForCausalLM.from_llama(llama, byte_tokenizer(), **settings).eval()
    model = LandmarkLlamaForCausalLM.from_llama(llama, byte_tokenizer(), landmark_query_rank=3, **settings).eval()
    assert model.config.landmark_query_rank == 3
    assert torch.equal(model(ids).logits, plain(ids).logits)
    for layer in model.model.layers:
        calibration = layer.self_attn.landmark_calibration
        assert (calibration.up == 0).all() and 0.1 < calibration.down.std() * 32**0.5 < 2


@pytest.mark.parametrize(
    ("field", "value"), [("landmark_key", "mean"), ("landmark_query_rank", -1)], ids=["key", "rank"]
)
def test_settings_that_cannot_be_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize("landmark_key", ["token", "pooled"])
def test_a_cache_goes_on_with_the_landmark_keys_that_it_holds(landmark_key: str) -> None:
    model = tiny_model(landmark_key=landmark_key)
    cache = model(random_ids(1, 60), use_cache=True).past_key_values
    model.config.landmark_key = {"token": "pooled", "pooled": "token"}[landmark_key]
    for more in (1, 10):
        with pytest.raises(ValueError, match=f"the cache holds '{landmark_key}' landmark keys"):
            model(random_ids(1, more), past_key_values=cache)


def test_the_kernels_take_landmarks_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(availability, "kernels_run_on", lambda device: True)
    rotary = tiny_model().model._rotary_table(torch.device("cpu"))
    for landmark in LANDMARKS.values():
        model = tiny_model(**landmark)
        (storage, _) = model(random_ids(1, 60), use_cache=True).past_key_values.storages
        assert table.kernels_take(storage, torch.float32, rotary)
        assert not table.kernels_take(storage, torch.float64, rotary)
        assert LandmarkCache(model.config, cuda_graphs=True).graphs is not None
