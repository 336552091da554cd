"""The self-test: a prompt that needs retrieval, and a verdict for each way in which a model may fail."""

from pathlib import Path

import pytest
import torch
from test_passkey_run import byte_tokenizer
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

from landmark_llama import LandmarkLlamaForCausalLM, add_landmark_token, self_test
from landmark_llama.self_test import KEY, SelfTest


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    add_landmark_token(tokenizer)
    return tokenizer


def model_for(tokenizer: PreTrainedTokenizerFast, **settings) -> LandmarkLlamaForCausalLM:
    landmark = tokenizer.convert_tokens_to_ids("<landmark>")
    return tiny_model(vocab_size=len(tokenizer), landmark_token_id=landmark, bos_token_id=0, **settings)


def finding(**changes) -> SelfTest:
    values = {
        "prompt_tokens": 300, "distance": 200, "needs_retrieval": True, "readable": True, "answer": f" {KEY}.",
        "loss": 2.0, "vocab_size": 32_000,
    }  # fmt: skip
    return SelfTest(**{**values, **changes})


@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
def test_the_number_stands_where_only_retrieval_reaches(
    local_attention: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_for(tokenizer, local_attention=local_attention, max_position_embeddings=512)
    found = self_test.self_test(model, tokenizer)
    read_directly = (model.config.retrieval().num_direct_blocks + 1) * (model.config.block_size - 1)
    assert found.needs_retrieval and read_directly < found.distance < found.prompt_tokens < read_directly + 500
    assert found.readable and not found.found


def test_a_long_window_is_not_filled(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "MAX_FILLER_TOKENS", 200)
    found = self_test.self_test(model_for(tokenizer, max_position_embeddings=1024), tokenizer)
    assert not found.needs_retrieval and found.prompt_tokens < 200 + 500
    assert "within what is read directly" in str(found)


def test_a_model_that_answers_is_told_so(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model, answer = model_for(tokenizer), tokenizer(f" {KEY}.", add_special_tokens=False, return_tensors="pt").input_ids
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, answer[:, 1:]], dim=1))
    report = str(self_test.self_test(model, tokenizer))
    assert f"the answer: '{KEY}.', expected {KEY}" in report
    assert report.endswith("the verdict: found; weights and tokenizer work, retrieval too")


def test_a_verdict_says_what_is_likely_wrong() -> None:
    assert finding().found and not finding(answer=f"1{KEY}").found
    assert finding(needs_retrieval=False).verdict() == "found; weights and tokenizer work"
    reads = finding(answer=" 12").verdict()
    assert "NOT found, though it reads (its loss on plain English is 2.00 nats a token, guessing has 10.37)" in reads
    for loss in (10.4, float("nan")):
        assert (
            "it is untrained, or weights, base or tokenizer do not belong together"
            in finding(answer="", loss=loss).verdict()
        )
    assert "the tokenizer has no tokens for the number" in finding(answer="", readable=False).verdict()


def test_a_report_never_fails_and_a_model_too_large_is_not_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model_for(tokenizer).save_pretrained(tmp_path)
    assert self_test.report(tmp_path).startswith("self-test: could not be run (")  # there is no tokenizer
    tokenizer.save_pretrained(tmp_path)
    self_test.main([str(tmp_path)])
    assert "self-test: the verdict: NOT found" in capsys.readouterr().out
    monkeypatch.setattr(self_test, "_free_memory", lambda: 1000)
    assert self_test.report(tmp_path).startswith("self-test: skipped, the weights take 0.0 GB")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds no weights"):
        self_test.main([str(tmp_path)])
