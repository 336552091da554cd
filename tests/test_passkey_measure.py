"""The accuracy of a loaded model, as a trainer asks for it between two steps."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prompt_tokenizers import byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from eval_passkey import measure
from eval_passkey.measure import accuracy, generate_answer
from eval_passkey.prompts import InputError
from eval_passkey.tasks import make_task
from landmark_llama import LandmarkLlamaForCausalLM


@pytest.fixture
def model(tmp_path: Path) -> LandmarkLlamaForCausalLM:
    tokenizer = byte_level_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    dense.save_pretrained(tmp_path)
    return LandmarkLlamaForCausalLM.from_llama(tmp_path, tokenizer, block_size=8)


def test_accuracy_is_the_share_of_right_answers_by_length(model, monkeypatch):
    asked = []

    def answer(model, tokenizer, prompt, cache=None):
        asked.append(len(prompt.input_ids))
        return f" {prompt.key}" if len(prompt.input_ids) % 2 else "no idea"

    monkeypatch.setattr(measure, "generate_answer", answer)
    result = accuracy(model, byte_level_tokenizer(), "passkey", lengths=[300, 500], samples=7, seed=7)
    assert result == {300: 3 / 7, 500: 3 / 7}
    assert sorted(asked) == [*range(294, 301), *range(494, 501)]  # every phase of blocks of 7 ordinary tokens


def test_the_accuracy_is_that_of_the_rows_that_the_command_writes(model):
    tokenizer = byte_level_tokenizer()
    task = make_task("multi_key:2", tokenizer)
    prompt = task.prompt(400, seed=3)
    row = measure.ask(model.eval(), task, 400, seed=3, period=7)
    assert row["prediction"] == generate_answer(model, tokenizer, prompt).strip() and row["key"] == prompt.key
    assert (row["prompt_tokens"], row["phase"], row["seed"]) == (400, 400 % 7, 3)
    assert accuracy(model, tokenizer, task, lengths=[600], samples=1) == {600: 0.0}


def test_training_goes_on_as_if_nothing_had_been_asked(model):
    model.train()
    model.lm_head.eval()  # a part that a trainer froze
    model.config.use_cache = False
    ids = torch.arange(40).unsqueeze(0)

    def gradients(model: LandmarkLlamaForCausalLM) -> list[torch.Tensor]:
        model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, random_state = gradients(copy.deepcopy(model)), torch.get_rng_state()
    accuracy(model, byte_level_tokenizer(), "passkey", lengths=[300], samples=2)
    assert model.training and not model.lm_head.training and model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(x, y) for x, y in zip(expected, gradients(model), strict=True))


def test_the_model_trains_on_after_an_error_too(model):
    model.train()
    with pytest.raises(InputError, match="^length=[0-9]+: task, needle and question alone need"):
        accuracy(model, byte_level_tokenizer(), "passkey", lengths=[20], samples=1)
    assert model.training


def test_measuring_needs_no_plotting_library():
    program = "import sys; sys.modules['matplotlib'] = None; import eval_passkey.measure"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[1])
