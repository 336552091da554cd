"""Blocks that weigh what their tokens do: against ordinary attention, the definition and the other ways of reading."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from landmark_llama import LandmarkCache, LandmarkLlamaConfig, LandmarkLlamaForCausalLM, landmark_attention
from landmark_llama.attention.reference import landmark_attention_reference
from landmark_llama.reading.choice import choose_blocks

BLOCK = 8
SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
VARIANTS = [
    {},
    {"landmark_key": "pooled"},
    {"landmark_key": "pooled", "landmark_query_rank": 3, "num_sink_blocks": 1},
    {"num_sink_blocks": 2},
]


def make_model(**settings: object) -> LandmarkLlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"block_size": BLOCK, "num_retrieved_blocks": 3, "block_weight": "exact", **settings}
    config = LandmarkLlamaConfig(**{**SHAPE, **settings}, landmark_token_id=39)
    model = LandmarkLlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # a calibration that has been trained
        if layer.self_attn.landmark_calibration is not None:
            for name, weight in layer.self_attn.landmark_calibration.named_parameters():
                if name.endswith("up"):
                    torch.nn.init.normal_(weight, std=0.5)
    return model


def make_ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(39, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_model_whose_blocks_all_fit_is_its_dense_self_at_landmarked_positions(settings: dict) -> None:
    model, ids = make_model(**settings), make_ids(90)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    token = torch.arange(90)
    expected = dense(ids, position_ids=(token + token // (BLOCK - 1)).unsqueeze(0)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("settings", VARIANTS)
def test_streaming_equals_one_forward_where_all_blocks_fit_the_table(settings: dict, granularity: str) -> None:
    model, ids = make_model(**settings, num_local_blocks=2, retrieval_granularity=granularity), make_ids(41)
    whole, cache = model(ids).logits, LandmarkCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1, 5, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS)
def test_how_a_long_text_is_cut_into_calls_changes_nothing(settings: dict) -> None:
    model, ids = make_model(**settings, num_local_blocks=1), make_ids(200)
    whole, cache = model(ids).logits, LandmarkCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([90, *[1] * 20, 33, 57], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("retrieved", [None, 2])
@pytest.mark.parametrize("sinks", [0, 1])
def test_whole_rows_follow_the_definition(retrieved: int | None, sinks: int) -> None:
    generator = torch.Generator().manual_seed(2)
    draw = {"generator": generator, "dtype": torch.float64}
    query, scoring = torch.randn(2, 4, 61, 8, **draw), torch.randn(2, 4, 61, 8, **draw)
    key, value, bias = torch.randn(2, 2, 61, 8, **draw), torch.randn(2, 2, 61, 8, **draw), torch.randn(2, 2, 7, **draw)
    settings = {
        "block_size": BLOCK, "num_retrieved_blocks": retrieved, "num_direct_blocks": 1, "num_sink_blocks": sinks,
        "landmark_query": scoring, "landmark_bias": bias, "exact_weights": True,
    }  # fmt: skip
    found = landmark_attention(query, key, value, **settings)
    expected = landmark_attention_reference(query, key, value, **settings)
    torch.testing.assert_close(found, expected)
    scores = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(2, 1)) * 8**-0.5
    column = torch.arange(61)
    hidden = (column > column[:, None]) | (column % BLOCK == BLOCK - 1)
    ordinary = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    assert torch.allclose(found, ordinary) == (retrieved is None)


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("landmarks_tie", [False, True])
def test_sinks_are_chosen_whatever_they_score_and_the_best_others_beside_them(
    granularity: str, landmarks_tie: bool
) -> None:
    generator, k = torch.Generator().manual_seed(3), 4
    rotated = torch.randn(1, 2, 2, 3, 2, k + 1, 8, generator=generator)
    landmarks = torch.randn(1, 2, 12, 8, generator=generator)
    if landmarks_tie:
        landmarks = landmarks[:, :, :1].expand(-1, -1, 12, -1)
    candidates, valid = torch.tensor([[1, 4, 12]]), torch.ones(1, 3, 2, dtype=torch.bool)
    how = {"granularity": granularity, "landmarks_tie": landmarks_tie}
    block = choose_blocks(rotated, landmarks, candidates, valid, **how, num_sink_blocks=2).block
    assert (block[:, :, :, 0, :, -1] == 0).all() and (block[:, :, :, 0, :, :-1] == -1).all()
    assert (block[:, :, :, 1] == torch.arange(4)).all()
    assert (block[:, :, :, 2, :, :2] == torch.arange(2)).all()
    # the others are the best of those that are left when nothing is forced
    if not landmarks_tie and granularity == "token_and_head":
        score = torch.einsum("bkgnqd,bkcd->bkgnqc", rotated[..., 0, :], landmarks)[:, :, :, 2, :, 2:8]
        recent = torch.einsum("bkgnqrd,bkrd->bkgnqr", rotated[..., 1:, :], landmarks[:, :, 8:])[:, :, :, 2]
        best = torch.cat([score, recent], dim=-1).topk(2).indices.sort(-1).values + 2
        assert (block[:, :, :, 2, :, 2:] == best).all()


@pytest.mark.parametrize("sinks", [0, 1])
def test_only_as_a_sink_is_the_first_block_read_from_far_behind(sinks: int) -> None:
    """In a single layer of token landmarks all candidates tie, and the later one wins: never the first of many."""
    model = make_model(num_hidden_layers=1, num_retrieved_blocks=1, num_local_blocks=0, num_sink_blocks=sinks)
    ids = make_ids(120, rows=1)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 39
    assert (model(ids).logits[0, -1] != model(changed).logits[0, -1]).any() == bool(sinks)


def test_segments_give_the_gradients_of_ordinary_attention() -> None:
    model, ids = make_model(num_local_blocks=2, landmark_key="pooled").train(), make_ids(56, rows=1)
    model(ids, labels=ids).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = LandmarkCache(model.config)
    model(ids, labels=ids, past_key_values=cache).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-5)


def test_more_sinks_than_retrieved_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_sink_blocks=4: must be from 0 to num_retrieved_blocks=3"):
        make_model(num_sink_blocks=4)
    with pytest.raises(ValueError, match="block_weight='both': must be one of 'landmark', 'exact'"):
        make_model(block_weight="both")
