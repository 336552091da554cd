"""Landmarks that learn to choose: the loss of their scores, where blocks weigh what their tokens do."""

from __future__ import annotations

import pytest
import torch

from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM
from landmark_llama.attention.teaching import TaughtRows, landmark_losses

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "landmark_token_id": 39,
}  # fmt: skip


def make_model(**settings: object) -> LandmarkLlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "block_size": 8, "num_retrieved_blocks": 3, "num_local_blocks": 2, "block_weight": "exact",
        "landmark_key": "pooled", "landmark_query_rank": 4, **settings,
    }  # fmt: skip
    model = LandmarkLlamaForCausalLM(LandmarkLlamaConfig(**SHAPE, **settings)).eval()
    for layer in model.model.layers:  # far from uniform attention, so that there is something to learn
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(project.weight, std=0.4)
    return model


def make_ids(length: int = 90, rows: int = 2) -> torch.Tensor:
    return torch.randint(39, (rows, length), generator=torch.Generator().manual_seed(1))


def losses_of(model: LandmarkLlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    with landmark_losses() as losses:
        model(ids)
    return losses


def test_a_pooled_key_of_one_token_scores_exactly_what_its_block_weighs() -> None:
    """Blocks of two positions hold one ordinary token, whose key is the pooled key: nothing is left to learn."""
    exact = losses_of(make_model(block_size=2, landmark_query_rank=0), make_ids(40))
    assert len(exact) == 2
    torch.testing.assert_close(torch.stack(exact), torch.zeros(2), rtol=0, atol=1e-5)
    assert all(loss > 1e-3 for loss in losses_of(make_model(landmark_query_rank=0), make_ids()))


def test_the_loss_is_the_divergence_from_what_blocks_weigh() -> None:
    """Against plain loops: one row, every query drawn, candidates where old blocks are scored."""
    generator, block_size, columns, scale, direct = torch.Generator().manual_seed(3), 4, 24, 0.5, 2
    query, key, value = (torch.randn(1, columns, heads, 8, generator=generator) for heads in (4, 2, 2))
    model = make_model(block_size=block_size, landmark_query_rank=0)
    rotary = model.model._rotary_table(torch.device("cpu"))
    view = TaughtRows(block_size, exact_weights=True, num_sink_blocks=1, retrieved=3, direct=direct)
    with landmark_losses() as found:
        view.attend(query, key, value, layer_idx=0, rotary=rotary, scale=scale)
    divergences, weights = [], []
    for i in range((direct + 2) * block_size, columns):
        own = i // block_size
        if i % block_size == block_size - 1:
            continue
        for head in range(4):
            far = rotary.rotate(query[0, i, head], torch.tensor(direct * block_size + i % block_size))
            far = rotary.rotate(far, torch.tensor(4 * block_size)) * scale
            mass, score = [], []
            for c in range(1, own - direct):
                stored = [
                    rotary.rotate(key[0, c * block_size + o, head // 2], torch.tensor(o)) for o in range(block_size)
                ]
                products = torch.stack([far @ k for k in stored])
                mass.append(products[:-1].logsumexp(0))
                score.append(products[-1])
            target, landmarks = torch.stack(mass).log_softmax(0), torch.stack(score).log_softmax(0)
            divergences.append((target.exp() * (target - landmarks)).sum())
            here = rotary.rotate(query[0, i, head], torch.tensor(i)) * scale
            read = [j for j in range(i + 1) if j % 4 != 3 and (j // 4 >= own - direct or j // 4 == 0)]
            near = torch.stack([here @ rotary.rotate(key[0, j, head // 2], torch.tensor(j)) for j in read])
            weights.append((torch.stack(mass).logsumexp(0) - near.logsumexp(0)).sigmoid())
    divergence, weight = torch.stack(divergences), torch.stack(weights)
    torch.testing.assert_close(found[0], (divergence * weight).sum() / weight.sum())


@pytest.mark.parametrize("landmark_key", ["pooled", "token"])
def test_training_the_calibration_alone_brings_scores_nearer(landmark_key: str) -> None:
    model = make_model(landmark_key=landmark_key, num_sink_blocks=1)
    ids = make_ids()
    model.requires_grad_(False)
    weights = [layer.self_attn.landmark_calibration.requires_grad_(True) for layer in model.model.layers]
    optimiser = torch.optim.Adam([p for module in weights for p in module.parameters()], lr=1e-2)
    course = []
    for _ in range(30):
        loss = torch.stack(losses_of(model, ids)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        course.append(loss.item())
    assert course[-1] < 0.9 * course[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_the_loss_adds_its_gradients_and_changes_no_output(checkpointing: bool) -> None:
    model, ids = make_model(), make_ids()
    expected_logits = model(ids).logits
    calibration = [p for layer in model.model.layers for p in layer.self_attn.landmark_calibration.parameters()]
    expected = torch.autograd.grad(sum(losses_of(model, ids)), calibration)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected_logits)
    output.loss.backward()
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for parameter, gradient in zip(calibration, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_other_rows_are_candidates_and_what_is_read_in_any_case_is_not() -> None:
    view = TaughtRows(8, num_sink_blocks=1, retrieved=3, direct=1)
    candidate = view._candidates(torch.tensor([[9, 30], [8, 17]]), rows=2, blocks=4)
    assert candidate[0].tolist() == [[False] * 5 + [True] * 3, [False, True] + [False] * 3 + [True] * 3]


@pytest.mark.parametrize("rows", [1, 2])
def test_queries_with_nothing_to_choose_teach_nothing(rows: int) -> None:
    model = make_model(num_sink_blocks=1, num_local_blocks=3).train()
    ids = make_ids(28, rows)  # three complete blocks
    losses = torch.stack(losses_of(model, ids))
    assert losses.isfinite().all() and (losses > 0).all() == (rows == 2)
    losses.sum().backward()
    for layer in model.model.layers:
        assert all(p.grad.isfinite().all() for p in layer.self_attn.landmark_calibration.parameters())


def test_landmarks_that_weigh_their_blocks_collect_no_loss() -> None:
    assert losses_of(make_model(block_weight="landmark"), make_ids()) == []
