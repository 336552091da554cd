"""Rows that several processes hold together: losses and gradients are those of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several_processes import run_in
from tiny import LANDMARKS, random_ids, tiny_model
from torch import Tensor

from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.attention.context_parallel import ContextShard

FAR = {"max_position_embeddings": 64}
KINDS = {name: {**FAR, **landmark} for name, landmark in LANDMARKS.items()} | {
    "few_heads": {**FAR, "num_key_value_heads": 1},
    "few_pooled": {**FAR, "num_key_value_heads": 1, "landmark_key": "pooled", "landmark_query_rank": 3},
    "retrieving": {**FAR, "train_retrieved_blocks": 2},
    "from_landmarks": {**FAR, "predict_from_landmark": True},
}
TOKENS = [24, 41]  # whole blocks for each process; a last part that is longer and ends inside a block


def model_of(settings: dict) -> LandmarkLlamaForCausalLM:
    return tiny_model(**settings).double().train()


def row(tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, some of which are not predicted."""
    ids = random_ids(2, tokens)
    return ids, ids.masked_fill(ids % 5 == 0, -100)


def share_of(settings: dict, tokens: int, checkpointing: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients that this process adds to those of the row."""
    model, (ids, labels) = model_of(settings), row(tokens)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shard = ContextShard.of(dist.group.WORLD, tokens, model.config.block_size)
    items = (labels[:, 1:] != -100).sum()
    output = model(
        shard.cut(ids), labels=shard.cut(labels, more=1), context_shard=shard, num_items_in_batch=items, use_cache=False
    )
    assert output.logits.shape[1] == shard.tokens[shard.part]
    output.loss.backward()
    return float(output.loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}


def all_kinds(names: list[str]) -> dict[tuple, tuple]:
    shares = {(name, tokens): share_of(KINDS[name], tokens) for name in names for tokens in TOKENS}
    return shares | {("checkpointed", TOKENS[1]): share_of(KINDS["calibrated"], TOKENS[1], checkpointing=True)}


@pytest.mark.parametrize(("processes", "kinds"), [(2, list(KINDS)), (4, ["token", "few_heads", "few_pooled"])])
def test_processes_that_share_rows_have_the_loss_and_the_gradients_of_one(
    processes: int, kinds: list[str], tmp_path: Path
) -> None:
    shares = run_in(processes, tmp_path / "processes", all_kinds, kinds)
    for kind, tokens in shares[0]:
        model, (ids, labels) = model_of(KINDS.get(kind, KINDS["calibrated"])), row(tokens)
        loss = model(ids, labels=labels).loss
        loss.backward()
        found, gradients = zip(*(share[kind, tokens] for share in shares), strict=True)
        assert sum(found) == pytest.approx(float(loss), rel=1e-6), kind
        assert min(found) > 0.0
        for name, weight in model.named_parameters():
            if weight.grad is None:
                assert all(each[name] is None for each in gradients)
                continue
            torch.testing.assert_close(sum(each[name] for each in gradients), weight.grad, msg=f"{kind}: {name}")


def refusals() -> list[str]:
    messages = []
    for settings, tokens, cut in [
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}, 24, 0),
        ({"max_position_embeddings": 28}, 24, 0),
        ({"block_weight": "exact"}, 24, 0),
        ({}, 24, 1),
    ]:
        model, (ids, _) = model_of({**FAR, **settings}), row(tokens)
        shard = ContextShard.of(dist.group.WORLD, tokens, model.config.block_size)
        with pytest.raises(ValueError) as error:
            model(shard.cut(ids)[:, cut:], context_shard=shard, use_cache=False)
        messages.append(str(error.value))
    with pytest.raises(ValueError) as error:
        ContextShard.of(dist.group.WORLD, 3, 4)
    return [*messages, str(error.value)]


def test_what_cannot_be_shared_is_refused_in_a_sentence(tmp_path: Path) -> None:
    found, _ = run_in(2, tmp_path / "processes", refusals)
    expected = ["3 attention heads", "train_context_length=28", "exact", "brings", "row_tokens=3"]
    for message, words in zip(found, expected, strict=True):
        assert words in message
