"""Sparse reading of dense models in `comparisons`: MInference, Quest, and LongLoRA's shifted groups."""

import pytest
import torch
from comparisons_cases import dense_states, loss_of, reader, states_of, tokens
from torch.nn.functional import scaled_dot_product_attention

from comparisons.methods import longlora, minference, quest


@pytest.mark.parametrize(("module", "options"), [("quest", {}), ("minference", {"pattern": "a_shape"})])
def test_sparse_readers_with_room_for_the_text_are_the_dense_model(module: str, options: dict) -> None:
    ids = tokens(50)
    torch.testing.assert_close(states_of(reader(module, **options), ids), dense_states(ids))


def test_no_score_of_a_page_exceeds_its_bound() -> None:
    query, key = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 24))
    page = key.unflatten(2, (-1, 4))
    bound = quest.bounds(query, page.amin(3), page.amax(3))
    assert (bound >= (query @ key.transpose(-1, -2)).unflatten(-1, (-1, 4)).amax(-1) - 1e-5).all()


def test_quest_reads_its_own_page_and_the_pages_of_highest_bound() -> None:
    quest_reader = reader("quest", page=4, pages=2, dense_layers=0)
    query, key, value = (torch.randn(1, 2, 22, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    kept = quest_reader.keep(None, key, value)
    output = quest_reader.attend(0, query, kept)
    for place in (3, 9, 15, 16, 21):
        before = place // 4
        low, high = (x[:, :, :before] for x in kept[2:])
        score = quest.bounds(query[:, :, place : place + 1], low, high)[:, :, 0]
        for head in range(2):
            pages = score[0, head].topk(min(2, before)).indices.tolist() + [before]
            seen = [j for page in pages for j in range(page * 4, page * 4 + 4) if j <= place]
            expected = scaled_dot_product_attention(
                query[:, head, place : place + 1], key[:, head, seen], value[:, head, seen]
            )
            torch.testing.assert_close(output[:, head, place : place + 1], expected)


def test_quest_decodes_by_gathered_pages_what_it_reads_by_masks() -> None:
    model, ids = reader("quest", page=4, pages=3, dense_layers=1), tokens(45)
    expected = model.logits(states_of(model, ids))
    assert not torch.allclose(states_of(model, ids), dense_states(ids), atol=1e-3)
    _, memory = model.read(ids[:, :30], None)
    expected[:, :30] = model.logits(states_of(model, ids[:, :30], cut=30))
    for place in range(30, 45):
        scores, memory = model.decode(ids[:, place : place + 1], memory)
        torch.testing.assert_close(scores, expected[:, place], rtol=1e-3, atol=1e-4)


def test_quest_reads_prompts_densely() -> None:
    model, ids = reader("quest", page=4, pages=2, dense_layers=0), tokens(60)
    scores, _ = model.prefill(ids)
    torch.testing.assert_close(scores, model.logits(dense_states(ids)[:, -1]), rtol=1e-3, atol=1e-4)


def test_an_a_shape_is_the_sinks_and_the_window_however_the_text_is_cut() -> None:
    model, ids = reader("minference", layers=1, pattern="a_shape", sinks=3, window=6), tokens(40)
    states = states_of(model, ids)
    torch.testing.assert_close(states_of(model, ids, cut=7), states)
    unseen = ids.clone()
    unseen[:, 3:30] = (unseen[:, 3:30] + 5) % 40
    torch.testing.assert_close(states_of(model, unseen)[:, 35:], states[:, 35:])
    assert not torch.allclose(states_of(model, unseen)[:, 34], states[:, 34], atol=1e-4)
    sink = ids.clone()
    sink[:, 1] = (sink[:, 1] + 5) % 40
    assert not torch.allclose(states_of(model, sink)[:, 35:], states[:, 35:], atol=1e-4)


@pytest.mark.parametrize("length", [40, 37])
def test_vertical_slash_attends_to_the_tokens_of_its_pattern_each_once(length: int) -> None:
    sizes = {"asked": 5, "verticals": 6, "slashes": 3, "block": 4}
    model = reader("minference", **sizes)
    query, key, value = (torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    output = model.attend(0, query, (key, value))
    columns, distances = minference.find_pattern(query, key, **sizes)
    assert {0, 1} <= set(distances[0, 0].tolist()) and len(set(columns[0, 0].tolist())) == 6
    for row in range(2):
        for head in range(2):
            for place in range(length):
                blocks = {place // 4 - distance for distance in distances[row, head].tolist()}
                named = {j for j in range(place + 1) if j // 4 in blocks} | set(columns[row, head].tolist())
                seen = [j for j in sorted(named) if j <= place]
                expected = scaled_dot_product_attention(
                    query[row, head, [place]], key[row, head, seen], value[row, head, seen]
                )
                torch.testing.assert_close(output[row, head, [place]], expected)


def test_a_vertical_slash_with_room_for_the_prompt_answers_as_the_dense_model() -> None:
    model, ids = reader("minference", slashes=9, block=8), tokens(55)
    expected = model.logits(dense_states(ids))
    scores, state = model.prefill(ids[:, :50])
    for place in range(50, 55):
        torch.testing.assert_close(scores, expected[:, place - 1], rtol=1e-3, atol=1e-4)
        scores, state = model.decode(ids[:, place : place + 1], state)
    with pytest.raises(ValueError, match="has no perplexity"):
        model.losses(ids)


def test_longlora_without_groups_and_interpolation_is_the_dense_model() -> None:
    model, ids = reader("longlora", segment=48, groups=1), tokens(48)
    torch.testing.assert_close(states_of(model, ids), dense_states(ids))
    torch.testing.assert_close(states_of(model.train(), ids), dense_states(ids))


def test_shifted_groups_share_tokens_and_see_nothing_later() -> None:
    model, ids = reader("longlora", segment=48, groups=4).train(), tokens(48)
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 40
    before, after = states_of(model, ids), states_of(model, changed)
    torch.testing.assert_close(after[:, :30], before[:, :30])
    moved = [place for place in range(30, 48) if not torch.allclose(after[:, place], before[:, place], atol=1e-4)]
    assert moved[0] == 30 and max(moved) >= 42  # two layers carry it over the borders of the groups
    plain, shifted = (longlora.group_mask(48, 12, shift, torch.device("cpu")) for shift in (0, 6))
    for mask in (plain, shifted):
        assert mask.diagonal().all() and not mask.triu(1).any()
    assert not plain[12, 11] and shifted[12, 11] and not shifted[18, 17] and plain[18, 17]


def test_longlora_trains_its_adapter_embeddings_and_norms_alone() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    model = reader("longlora", segment=128, groups=4, four_bits=True)
    weight = model.base.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    loss_of(model, 128).backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {name.partition(".")[0] for name in trained} == {"base", "adapter"}
    assert all("embed" in name or "norm" in name for name in trained if name.startswith("base"))
    assert all(f"adapter.model_layers_{i}_self_attn_{name}_B" in trained for i in range(2) for name in longlora.ADAPTED)
    rounded = weight.detach().clone()
    assert not torch.equal(rounded, before) and len(rounded.flatten()[:64].unique()) <= 16
    model.rounded = False
    states_of(model, tokens(5))
    torch.testing.assert_close(weight, rounded)


def test_interpolated_positions_stay_among_those_that_the_model_knew() -> None:
    model, ids = reader("longlora", segment=256), tokens(73)
    assert model.place(torch.tensor([0, 128, 255])).tolist() == [0.0, 32.0, 63.75]
    torch.testing.assert_close(states_of(model, ids, cut=20), states_of(model, ids), rtol=1e-3, atol=1e-4)
