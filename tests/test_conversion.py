"""Vanilla LLaMA to landmark LLaMA, and checkpoints that are not what they should be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenization import word_tokenizer
from tiny import random_ids, tiny_llama, tiny_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from landmark_llama import LandmarkLlamaForCausalLM, add_landmark_token

SETTINGS = {"block_size": 4, "num_retrieved_blocks": 2}


def save_llama(path: Path, **settings) -> LlamaForCausalLM:
    llama = tiny_llama(vocab_size=5, **settings)
    llama.generation_config.do_sample, llama.generation_config.top_k = True, 17
    llama.save_pretrained(path)
    return llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loaded", [False, True], ids=["path", "model"])
def test_every_weight_stays_bitwise_and_the_landmarks_rows_are_means(
    loaded: bool, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    llama = save_llama(tmp_path, tie_word_embeddings=tied).to(dtype)
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    tokenizer = word_tokenizer()
    source = llama if loaded else tmp_path
    model = LandmarkLlamaForCausalLM.from_llama(source, tokenizer, dtype=dtype, **SETTINGS)
    assert model.config.landmark_token_id == tokenizer.convert_tokens_to_ids("<landmark>") == 5
    assert model.config.vocab_size == len(tokenizer) == 6 and model.dtype == dtype
    after = model.state_dict()
    assert set(after) == set(before)
    for name, weight in before.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(after[name][:5], weight)
            assert torch.equal(after[name][5], weight.float().mean(0).to(dtype))
        else:
            assert torch.equal(after[name], weight)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert model.generation_config.top_k == 17


def test_settings_become_the_configuration_and_the_rest_is_the_llamas(tmp_path: Path) -> None:
    llama = save_llama(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0})
    settings = {
        "block_size": 3,
        "train_context_length": 30,
        "num_retrieved_blocks": 1,
        "num_local_blocks": 2,
        "local_attention": "chunked",
        "retrieval_granularity": "head",
        "predict_from_landmark": True,
    }
    config = LandmarkLlamaForCausalLM.from_llama(tmp_path, word_tokenizer(), **settings).config
    assert {name: getattr(config, name) for name in settings} == settings
    for name in ("rope_parameters", "hidden_size", "num_key_value_heads", "rms_norm_eps", "bos_token_id"):
        assert getattr(config, name) == getattr(llama.config, name)


def test_a_converted_model_is_saved_and_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    tokenizer = word_tokenizer()
    model = LandmarkLlamaForCausalLM.from_llama(tmp_path / "llama", tokenizer, **SETTINGS).eval()
    model.save_pretrained(tmp_path / "landmark")
    tokenizer.save_pretrained(tmp_path / "landmark")
    loaded = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "landmark").eval()
    ids = random_ids(1, 40) % 5
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert add_landmark_token(AutoTokenizer.from_pretrained(tmp_path / "landmark")) == loaded.config.landmark_token_id
    assert (tmp_path / "landmark" / "config.json").read_text().count('"landmark_llama"') == 1


def test_a_vocabulary_that_is_larger_than_the_tokenizer_has_room_for_the_landmark() -> None:
    # many checkpoints pad their embeddings
    llama, tokenizer = tiny_llama(vocab_size=16), word_tokenizer()
    before = llama.get_input_embeddings().weight.clone()
    model = LandmarkLlamaForCausalLM.from_llama(llama, tokenizer, **SETTINGS)
    assert model.config.vocab_size == 16 and model.config.landmark_token_id == 5
    after = model.get_input_embeddings().weight
    others = [row for row in range(16) if row != 5]
    assert torch.equal(after[others], before[others])
    torch.testing.assert_close(after[5], before[others].mean(0))


def test_a_tokenizer_that_knows_more_than_the_checkpoint_gets_rows_for_all_its_tokens() -> None:
    llama, tokenizer = tiny_llama(vocab_size=5), word_tokenizer()
    tokenizer.add_tokens(["c", "d"])
    model = LandmarkLlamaForCausalLM.from_llama(llama, tokenizer, **SETTINGS)
    assert model.config.vocab_size == 8 and model.config.landmark_token_id == 7
    assert model.get_input_embeddings().weight.isfinite().all()
    assert model(torch.tensor([[5, 6, 3]])).logits.isfinite().all()


def test_a_tokenizer_that_has_its_landmark_already_keeps_it() -> None:
    tokenizer = word_tokenizer()
    assert add_landmark_token(tokenizer) == 5
    tokenizer.add_tokens(["c"])
    model = LandmarkLlamaForCausalLM.from_llama(tiny_llama(vocab_size=5), tokenizer, **SETTINGS)
    assert model.config.landmark_token_id == 5


def test_a_checkpoint_that_is_not_a_llama_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    tiny_model().save_pretrained(tmp_path / "landmark")
    for name in ("gpt2", "landmark_llama"):
        folder = tmp_path / name.removesuffix("_llama")
        tokenizer = word_tokenizer()
        with pytest.raises(ValueError, match=f"model_type is '{name}', from_llama takes a 'llama' checkpoint"):
            LandmarkLlamaForCausalLM.from_llama(folder, tokenizer)
        assert len(tokenizer) == 5  # nothing was done by halves
    with pytest.raises(ValueError, match="LandmarkLlamaForCausalLM: model_type is 'landmark_llama'"):
        LandmarkLlamaForCausalLM.from_llama(tiny_model(), word_tokenizer())


def test_a_window_that_cannot_fit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="block_size=64"):
        LandmarkLlamaForCausalLM.from_llama(tmp_path, tokenizer)
    assert len(tokenizer) == 5


def test_a_typing_error_in_a_setting_is_no_setting(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(TypeError, match="num_retrieved_block"):
        LandmarkLlamaForCausalLM.from_llama(tmp_path, word_tokenizer(), block_size=4, num_retrieved_block=1)


def test_a_llama_without_a_landmark_token_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(ValueError, match="a LLaMA checkpoint, which has no landmark token"):
        LandmarkLlamaForCausalLM.from_pretrained(tmp_path)


def load_both_ways(path: Path, match: str) -> None:
    with pytest.raises(OSError, match=match):
        LandmarkLlamaForCausalLM.from_llama(path, word_tokenizer(), **SETTINGS)
    config = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else None
    if config is not None:
        config |= {"model_type": "landmark_llama", "landmark_token_id": 4, **SETTINGS}
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=match):
        LandmarkLlamaForCausalLM.from_pretrained(path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    load_both_ways(tmp_path / "nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    load_both_ways(tmp_path / "empty", "empty")
    save_llama(tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    load_both_ways(tmp_path / "weightless", "weightless")


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_named(left: int, tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    load_both_ways(tmp_path, "truncated or damaged")


def test_an_incomplete_checkpoint_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_both_ways(tmp_path, r"lacks 1 of the model's weights, among them model\.layers\.1\.mlp\.up_proj\.weight")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="norm.weight|shape|mismatch"):
        LandmarkLlamaForCausalLM.from_llama(tmp_path, word_tokenizer(), **SETTINGS)
