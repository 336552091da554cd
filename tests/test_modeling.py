"""The model: losses and logits in plain coordinates at any length, inputs of every kind, what it refuses."""

from typing import Any

import pytest
import torch
from tiny import LANDMARK, VOCABULARY, in_float64, logits_in_calls, ragged, random_ids, tiny_llama, tiny_model
from tolerance import assert_as_accurate
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM, LandmarkLlamaModel, insert_landmarks
from landmark_llama.reading import groups

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS = [1, 2, 3, 4, 23, 24, 25, 26, 61, 100]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_text_of_any_length_has_all_its_logits_and_their_loss(length: int) -> None:
    model, ids = tiny_model(), random_ids(2, length)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, length, VOCABULARY) and output.logits.isfinite().all()
    if length > 1:
        torch.testing.assert_close(output.loss, next_token_loss(output.logits, ids))


@pytest.mark.parametrize("length", [20, 100])
def test_ignored_labels_and_padding_have_no_part_in_the_loss(length: int) -> None:
    model = in_float64(tiny_model())
    rows = [random_ids(length), random_ids(length // 2)]
    batch = ragged(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 5:9] = -100
    total, count = 0.0, 0
    for row, target in ((rows[0], labels[0]), (rows[1], labels[1, length - length // 2 :])):
        logits = model(row.unsqueeze(0)).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, target[1:], reduction="sum")
        count += int((target[1:] != -100).sum())
    torch.testing.assert_close(model(**batch, labels=labels).loss, total / count)
    for items in (7, torch.tensor(7)):
        torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=items).loss, total / 7)


def test_the_loss_of_a_long_text_never_holds_all_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(1, 300)
    sizes = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[1]))
    loss = model(ids, labels=ids, logits_to_keep=1).loss
    assert max(sizes) <= 32 and sum(sizes) >= 300
    torch.testing.assert_close(loss, next_token_loss(model(ids).logits, ids))


@pytest.mark.parametrize("length", [20, 90])
def test_logits_to_keep_are_those_of_all_logits(length: int) -> None:
    model, ids = tiny_model(), random_ids(2, length)
    logits = model(ids).logits
    for keep in (1, 3, length):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits[:, -keep:])
    some = torch.tensor([0, 3, length - 1])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, logits[:, some])
    kept = model(ids, logits_to_keep=2, labels=ids)
    torch.testing.assert_close(kept.logits, logits[:, -2:])
    torch.testing.assert_close(kept.loss, next_token_loss(logits, ids))
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, logits_to_keep=torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
def test_where_no_logits_are_kept_the_last_layer_only_remembers(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is read by nobody there, its keys and values by all that comes later."""
    monkeypatch.setattr(groups, "CHUNK_POSITIONS", 16)  # several chunks
    model, ids = tiny_model(retrieval_granularity=granularity), random_ids(2, 100)
    outputs = [0, 0]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(lambda *_, i=i: outputs.__setitem__(i, outputs[i] + 1))
    logits, kept = {}, {}
    for keep in (0, 1):
        cache, outputs[:] = LandmarkCache(model.config), [0, 0]
        first = model(ids[:, :80], past_key_values=cache, logits_to_keep=keep).logits
        kept[keep] = tuple(outputs)
        logits[keep] = torch.cat([first[:, -1:], model(ids[:, 80:], past_key_values=cache).logits], dim=1)
    assert kept[0][0] == kept[0][1] == kept[1][0] > 2 and kept[1][1] == 1
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("predict_from_landmark", [False, True])
def test_input_that_holds_its_landmarks_means_the_same(predict_from_landmark: bool, use_cache: bool) -> None:
    model = tiny_model(predict_from_landmark=predict_from_landmark)
    for length in (3, 20, 21, 70):
        ids = random_ids(2, length)
        landmarked = insert_landmarks(ids, 4, LANDMARK)
        labels = landmarked.clone()
        plain = model(ids, labels=ids, use_cache=use_cache)
        given = model(landmarked, labels=labels, use_cache=use_cache)
        assert torch.equal(given.logits, plain.logits) and torch.equal(given.loss, plain.loss)


def test_rows_that_hold_landmarks_may_be_padded() -> None:
    model = in_float64(tiny_model())
    rows = [random_ids(50), random_ids(13), random_ids(2)]
    expected = model(**ragged(rows)).logits
    batch = ragged([insert_landmarks(row, 4, LANDMARK) for row in rows], pad=LANDMARK)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    for i, row in enumerate(rows):
        torch.testing.assert_close(output.logits[i, -len(row) :], expected[i, -len(row) :])
    plain = ragged(rows)
    plain_labels = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100)
    torch.testing.assert_close(output.loss, model(**plain, labels=plain_labels).loss)


def test_a_misplaced_landmark_is_named_by_row_and_position() -> None:
    model = tiny_model()
    ids = random_ids(2, 30)
    ids[1, 10] = LANDMARK
    for settings in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="row 1, position 10"):
            model(ids, **settings)


@pytest.mark.parametrize("wrong", [VOCABULARY, -1, 10**6])
def test_ids_outside_the_vocabulary_are_named_by_row_and_position(wrong: int) -> None:
    ids = random_ids(2, 30)
    ids[1, 4] = wrong
    with pytest.raises(ValueError, match=f"row 1, position 4: token id {wrong} is outside the vocabulary of 61"):
        tiny_model()(ids)


def test_embeddings_in_place_of_ids_give_the_same() -> None:
    model = tiny_model()
    for length in (20, 70):
        ids = random_ids(2, length)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_a_mask_that_does_not_fit_and_attention_weights_are_refused() -> None:
    model, ids = tiny_model(), random_ids(2, 10)
    for mask in (torch.ones(2, 9), torch.ones(1, 10), torch.ones(2, 1, 10, 10)):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids[:, :5])


def test_a_mask_may_have_the_columns_of_earlier_calls_in_front() -> None:
    model, ids = in_float64(tiny_model()), random_ids(1, 40)
    cache = LandmarkCache(model.config)
    model(ids[:, :30], past_key_values=cache)
    mask = torch.ones(1, 40, dtype=torch.long)
    logits = model(ids[:, 30:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=True).logits[:, 30:])


def test_hidden_states_are_those_of_the_plain_columns() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    output = model(ids, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 20, 32)] * 3
    torch.testing.assert_close(output.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        model(random_ids(2, 90), output_hidden_states=True)


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 500.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 8,
    },
}


def as_landmark(llama: LlamaForCausalLM, **settings: Any) -> LandmarkLlamaForCausalLM:
    config = {**llama.config.to_diff_dict(), "landmark_token_id": LANDMARK, "num_retrieved_blocks": 0, **settings}
    for name in ("model_type", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    model = LandmarkLlamaForCausalLM(LandmarkLlamaForCausalLM.config_class(**config)).eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE.keys())
def test_inside_one_block_a_landmark_model_is_a_llama_with_any_rope(rope: dict, streamed: bool) -> None:
    # blocks of 24: 22 tokens complete none
    llama = tiny_llama(rope_parameters=dict(rope), max_position_embeddings=48)
    model, ids = as_landmark(llama, block_size=24), random_ids(2, 22)
    position = torch.arange(48).unsqueeze(0)
    # types that follow the length of the text are asked for the whole window, as the landmark model's table is
    cos, sin = llama.model.rotary_emb(torch.zeros(1), position)
    table = model.model._rotary_table(torch.device("cpu"))
    torch.testing.assert_close(table.cos * table.scaling, cos[0, :, :4])
    torch.testing.assert_close(table.sin * table.scaling, sin[0, :, :4])
    whole = torch.nn.functional.pad(ids, (0, 26), value=9)  # 48 positions, for types that follow the text's length
    actual = model.double()(ids, use_cache=streamed).logits  # its table and norms still in float32
    plain = llama(whole).logits[:, :22]
    assert_as_accurate(actual, plain, llama.double()(whole).logits[:, :22])


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE.keys())
def test_any_chunking_gives_the_same_logits_with_any_rope(rope: dict) -> None:
    model = tiny_model(rope_parameters=dict(rope), train_context_length=32, max_position_embeddings=32)
    ids = random_ids(1, 21)
    with torch.no_grad():
        reference = model.double()(ids).logits
        streamed = logits_in_calls(model, ids, [5, 1, 1, 9])
        plain = model.float()(ids).logits
    assert_as_accurate(streamed, plain, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rope_table_stays_in_fp32_whatever_the_models_dtype(dtype: torch.dtype, tmp_path) -> None:
    expected = tiny_model().model._rotary_table(torch.device("cpu"))
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for low in (model.to(dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        low(random_ids(1, 5))
        table = low.model._rotary_table(torch.device("cpu"))
        assert low.dtype == dtype and table.cos.dtype == torch.float32
        assert torch.equal(table.cos, expected.cos) and torch.equal(table.sin, expected.sin)


def test_low_precision_is_as_accurate_as_low_precision_of_a_dense_llama() -> None:
    # the same text in one block: landmark against dense, both in bf16, against float32
    llama = tiny_llama(max_position_embeddings=48)
    model, ids = as_landmark(llama, block_size=24), random_ids(4, 22)
    with torch.no_grad():
        reference = llama(ids).logits
        plain = llama.bfloat16()(ids).logits
        actual = model.bfloat16()(ids).logits
        streamed = model(ids, use_cache=True).logits
    assert_as_accurate(actual, plain, reference)
    assert_as_accurate(streamed, plain, reference)


def test_training_with_retrieval_leaves_the_least_of_the_earlier_blocks_unseen() -> None:
    settings = {"num_local_blocks": 1, "num_retrieved_blocks": 2}
    full, some, all_blocks = (tiny_model(train_retrieved_blocks=n, **settings) for n in (None, 2, 8))
    ids = random_ids(2, 24)
    few = 4 * 3  # tokens of the first four blocks: their own, one local block and two more are all there are
    torch.testing.assert_close(some(ids).logits[:, :few], full(ids).logits[:, :few])
    assert not torch.isclose(some(ids).logits[:, -1], full(ids).logits[:, -1]).all()
    torch.testing.assert_close(all_blocks(ids).logits, full(ids).logits)
    some.train()(ids, labels=ids).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in some.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_learns_the_landmarks_row_included(tied: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied).train(), random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name
    assert model.get_input_embeddings().weight.grad[LANDMARK].abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = tiny_model().train(), tiny_model().train()
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    calls = []
    saving.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = random_ids(2, 20)
    losses = [model(ids, labels=ids).loss for model in (plain, saving)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # the forward ran once more in the backward
    for (name, weight), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)


def test_training_on_rows_longer_than_the_context_is_refused() -> None:
    model, ids = tiny_model().train(), random_ids(1, 25)
    with pytest.raises(ValueError, match="train_context_length=32"):
        model(ids, labels=ids)
    model(ids[:, :24], labels=ids[:, :24]).loss.backward()
    assert model.eval()(ids, labels=ids).loss.isfinite()


def test_a_tuple_is_returned_where_one_is_asked_for() -> None:
    model, ids = tiny_model(), random_ids(1, 10)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0 and logits.shape == (1, 10, VOCABULARY)
    torch.testing.assert_close(model(ids, return_dict=False)[0], logits)


def test_the_model_without_a_head_reads_the_same_states() -> None:
    model, ids = tiny_model(), random_ids(1, 50)
    bare = LandmarkLlamaModel(model.config).eval()
    bare.load_state_dict(model.model.state_dict())
    torch.testing.assert_close(model.lm_head(bare(ids).last_hidden_state), model(ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_load_the_model_where_they_say(device_map: str, tmp_path) -> None:
    model, ids = tiny_model(), random_ids(1, 50)
    model.save_pretrained(tmp_path)
    loaded = LandmarkLlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3).shape == (1, 53)


def test_layers_that_are_moved_at_each_call_work() -> None:
    from accelerate import cpu_offload

    model, ids = tiny_model(), random_ids(1, 50)
    expected = model(ids).logits
    offloaded = tiny_model()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded(ids).logits, expected)
    torch.testing.assert_close(offloaded(ids, logits_to_keep=1).logits, expected[:, -1:])


def test_saving_and_loading_gives_the_same_model(tmp_path) -> None:
    for tied in (False, True):
        model, ids = tiny_model(tie_word_embeddings=tied), random_ids(1, 50)
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert type(loaded) is LandmarkLlamaForCausalLM and not loaded.training
        assert torch.equal(loaded(ids).logits, model(ids).logits)
