"""Models made with the paper's released code: the same numbers, window and tokens after import; what is refused."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import edit, names, refusal, to_bin, truncate
from safetensors.torch import load_file, save_file
from tiny import BASE, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_llama import LandmarkLlamaForCausalLM, import_released, strip_landmarks, weight_difference
from landmark_llama.checkpoints.released_tokenizer import released_tokenizer
from landmark_llama.checkpoints.sentencepiece_model import read_tokenizer_model

LLAMA = 20  # tokens of the base's vocabulary; [PAD] and <landmark> come behind them
FIELDS = {"model_type": "llama_with_landmark", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}


def save_words(folder: Path, words: dict[str, int]) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **words}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def numbered(first: int, end: int) -> dict[str, int]:
    return {f"w{i}": i for i in range(first, end)}


def frequencies(head_dim: int, layers: int) -> dict[str, Tensor]:
    """The rotary buffers, as transformers 4.31 saved them: fp32 whatever the weights' dtype."""
    frequency = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequency.clone() for i in range(layers)}


def save_released(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """A released-style folder: 22 tokens, [PAD] at 20 and <landmark> at 21, blocks of 3 + 1, in one .bin file."""
    folder.mkdir()
    model = tiny_llama(seed=1, vocab_size=LLAMA + 2, num_key_value_heads=4).to(dtype)
    own = {"mem_id": 21, "mem_freq": 3, "train_context_length": 32, "include_landmark_in_loss": True}
    fields = {**BASE, "vocab_size": LLAMA + 2, "num_key_value_heads": 4, **own, **FIELDS, **fields}
    (folder / "config.json").write_text(json.dumps(fields))
    torch.save({**model.state_dict(), **frequencies(8, layers=2)}, folder / "pytorch_model.bin")
    save_words(folder, numbered(3, LLAMA))
    (folder / "added_tokens.json").write_text(json.dumps({"<landmark>": 21, "[PAD]": 20}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_released(tmp_path / "released")


def imported(folder: Path, *flags: object) -> LandmarkLlamaForCausalLM:
    output = folder.parent / "imported"
    import_released.main([str(folder), str(output), "--no_self_test", *map(str, flags)])
    return AutoModelForCausalLM.from_pretrained(output)


def test_an_imported_model_gives_the_released_logits_and_tokens(landmark_data: Path, tmp_path: Path) -> None:
    path = landmark_data / "upstream" / "parity.npz"
    if not path.is_file():
        pytest.skip(f"no numbers of the released implementation at {path}")
    numbers, folder = dict(np.load(path)), tmp_path / "released"
    folder.mkdir()
    fields = {**json.loads(str(numbers["config"])), **FIELDS}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = {name.removeprefix("weights/"): x for name, x in numbers.items() if name.startswith("weights/")}
    weights = {name: torch.from_numpy(x) for name, x in weights.items()} | frequencies(16, layers=2)
    shards = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])]
    places = {name: f"pytorch_model-{i}.bin" for i, shard in enumerate(shards) for name in shard}
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_words(folder, numbered(3, 126))  # a base's tokenizer: [PAD] and the landmark are added as in training
    model = imported(folder)

    config = model.config
    assert (config.landmark_token_id, config.block_size, config.train_context_length) == (127, 8, 64)
    landmarked = torch.from_numpy(numbers["full/landmarked_ids"])
    place = torch.arange(landmarked.shape[1])
    logits = model(strip_landmarks(landmarked, 8, 127)).logits
    expected = torch.from_numpy(numbers["full/logits"])[:, place[place % 8 != 7]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    run = "generate/prompt140_k2_per_token_and_head"
    output = model.generate(
        torch.from_numpy(numbers["input_ids"][:, :140]),
        max_new_tokens=17,
        do_sample=False,
        num_retrieved_blocks=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences[0, 140:].tolist() == numbers[f"{run}/tokens"].tolist()
    scores = torch.from_numpy(numbers[f"{run}/scores"])[:, :127]
    torch.testing.assert_close(torch.cat(output.logits)[:, :127], scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("in_loss", [True, False])
def test_landmarks_in_the_loss_predict_what_follows_them(in_loss: bool, folder: Path) -> None:
    edit(folder / "config.json", include_landmark_in_loss=in_loss)
    assert imported(folder).config.predict_from_landmark is in_loss


def test_the_papers_model_reads_chunks_of_204_positions_and_five_blocks(folder: Path) -> None:
    fields = ("mem_freq", "train_context_length", "include_landmark_in_loss")
    edit(folder / "config.json", max_position_embeddings=2048, **dict.fromkeys(fields))  # left out: the class's values
    config = imported(folder).config
    assert (config.block_size, config.train_context_length, config.predict_from_landmark) == (51, 512, True)
    settings = config.retrieval()
    assert (settings.local_attention, settings.num_retrieved_blocks, settings.granularity) == (
        "chunked",
        5,
        "token_and_head",
    )
    assert settings.chunk_blocks * config.block_size == 512 - 512 % 51 - (5 + 1) * 51


def test_weights_keep_their_bits_and_rotary_buffers_go(tmp_path: Path) -> None:
    folder = save_released(tmp_path / "released", dtype=torch.bfloat16)
    model = imported(folder, "--num_retrieved_blocks", 2)
    assert model.config.num_retrieved_blocks == 2 and model.dtype == torch.bfloat16
    before, after = torch.load(folder / "pytorch_model.bin"), load_file(tmp_path / "imported/model.safetensors")
    assert before.keys() - after.keys() == frequencies(8, layers=2).keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_landmark_in_the_middle_of_the_vocabulary_is_no_matter(folder: Path) -> None:
    edit(folder / "config.json", mem_id=7)
    (folder / "added_tokens.json").unlink()
    save_words(folder, {**numbered(3, 7), "<landmark>": 7, **numbered(8, 22)})
    model = imported(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "imported")
    assert model.config.landmark_token_id == tokenizer.convert_tokens_to_ids("<landmark>") == 7
    assert "<landmark>" in tokenizer.all_special_tokens


def test_padding_of_the_first_conversions_is_the_tokenizers(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=-1)
    assert imported(folder).config.pad_token_id == 20


def test_rope_is_the_released_codes_whatever_the_configuration_says(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    assert imported(folder).config.rope_parameters["rope_theta"] == 10_000
    weights = {**torch.load(folder / "pytorch_model.bin")}
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] *= 2
    torch.save(weights, folder / "pytorch_model.bin")
    assert "rotary frequencies are not the released code's" in refusal(
        import_released.main, folder, folder.parent / "out"
    )


def test_the_first_code_left_a_plain_configuration(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama", mem_id=None, mem_freq=None, train_context_length=None)
    message = refusal(import_released.main, folder, folder.parent / "out")
    assert "model_type is 'llama', not 'llama_with_landmark'" in message and "add --legacy" in message
    config = imported(folder, "--legacy").config
    assert (config.landmark_token_id, config.block_size, config.predict_from_landmark) == (21, 51, True)


def test_the_first_codes_difference_is_recovered_with_its_base(difference: Path, tmp_path: Path) -> None:
    edit(difference / "config.json", model_type="llama", mem_id=None, mem_freq=None, train_context_length=None)
    message = refusal(weight_difference.main, "recover", difference, tmp_path / "base", tmp_path / "out")
    assert "import_released --base BASE --legacy" in message
    assert imported(difference, "--legacy", "--base", tmp_path / "base").config.landmark_token_id == 21


def sentencepiece_model(pieces: list[tuple[str, float, int]], model_type: int = 2) -> bytes:
    """A tokenizer.model as SentencePiece writes it."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    rows = (
        field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + bytes([3 << 3, kind])
        for text, score, kind in pieces
    )
    return b"".join(field(1, row) for row in rows) + field(2, bytes([3 << 3, model_type]))


def test_a_tokenizer_of_pieces_merges_the_best_pair_first(folder: Path) -> None:
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<0x21>", 0, 6), ("bc", -1, 1), ("ab", -2, 1)]
    pieces += [(text, -10 - i, 1) for i, text in enumerate("▁abcdefghijklm")]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    imported(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "imported")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc!<landmark>").input_ids) == [
        "<s>", "▁", "a", "bc", "<0x21>", "<landmark>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("abc! m").input_ids, skip_special_tokens=True) == "abc! m"
    assert (len(tokenizer), tokenizer.pad_token_id) == (22, 20)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces, model_type=1))
    assert "not a byte-pair model as LLaMA's" in refusal(import_released.main, folder, folder.parent / "out")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces)[:-30])
    assert "tokenizer.model: truncated" in refusal(import_released.main, folder, folder.parent / "out")


def test_llamas_own_pieces_give_llamas_exact_tokenizer(landmark_data: Path) -> None:
    folder = landmark_data / "tokenizers/llama"
    found = json.loads(read_tokenizer_model(folder / "tokenizer.model").to_str())
    expected = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    merges = [cut.split(" ") if isinstance(cut, str) else cut for cut in expected["model"]["merges"]]
    assert found["model"]["merges"] == merges and found["model"]["vocab"] == expected["model"]["vocab"]
    assert all(found[part] == expected[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    assert released_tokenizer(folder, 32001, 32002).convert_tokens_to_ids(["[PAD]", "<landmark>"]) == [32000, 32001]


class Runs:
    """Pickled, it would run a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_no_pickle_is_run(folder: Path) -> None:
    torch.save({"model.norm.weight": Runs(folder.parent / "ran")}, folder / "pytorch_model.bin")
    message = refusal(import_released.main, folder, folder.parent / "out")
    assert "a pickle of more than tensors, which could run code and is not loaded" in message
    torch.save({"model.norm.weight": [1]}, folder / "pytorch_model.bin")
    assert "holds more than tensors" in refusal(import_released.main, folder, folder.parent / "out")
    torch.save({}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "PyTorch's format of before 1.6" in refusal(import_released.main, folder, folder.parent / "out")
    assert names(folder.parent) == ["released"]


def test_what_cannot_be_imported_is_one_sentence_and_nothing_is_written(folder: Path) -> None:
    output, weights = folder.parent / "out", torch.load(folder / "pytorch_model.bin")

    def refused(*flags: object) -> str:
        message = refusal(import_released.main, folder, output, *flags)
        assert names(folder.parent) == ["released"]
        return message

    edit(folder / "config.json", mem_id=22)
    assert "mem_id=22 in config.json is outside the vocabulary of 22 tokens" in refused()
    edit(folder / "config.json", mem_id=20)
    message = refused()
    assert "mem_id=20 in config.json is '[PAD]' in the tokenizer, whose <landmark> is token 21" in message
    assert "by --tokenizer FOLDER" in message
    edit(folder / "config.json", mem_id=21, mem_freq="3")
    assert "mem_freq='3' in config.json: the released code saves no such value" in refused()
    edit(folder / "config.json", mem_freq=3, hidden_size="32")
    assert "'hidden_size' expected int, got str" in refused()
    edit(folder / "config.json", hidden_size=32, intermediate_size=40)
    assert "gate_proj.weight has the shape (48, 32), config.json says (40, 32)" in refused()
    edit(folder / "config.json", intermediate_size=48, num_hidden_layers=3)
    assert "its weights lack model.layers.2.input_layernorm.weight" in refused()
    edit(folder / "config.json", num_hidden_layers=2, train_context_length=4)
    assert "num_retrieved_blocks=0" in refused()
    edit(folder / "config.json", train_context_length=32)
    assert "num_retrieved_blocks=7" in refused("--num_retrieved_blocks", 7)
    assert "nowhere: there is no such folder" in refused("--tokenizer", folder.parent / "nowhere")
    edit(folder / "added_tokens.json", **{"<landmark>": 30})
    assert "added_tokens.json has '<landmark>' at 30" in refused()
    (folder / "added_tokens.json").unlink()
    save_words(folder, numbered(3, 15))
    assert "its tokenizer of 15 tokens has no <landmark>, and mem_id=21 is not the next free id" in refused()
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: damaged" in refused()
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused() and "by --tokenizer FOLDER" in refused()
    save_words(folder, numbered(3, LLAMA))
    truncate(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: truncated, damaged or in PyTorch's format of before 1.6" in refused()
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights: neither model.safetensors nor pytorch_model.bin" in refused()
    save_file(weights, folder / "model.safetensors")
    truncate(folder / "model.safetensors")
    assert "model.safetensors: truncated or damaged" in refused()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    assert "config.json: damaged" in refused()
    (folder / "config.json").unlink()
    assert "holds no config.json" in refused()


def test_an_output_that_holds_something_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert "out: is not empty" in refusal(import_released.main, folder, tmp_path / "out")
    assert names(tmp_path / "out") == ["mine"]


@pytest.fixture
def difference(folder: Path, tmp_path: Path) -> Path:
    """The released code's weight difference of the model in `folder`, and the base beside it, in .bin files."""
    base = tiny_llama(seed=2, vocab_size=LLAMA, num_key_value_heads=4)
    base.half().save_pretrained(tmp_path / "base")
    to_bin(tmp_path / "base")
    base, tuned = base.float().state_dict(), torch.load(folder / "pytorch_model.bin")
    total, stored = sum(weight.double().sum().item() for weight in tuned.values()), {}
    for name, weight in tuned.items():
        start = base.get(name, weight)  # rotary buffers are the same
        if added := len(weight) - len(start):
            start = torch.cat([start, start.mean(0, keepdim=True).expand(added, -1)])
        stored[name] = weight - start
    difference = save_released(tmp_path / "difference")
    torch.save(stored, difference / "pytorch_model.bin")
    (difference / "checksum_psum.txt").write_text(str(total))
    return difference


def test_the_papers_own_difference_is_recovered_and_its_sum_checked(
    difference: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = imported(difference, "--base", tmp_path / "base")
    tuned = torch.load(folder / "pytorch_model.bin")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, tuned[name], rtol=0, atol=1e-6)
    assert "as checksum_psum.txt says; this is all that can be checked" in capsys.readouterr().out
    (difference / "checksum_psum.txt").unlink()
    weight_difference.main(
        ["recover", str(difference), str(tmp_path / "base"), str(tmp_path / "out"), "--no_self_test"]
    )
    assert "there is no checksum_psum.txt to compare with" in capsys.readouterr().out
    assert load_file(tmp_path / "out/model.safetensors").keys() == model.state_dict().keys()


def test_a_difference_without_its_base_and_a_model_with_one_are_refused(
    difference: Path, folder: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        message = refusal(import_released.main, *arguments)
        assert names(tmp_path) == ["base", "difference", "released"]
        return message

    out, base = tmp_path / "out", ("--base", tmp_path / "base")
    assert "a weight difference, not a model; give the LLaMA it was made from with --base" in refused(difference, out)
    assert "a whole model, no weight difference" in refused(folder, out, *base)
    (difference / "checksum_psum.txt").write_text("12")
    message = refused(difference, out, *base)
    assert "base: not the base that the difference was made from" in message and "says 12.0000" in message
    edit(difference / "config.json", num_hidden_layers=1)
    assert "hold, besides the model's, model.layers.1" in refused(difference, out, *base)
    edit(difference / "config.json", num_hidden_layers=2)
    weights = torch.load(tmp_path / "base/pytorch_model.bin")
    weights["model.norm.weight"] = torch.ones(16)
    torch.save(weights, tmp_path / "base/pytorch_model.bin")
    assert "its model.norm.weight has the shape (16,), the tuned model's (32,)" in refused(difference, out, *base)
    del weights["model.norm.weight"]
    torch.save(weights, tmp_path / "base/pytorch_model.bin")
    assert "base: lacks model.norm.weight" in refused(difference, out, *base)
