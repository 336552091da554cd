"""Checkpoints of each family: converting, saving, loading, tokenizers, adapters, differences, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import refusal
from families import CASES, dense_model, every_family, landmark_model, save_dense, save_landmark
from prompt_tokenizers import TEXT, byte_level_tokenizer, sentencepiece_like_tokenizer
from safetensors.torch import load_file
from test_hub import run
from test_tokenization import word_tokenizer
from tiny import random_ids, tiny_llama
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from landmark_llama import (
    LandmarkLlamaForCausalLM,
    from_dense,
    landmark_lora_config,
    load_adapter,
    merge,
    self_test,
    weight_difference,
)
from landmark_llama.adapters.folder import tokenizer_fingerprint
from landmark_llama.adapters.peft_model import LandmarkPeftModel
from landmark_llama.families import FAMILIES, landmark_class
from landmark_llama.hub import LOADER

SETTINGS = {"block_size": 4, "num_retrieved_blocks": 2, "num_local_blocks": 3}
IDS = random_ids(2, 24) % 5


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


@every_family
def test_conversion_keeps_every_weight_and_adds_the_landmarks_row(family: str, tmp_path: Path) -> None:
    save_dense(family, tmp_path)
    tokenizer, before = word_tokenizer(), load_file(tmp_path / "model.safetensors")
    model = from_dense(tmp_path, tokenizer, **SETTINGS)
    assert type(model) is FAMILIES[family] and model.config.landmark_token_id == 5 == tokenizer.vocab_size
    after = model.state_dict()
    for name, weight in before.items():
        assert torch.equal(after[name][: len(weight)], weight), name
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[5], before["model.embed_tokens.weight"].mean(0))
    assert after.keys() - before.keys() <= {"lm_head.weight"}  # where it is tied


@every_family
def test_conversion_keeps_what_the_family_is_configured_by(family: str, tmp_path: Path) -> None:
    save_dense(family, tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 54321.0})
    dense, tokenizer = AutoConfig.from_pretrained(tmp_path).to_dict(), word_tokenizer()
    for source in (tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path)):
        config = FAMILIES[family].from_dense(source, tokenizer, **SETTINGS).config.to_dict()
        others = {"model_type", "architectures", "dtype", "vocab_size", "_name_or_path", "transformers_version"}
        assert {name: config[name] for name in dense.keys() - others} == {
            name: value for name, value in dense.items() if name not in others
        }


@every_family
def test_a_saved_model_is_loaded_by_the_auto_classes_as_it_was(family: str, tmp_path: Path) -> None:
    model = landmark_model(family, vocab_size=6, landmark_token_id=5, landmark_key="pooled", landmark_query_rank=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(AutoModel.from_pretrained(tmp_path)) is type(model.model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert torch.equal(logits(loaded), logits(model))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"landmark_{family}" and saved["architectures"] == [type(model).__name__]
    name = type(model).__name__.removesuffix("ForCausalLM")
    assert set(saved["auto_map"].values()) == {
        f"landmark_llama_classes.{name}{ending}" for ending in ("Config", "Model", "ForCausalLM")
    }
    assert f"{name}Config, {name}Model, {name}ForCausalLM" in (tmp_path / LOADER).read_text()
    assert f"A {name.removeprefix('Landmark')} with landmark attention" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_auto_classes_load_every_family_where_the_package_was_not_imported(tmp_path: Path) -> None:
    for family in CASES:
        save_landmark(family, tmp_path / family)
    result = run(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    print(type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__)\n",
        *(tmp_path / family for family in CASES),
        modules=tmp_path / "modules",
    )
    assert result.stdout.split() == [FAMILIES[family].__name__ for family in CASES], result.stderr


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """Qwen's own class: bytes, no BOS."""
    state = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = {"<|endoftext|>" if token == "<|end|>" else token: i for token, i in state["vocab"].items()}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in state["merges"]])


def llama_tokenizer() -> LlamaTokenizer:
    """Mistral's: a space before the text, BOS."""
    state = json.loads(sentencepiece_like_tokenizer().backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])


TOKENIZERS = {
    "mistral": llama_tokenizer,
    "qwen2": qwen2_tokenizer,
    "qwen3": qwen2_tokenizer,
    "smollm3": byte_level_tokenizer,
}


@every_family
def test_a_converted_folders_tokenizer_reads_as_the_dense_ones(family: str, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS[family]()
    dense_model(family, vocab_size=len(tokenizer) + 3).save_pretrained(tmp_path / "dense")  # with rows to spare
    tokenizer.save_pretrained(tmp_path / "dense")
    before = AutoTokenizer.from_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    model = from_dense(tmp_path / "dense", tokenizer, **SETTINGS)
    model.save_pretrained(tmp_path / "landmark")
    tokenizer.save_pretrained(tmp_path / "landmark")
    after = AutoTokenizer.from_pretrained(tmp_path / "landmark")
    ids = after(TEXT[0])["input_ids"]
    assert ids == before(TEXT[0])["input_ids"] and after.decode(ids) == before.decode(ids)
    landmark = after.convert_tokens_to_ids("<landmark>")
    assert landmark == len(before) == model.config.landmark_token_id < model.config.vocab_size == len(before) + 3
    generated = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)
    assert generated.shape == (1, len(ids) + 4) and landmark not in generated


def train_adapter(base: Path, folder: Path, **lora: object) -> LandmarkPeftModel:
    """An adapter after three large steps, saved."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()  # not by AutoTokenizer, which makes a Qwen2Tokenizer of it, with a token more
    model = from_dense(base, tokenizer, **SETTINGS)
    config = landmark_lora_config(model.config, r=4, base_model_name_or_path=str(base), **lora)
    model = LandmarkPeftModel(model, config, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)).train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=0.05)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@every_family
def test_an_adapter_is_trained_saved_loaded_and_merged(family: str, tmp_path: Path) -> None:
    base = save_dense(family, tmp_path / "base")
    trained = train_adapter(base, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is FAMILIES[family]
    assert torch.equal(logits(loaded), logits(trained))
    assert (logits(loaded) - logits(from_dense(base, word_tokenizer(), **SETTINGS))).abs().max() > 0.1
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is FAMILIES[family] and merged.config.architectures == [FAMILIES[family].__name__]
    assert torch.equal(logits(merged).argmax(-1), logits(trained).argmax(-1))
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-3, atol=1e-3)


def test_an_adapter_is_not_put_on_another_family_of_the_same_shape(tmp_path: Path) -> None:
    train_adapter(save_dense("qwen2", tmp_path / "base"), tmp_path / "adapter")
    tiny_llama(vocab_size=5).save_pretrained(tmp_path / "llama")
    sentence = "llama: model_type is 'llama', not 'qwen2'; the adapter .* was trained on .*base: give that"
    with pytest.raises(ValueError, match=sentence):
        load_adapter(tmp_path / "adapter", tmp_path / "llama")
    refused = refusal(merge.main, tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "llama")
    assert "model_type is 'llama', not 'qwen2'" in refused and not (tmp_path / "out").exists()


@every_family
def test_a_difference_from_the_dense_model_gives_the_tuned_one_again(family: str, tmp_path: Path) -> None:
    base, tokenizer = save_dense(family, tmp_path / "base"), word_tokenizer()
    model = from_dense(base, tokenizer, **SETTINGS)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    paths = {name: str(tmp_path / name) for name in ("tuned", "base", "difference", "recovered")}
    weight_difference.make(paths["tuned"], paths["base"], paths["difference"])
    weight_difference.recover(paths["difference"], paths["base"], paths["recovered"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(paths["recovered"])), logits(model))
    assert "the verdict: " in self_test.report(tmp_path / "recovered")


@every_family
def test_each_class_takes_its_own_family_and_says_what_to_do_with_others(family: str, tmp_path: Path) -> None:
    save_dense(family, tmp_path / "dense")
    save_landmark(family, tmp_path / "landmark")
    tokenizer, ours = word_tokenizer(), FAMILIES[family]
    with pytest.raises(ValueError, match=f"model_type is '{family}', from_llama takes a 'llama' .*_llama.from_dense"):
        LandmarkLlamaForCausalLM.from_llama(tmp_path / "dense", tokenizer)
    with pytest.raises(ValueError, match=f"which has no landmark token; convert it with {ours.__name__}.from_dense"):
        ours.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"model_type is 'landmark_{family}', not 'landmark_llama'; load it with Auto"):
        LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "landmark")
    with pytest.raises(ValueError, match=f"model_type is 'landmark_{family}', from_dense takes a '{family}'"):
        from_dense(tmp_path / "landmark", tokenizer)
    assert len(tokenizer) == 5 and not hasattr(ours, "from_llama")


def test_a_model_that_is_no_decoder_of_these_families_is_refused(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path)
    for source in (tmp_path, gpt2):
        with pytest.raises(ValueError, match="model_type 'gpt2' is not a LLaMA, nor .*: llama, mistral, qwen2, qw"):
            from_dense(source, word_tokenizer())
    with pytest.raises(OSError, match="holds no config.json"):
        (tmp_path / "empty").mkdir()
        from_dense(tmp_path / "empty", word_tokenizer())
    assert landmark_class(tiny_llama().config) is LandmarkLlamaForCausalLM


def test_a_sliding_window_of_the_dense_model_bounds_the_training_context(tmp_path: Path) -> None:
    save_dense("mistral", tmp_path, sliding_window=20)
    settings = {"block_size": 4, "num_retrieved_blocks": 1}
    assert from_dense(tmp_path, word_tokenizer(), **settings).config.train_context_length == 20
    for length in (12, 20):
        model = from_dense(tmp_path, word_tokenizer(), train_context_length=length, **settings)
        assert model.config.train_context_length == length
    with pytest.raises(ValueError, match=r"train_context_length=24: .* sliding_window=20 .* set at most train"):
        from_dense(tmp_path, word_tokenizer(), train_context_length=24, **settings)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_a_sliding_window_that_no_layer_uses_bounds_nothing(family: str) -> None:
    windows = {"sliding_window": 20, "max_window_layers": 1} if family != "smollm3" else {"sliding_window": 20}
    settings = {**windows, "no_rope_layers": [1, 0, 1]} if family == "smollm3" else windows
    config = FAMILIES[family].config_class
    fields = {"num_hidden_layers": 3, "max_position_embeddings": 32, "block_size": 4, "num_retrieved_blocks": 1}
    assert config(**fields, **settings).train_context_length == 32
    assert config(**fields, **settings, use_sliding_window=True).train_context_length == 20
    with pytest.raises(ValueError, match="sliding_window=20"):
        config(**fields, **settings, use_sliding_window=True, train_context_length=32)
    full = {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}
    assert config(**fields, **settings, **full).train_context_length == 32


def test_a_first_layer_without_rope_needs_pooled_keys() -> None:
    with pytest.raises(ValueError, match=r"no_rope_layers\[0\]=0: .* set landmark_key='pooled'"):
        landmark_model("smollm3", no_rope_layers=[0, 1, 1])
    model = landmark_model("smollm3", no_rope_layers=[0, 1, 1], landmark_key="pooled")
    assert model(random_ids(1, 60)).logits.isfinite().all()
