"""Tiny checkpoints whose tokens are the bytes of a text, dense and with landmarks, and texts for them."""

import random
from pathlib import Path

import torch
from tiny import sharpen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from landmark_llama import LandmarkLlamaForCausalLM

POSITIONS = 64
LETTERS = "abcdefghij   \n.,éß€日本𝔘"  # of one to four bytes


def byte_tokenizer(bos: bool = True, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A token a byte, more for `merges`; BOS in front of a text unless told otherwise."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_dense(folder: Path, seed: int = 0, **settings) -> Path:
    """A LLaMA of `POSITIONS` positions with its tokenizer."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    model = LlamaForCausalLM(config)
    sharpen(model, seed)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_landmark(dense: Path, folder: Path, **settings) -> Path:
    """The dense model's landmark form, blocks of 4 positions and 2 blocks retrieved."""
    tokenizer = byte_tokenizer()
    settings = {"block_size": 4, "num_retrieved_blocks": 2, "num_local_blocks": 3, **settings}
    LandmarkLlamaForCausalLM.from_llama(dense, tokenizer, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_text(seed: int, characters: int = 300) -> str:
    """Letters of several bytes, drawn."""
    return "".join(random.Random(seed).choices(LETTERS, k=characters))


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of bytes."""
    return torch.randint(2, 258, shape, generator=torch.Generator().manual_seed(seed))
