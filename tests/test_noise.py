"""Noise on landmark keys in training: what it touches, what it leaves alone, and when a run has it."""

from pathlib import Path

import pytest
import torch
from test_finetune_run import base, data, flags  # noqa: F401
from tiny import random_ids, tiny_model
from torch import Tensor

from finetune.arguments import UserError, parse_arguments
from finetune.run import main
from landmark_llama import LandmarkCache
from landmark_llama.modeling import LandmarkLlamaModel
from landmark_llama.noise import LandmarkNoise

BLOCK = 3  # ordinary tokens of the tiny models' blocks


def logits(model, ids: Tensor, noise: float, **settings) -> Tensor:
    model.model.landmark_noise = noise
    torch.manual_seed(0)
    with torch.no_grad():
        return model(ids, **settings).logits


def test_only_landmarks_keys_get_noise_of_the_given_share_of_their_length() -> None:
    key, landmark = torch.randn(8, 400, 2, 32), torch.arange(400).expand(8, -1) % 4 == 3
    noise = LandmarkNoise(0.3, landmark).add_to(key) - key
    assert not noise[~landmark].any()
    shares = noise[landmark].norm(dim=-1) / key[landmark].norm(dim=-1)
    assert 0.28 < shares.mean() < 0.32 and 0.02 < shares.std() < 0.06
    assert noise[landmark].mean().abs() < 0.01


def test_gradients_reach_the_keys_as_without_noise() -> None:
    key = torch.randn(2, 8, 1, 4, requires_grad=True)
    LandmarkNoise(0.5, torch.arange(8).expand(2, -1) % 4 == 3).add_to(key).sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))


def test_what_is_read_through_landmarks_changes_in_training_and_nothing_else() -> None:
    model, ids = tiny_model().train(), random_ids(2, 24)
    plain, noisy = logits(model, ids, 0.0), logits(model, ids, 0.5)
    assert torch.equal(noisy[:, :BLOCK], plain[:, :BLOCK])  # reads no other block
    assert (noisy[:, BLOCK:] != plain[:, BLOCK:]).any(-1).all()
    assert torch.equal(logits(model.eval(), ids, 0.5), logits(model, ids, 0.0))


def test_the_first_layer_where_landmarks_are_alike_has_none() -> None:
    model, ids = tiny_model(num_hidden_layers=1).train(), random_ids(2, 24)
    assert torch.equal(logits(model, ids, 0.5), logits(model, ids, 0.0))


def test_landmarks_of_packed_documents_and_of_segments_have_it_too() -> None:
    model, ids = tiny_model().train(), random_ids(1, 24)
    position = torch.tensor([[*range(10), *range(14)]])
    plain, noisy = (logits(model, ids, noise, position_ids=position) for noise in (0.0, 0.5))
    own_block = [*range(BLOCK), *range(10, 10 + BLOCK)]  # of each document's first block
    rest = [i for i in range(24) if i not in own_block]
    assert torch.equal(noisy[:, own_block], plain[:, own_block])
    assert (noisy[:, rest] != plain[:, rest]).any(-1).all()
    both = []
    for noise in (0.0, 0.5):
        cache = LandmarkCache(model.config)
        parts = [logits(model, part, noise, past_key_values=cache) for part in ids[:, :24].split(12, dim=1)]
        both.append(torch.cat(parts, dim=1))
    assert (both[0][:, BLOCK:] != both[1][:, BLOCK:]).any(-1).all()


def test_gradient_checkpointing_draws_the_same_noise_again() -> None:
    models, ids = (tiny_model().train(), tiny_model().train()), random_ids(2, 20)
    models[1].gradient_checkpointing_enable()
    for model in models:
        model.model.landmark_noise = 0.5
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), [0.0] * 6),
        (("--landmark_noise", "0.4"), [0.4] * 4 + [0.0] * 2),
        (("--landmark_noise", "0.4", "--landmark_noise_share", "1"), [0.4] * 6),
    ],
)
def test_a_run_has_noise_in_its_first_steps_and_none_when_it_evaluates(
    more: tuple[str, ...],
    expected: list[float],
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    forward = LandmarkLlamaModel.forward

    def watched(self, *args, **settings):
        if self.training:
            seen.append(self.landmark_noise)
        return forward(self, *args, **settings)

    monkeypatch.setattr(LandmarkLlamaModel, "forward", watched)
    main(flags(base, data, tmp_path / "run", *more))
    assert seen == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--landmark_noise", "-1"), "--landmark_noise -1.0: must be 0 or more"),
        (("--landmark_noise", "nan"), "--landmark_noise nan: must be 0 or more"),
        (("--landmark_noise", "1", "--landmark_noise_share", "0"), "--landmark_noise_share 0.0: must lie between"),
        (("--landmark_noise", "1", "--attention", "dense"), "--landmark_noise 1.0 needs --attention landmark"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(flags(tmp_path, tmp_path, tmp_path / "run", *more))
