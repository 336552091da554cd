"""Tokenizers of every kind that prompts must fit: as LLaMA's, GPT-2's, LLaMA 3's, and real ones; a model with one."""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(os.environ.get("LANDMARK_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
TEXT = ["The number of the lamp is 48213, and the sky above 907 roofs was green.\nHere we go, again and again.\n"] * 4
# As LLaMA 3 cuts text, where a full stop takes the line end along.
LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """As LLaMA's: a space before the text, merges over several words, bytes for unknown characters, BOS."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n\d]+|."), "isolated")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {piece: i for piece, i in model["vocab"].items() if piece != "\n"}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(model["vocab"]) + byte
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_tokenizer(words: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's, or with another pattern of words; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts BOS before and EOS behind every text."""
    tokenizer = sentencepiece_like_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def stored_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """One of the real files; the test that asks for it is skipped where they are not there."""
    if not (DATA / folder).is_dir():
        pytest.skip(f"LANDMARK_DATA: {DATA / folder} is not there")
    return AutoTokenizer.from_pretrained(DATA / folder)


TOKENIZERS = {
    "sentencepiece-like": sentencepiece_like_tokenizer,
    "byte-level": byte_level_tokenizer,
    "byte-level, merging line ends": lambda: byte_level_tokenizer(LLAMA3_WORDS),
    "with EOS at the end": closing_tokenizer,
    "LLaMA": lambda: stored_tokenizer("tokenizers/llama"),
    "stories260K": lambda: stored_tokenizer("models/stories260K/gqa"),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and BOS."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_dense(folder: Path, seed: int = 0) -> Path:
    """A tiny LLaMA with random weights and that tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
