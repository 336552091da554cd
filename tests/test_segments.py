"""Training through the cache: what a segment sees, where its gradients go, and what is refused."""

import copy

import pytest
import torch
from tiny import LANDMARK, every_landmark, in_float64, ragged, random_ids, tiny_model
from torch import Tensor
from torch.nn import functional

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM, insert_landmarks
from landmark_llama.attention import landmark_attention_reference
from landmark_llama.reading.segments import Segment

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCK = 3  # ordinary tokens of a block; a window is 8 blocks


def train_in_segments(
    model: LandmarkLlamaForCausalLM, ids: Tensor, tokens: int, cache: LandmarkCache | None = None, **row: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The sum of the losses of segments of `tokens`, each with a backward of its own, and their logits."""
    cache, losses, logits = LandmarkCache(model.config) if cache is None else cache, [], []
    for start in range(0, ids.shape[1], tokens):
        labels = ids[:, start : start + tokens + 1]
        call = {name: x[:, start : start + tokens] for name, x in row.items()}
        output = model(
            ids[:, start : start + tokens], labels=labels, past_key_values=cache, num_items_in_batch=1, **call
        )
        output.loss.backward()
        losses.append(output.loss.detach())
        logits.append(output.logits.detach())
    return torch.stack(losses).sum(), logits


def gradients(model: LandmarkLlamaForCausalLM) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def read_in_segments(model: LandmarkLlamaForCausalLM, ids: Tensor, tokens: int, **settings: object) -> list[Tensor]:
    """Logits of the same segments in evaluation, by the paper's protocol."""
    settings = {"local_attention": "chunked", "retrieval_granularity": "token_and_head", **settings}
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        return [model(part, past_key_values=cache, **settings).logits for part in ids.split(tokens, dim=1)]


@every_landmark
@pytest.mark.parametrize("tied", [False, True])
def test_one_segment_is_an_ordinary_training_step(landmark: dict, tied: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied, **landmark).train(), random_ids(2, 24)
    loss = model(ids, labels=ids, num_items_in_batch=1).loss
    loss.backward()
    expected = gradients(model)
    segment, _ = train_in_segments(model, ids, 24)
    assert torch.equal(segment, loss)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name


def with_earlier_keys_detached(tokens: int):
    """The definition over a whole row in which the keys of earlier segments are numbers."""
    positions = tokens // BLOCK * (BLOCK + 1)

    def attend(query: Tensor, key: Tensor, value: Tensor, *, block_size: int, scale: float, **_) -> Tensor:
        outputs = []
        for start in range(0, query.shape[2], positions):
            stop = start + positions
            k, v = (torch.cat([x[:, :, :start].detach(), x[:, :, start:stop]], dim=2) for x in (key, value))
            outputs.append(
                landmark_attention_reference(query[:, :, start:stop], k, v, block_size=block_size, scale=scale)
            )
        return torch.cat(outputs, dim=2)

    return attend


@pytest.mark.parametrize(("num_retrieved_blocks", "tokens", "length"), [(4, 9, 18), (5, 6, 18), (6, 3, 20)])
@pytest.mark.parametrize("predict_from_landmark", [False, True])
def test_where_every_block_is_retrieved_segments_are_one_forward_with_earlier_keys_detached(
    num_retrieved_blocks: int, tokens: int, length: int, predict_from_landmark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_retrieved_blocks": num_retrieved_blocks, "predict_from_landmark": predict_from_landmark}
    model, ids = in_float64(tiny_model(num_local_blocks=0, **settings)).train(), random_ids(2, length)
    loss, _ = train_in_segments(model, ids, tokens)
    actual = gradients(model)
    monkeypatch.setattr("landmark_llama.attention.whole_rows.landmark_attention", with_earlier_keys_detached(tokens))
    expected = model(ids, labels=ids, num_items_in_batch=1).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach().to(loss.dtype))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@every_landmark
@pytest.mark.parametrize("num_retrieved_blocks", [0, 1, 2, 4])
def test_a_segment_sees_what_chunked_reading_sees(landmark: dict, num_retrieved_blocks: int) -> None:
    model = in_float64(
        tiny_model(num_retrieved_blocks=num_retrieved_blocks, num_local_blocks=0, num_hidden_layers=3, **landmark)
    )
    ids, tokens = random_ids(2, 100), (8 - num_retrieved_blocks - 1) * BLOCK
    expected = read_in_segments(model, ids, tokens)
    _, logits = train_in_segments(model.train(), ids, tokens)
    for actual, read in zip(logits, expected, strict=True):
        torch.testing.assert_close(actual, read)


@every_landmark
def test_the_gradient_of_a_segment_is_the_derivative_of_its_loss_with_the_cache_held_fixed(landmark: dict) -> None:
    model, ids = in_float64(tiny_model(num_retrieved_blocks=2, **landmark)).train(), random_ids(2, 60)
    cache = LandmarkCache(model.config)
    train_in_segments(model, ids[:, :45], 15, cache)
    model.zero_grad()

    def loss() -> Tensor:
        call = {"past_key_values": copy.deepcopy(cache), "labels": ids[:, 45:], "num_items_in_batch": 1}
        return model(ids[:, 45:], **call).logits.log_softmax(-1).square().mean()

    loss().backward()
    direction = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    slope = sum((weight.grad * direction[name]).sum() for name, weight in model.named_parameters())
    ends, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for name, weight in model.named_parameters():
                weight += sign * step * direction[name]
            ends.append(loss())
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)


def test_no_gradient_flows_into_earlier_segments() -> None:
    model, ids = tiny_model().train(), random_ids(2, 30)
    parts = [model.get_input_embeddings()(part).detach().requires_grad_() for part in ids.split(15, dim=1)]
    cache = LandmarkCache(model.config)
    losses = [
        model(inputs_embeds=part, labels=labels, past_key_values=cache).loss
        for part, labels in zip(parts, ids.split(15, dim=1), strict=True)
    ]
    losses[1].backward()
    assert parts[0].grad is None and parts[1].grad.abs().sum() > 0
    losses[0].backward()  # what is written to the cache later is no part of what this needs
    assert parts[0].grad.abs().sum() > 0
    assert not any(layer.storage.key.requires_grad for layer in cache.layers)


def test_changing_a_later_token_changes_no_earlier_logit() -> None:
    model, ids = tiny_model().train(), random_ids(1, 75)
    expected = torch.cat(train_in_segments(model, ids, 15)[1], dim=1)
    for place in (0, 14, 15, 37, 60, 74):
        other = ids.clone()
        other[0, place] = 8 + (ids[0, place] - 7) % 50
        logits = torch.cat(train_in_segments(model, other, 15)[1], dim=1)
        torch.testing.assert_close(logits[:, :place], expected[:, :place], rtol=0, atol=0)
        assert not torch.equal(logits[:, place], expected[:, place])


def test_the_losses_of_the_segments_add_up_to_that_of_the_row() -> None:
    model, ids = tiny_model().train(), random_ids(2, 50)
    loss, logits = train_in_segments(model, ids, 15)
    whole = torch.cat(logits, dim=1)
    expected = functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_the_label_after_the_last_token_may_be_given_to_any_call() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    logits = model(ids).logits
    expected = functional.cross_entropy(logits[:, :13].flatten(0, 1), ids[:, 1:14].flatten())
    torch.testing.assert_close(model(ids[:, :13], labels=ids[:, :14]).loss, expected)
    landmarked = insert_landmarks(ids[:, :13], BLOCK + 1, LANDMARK)
    labels = torch.cat([landmarked, ids[:, 13:14]], dim=1)
    torch.testing.assert_close(model(landmarked, labels=labels).loss, expected)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, 12] = 0  # padding predicts nothing
    left_out = functional.cross_entropy(logits[0, :12], ids[0, 1:13], reduction="sum")
    left_out = left_out + functional.cross_entropy(logits[1, :13], ids[1, 1:14], reduction="sum")
    labels = ids[:, :14].clone()
    labels[0, 12] = -100
    with_padding = model(ids[:, :13], attention_mask=mask, labels=labels).loss
    expected = (left_out - functional.cross_entropy(logits[0, 11], ids[0, 12])) / 24
    torch.testing.assert_close(with_padding, expected)
    with pytest.raises(ValueError, match="only a column more"):
        model(ids[:, :13], labels=ids[:, :15])


def test_rows_may_end_early_or_begin_in_a_later_segment() -> None:
    model = in_float64(tiny_model()).train()
    rows = [random_ids(55), random_ids(20, seed=1), random_ids(40, seed=2)]
    batch = ragged([rows[0], functional.pad(rows[1], (0, 35)), rows[2]])
    batch["attention_mask"][1, 20:] = 0
    ids = batch.pop("input_ids")
    loss, logits = train_in_segments(model, ids, 15, **batch)
    actual, whole = gradients(model), torch.cat(logits, dim=1)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in actual.values())
    for row, place in ((0, slice(0, 55)), (1, slice(0, 20)), (2, slice(15, 55))):
        alone = torch.cat(train_in_segments(model, rows[row].unsqueeze(0), 15)[1], dim=1)
        torch.testing.assert_close(whole[row, place], alone[0])


@pytest.mark.parametrize("after_all", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(after_all: bool) -> None:
    plain, saving = tiny_model().train(), tiny_model().train()
    saving.gradient_checkpointing_enable()
    ids, found = random_ids(2, 60), []
    for model in (plain, saving):
        if after_all:
            cache = LandmarkCache(model.config)
            sum(model(x, labels=x, past_key_values=cache).loss for x in ids.split(15, dim=1)).backward()
        else:
            _, logits = train_in_segments(model, ids, 15)
            torch.testing.assert_close(torch.cat(logits, 1), torch.cat(read_in_segments(plain.eval(), ids, 15), 1))
            plain.train()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_finite_everywhere(autocast: bool) -> None:
    model, ids = tiny_model().train(), random_ids(2, 60)
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, logits = train_in_segments(model, ids, 15)
    assert loss.isfinite() and logits[-1].dtype == torch.bfloat16
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_autocast_does_not_lower_the_precision_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, outputs = Segment.attend, []

    def observe(self: Segment, *inputs: Tensor, **settings: object) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            outputs.append(attend(self, *inputs, **settings))
        outputs.append(attend(self, *inputs, **settings))  # writes the same to the cache
        return outputs[-1]

    monkeypatch.setattr(Segment, "attend", observe)
    model, ids = tiny_model().train(), random_ids(2, 45)
    with torch.autocast("cpu", torch.bfloat16):
        train_in_segments(model, ids, 15)
    assert len(outputs) == 12
    for without, within in zip(outputs[::2], outputs[1::2], strict=True):
        assert within.dtype == torch.bfloat16 and torch.equal(without, within)


def test_a_segment_retrieves_as_many_blocks_as_training_is_to() -> None:
    few, ids = in_float64(tiny_model(num_retrieved_blocks=4, train_retrieved_blocks=2)), random_ids(2, 45)
    expected = read_in_segments(few, ids, 9, num_retrieved_blocks=2)
    _, logits = train_in_segments(few.train(), ids, 9)
    torch.testing.assert_close(logits, expected)
    cache = LandmarkCache(few.config)
    asked = [few(x, past_key_values=cache, num_retrieved_blocks=4).logits for x in ids.split(9, dim=1)]
    torch.testing.assert_close(asked, read_in_segments(few.eval(), ids, 9, num_retrieved_blocks=4))
    assert not torch.isclose(asked[-1], logits[-1]).all()


def test_a_cache_is_returned_where_one_is_asked_for() -> None:
    model, ids = tiny_model().train(), random_ids(1, 24)
    first = model(ids[:, :15], use_cache=True)
    again = model(ids[:, 15:], past_key_values=first.past_key_values)
    assert again.past_key_values.get_seq_length() == 24
    torch.testing.assert_close([first.logits, again.logits], read_in_segments(model.eval(), ids, 15))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrieval_granularity": "head"}, "retrieval_granularity='head' in training with a cache"),
        ({"local_attention": "sliding"}, "local_attention='sliding' in training with a cache"),
        ({"num_local_blocks": 1}, "num_local_blocks=1 in training with a cache"),
    ],
)
def test_how_a_segment_is_read_cannot_be_asked_for(settings: dict, message: str) -> None:
    model, ids = tiny_model().train(), random_ids(1, 15)
    with pytest.raises(ValueError, match=message):
        model(ids, past_key_values=LandmarkCache(model.config), **settings)


def test_segments_that_begin_inside_a_block_or_do_not_fit_are_refused() -> None:
    model, ids = tiny_model(retrieval_granularity="head").train(), random_ids(2, 40)
    cache = LandmarkCache(model.config)
    model(ids[:, :24], past_key_values=cache)  # the first may take the whole window
    with pytest.raises(ValueError, match=r"21 landmarked positions .* at most 20 fit .* beside 2 retrieved blocks"):
        model(ids[:, 24:40], past_key_values=cache)
    model(ids[:, 24:38], past_key_values=cache)
    with pytest.raises(ValueError, match="row 0 goes on inside a block, at landmarked position 50"):
        model(ids[:, 38:], past_key_values=cache)
    with pytest.raises(ValueError, match="33 landmarked positions"):
        model(ids[:, :25], past_key_values=LandmarkCache(model.config))
