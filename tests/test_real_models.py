"""Real pretrained LLaMA checkpoints, grouped-query and multi-head, and real text: where the data is there."""

from pathlib import Path

import pytest
import torch
from tolerance import assert_as_accurate
from transformers import AutoTokenizer, LlamaForCausalLM

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM

pytestmark = pytest.mark.slow

KINDS = ("gqa", "mha")
BLOCK = 16
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "


@pytest.fixture(scope="module")
def checkpoints(landmark_data: Path) -> Path:
    path = landmark_data / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"no checkpoints at {path}")
    return path


def converted(checkpoints: Path, kind: str, **settings):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / kind)
    model = LandmarkLlamaForCausalLM.from_llama(checkpoints / kind, tokenizer, block_size=BLOCK, **settings)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoints_and_this_transformers_give_the_published_text(kind: str, checkpoints: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(checkpoints / kind)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / kind)
    generated = llama.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=200)
    expected = (checkpoints / "expected_greedy_200.txt").read_text()
    assert tokenizer.decode(generated[0], skip_special_tokens=True).strip() == expected.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_leaves_every_weight_bitwise_and_the_tokenizer_usable(kind: str, checkpoints: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(checkpoints / kind)
    plain = AutoTokenizer.from_pretrained(checkpoints / kind)
    model, tokenizer = converted(checkpoints, kind)
    assert model.config.landmark_token_id == 512 and model.config.vocab_size == 513 and len(tokenizer) == 513
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in llama.state_dict().items():
        assert torch.equal(model.state_dict()[name][: len(weight)], weight), name
    torch.testing.assert_close(model.lm_head.weight[512], llama.lm_head.weight.mean(0))
    assert tokenizer(STORY)["input_ids"] == plain(STORY)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_first_block_a_converted_model_is_the_llama_it_was(kind: str, checkpoints: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(checkpoints / kind)
    model, tokenizer = converted(checkpoints, kind)
    ids = torch.tensor([tokenizer(STORY)["input_ids"][: BLOCK - 1]])
    with torch.no_grad():
        plain, reference = llama(ids).logits, llama.double()(ids).logits
        for use_cache in (False, True):
            assert_as_accurate(model.double()(ids, use_cache=use_cache).logits[..., :512], plain, reference)


def test_grouped_query_and_multi_head_generate_the_same_text(checkpoints: Path) -> None:
    (grouped, tokenizer), (multi, _) = (converted(checkpoints, kind) for kind in KINDS)
    assert grouped.config.num_key_value_heads == 4 and multi.config.num_key_value_heads == 8
    ids = torch.tensor([tokenizer(STORY * 40)["input_ids"]])
    assert ids.shape[1] > 1000
    texts = [model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :] for model in (grouped, multi)]
    assert torch.equal(*texts) and not (texts[0] == 512).any()


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
def test_real_text_is_read_at_any_length(granularity: str, landmark_data: Path, checkpoints: Path) -> None:
    books = sorted((landmark_data / "books").glob("*.txt"))
    if not books:
        pytest.skip("no books among the real files")
    model, tokenizer = converted(checkpoints, "gqa", retrieval_granularity=granularity)
    text = books[0].read_text(encoding="utf-8", errors="replace")[:12_000]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape[1] > 4000
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        output = model(ids, labels=ids, past_key_values=cache, logits_to_keep=1)
    assert output.loss.isfinite() and output.logits.shape == (1, 1, 513)
    more = torch.tensor([tokenizer("Lily said")["input_ids"]])
    generated = model.generate(torch.cat([ids, more], dim=1), past_key_values=cache, do_sample=False, max_new_tokens=5)
    assert generated.shape[1] == ids.shape[1] + more.shape[1] + 5
