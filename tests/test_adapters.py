"""Adapters: what is trained, saved and loaded, what is refused, and merging into a whole model."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import edit
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_tokenization import word_tokenizer
from tiny import in_float64, random_ids, tiny_llama
from tolerance import assert_as_accurate
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_llama import LandmarkLlamaForCausalLM, load_adapter, merge
from landmark_llama.adapters.folder import ADAPTER_WEIGHTS, LANDMARK_ROW, TOKENIZER_RECORD, tokenizer_fingerprint
from landmark_llama.adapters.peft_model import LandmarkPeftModel
from landmark_llama.checkpoints import files as checkpoint_files

SETTINGS = {"block_size": 4, "num_retrieved_blocks": 1, "num_local_blocks": 3, "local_attention": "sliding"}
WORDS = 5  # of the tokenizer; its landmark is token 5
IDS = random_ids(2, 24) % WORDS
KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "spare rows": {"vocab_size": 8},
    "landmark base": {"landmark": True},
}


def make_base(folder: Path, landmark: bool = False, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A checkpoint to train on, with its tokenizer: vanilla, or made into a landmark LLaMA beforehand."""
    tokenizer = word_tokenizer()
    model = tiny_llama(**{"vocab_size": WORDS, **settings}).to(dtype)
    if landmark:
        model = LandmarkLlamaForCausalLM.from_llama(model, tokenizer, **SETTINGS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start_adapter(base: Path, rank: int = 4, **lora) -> tuple[LandmarkPeftModel, object]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if "landmark_llama" in (base / "config.json").read_text():
        model = LandmarkLlamaForCausalLM.from_pretrained(base)
    else:
        model = LandmarkLlamaForCausalLM.from_llama(base, tokenizer, **SETTINGS)
    lora = {"lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora}
    config = LoraConfig(r=rank, base_model_name_or_path=str(base), **lora)
    return LandmarkPeftModel(model, config, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)), tokenizer


def train_adapter(base: Path, folder: Path | None = None, **lora) -> LandmarkPeftModel:
    """An adapter after three large steps, saved in `folder`."""
    torch.manual_seed(0)
    model, tokenizer = start_adapter(base, **lora)
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=0.1)
    model.train()
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(IDS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    train_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_landmarks_row_and_no_other_row_of_the_embeddings(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, **KINDS[kind])
    start, trained = start_adapter(base)[0].get_base_model(), train_adapter(base).get_base_model()
    landmark = start.config.landmark_token_id
    others = torch.arange(start.config.vocab_size) != landmark
    before, after = (model.get_input_embeddings().weight for model in (start, trained))
    assert torch.equal(before[others], after[others])
    assert (before[landmark] != after[landmark]).all()
    before, after = (model.get_output_embeddings().weight for model in (start, trained))
    assert torch.equal(before[others], after[others])
    # an untied output row stays: the landmark is never predicted
    assert torch.equal(before[landmark], after[landmark]) == (kind != "tied")


def test_a_landmark_row_of_a_model_in_bf16_is_trained_in_fp32(tmp_path: Path) -> None:
    model = start_adapter(make_base(tmp_path, dtype=torch.bfloat16))[0]
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_what_was_trained_and_no_more(kind: str, tmp_path: Path) -> None:
    train_adapter(make_base(tmp_path / "base", **KINDS[kind]), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert weights.pop(LANDMARK_ROW).shape == (1, 32)
    assert len(weights) == 2 * 2 * 3 and all(".lora_A." in name or ".lora_B." in name for name in weights)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "config.json", TOKENIZER_RECORD, "tokenizer.json"}
    assert not any(name.startswith("model") or name == "README.md" for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_gives_the_trained_logits_and_settings(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **KINDS[kind])
    trained = train_adapter(base, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trained))
    assert (logits(loaded) - logits(start_adapter(base)[0])).abs().max() > 0.1
    assert {name: getattr(loaded.config, name) for name in SETTINGS} == SETTINGS
    assert not any(weight.requires_grad for weight in loaded.parameters())
    generated = loaded.generate(IDS[:, :6], max_new_tokens=30, do_sample=False)
    assert torch.equal(generated, trained.generate(IDS[:, :6], max_new_tokens=30, do_sample=False))


def test_the_trained_row_is_read_where_embeddings_are_given(adapter: Path) -> None:
    model = load_adapter(adapter)
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model))


def test_an_adapter_is_loaded_onto_a_base_that_is_loaded_already_or_has_moved(adapter: Path, base: Path) -> None:
    expected = logits(load_adapter(adapter))
    base = base.rename(base.with_name("moved"))
    model = LandmarkLlamaForCausalLM.from_llama(base, word_tokenizer(), block_size=4, num_retrieved_blocks=2)
    for source in (base, tiny_llama(vocab_size=WORDS), model):
        loaded = load_adapter(adapter, source, is_trainable=True)
        assert torch.equal(logits(loaded), expected)
        assert loaded.config.num_retrieved_blocks == 1
        assert sum(weight.requires_grad for weight in loaded.parameters()) == 13


def test_an_adapter_without_its_landmark_row_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    row = weights.pop(LANDMARK_ROW)
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    for load in (load_adapter, lambda folder: merge.merge_adapter(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="lacks the landmark's embedding row .* finds nothing: save the adapter"):
            load(adapter)
    save_file({**weights, LANDMARK_ROW: row}, adapter / ADAPTER_WEIGHTS)
    load_adapter(adapter)
    edit(adapter / "adapter_config.json", trainable_token_indices=None)
    with pytest.raises(ValueError, match="trained the embedding rows of no token, not the one of its landmark, 5"):
        load_adapter(adapter)
    edit(adapter / "adapter_config.json", trainable_token_indices={"embed_tokens": [3]})
    with pytest.raises(ValueError, match=r"trained the embedding rows \[3\], not the one of its landmark, 5"):
        load_adapter(adapter)


def test_a_landmark_row_that_was_never_trained_is_refused(base: Path, tmp_path: Path) -> None:
    model, tokenizer = start_adapter(base)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="still the one that training starts from, .* was it trained at all"):
        load_adapter(tmp_path / "adapter")


def test_another_tokenizer_is_refused(adapter: Path, tmp_path: Path) -> None:
    longer = word_tokenizer()
    longer.add_tokens(["another"])
    with pytest.raises(ValueError, match="its landmark is token 6, that of the adapter .* token 5; take the tokenizer"):
        load_adapter(adapter, tokenizer=longer)
    swapped = json.loads((adapter / "tokenizer.json").read_text())
    words = swapped["model"]["vocab"]
    first, second = list(words)[3:5]
    words[first], words[second] = words[second], words[first]
    (adapter / "tokenizer.json").write_text(json.dumps(swapped))
    for load in (load_adapter, lambda folder: merge.merge_adapter(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="its vocabulary is not the one that the adapter .* was trained with"):
            load(adapter)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 7}, "vocabulary of 7 tokens is not that of 6 with landmark 5; the adapter .* was trained on"),
        ({"vocab_size": 4}, "vocabulary of 4 tokens is not that of 6"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, not 2; the adapter .* was trained on .*base: give that"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, not False"),
        ({"landmark": True, "vocab_size": 8}, "vocab_size is 8, not 6"),
    ],
)
def test_another_base_is_refused(other: dict, message: str, adapter: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", **other)
    with pytest.raises(ValueError, match=message):
        load_adapter(adapter, tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        merge.merge_adapter(adapter, tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_landmark_is_another_token_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", landmark=True, vocab_size=8)
    train_adapter(base, tmp_path / "adapter")
    edit(base / "config.json", landmark_token_id=6)
    with pytest.raises(ValueError, match="landmark_token_id is 6, not 5"):
        load_adapter(tmp_path / "adapter")
    edit(base / "config.json", landmark_token_id=5, block_size=3)
    with pytest.raises(ValueError, match="block_size is 3, not 4"):
        load_adapter(tmp_path / "adapter")


def test_an_adapter_that_is_not_complete_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    name = next(name for name in weights if ".lora_B." in name)
    save_file({key: value for key, value in weights.items() if key != name}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match=f"lacks weights, 1 of them, the first {name}"):
        load_adapter(adapter)
    (adapter / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:-9])
    with pytest.raises(OSError, match="adapter_model.safetensors: truncated or damaged"):
        load_adapter(adapter)
    (adapter / TOKENIZER_RECORD).write_text("{}")
    with pytest.raises(OSError, match="landmark_adapter.json is damaged .KeyError.'tokenizer_sha256'"):
        load_adapter(adapter)
    (adapter / TOKENIZER_RECORD).unlink()
    with pytest.raises(OSError, match="holds no landmark_adapter.json, so it is no adapter of a landmark LLaMA"):
        load_adapter(adapter)
    with pytest.raises(OSError, match="nowhere: there is no such folder"):
        load_adapter(adapter / "nowhere")


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, LandmarkLlamaForCausalLM.from_pretrained])
def test_an_adapter_is_not_taken_for_a_whole_model(load, adapter: Path) -> None:
    with pytest.raises(ValueError, match="an adapter, not a whole model; load it with landmark_llama.load_adapter"):
        load(adapter)


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_adapted_one(kind: str, shard_size: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **KINDS[kind])
    adapted = train_adapter(base, tmp_path / "adapter")
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--max_shard_size", shard_size])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model*.safetensors"))) == 1 or shard_size == "4KB"
    assert isinstance(merged, LandmarkLlamaForCausalLM) and merged.config.use_cache
    # the weights were merged in fp32 and rounded once: no worse than to compute with the adapter in fp32
    exact = in_float64(copy.deepcopy(adapted).double().merge_and_unload())
    assert_as_accurate(logits(in_float64(merged)), logits(adapted), logits(exact))
    start, change = start_adapter(base)[0].get_base_model(), load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    module = "base_model.model.model.layers.1.mlp.down_proj"
    weight = start.model.layers[1].mlp.down_proj.base_layer.weight.detach()
    a, b = change[f"{module}.lora_A.weight"], change[f"{module}.lora_B.weight"]
    reference = weight.double() + 3 * b.double() @ a.double()
    assert_as_accurate(merged.model.layers[1].mlp.down_proj.weight.detach(), weight + 3 * b @ a, reference)
    # what was not trained is bitwise the base's
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, start.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(merged.get_output_embeddings().weight, adapted.get_output_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<landmark>") == 5


def test_merging_rounds_once_and_keeps_the_bases_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    train_adapter(base, tmp_path / "adapter", use_rslora=True)
    merge.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    before, after, change = (
        load_file(tmp_path / name)
        for name in ("base/model.safetensors", "merged/model.safetensors", f"adapter/{ADAPTER_WEIGHTS}")
    )
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj"
    a, b = (change[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = before[f"{name}.weight"].double() + 12 / 4**0.5 * b @ a
    # as near as two numbers in bf16 stand there: rounding twice would leave some further away
    assert ((after[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_merging_holds_one_shard_at_a_time(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def save(tensors: dict[str, Tensor], path: Path, **kwargs) -> None:
        sizes.append((len(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint_files, "save_file", save)
    merge.merge_adapter(adapter, tmp_path / "out", max_shard_size=8000)
    assert len(sizes) > 4 and all(count == 1 or size <= 8000 for count, size in sizes)


def test_merging_needs_no_peft_and_loading_says_that_it_does(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "landmark_llama.adapters.peft_model")
    merge.merge_adapter(adapter, tmp_path / "out")
    with pytest.raises(ImportError, match="load_adapter needs peft, which is not installed: pip install peft"):
        load_adapter(adapter)


def test_an_interrupted_merge_leaves_nothing_that_loads(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge.merge_adapter(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()
    merge.merge_adapter(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_what_cannot_be_merged_is_one_sentence(adapter: Path, base: Path, tmp_path: Path) -> None:
    def refusal(*more: str) -> str:
        with pytest.raises(SystemExit) as error:
            merge.main([str(adapter), str(tmp_path / "out"), *more])
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "out: is not empty; give a folder that does not exist yet" in refusal()
    shutil.rmtree(tmp_path / "out")
    edit(adapter / "adapter_config.json", rank_pattern={"q_proj": 2})
    assert "rank_pattern={'q_proj': 2} cannot be merged here; merge it with peft's merge_and_unload" in refusal()
    edit(adapter / "adapter_config.json", rank_pattern={}, peft_type="IA3")
    assert "peft_type='IA3' cannot be merged here" in refusal()
    edit(adapter / "adapter_config.json", peft_type="LORA")
    (base / "model.safetensors").rename(base / "weights")
    assert "holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards" in refusal()
    (base / "weights").rename(base / "model.safetensors")
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "a quantised checkpoint; give --base the one in full precision" in refusal()
