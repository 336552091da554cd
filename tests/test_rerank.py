"""Blocks chosen in two stages: landmarks propose, and what the blocks weigh decides (`num_reranked_blocks`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import in_float64, random_ids, tiny_model

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.reading import rerank
from landmark_llama.reading.rerank import choose_by_weight
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage
from landmark_llama.reading.trace import record_retrieved

BLOCK, TOKENS, ALL = 8, 7, 1000
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_model(reranked: int, **settings: object) -> LandmarkLlamaForCausalLM:
    how = {"retrieval_granularity": "head", "landmark_key": "pooled", "block_weight": "exact", "num_sink_blocks": 1}
    how |= {"num_retrieved_blocks": 3, "num_local_blocks": 1, "num_question_blocks": 2, **settings}
    return in_float64(tiny_model(block_size=BLOCK, train_context_length=64, num_reranked_blocks=reranked, **how))


@pytest.mark.parametrize(("reranked", "sinks"), [(ALL, 0), (ALL, 2), (4, 1)])
def test_the_heaviest_of_the_proposed_blocks_are_chosen(reranked: int, sinks: int) -> None:
    generator, blocks, k, size = torch.Generator().manual_seed(0), 20, 3, 4
    storage = DeviceStorage(BLOCK)
    key = torch.randn(1, blocks * BLOCK, 2, size, generator=generator, dtype=torch.float64)
    storage.write(key, key, torch.zeros(1, dtype=torch.long), blocks * BLOCK)
    rotated = 3 * torch.randn(1, 2, 2, 2, 5, k + 1, size, generator=generator, dtype=torch.float64)
    candidates, valid = torch.tensor([[17, 2]]), torch.ones(1, 2, 5, dtype=torch.bool)
    how = {"num_reranked_blocks": reranked, "num_sink_blocks": sinks}
    choice = choose_by_weight(rotated, rotated[..., 0, :], storage, candidates, valid, **how)
    landmark, tokens = key[0].view(blocks, BLOCK, 2, size)[:, -1], key[0].view(blocks, BLOCK, 2, size)[:, :-1]
    for head in range(2):
        for group, number in enumerate([17, 2]):
            older = range(sinks, max(number - k, 0))
            queries = rotated[0, head, :, group].flatten(0, 1)  # both query heads propose together
            shares = (queries[:, 0] @ landmark[list(older), head].T).softmax(-1).amax(0)
            proposed = [older[i] for i in shares.topk(min(reranked, len(older))).indices]
            for found, query in zip(choice.block[0, head, :, group].flatten(0, 1), queries, strict=True):
                weight = {c: (tokens[c, :, head] @ query[0]).logsumexp(0) for c in proposed}
                for c in range(max(number - k, sinks), number):
                    weight[c] = (tokens[c, :, head] @ query[1 + c - (number - k)]).logsumexp(0)
                best = sorted(weight, key=weight.get, reverse=True)[: k - sinks] + list(range(min(sinks, number)))
                assert [c for c in found.tolist() if c >= 0] == sorted(best)


def test_a_question_read_at_once_is_read_as_token_by_token() -> None:
    model = make_model(ALL)
    ids, question = random_ids(2, 30 * TOKENS), 2 * TOKENS
    whole = model(input_ids=ids, past_key_values=LandmarkCache(model.config)).logits[:, -question:]
    cache = LandmarkCache(model.config)
    model(input_ids=ids[:, :-question], past_key_values=cache)  # of which the last blocks were a question, too
    model.config.num_question_blocks = 0
    other = LandmarkCache(model.config)
    model(input_ids=ids[:, :-question], past_key_values=other)
    steps = [model(input_ids=token, past_key_values=other).logits for token in ids[:, -question:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_the_general_path_reads_what_the_fast_one_reads() -> None:
    model, ids = make_model(5), random_ids(1, 30 * TOKENS + 3)
    plain = model(input_ids=ids, past_key_values=LandmarkCache(model.config)).logits
    with record_retrieved(model):  # which only the general path can
        recorded = model(input_ids=ids, past_key_values=LandmarkCache(model.config)).logits
    torch.testing.assert_close(recorded, plain)


def test_rows_of_a_ragged_batch_choose_for_themselves() -> None:
    model, ids = make_model(4), random_ids(2, 30 * TOKENS)
    mask = torch.ones_like(ids)
    mask[1, : 11 * TOKENS + 2] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    both = model.generate(input_ids=ids, attention_mask=mask, **how)[:, -4:]
    for row in range(2):
        alone = ids[row : row + 1, mask[row] == 1]
        assert torch.equal(model.generate(input_ids=alone, **how)[0, -4:], both[row])


def test_all_blocks_are_weighed_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model(ALL), random_ids(2, 30 * TOKENS + 3)
    at_once = model(input_ids=ids, past_key_values=LandmarkCache(model.config)).logits
    monkeypatch.setattr(rerank, "SCORES_AT_ONCE", 1)
    in_parts = model(input_ids=ids, past_key_values=LandmarkCache(model.config)).logits
    torch.testing.assert_close(in_parts, at_once)


@pytest.mark.parametrize("reranked", [5, ALL])
@pytest.mark.parametrize("tier", ["host", "file"])
def test_a_slower_tier_gives_the_same_bits(tier: str, reranked: int, tmp_path: Path, general_steps: None) -> None:
    model, ids = make_model(reranked), random_ids(1, 30 * TOKENS + 3)
    storage = HostStorage(budget=0) if tier == "host" else FileStorage(tmp_path, budget=0)
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    how["return_dict_in_generate"] = True
    expected = model.generate(ids, past_key_values=LandmarkCache(model.config), **how)
    found = model.generate(ids, past_key_values=LandmarkCache(model.config, storage=storage), **how)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_only_where_heads_share_choices_is_anything_compared_again() -> None:
    config = make_model(5).config
    assert config.retrieval().num_reranked_blocks == 5
    assert config.retrieval(retrieval_granularity="token_and_head").num_reranked_blocks == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"reranked": -1}, "num_reranked_blocks=-1: must not"), ({"block_weight": "landmark"}, "block_weight='exact'")],
    ids=["negative", "weights"],
)
def test_what_cannot_be_compared_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**{"reranked": 5, **settings})
