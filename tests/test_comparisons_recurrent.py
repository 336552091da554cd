"""Methods that carry a memory from segment to segment: each is a simpler one where its own part is taken away."""

import pytest
import torch
from comparisons_cases import base, reader, tokens
from torch.testing import assert_close

from comparisons.layers import Rotary, attend_causally, through_layers


def states_of(model, ids):
    """The last states (B, length, C) of texts, read segment by segment."""
    memory, states = None, []
    with torch.no_grad():
        for piece in ids.split(model.segment, dim=1):
            state, memory = model.read(piece, memory)
            states.append(state)
    return torch.cat(states, dim=1)


def in_one_pass(ids, mask):
    """The dense model's states where a token sees what the mask (T, T) says, at distances as they are."""
    model = base().model
    rotary, position = Rotary(model.rotary_emb), torch.arange(ids.shape[1])

    def attend(_, query, key, value):
        return attend_causally(rotary(query, position), rotary(key, position), value, mask)

    with torch.no_grad():
        return through_layers(model, model.embed_tokens(ids), attend)


def test_transformer_xl_with_memory_equals_one_pass_with_a_mask():
    ids, place = tokens(48), torch.arange(48)
    query, key = place.unsqueeze(1), place
    seen = (key <= query) & (key >= query // 16 * 16 - 12)  # its own segment, and 12 before it
    assert_close(states_of(reader("transformer_xl", memory=12), ids), in_one_pass(ids, seen))


def test_a_window_with_sinks_is_the_dense_model_on_what_fits():
    ids = tokens(16)
    expected = base().model(ids).last_hidden_state
    assert_close(states_of(reader("window", sinks=2), ids), expected)


def test_a_window_without_sinks_equals_one_pass_with_a_mask_wherever_calls_cut_the_text():
    ids, place = tokens(48), torch.arange(48)
    seen = (place <= place.unsqueeze(1)) & (place > place.unsqueeze(1) - 16)
    model, memory, states = reader("window", sinks=0), None, []
    for piece in ids.split([3, 16, 1, 1, 12, 15], dim=1):
        state, memory = model.read(piece, memory)
        states.append(state)
    assert_close(torch.cat(states, dim=1), in_one_pass(ids, seen))


def test_sinks_stand_in_front_of_the_nearest_tokens():
    ids = tokens(17, rows=1)
    kept = torch.cat([ids[:, :2], ids[:, 3:]], dim=1)  # what the last token sees in the first layer
    model = reader("window", sinks=2, layers=1)
    assert_close(states_of(model, ids)[:, -1], base(1).model(kept).last_hidden_state[:, -1])


@pytest.mark.parametrize(
    "module, options",
    [("transformer_xl", {"memory": 0}), ("recurrent_memory", {"memory": 0}), ("dense", {"reading": "alone"})],
)
def test_without_memory_each_segment_is_read_by_itself(module, options):
    ids = tokens(40)
    alone = torch.cat([base().model(piece).last_hidden_state for piece in ids.split(16, dim=1)], dim=1)
    assert_close(states_of(reader(module, **options), ids), alone)


def test_compression_of_one_to_one_is_transformer_xl_with_both_lengths():
    ids = tokens(90)
    compressive = reader("compressive", memory=16, compressed=20, ratio=1, mean=True)
    assert_close(states_of(compressive, ids), states_of(reader("transformer_xl", memory=36), ids))


def test_the_convolution_begins_as_the_mean():
    ids, options = tokens(90), {"memory": 16, "compressed": 8, "ratio": 4}
    mean = reader("compressive", mean=True, **options)
    assert_close(states_of(reader("compressive", **options), ids), states_of(mean, ids))
    assert not torch.allclose(states_of(mean, ids), states_of(reader("transformer_xl", memory=16), ids), atol=1e-3)


def test_reconstruction_teaches_the_convolutions_alone():
    model = reader("compressive", memory=16, compressed=8, ratio=4).train()
    _, memory = model.read(tokens(16), None)
    _, memory = model.read(tokens(16), memory)
    model.auxiliary_loss(memory).backward()
    assert all(weight.grad is None for weight in model.base.parameters())
    assert all(weight.grad is not None for weight in model.convolutions.parameters())


def test_closed_gates_make_a_memorizing_transformer_transformer_xl():
    ids, model = tokens(60), reader("memorizing", memory=16, k=4)
    expected = states_of(reader("transformer_xl", memory=16), ids)
    assert not torch.allclose(states_of(model, ids), expected, atol=1e-3)
    model.gate.data.fill_(-1e9)
    assert_close(states_of(model, ids), expected)


def test_the_lookup_takes_the_nearest_of_all_keys(monkeypatch):
    from comparisons.methods import memorizing

    monkeypatch.setattr(memorizing, "PIECE", 7)
    key, value, query = (torch.randn(2, 4, n, 8) for n in (30, 30, 5))
    with torch.no_grad():
        store = memorizing.Store.of(key[:, :, :4], value[:, :, :4], faiss=False)
        for start in (4, 5, 17):
            stop = {4: 5, 5: 17, 17: 30}[start]
            store = store.append(key[:, :, start:stop], value[:, :, start:stop])
    scores, which = store.nearest(query, 6)
    expected = (query @ key.transpose(2, 3)).topk(6, dim=-1)
    assert_close(scores, expected.values)
    assert which.equal(expected.indices)
    assert store.values(which).equal(value.unsqueeze(2).expand(-1, -1, 5, -1, -1).gather(
        3, which.unsqueeze(-1).expand(-1, -1, -1, -1, 8)
    ))  # fmt: skip


def test_an_approximate_lookup_finds_nearly_all_that_the_exact_one_does():
    pytest.importorskip("faiss")
    from comparisons.methods.memorizing import Store

    key, value, query = (torch.nn.functional.normalize(torch.randn(1, 2, n, 8), dim=-1) for n in (600, 600, 20))
    found = [Store.of(key, value, faiss).nearest(query, 8)[1] for faiss in (False, True)]
    shared = (found[0].unsqueeze(-1) == found[1].unsqueeze(-2)).any(-1).float().mean()
    assert shared > 0.9


def test_recurrent_memory_is_what_the_places_after_a_segment_hold():
    model, ids = reader("recurrent_memory", memory=2), tokens(32)
    with torch.no_grad():
        _, written = model.read(ids[:, :16], None)
        states, _ = model.read(ids[:, 16:], written)
        embedded = torch.cat([written, model.base.model.embed_tokens(ids[:, 16:])], dim=1)
        assert_close(states, model.base.model(inputs_embeds=embedded).last_hidden_state[:, 2:])


def test_gradients_reach_back_as_many_segments_as_asked_for():
    reached = []
    for segments in (1, 4):
        model = reader("recurrent_memory", memory=2, stages=1, backward_segments=segments)
        ids = tokens(65)
        labels = ids[:, 1:].clone()
        labels[:, :48] = -100  # only the last segment is scored
        model.train()(ids[:, :-1], labels)["loss"].backward()
        reached.append(model.initial.grad is not None and bool(model.initial.grad.any()))
    assert reached == [False, True]


def test_the_curriculum_begins_with_single_segments():
    model = reader("recurrent_memory", memory=2, stages=4)
    lengths = []
    for model.progress in (0.0, 0.3, 0.6, 0.9):
        kept = [model.between(torch.zeros(1), segment) is not None for segment in range(1, 7)]
        lengths.append(kept.index(False) + 1 if False in kept else "whole rows")
    assert lengths == [1, 2, 3, "whole rows"]


def test_states_that_add_nothing_leave_a_block_recurrent_transformer_transformer_xl():
    ids, model = tokens(60), reader("block_recurrent", memory=16, states=3)
    expected = states_of(reader("transformer_xl", memory=16), ids)
    assert not torch.allclose(states_of(model, ids), expected, atol=1e-3)
    model.states.to_tokens.weight.data.zero_()
    assert_close(states_of(model, ids), expected)


def test_a_closed_gate_changes_no_state():
    model = reader("block_recurrent", memory=16, states=3)
    model.states.gate.data.fill_(1e9)
    _, memory = model.read(tokens(16), None)
    assert_close(memory[model.number][1], model.states.initial.expand(2, -1, -1))


def test_hmt_with_one_memory_is_a_recurrent_memory_transformer_with_one_token():
    ids = tokens(60)
    hierarchical = reader("hmt", sensory=0, recalled=1)
    recurrent = reader("recurrent_memory", memory=1)
    recurrent.initial.data.copy_(hierarchical.initial.data)
    assert_close(states_of(hierarchical, ids), states_of(recurrent, ids))


def test_hmt_recalls_a_mixture_of_all_past_segments():
    model, ids = reader("hmt", sensory=0, recalled=3), tokens(48, rows=1)
    with torch.no_grad():
        _, memory = model.read(ids[:, :16], None)
        _, memory = model.read(ids[:, 16:32], memory)
        assert memory.states.shape[1] == 2
        model.query.weight.zero_()
        assert_close(model.recall(memory), memory.states.mean(dim=1, keepdim=True))
