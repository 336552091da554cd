"""Methods in `comparisons` whose memory does not grow with the text: against the same written token by token."""

import pytest
import torch
from comparisons_cases import base, dense_states, loss_of, reader, states_of, tokens
from torch import Tensor
from torch.nn.functional import layer_norm

from comparisons.layers import Rotary, through_layers
from comparisons.methods import routing, taipan, transformer_vq


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_routed_heads_attend_to_what_their_cluster_remembers_and_the_segment() -> None:
    segment, most, length = 8, 3, 32
    shared, value = layer_norm(draw(2, 2, length, 8), (8,)), draw(2, 2, length, 8, seed=1)
    cluster = torch.randint(0, 3, (2, 2, length), generator=torch.Generator().manual_seed(2))
    model, found = reader("routing", clusters=3, members=most), []
    kept = model._empty(draw(2, 4, 1, 8))
    for start in range(0, length, segment):
        part = [x[:, :, start : start + segment] for x in (shared, value, cluster)]
        found.append(routing.attend_in_clusters(*part, kept))
        members = routing.add_members(kept, *part)
        kept = kept._replace(member_key=members[0], member_value=members[1], member=members[2])
    found = torch.cat(found, dim=2)
    for row, head, place in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(length)).tolist():
        same = [j for j in range(place + 1) if cluster[row, head, j] == cluster[row, head, place]]
        start = place // segment * segment
        seen = [j for j in same if j < start][-most:] + [j for j in same if j >= start]
        weight = (shared[row, head, seen] @ shared[row, head, place] * 8**-0.5).softmax(-1)
        torch.testing.assert_close(found[row, head, place], weight @ value[row, head, seen])


def test_centroids_drift_to_the_vectors_that_are_nearest_in_training_alone() -> None:
    model = reader("routing", clusters=3, decay=0.5)
    before = model.centroids.clone()
    states_of(model, tokens(40))
    assert torch.equal(model.centroids, before)
    loss_of(model).backward()
    assert not torch.equal(model.centroids, before)

    shared = layer_norm(draw(1, 2, 50, 8), (8,))

    def fit() -> Tensor:
        return (shared @ model.centroids[0].transpose(-1, -2)).amax(-1).mean()

    poor = fit()
    for _ in range(5):
        model._move_centroids(0, shared, (shared @ model.centroids[0].transpose(-1, -2)).argmax(-1))
    assert fit() > poor


def test_segments_of_quantised_keys_are_softmax_attention_over_all_of_them() -> None:
    model, ids, segment = reader("transformer_vq", layers=1, codes=5), tokens(61), 16
    rotary = Rotary(model.base.model.rotary_emb)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = (layer_norm(x, x.shape[-1:]) for x in (query, key))
        distance = (key.unsqueeze(3) - model.codebook[layer].unsqueeze(1)).square().sum(-1)
        key = model.codebook[layer].expand(2, -1, -1, -1).gather(2, distance.argmin(-1)[..., None].expand_as(key))
        place = torch.arange(query.shape[2])
        near = rotary(query, place) @ rotary(key, place).transpose(-1, -2)
        is_near = place[:, None] // segment - place // segment <= 1
        scores = torch.where(is_near, near, query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        return scores.masked_fill(place > place[:, None], -torch.inf).softmax(-1) @ value

    with torch.no_grad():
        expected = through_layers(model.base.model, model.base.model.embed_tokens(ids), attend)
    torch.testing.assert_close(states_of(model, ids), expected)


def test_codes_move_to_their_keys_and_keys_to_their_codes() -> None:
    key, model = layer_norm(draw(1, 4, 200, 8), (8,)), reader("transformer_vq", codes=6, decay=0.5, commitment=1.0)

    def distance() -> Tensor:
        return torch.cdist(key[0], model.codebook[0]).amin(-1).mean()

    before = distance()
    for _ in range(5):
        model._move_codes(0, key, transformer_vq.nearest(key, model.codebook[0]))
    assert distance() < before
    drawn, free = (reader("transformer_vq", codes=6, commitment=weight) for weight in (1.0, 0.0))
    assert loss_of(drawn) > loss_of(free)


def test_latents_look_once_at_the_input_and_no_further_than_it_reaches() -> None:
    ids = tokens(64)
    torch.testing.assert_close(states_of(reader("perceiver_ar", segment=64, context=64), ids), dense_states(ids))
    shallow = reader("perceiver_ar", layers=1, context=64)
    torch.testing.assert_close(states_of(shallow, ids), dense_states(ids, layers=1))
    assert not torch.allclose(states_of(reader("perceiver_ar", context=64), ids), dense_states(ids), atol=1e-3)
    narrow, changed = reader("perceiver_ar", context=20), ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 40
    before, after = states_of(narrow, ids), states_of(narrow, changed)
    torch.testing.assert_close(after[:, 32:], before[:, 32:])
    assert not torch.allclose(after[:, 31], before[:, 31], atol=1e-4)
    with pytest.raises(ValueError, match="context=8"):
        reader("perceiver_ar", context=8)


def test_inputs_learn_from_the_latents_of_later_segments() -> None:
    model = reader("perceiver_ar", context=64)
    ids = tokens(32)
    _, memory = model.train().read(ids[:, :16], None)
    states, _ = model.read(ids[:, 16:], model.between(memory, 1))
    (gradient,) = torch.autograd.grad(states.square().sum(), memory[0])
    assert gradient.any()


@pytest.mark.parametrize("cut", [1, 7])
def test_slots_are_written_and_read_token_by_token(cut: int) -> None:
    model, ids = reader("memsizer", slots=5), tokens(33)
    torch.testing.assert_close(states_of(model, ids, cut=cut), states_of(model, ids), rtol=1e-3, atol=1e-4)
    _, memory = model.read(ids, None)
    assert [written.shape for written in memory.written] == [(2, 4, 5, 8)] * base().config.num_hidden_layers


def test_the_recurrence_of_segments_is_that_of_tokens() -> None:
    query, key, value = (draw(2, 3, 20, 4, seed=seed) for seed in range(3))
    log_decay, state, expected = -draw(2, 3, 20, seed=3).exp(), torch.zeros(2, 3, 4, 4), []
    for t in range(20):
        decay = log_decay[:, :, t, None, None].exp()
        state = decay * state + (1 - decay) * key[:, :, t, :, None] * value[:, :, t, None, :]
        expected.append(query[:, :, t, None] @ state)
    found, held = [], None
    for start, stop in ((0, 8), (8, 9), (9, 20)):
        part = (x[:, :, start:stop] for x in (query, key, value, log_decay))
        output, held = taipan.recurrence(*part, held)
        found.append(output)
    torch.testing.assert_close(torch.cat(found, dim=2), torch.cat(expected, dim=2))
    torch.testing.assert_close(held, state)


@torch.no_grad()
def test_tokens_that_are_not_selected_pass_and_are_not_seen() -> None:
    torch.manual_seed(0)
    attention, states = taipan.SelectiveAttention(base(), window=4).eval(), draw(1, 24, 32)
    chosen = attention.gate(attention.norm(states)).argmax(-1)[0] == 1
    assert 5 < chosen.sum() < 19
    output, _ = attention(states, None)
    torch.testing.assert_close(output[0, ~chosen], states[0, ~chosen])
    assert not torch.isclose(output[0, chosen], states[0, chosen]).all(-1).any()


@torch.no_grad()
def test_later_tokens_find_the_selected_ones_alone() -> None:
    attention, there = taipan.SelectiveAttention(base(), window=4), torch.tensor([[True, False] * 6])
    query, key, value = (draw(1, 4, 12, 8, seed=seed) for seed in range(3))
    found = attention._attend(query, key, value, there)
    for place, is_seen in ((4, True), (5, False)):
        changed = value.clone()
        changed[:, :, place] += 1.0
        moved = (attention._attend(query, key, changed, there) - found).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [j == place or (is_seen and j > place) for j in range(12)]


def test_the_budget_is_a_loss() -> None:
    memory = ([], [taipan.Selected(*[torch.zeros(1)] * 3, share) for share in (torch.tensor(0.5), torch.tensor(0.15))])
    assert float(reader("taipan", every=1).auxiliary_loss(memory)) == pytest.approx(0.35**2)
