"""lm-evaluation-harness, by its plain `--model hf`, measures the whole prompt. Skips where it is not installed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from landmark_llama import LandmarkLlamaForCausalLM
from tests.tiny import BASE, tiny_llama

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm_eval]'")
nltk = pytest.importorskip("nltk", reason="nltk is not installed")
pytest.importorskip("wonderwords", reason="wonderwords is not installed")

TINY_BASE = Path(__file__).resolve().parents[1] / "finetune" / "tiny_base"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A landmark checkpoint with its tokenizer, made of a LLaMA whose tokenizer allows 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    assert tokenizer.model_max_length == 512
    model = LandmarkLlamaForCausalLM.from_llama(tiny_llama(vocab_size=len(tokenizer)), tokenizer, block_size=4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_pass_key_prompt_longer_than_the_window_is_read_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)  # or the task asks the network for it
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    read, generate = [], LandmarkLlamaForCausalLM.generate

    def recorded(self: LandmarkLlamaForCausalLM, input_ids: torch.Tensor, **settings) -> torch.Tensor:
        read.append(input_ids[0].tolist())
        return generate(self, input_ids, **settings)

    monkeypatch.setattr(LandmarkLlamaForCausalLM, "generate", recorded)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder)},
        tasks=["niah_single_1"],
        metadata={"pretrained": str(folder), "max_seq_lengths": [1024]},
        gen_kwargs={"max_gen_toks": 4},
        limit=1,
        device="cpu",
        bootstrap_iters=0,
    )
    prompt = results["samples"]["niah_single_1"][0]["arguments"][0][0]
    tokens = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    assert read == [tokens] and len(tokens) > 512 > BASE["max_position_embeddings"]


def test_the_likelihood_of_a_long_text_is_that_of_one_forward_call(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    text = "The number of the silver door is 48213. " * 40
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    model, tokenizer = LandmarkLlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])  # a prefix, and the tokenizer's own
    assert ids.shape[1] > 512
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert found == pytest.approx(float(-loss * (ids.shape[1] - 1)), rel=1e-4)
