"""Temp-LoRA learns what it has read, a row at a time, and leaves the model as it was."""

import torch
from comparisons_cases import base, dense_states, reader, states_of, tokens

LEARNS = {"context": 16, "steps": 4, "learning_rate": 2e-2}


def test_the_first_segment_and_a_reader_that_takes_no_steps_are_the_dense_model_in_a_window() -> None:
    ids = tokens(48)
    states = states_of(reader("temp_lora", **LEARNS), ids)
    still = states_of(reader("temp_lora", context=16, steps=0), ids)
    torch.testing.assert_close(states[:, :16], dense_states(ids[:, :16]))
    assert not torch.allclose(states[:, 16:32], still[:, 16:32], atol=1e-3)
    torch.testing.assert_close(still[:, 32:], dense_states(ids[:, 16:])[:, 16:])


def test_a_repeated_text_becomes_likelier_and_the_models_weights_stay() -> None:
    model, once = reader("temp_lora", **LEARNS | {"context": 1}), tokens(16, rows=1)
    ids = once.repeat(1, 4)
    learnt, still = model.losses(ids), reader("temp_lora", context=1, steps=0).losses(ids)
    assert learnt[:, 32:].mean() < still[:, 32:].mean() - 0.1
    for name, weight in base().state_dict().items():
        assert torch.equal(model.base.state_dict()[name], weight), name


def test_rows_learn_by_themselves_and_reading_twice_gives_the_same() -> None:
    model, ids = reader("temp_lora", **LEARNS), tokens(48)
    states = states_of(model, ids)
    torch.testing.assert_close(states_of(model, ids), states)
    torch.testing.assert_close(states_of(model, ids[:1]), states[:1], rtol=1e-3, atol=1e-4)
