"""What was retrieved: blocks and weights that are recorded are those that attention used, and nobody pays unasked."""

import pytest
import torch
from tiny import LANDMARKS, ragged, random_ids, tiny_model

from landmark_llama import LandmarkCache
from landmark_llama.reading import trace
from landmark_llama.reading.trace import record_retrieved

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ways_to_weigh = pytest.mark.parametrize(
    "settings",
    [*LANDMARKS.values(), {"block_weight": "exact"}, {"predict_from_landmark": True}],
    ids=[*LANDMARKS, "exact", "predict_from_landmark"],
)


@ways_to_weigh
@torch.no_grad()
def test_decoding_and_reading_record_the_same_blocks_and_weights(settings: dict) -> None:
    model, ids = tiny_model(**settings), random_ids(1, 61)
    output = model.generate(ids, max_new_tokens=8, do_sample=False, return_retrieved=True)
    assert len(output.retrieved) == 8
    with record_retrieved(model) as read:
        for length in range(61, 69):
            # the last token of a text that is read anew is a chunk's last, not a step's
            model(output.sequences[:, :length], past_key_values=LandmarkCache(model.config))
    for step, again in zip(output.retrieved, read, strict=True):
        assert step.block.shape == (2, 1, 4, 2)
        assert torch.equal(step.block, again.block)
        torch.testing.assert_close(step.weight, again.weight, atol=1e-4, rtol=1e-3)
        assert (step.weight > 0).all() and (step.weight.sum(-1) <= 1).all()


@torch.no_grad()
def test_a_block_has_the_weight_that_its_values_get_in_the_output() -> None:
    model, ids = tiny_model(num_hidden_layers=1), random_ids(1, 61)
    with record_retrieved(model) as retrieved:
        cache = LandmarkCache(model.config)
        model(ids, past_key_values=cache)
        # a value of 1 in all of a block's tokens adds its weight to the output of attention
        outputs = {}
        attention = model.model.layers[0].self_attn
        hook = attention.o_proj.register_forward_pre_hook(lambda _, given: outputs.update(last=given[0]))
        storage, token = cache.storages[0], random_ids(1, 1)
        chosen = []
        for block in range(20):
            storage.value[:], cache_before = 0, cache.get_seq_length()
            storage.value[:, :, block] = 1
            # what the step itself adds must be nothing, too
            value = attention.v_proj.weight.data.clone()
            attention.v_proj.weight.data.zero_()
            model(token, past_key_values=cache)
            attention.v_proj.weight.data.copy_(value)
            chosen.append(outputs["last"].view(4, -1)[:, 0])
            cache.crop(cache_before)
        hook.remove()
    step = retrieved[-1]
    for head in range(4):
        for block, weight in zip(step.block[0, 0, head].tolist(), step.weight[0, 0, head].tolist(), strict=True):
            assert float(chosen[block][head]) == pytest.approx(weight, abs=1e-5)


@torch.no_grad()
def test_each_row_of_a_batch_records_its_own_last_token() -> None:
    model = tiny_model()
    rows = [random_ids(80), random_ids(33, seed=1), random_ids(47, seed=2)]
    together = model.generate(**ragged(rows), max_new_tokens=3, do_sample=False, return_retrieved=True)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=3, do_sample=False, return_retrieved=True)
        for step, expected in zip(together.retrieved, alone.retrieved, strict=True):
            assert torch.equal(step.block[1:, i], expected.block[1:, 0])
            torch.testing.assert_close(step.weight[:, i], expected.weight[:, 0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
@torch.no_grad()
def test_every_way_of_choosing_is_recorded(granularity: str, local_attention: str) -> None:
    model = tiny_model(retrieval_granularity=granularity, local_attention=local_attention)
    output = model.generate(random_ids(1, 61), max_new_tokens=4, do_sample=False, return_retrieved=True)
    for step in output.retrieved:
        assert ((step.block >= 0) & (step.block < 22)).all()
        assert (step.block[..., 1:] > step.block[..., :-1]).all()
        assert (step.weight.sum(-1) <= 1 + 1e-5).all()


@torch.no_grad()
def test_a_text_that_is_read_directly_retrieves_nothing() -> None:
    model = tiny_model()
    output = model.generate(random_ids(1, 5), max_new_tokens=2, do_sample=False, return_retrieved=True)
    assert len(output.retrieved) == 2
    assert all((step.block == -1).all() and not step.weight.any() for step in output.retrieved)


@torch.no_grad()
def test_recording_changes_no_token_and_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(1, 61)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    output = model.generate(ids, max_new_tokens=6, do_sample=False, return_retrieved=True)
    assert torch.equal(output.sequences, plain)
    steps = len(output.retrieved)
    # outside nothing is recorded, nor computed
    monkeypatch.setattr(trace.Recorder, "add", lambda *_: pytest.fail("recorded unasked"))
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert len(output.retrieved) == steps and not model.model._forward_hooks


def test_a_model_without_landmarks_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear holds no landmark LLaMA"), record_retrieved(torch.nn.Linear(2, 2)):
        pass
