"""The step of rows that stand at one position is the general decoding step, and steps aside wherever it must."""

import pytest
import torch
from tiny import every_landmark, in_float64, ragged, random_ids, tiny_model

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.modeling import LandmarkDecoderLayer
from landmark_llama.reading.aligned import AlignedStep
from landmark_llama.reading.decoding import DecodingStep
from landmark_llama.reading.tiered_storage import HostStorage
from landmark_llama.reading.trace import record_retrieved

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of step that were taken."""
    taken = []
    for kind in (AlignedStep, DecodingStep):
        attend = kind.attend

        def noted(self, *args, kind=kind, attend=attend, layer_idx: int, **settings):
            taken.extend([kind.__name__] * (layer_idx == 0))
            return attend(self, *args, layer_idx=layer_idx, **settings)

        monkeypatch.setattr(kind, "attend", noted)
    return taken


def logits_of_steps(model: LandmarkLlamaForCausalLM, read: int, batch: int = 2, **settings) -> torch.Tensor:
    """Logits of 9 tokens, each in a call of its own, after `read` others."""
    ids, cache = random_ids(batch, read + 9), LandmarkCache(model.config)
    model(ids[:, :read], past_key_values=cache, **settings)
    calls = (model(one, past_key_values=cache, **settings).logits for one in ids[:, read:].split(1, dim=1))
    return torch.cat(list(calls), dim=1)


@every_landmark
@pytest.mark.parametrize("read", [1, 13, 40], ids=["in the first block", "fewer blocks than fit", "many blocks"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"local_attention": "chunked"},
        {"num_retrieved_blocks": 3, "num_local_blocks": 0, "num_key_value_heads": 4},
        {"block_weight": "exact", "num_sink_blocks": 1},
        {"num_sink_blocks": 2, "num_key_value_heads": 1},
        {"num_retrieved_blocks": 0},
        {"block_weight": "exact", "num_reranked_blocks": 1, "num_sink_blocks": 1},
        {"block_weight": "exact", "num_reranked_blocks": 1000, "num_key_value_heads": 1},
    ],
    ids=["sliding", "chunked", "own heads", "exact", "sinks", "nothing retrieved", "reranked", "all reranked"],
)
def test_rows_at_one_position_get_what_rows_anywhere_get(
    settings: dict, read: int, landmark: dict, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_float64(tiny_model(**settings, **landmark))
    logits = logits_of_steps(model, read)
    assert steps.count("AlignedStep") >= 4 and "DecodingStep" in steps
    steps.clear()
    monkeypatch.setattr(AlignedStep, "of", lambda *_: None)
    torch.testing.assert_close(logits, logits_of_steps(model, read))
    assert set(steps) == {"DecodingStep"}


def test_weights_that_change_between_steps_are_the_ones_that_count() -> None:
    model, ids = tiny_model(), random_ids(1, 44)
    expected = tiny_model(seed=1)
    caches = [LandmarkCache(model.config) for _ in range(2)]
    for one, cache in zip((model, expected), caches, strict=True):
        one(ids[:, :41], past_key_values=cache)
        one(ids[:, 41:42], past_key_values=cache)
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        weight.data = other.data
    logits = (x(ids[:, 42:43], past_key_values=caches[1]).logits for x in (model, expected))
    first = next(logits)
    caches[1].crop(-1)
    torch.testing.assert_close(first, next(logits), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "layers.1.self_attn.q_proj", "layers.1.input_layernorm"])
def test_hooks_are_called_in_every_step(name: str) -> None:
    model, calls = tiny_model(), []
    model.model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    logits_of_steps(model, 13)
    assert len(calls) == 10


def test_a_step_of_plain_modules_is_that_of_their_calls_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    logits = logits_of_steps(model, 40)
    monkeypatch.setattr(LandmarkDecoderLayer, "decode", torch.nn.Module.__call__)
    torch.testing.assert_close(logits, logits_of_steps(model, 40), rtol=0, atol=0)


def test_a_block_that_is_begun_in_inference_mode_is_gone_on_with_in_any(steps: list[str]) -> None:
    model, ids, cache = tiny_model(), random_ids(1, 43), LandmarkCache(tiny_model().config)
    with torch.no_grad():
        model(ids[:, :39], past_key_values=cache)
    with torch.inference_mode():
        model(ids[:, 39:40], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, 40:41], past_key_values=cache)
    assert steps == ["AlignedStep"] * 2


def test_the_general_step_is_taken_by_ragged_rows_other_tiers_shared_choices_and_records(steps: list[str]) -> None:
    model, one = tiny_model(), random_ids(2, 1)
    cache = LandmarkCache(model.config)
    model(**ragged([random_ids(40), random_ids(30)]), past_key_values=cache)
    model(one, past_key_values=cache)
    for storage in ({}, {"storage": HostStorage()}):
        cache = LandmarkCache(model.config, **storage)
        model(random_ids(2, 40), past_key_values=cache)
        if storage:
            model(one, past_key_values=cache)
        model(one, past_key_values=cache, retrieval_granularity="token")
        with record_retrieved(model):
            model(one, past_key_values=cache)
    assert set(steps) == {"DecodingStep"}
