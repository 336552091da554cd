"""`num_question_blocks`: the end of a call, where a question stands, shares no choice with the text before it."""

from __future__ import annotations

import pytest
import torch
from tiny import in_float64, random_ids, tiny_model

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM

BLOCK = 8
TOKENS = BLOCK - 1  # of a block, beside its landmark


def make_model(**settings: object) -> LandmarkLlamaForCausalLM:
    settings = {"retrieval_granularity": "head", "num_retrieved_blocks": 2, "num_local_blocks": 1, **settings}
    return in_float64(tiny_model(block_size=BLOCK, train_context_length=64, **settings))


def read(model: LandmarkLlamaForCausalLM, *parts: torch.Tensor, granularities: tuple[str | None, ...]) -> torch.Tensor:
    """Logits of the last part, each read by a call of its own."""
    cache = LandmarkCache(model.config)
    for ids, granularity in zip(parts, granularities, strict=True):
        logits = model(input_ids=ids, past_key_values=cache, retrieval_granularity=granularity).logits
    return logits


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_blocks_of_a_call_choose_for_each_token(count: int) -> None:
    model = make_model(num_question_blocks=count)
    ids = random_ids(1, 40 * TOKENS + 3, seed=1)
    cut = ids.shape[1] - 3 - (count - 1) * TOKENS
    logits = read(model, ids, granularities=(None,))
    model.config.num_question_blocks = 0
    apart = read(model, ids[:, :cut], ids[:, cut:], granularities=("head", "token_and_head"))
    torch.testing.assert_close(logits[:, cut:], apart)
    shared = read(model, ids, granularities=("head",))
    torch.testing.assert_close(logits[:, :cut], shared[:, :cut])
    assert (logits[:, cut:] - shared[:, cut:]).abs().max() > 1e-6


def test_rows_of_a_ragged_batch_end_where_they_end() -> None:
    model = make_model(num_question_blocks=1)
    ids = random_ids(2, 30 * TOKENS, seed=2)
    mask = torch.ones_like(ids)
    mask[1, : 12 * TOKENS + 2] = 0
    both = model(input_ids=ids, attention_mask=mask, past_key_values=LandmarkCache(model.config)).logits
    for row in range(2):
        alone = read(model, ids[row : row + 1, mask[row] == 1], granularities=(None,))
        torch.testing.assert_close(both[row, mask[row] == 1], alone[0])


def test_decoding_steps_are_as_they_were() -> None:
    model = make_model(num_question_blocks=1)
    ids = random_ids(1, 20 * TOKENS, seed=3)
    parts = (ids[:, :-1], ids[:, -1:])
    logits = read(model, *parts, granularities=(None, None))
    model.config.num_question_blocks = 0
    prefix = LandmarkCache(model.config)
    model.config.num_question_blocks = 1
    model(input_ids=parts[0], past_key_values=prefix)
    model.config.num_question_blocks = 0
    torch.testing.assert_close(model(input_ids=parts[1], past_key_values=prefix).logits, logits)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 2), ({"retrieval_granularity": "token_and_head"}, 0), ({"local_attention": "chunked"}, 0)],
    ids=["head", "token_and_head", "chunked"],
)
def test_only_shared_choices_have_a_question(settings: dict[str, str], kept: int) -> None:
    config = make_model(num_question_blocks=2, num_local_blocks=None).config
    assert config.retrieval(**settings).num_question_blocks == kept


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="num_question_blocks=-1: must not be negative"):
        make_model(num_question_blocks=-1)
