"""Tokenizers of every kind that prompts must fit: as LLaMA's, as GPT-2's, as LLaMA 3's, and real ones."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
