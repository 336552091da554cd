"""Blocks chosen by an index of faiss: what differs from the exact choice, and what does not."""

import sys
from pathlib import Path

import pytest
import torch
from test_choice import SCALE, random_case
from test_passkey_run import command, dense, landmark  # noqa: F401
from tiny import random_ids, tiny_model

from eval_passkey.prompts import InputError
from landmark_llama import LandmarkCache
from landmark_llama.reading import approximate, repeated
from landmark_llama.reading.approximate import ApproximateLandmarks
from landmark_llama.reading.choice import choose_blocks

pytest.importorskip("faiss", reason="faiss is not installed")
KINDS = ("hnsw", "ivf")


@pytest.fixture
def exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks are enough, and an IVF looks at all; a graph never promises that."""
    for name, value in {"FROM_BLOCKS": 64, "ADDED_AT_ONCE": 8, "LISTS_LOOKED_AT": 99}.items():
        monkeypatch.setattr(approximate, name, value)
    monkeypatch.setattr(approximate, "PROPOSED", 9)


def case(blocks: int, batch: int = 1):
    query, landmarks, _, position = random_case([blocks, blocks + 1, blocks + 2], batch=batch)
    return query.float().unsqueeze(-2).repeat_interleave(4, -2) * SCALE, landmarks.float(), position


def choose(query, landmarks, position, granularity, found=None, last=None, **settings):
    last = landmarks.shape[2] if last is None else last
    candidates = torch.tensor([[last - 2, last - 1, last]] * len(query))
    settings = {"valid": torch.ones_like(position, dtype=torch.bool), "landmarks_tie": False, **settings}
    return choose_blocks(query, landmarks[:, :, :last], candidates, granularity=granularity, repeated=found, **settings)


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("sinks", [0, 2], ids="{} sinks".format)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.usefixtures("exhaustive")
def test_a_search_of_all_landmarks_chooses_as_the_exact_comparison(
    granularity: str, sinks: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, landmarks, position = case(300, batch=2)
    biases = torch.randn(landmarks.shape[:3]) if biased else None
    found, searched = ApproximateLandmarks("ivf"), []
    highest = found._highest
    monkeypatch.setattr(found, "_highest", lambda *args, **kw: searched.append(1) or highest(*args, **kw))
    if granularity == "head":  # what is proposed for few queries is not all, and shares are of what is proposed
        monkeypatch.setattr(approximate, "PROPOSED", 400)
    for last in 100, 104, 290, 302:  # landmarks are added as they come
        settings = {"num_sink_blocks": sinks, "last": last}
        shown = None if biases is None else biases[:, :, :last]
        expected = choose(query, landmarks, position, granularity, biases=shown, **settings)
        choice = choose(query, landmarks, position, granularity, found, biases=shown, **settings)
        assert torch.equal(choice.block, expected.block) and torch.equal(choice.recent, expected.recent)
    assert len(searched) == 4


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_most_of_the_best_blocks_of_random_landmarks_are_found(
    kind: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate, "FROM_BLOCKS", 1000)
    query, landmarks, position = case(5000)
    exact, found = (
        choose(query, landmarks, position, granularity, x).block for x in (None, ApproximateLandmarks(kind))
    )
    recall = (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).float().mean()
    assert 0.6 < recall <= 1


@pytest.mark.parametrize("sharpness", [0.2, 1.0])
def test_what_shares_are_of_is_estimated_for_what_is_not_proposed_too(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 5, 8, generator=generator) * sharpness
    key, bias = torch.randn(2, 4002, 8, generator=generator), torch.randn(2, 4002, generator=generator) * 0.3
    scores = query @ key[:, None, 2:].mT + bias[:, None, None, 2:]  # two sinks aside
    found = scores.topk(20, dim=-1).values
    total = approximate._estimated_sum(query, found, 20, key[:, 2:], bias, 2)
    expected = scores.exp().sum(-1, keepdim=True)
    assert (found.exp().sum(-1, keepdim=True) < 0.7 * expected).any(), "what is proposed says too little"
    assert ((total / expected).log().abs() < 0.25).all()


@pytest.mark.usefixtures("exhaustive")
def test_blocks_that_are_written_anew_are_searched_anew() -> None:
    query, landmarks, position = case(200)
    found = ApproximateLandmarks("ivf")
    choose(query, landmarks, position, "token_and_head", found)
    other = landmarks.clone()
    other[:, :, 50:] = torch.randn(other[:, :, 50:].shape)
    expected = choose(query, other, position, "token_and_head").block
    assert not torch.equal(choose(query, other, position, "token_and_head", found).block, expected)
    found.forget(50)
    assert torch.equal(choose(query, other, position, "token_and_head", found).block, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("exhaustive")
def test_of_equal_landmarks_the_later_blocks_are_chosen_as_by_the_exact_comparison(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated, "FROM_BLOCKS", 64)
    query, landmarks, position = case(300)
    query, landmarks = (x.mul(4).round().div(4) for x in (query, landmarks))
    landmarks = landmarks[:, :, torch.arange(landmarks.shape[2]) % 7].contiguous()
    found = ApproximateLandmarks(kind)
    choice = choose(query, landmarks, position, "head", found)
    assert torch.equal(choice.block, choose(query, landmarks, position, "head").block) and not found._indices


def test_few_blocks_are_compared_all() -> None:
    query, landmarks, position = case(200)
    found = ApproximateLandmarks("hnsw")
    choice = choose(query, landmarks, position, "head", found)
    assert found.search(landmarks, None, 3) is None
    assert torch.equal(choice.block, choose(query, landmarks, position, "head").block)


@pytest.mark.usefixtures("exhaustive")
def test_a_model_reads_and_goes_on_as_with_the_exact_choice() -> None:
    model = tiny_model(num_retrieved_blocks=2, num_local_blocks=2)
    ids = random_ids(1, 700)
    logits = []
    for index in (None, "ivf"):
        cache = LandmarkCache(model.config, index=index)
        read = [model(piece, past_key_values=cache).logits for piece in ids.split((400, 250, 50), dim=1)]
        cache.crop(600)
        read += [model(ids[:, 600 + i : 601 + i], past_key_values=cache).logits for i in range(4)]
        logits.append(torch.cat(read, dim=1))
        used = [storage.repeated for storage in cache.storages]
    assert any(x._indices for x in used)
    torch.testing.assert_close(*logits)


def test_what_cannot_be_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model().config
    with pytest.raises(ValueError, match="index='tree': must be one of 'hnsw', 'ivf'"):
        LandmarkCache(config, index="tree")
    config.block_weight = "exact"
    with pytest.raises(ValueError, match="index='ivf': needs block_weight='landmark' .* not block_weight='exact'"):
        LandmarkCache(config, index="ivf")
    config.block_weight, config.retrieval_granularity = "landmark", "token"
    with pytest.raises(ValueError, match="index='ivf': .* retrieval_granularity='token'"):
        LandmarkCache(config, index="ivf")
    config.retrieval_granularity = "head"
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"index='ivf': needs faiss; pip install 'landmark-llama\[faiss\]'"):
        LandmarkCache(config, index="ivf")


@pytest.mark.usefixtures("exhaustive")
def test_the_command_takes_an_index(
    landmark: Path,  # noqa: F811
    dense: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    few = ("--lengths", "600", "--samples", "1")
    assert command(landmark, tmp_path / "index", "--index", "hnsw", "--cache", "host", *few) == 0
    with pytest.raises(InputError, match="index was"):
        command(landmark, tmp_path / "index", "--cache", "host", *few)
    with pytest.raises(InputError, match="--index ivf: needs a landmark model"):
        command(dense, tmp_path / "other", "--index", "ivf")
