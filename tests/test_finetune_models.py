"""A vocabulary padded to a multiple: nothing is predicted, sampled, trained or counted that belongs to no token."""

import copy
import json
from pathlib import Path

import pytest
import torch
from test_finetune_run import base, data, finished, flags  # noqa: F401
from tiny import random_ids, tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM

from finetune.checkpoints.output import METRICS
from finetune.models import pad_vocabulary
from finetune.run import main
from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_model_computes_what_it_did_and_its_padding_gets_no_gradient(tied: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied).train(), random_ids(2, 20)
    tokens = model.config.vocab_size
    padded = copy.deepcopy(model)
    pad_vocabulary(padded, 64)
    assert padded.config.vocab_size == 64 and padded.config.num_padded_tokens == 64 - tokens
    embedding, head = padded.get_input_embeddings().weight, padded.get_output_embeddings().weight
    assert (embedding is head) == tied and len(embedding) == len(head) == 64
    results = [m(ids, labels=ids) for m in (model, padded)]
    torch.testing.assert_close(results[1].loss, results[0].loss)
    torch.testing.assert_close(results[1].logits[..., :tokens], results[0].logits)
    for result in results:
        result.loss.backward()
    assert not embedding.grad[tokens:].any() and not head.grad[tokens:].any()
    torch.testing.assert_close(head.grad[:tokens], model.get_output_embeddings().weight.grad)


def test_padding_is_never_sampled(tmp_path: Path) -> None:
    model = tiny_model().eval()
    pad_vocabulary(model, 256)
    with torch.no_grad():
        model.lm_head.weight.neg_().mul_(1e-3)  # all tokens are as good, and padding would be, too
    model.save_pretrained(tmp_path)
    model = LandmarkLlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_padded_tokens == 256 - 61
    sampled = model.generate(random_ids(8, 5), max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=None)
    assert sampled.max() < 61
    assert model.generate(random_ids(2, 5), max_new_tokens=5, num_beams=3, eos_token_id=None).max() < 61


def test_a_vocabulary_is_padded_once_and_again_to_another_multiple() -> None:
    model = tiny_model()
    for multiple, rows in ((64, 64), (64, 64), (128, 128), (1, 61)):
        pad_vocabulary(model, multiple)
        assert (model.config.vocab_size, model.config.num_padded_tokens) == (rows, rows - 61)


def test_padding_cannot_hold_the_landmark() -> None:
    with pytest.raises(ValueError, match="landmark_token_id=60: outside the vocabulary of 60 tokens"):
        LandmarkLlamaConfig(vocab_size=64, num_padded_tokens=4, landmark_token_id=60)
    with pytest.raises(ValueError, match="num_padded_tokens=64: must be from 0 to less than vocab_size=64"):
        LandmarkLlamaConfig(vocab_size=64, num_padded_tokens=64)


def test_a_run_with_a_padded_vocabulary_learns_what_one_without_does(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    main(flags(base, data, tmp_path / "out", "--pad_vocabulary_to_multiple_of", "64"))
    model = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 512 and model.config.num_padded_tokens == 11
    assert not model.lm_head.weight[501:].any()
    padded, plain = (json.loads((folder / METRICS).read_text()) for folder in (tmp_path / "out", finished))
    assert padded["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)
    # and goes on as a checkpoint to train on, with its own tokenizer
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 501
    main(flags(tmp_path / "out", data, tmp_path / "again", "--max_steps", "1"))
    assert LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "again").config.num_padded_tokens == 11
    assert LlamaForCausalLM.from_pretrained(base).config.vocab_size == 500
