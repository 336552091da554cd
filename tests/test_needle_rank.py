"""`--needle_rank`: where the needle's block stood among those that the last token of a prompt could retrieve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prompt_tokenizers import byte_tokenizer, save_dense
from tiny import LANDMARKS, random_ids, tiny_model

from eval_passkey import run
from eval_passkey.prompts import InputError, Prompt
from eval_passkey.ranks import growth, rank_table, ranks_of_needle, summarise_ranks
from eval_passkey.tasks import make_task
from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.reading.trace import record_retrieved

WAYS = [*LANDMARKS.values(), {"block_weight": "exact", "landmark_key": "pooled", "num_sink_blocks": 1}]


@pytest.mark.parametrize("settings", WAYS, ids=[*LANDMARKS, "sinks"])
@torch.no_grad()
def test_the_blocks_of_the_highest_scores_are_those_that_are_retrieved(settings: dict) -> None:
    model, ids = tiny_model(**settings), random_ids(1, 90)
    cache = LandmarkCache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    with record_retrieved(model, scores=True) as steps:
        model(ids[:, -1:], past_key_values=cache)
    sinks, compared = model.config.num_sink_blocks, 0
    for layer, score in enumerate(steps[0].score):
        if score is not None:
            score[..., :sinks] = torch.inf  # always read
            best = score.topk(model.config.num_retrieved_blocks).indices.sort(-1).values
            assert torch.equal(best, steps[0].block[layer])
            compared += 1
    assert compared >= 1


@torch.no_grad()
def test_a_rank_counts_the_candidates_that_score_higher_and_the_cache_stays_as_it_was() -> None:
    model, ids = tiny_model(landmark_key="pooled", num_sink_blocks=1), random_ids(1, 90)
    cache, tokens = LandmarkCache(model.config), model.config.block_size - 1
    model(ids[:, :-1], past_key_values=cache)
    with record_retrieved(model, scores=True) as steps:
        model(ids[:, -1:], past_key_values=cache)
    cache.crop(-1)
    prompt = Prompt(ids[0].tolist(), ("1",), 0.5, 0, 1, needle=(5 * tokens - 1, 5 * tokens + 1))  # in blocks 4 and 5
    row = ranks_of_needle(model, cache, prompt)
    assert cache.get_seq_length() == 89
    assert row["retrieved"] == model.config.num_retrieved_blocks - 1
    for ranks, score in zip(row["needle_rank"], steps[0].score, strict=True):
        candidates = score[0, :, 1:]
        expected = [(x > max(x[3], x[4])).sum().item() for x in candidates]
        assert ranks == expected and row["candidates"] == candidates.shape[-1]


def test_what_is_read_directly_has_no_rank() -> None:
    model, ids = tiny_model(landmark_key="pooled"), random_ids(1, 90)
    cache = LandmarkCache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    row = ranks_of_needle(model, cache, Prompt(ids[0].tolist(), ("1",), 0.5, 0, 1, needle=(86, 88)))
    assert row["needle_rank"] == [None, None]
    assert ranks_of_needle(model, cache, Prompt(ids[0].tolist(), ("1",), 0.5, 0, 1))["needle_rank"] == [None, None]


@pytest.mark.parametrize("name", ["passkey", "passkey:once", "multi_key:4", "niah_single_1"])
def test_a_prompt_knows_where_its_needle_stands(name: str) -> None:
    tokenizer = byte_tokenizer()
    prompt = make_task(name, tokenizer).prompt(4000, seed=3)
    begin, end = prompt.needle
    assert prompt.answers[0] in tokenizer.decode(prompt.input_ids[begin:end])
    assert 0 < begin < end < len(prompt.input_ids)


@pytest.fixture(scope="module")
def landmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("landmark"), byte_tokenizer()
    dense = save_dense(tmp_path_factory.mktemp("dense"))
    LandmarkLlamaForCausalLM.from_llama(dense, tokenizer, block_size=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_keeps_ranks_and_prints_and_draws_them(landmark: Path, tmp_path: Path, capsys) -> None:
    flags = ["--model", str(landmark), "--output", str(tmp_path), "--device", "cpu", "--lengths", "500", "900"]
    assert run.main([*flags, "--samples", "2", "--needle_rank", "true"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(len(row["needle_rank"][-1]) == 2 and row["candidates"] > 40 for row in rows)
    assert "rank of the needle's block" in capsys.readouterr().out
    assert (tmp_path / "rank.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="needle_rank"):  # other rows than those of a run without
        run.main([*flags, "--samples", "3"])


def test_a_dense_model_has_no_ranks(tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "out"), "--device", "cpu", "--needle_rank", "true", "--lengths", "500"]
    with pytest.raises(InputError, match="--needle_rank: needs a landmark model"):
        run.main(["--model", str(save_dense(tmp_path / "dense")), *flags])


def test_the_best_head_is_the_one_that_sees_the_needle_first() -> None:
    def row(length: int, candidates: int, ranks: list[list[int] | None]) -> dict:
        return {
            "task": "passkey", "length": length, "candidates": candidates, "retrieved": 2, "needle_rank": ranks,
        }  # fmt: skip

    rows = [row(100, 10, [None, [9, 1]]), row(100, 10, [None, [1, 1]]), row(1000, 100, [None, [0, 3]])]
    first, second = summarise_ranks(rows)
    assert (first.layer, first.head, first.median, first.samples, first.found) == (1, 1, 1, 2, 1.0)
    assert (second.length, second.candidates, second.median) == (1000, 100, 3)
    assert growth(rows, 1, 1) == pytest.approx(0.30103)  # from 1 + 1 to 1 + 3 over a factor of ten
    assert "to the power of 0.30" in rank_table(rows)
    assert rank_table([row(100, 10, [None, None])]) == ""
