"""Mistral, Qwen2, Qwen3 and SmolLM3 with landmarks: the definition, reading, generation and training in each."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import dense_in_float64, dense_model, every_family, landmark_model, logits_by_definition
from tiny import LANDMARK, LANDMARKS, every_landmark, in_float64, logits_in_calls, ragged, random_ids
from tolerance import assert_as_accurate
from torch import Tensor

from landmark_llama import LandmarkCache
from landmark_llama.attention.rotary import StillTable
from landmark_llama.language_model import LandmarkForCausalLM

EXACT = {"landmark_key": "pooled", "block_weight": "exact", "num_sink_blocks": 1}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@every_family
def test_within_one_block_a_landmark_model_is_its_dense_model(family: str) -> None:
    dense, ids = dense_model(family), random_ids(2, 31)
    landmark = landmark_model(family, block_size=32, num_retrieved_blocks=0, max_position_embeddings=64)
    with torch.no_grad():
        plain, reference = dense(ids).logits, dense_in_float64(dense)(ids).logits
        assert_as_accurate(in_float64(landmark)(ids).logits, plain, reference)


@every_family
def test_rows_of_several_blocks_are_the_familys_own_layers_around_the_definition(family: str) -> None:
    dense, ids = dense_model(family), random_ids(2, 24)
    plain, reference = logits_by_definition(dense, ids), logits_by_definition(dense_in_float64(dense), ids)
    with torch.no_grad():
        assert_as_accurate(in_float64(landmark_model(family))(ids).logits, plain, reference)


@every_landmark
@every_family
def test_where_all_blocks_fit_streaming_is_one_forward(family: str, landmark: dict) -> None:
    model, ids = in_float64(landmark_model(family, **landmark)), random_ids(2, 21)  # the last has two to retrieve
    with torch.no_grad():
        expected = model(ids).logits
    for calls in ([21], [5, 1, 1, 9], [1] * 21):
        torch.testing.assert_close(logits_in_calls(model, ids, calls), expected)


READING = pytest.mark.parametrize("landmark", [*LANDMARKS.values(), EXACT], ids=[*LANDMARKS, "exact"])


@READING
@every_family
def test_a_long_text_gives_the_same_logits_however_it_is_cut_into_calls(family: str, landmark: dict) -> None:
    model, ids = in_float64(landmark_model(family, **landmark)), random_ids(2, 70)
    with torch.no_grad():
        expected = model(ids).logits
    for calls in ([1] * 70, [40, 1, 7, 1]):
        torch.testing.assert_close(logits_in_calls(model, ids, calls), expected)


@pytest.mark.parametrize("granularity", ["head", "token"])
@every_family
def test_choices_that_tokens_or_heads_share_read_a_batch_as_each_row_alone(family: str, granularity: str) -> None:
    model = in_float64(landmark_model(family, retrieval_granularity=granularity, local_attention="chunked"))
    rows = [random_ids(length, seed=length) for length in (70, 3, 41)]
    with torch.no_grad():
        together = model(**ragged(rows)).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits[-len(row) :], model(row.unsqueeze(0)).logits[0])


@every_family
def test_left_padding_moves_no_landmark(family: str) -> None:
    model = in_float64(landmark_model(family))
    rows = [random_ids(length, seed=length) for length in (50, 1, 20)]
    with torch.no_grad():
        together = model(**ragged(rows)).logits
    generated = model.generate(**ragged(rows), do_sample=False, max_new_tokens=8)[:, -8:]
    for row, logits, tokens in zip(rows, together, generated, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits[-len(row) :], model(row.unsqueeze(0)).logits[0])
        alone = model.generate(row.unsqueeze(0), do_sample=False, max_new_tokens=8)
        assert torch.equal(tokens, alone[0, len(row) :])


@every_family
def test_generation_through_the_cache_is_generation_without_one(family: str) -> None:
    model, ids = in_float64(landmark_model(family)), random_ids(1, 45)
    cached = model.generate(ids, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    assert isinstance(cached.past_key_values, LandmarkCache)
    anew = model.generate(ids, do_sample=False, max_new_tokens=10, use_cache=False)
    assert torch.equal(cached.sequences, anew) and not (anew == LANDMARK).any()
    beams = model.generate(ids, do_sample=False, num_beams=3, max_new_tokens=6)
    assert torch.equal(beams, model.generate(ids, do_sample=False, num_beams=3, max_new_tokens=6, use_cache=False))


@every_landmark
@every_family
def test_the_gradient_of_every_weight_is_the_derivative_of_the_loss(family: str, landmark: dict) -> None:
    model, ids = in_float64(landmark_model(family, **landmark)).train(), random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        direction, step = torch.randn(weight.shape, generator=generator, dtype=torch.float64), 1e-4
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * step)
                logits = model(ids).logits[:, :-1].flatten(0, 1)
                losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
                weight.sub_(direction, alpha=sign * step)
        expected = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((weight.grad * direction).sum(), expected, rtol=1e-3, atol=1e-6, msg=name)


@every_family
def test_a_model_learns_a_row_by_heart(family: str) -> None:
    model, ids = landmark_model(family).train(), random_ids(1, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@every_family
def test_training_in_segments_sees_what_chunked_reading_sees(family: str) -> None:
    model, ids = in_float64(landmark_model(family, num_local_blocks=0)), random_ids(2, 60)
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        calls = {"local_attention": "chunked", "past_key_values": cache}
        expected = torch.cat([model(part, **calls).logits for part in ids.split(15, dim=1)], dim=1)
    cache, model = LandmarkCache(model.config), model.train()
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(15, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected)
    assert logits.requires_grad


@every_family
def test_documents_of_a_packed_row_are_read_as_if_each_stood_alone(family: str) -> None:
    model = in_float64(landmark_model(family))
    parts = [random_ids(1, length, seed=length) for length in (9, 4, 17)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat(parts, dim=1), position_ids=positions).logits
        torch.testing.assert_close(packed, torch.cat([model(part).logits for part in parts], dim=1))


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model, ids = landmark_model(family).train(), random_ids(1, 24)
    found = []
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
def test_low_precision_reads_and_generates(family: str, dtype: torch.dtype) -> None:
    model, ids = landmark_model(family).to(dtype), random_ids(2, 50)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert model.generate(ids, do_sample=False, max_new_tokens=4).shape == (2, 54)
    assert model.model._rotary.cos.dtype == torch.float32


def test_the_table_of_layers_without_rope_rotates_nothing_wherever_it_goes() -> None:
    rotary, cpu = landmark_model("smollm3").model._rotary_table(torch.device("cpu")), torch.device("cpu")
    x, position = torch.randn(2, 3, 8), torch.tensor([3, 9, 31])
    for table in (rotary, rotary.to(cpu)):
        assert table.still.cos.shape == table.cos.shape and isinstance(table.still.to(cpu), StillTable)
        assert torch.equal(table.still.rotate(x, position), x) and not torch.equal(table.rotate(x, position), x)


@contextmanager
def collected(model: LandmarkForCausalLM) -> Iterator[list[list[Tensor]]]:
    """What each layer's key projection gives, a tensor a call."""
    keys, handles = [[] for _ in model.model.layers], []
    for layer, parts in zip(model.model.layers, keys, strict=True):
        hook = layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, output, parts=parts: parts.append(output))
        handles.append(hook)
    yield keys
    for handle in handles:
        handle.remove()


def test_the_keys_that_a_layer_without_rope_stores_are_the_projected_ones() -> None:
    model, ids = landmark_model("smollm3"), random_ids(1, 21)
    for calls in ([21], [1] * 21):  # streamed, and by decoding steps
        cache = LandmarkCache(model.config)
        with collected(model) as keys:
            logits_in_calls(model, ids, calls, cache)
        for storage, parts, turns in zip(cache.storages, keys, [True, False, True], strict=True):
            projected = torch.cat(parts, dim=1)[0].unflatten(-1, (2, 8)).transpose(0, 1)
            stored = storage.key[0].flatten(1, 2)[:, : projected.shape[1]]
            assert torch.equal(stored, projected) is not turns
