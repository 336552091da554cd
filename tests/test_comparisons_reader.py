"""What every method on the bench keeps to: no token sees a later one, decoding equals reading, every weight learns."""

import pytest
import torch
from comparisons_cases import loss_of, reader, tokens
from torch.testing import assert_close

from comparisons.training import load_weights, save_weights

METHODS = {
    "dense": {},
    "dense alone": {"reading": "alone"},
    "dense yarn": {"reading": "yarn"},
    "window": {"sinks": 2},
    "landmark": {"block_size": 5, "k": 1, "stream": True},
    "landmark pooled": {"block_size": 5, "k": 1, "stream": True, "landmark_key": "pooled"},
    "landmark exact": {"block_size": 5, "k": 1, "stream": True, "landmark_key": "pooled", "block_weight": "exact"},
    "transformer_xl": {"memory": 12},
    "compressive": {"memory": 16, "compressed": 6, "ratio": 4},
    "memorizing": {"memory": 16, "k": 4},
    "recurrent_memory": {"memory": 2, "stages": 1},
    "block_recurrent": {"memory": 16, "states": 3},
    "hmt": {"sensory": 3, "recalled": 2},
    "quest": {"page": 4, "pages": 100},
    "minference": {"pattern": "a_shape"},
    "temp_lora": {"context": 8},
    "routing": {"clusters": 3, "members": 4},
    "transformer_vq": {"codes": 6},
    "perceiver_ar": {"context": 80},
    "memsizer": {"slots": 5},
    "taipan": {"every": 1, "window": 6, "budget": 0.5},
}


@pytest.fixture(params=METHODS)
def model(request):
    return reader(request.param.split()[0], **METHODS[request.param])


def test_a_later_token_changes_no_earlier_loss(model):
    ids = tokens(71)
    changed = ids.clone()
    changed[:, 50] = (changed[:, 50] + 1) % 40
    before, after = model.losses(ids), model.losses(changed)
    assert_close(before[:, :49], after[:, :49])
    assert (before[:, 50:] - after[:, 50:]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [5, 16, 45])
def test_decoding_token_by_token_equals_reading_the_whole(model, length):
    ids = tokens(length + 20, rows=1)
    scores, state = model.prefill(ids[:, :length])
    for i in range(length, length + 19):
        loss = torch.nn.functional.cross_entropy(scores, ids[:, i], reduction="none")
        assert_close(loss, model.losses(ids[:, : i + 1])[:, -1], atol=1e-4, rtol=1e-4)
        scores, state = model.decode(ids[:, i : i + 1], state)


def test_rows_of_a_batch_are_read_as_if_alone(model):
    ids = tokens(60, rows=3)
    alone = torch.cat([model.losses(row.unsqueeze(0)) for row in ids])
    assert_close(model.losses(ids), alone, atol=1e-5, rtol=1e-5)


def test_training_reaches_every_weight(model):
    loss_of(model).backward()
    unreached = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not unreached


def test_a_landmark_model_reads_what_a_dense_one_has_learned(tmp_path):
    dense, path = reader("dense"), tmp_path / "dense.safetensors"
    with torch.no_grad():
        for weight in dense.parameters():
            weight.mul_(1.5)
    save_weights(dense, path)
    landmark = reader("landmark", **METHODS["landmark exact"])
    load_weights(landmark, path)
    for name, weight in dense.base.state_dict().items():
        assert torch.equal(landmark.base.state_dict()[name][: len(weight)], weight), name
