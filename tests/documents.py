"""For the tests of `finetune`'s data: documents on disk, and a tokenizer with one token per byte."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 0  # id of end-of-sequence
LANDMARK = 300


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte; `</s>` has id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": END, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts), encoding="utf-8")
    return path


def random_documents(seed: int, count: int = 40, longest: int = 60) -> list[list[int]]:
    """Lists of random ids without `END` and `LANDMARK`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, 200, (length,), generator=generator).tolist() for length in lengths]


def whole_documents(tokens: list[int]) -> list[list[int]]:
    """The documents in a stream of tokens, without `END`. The last one, which may be cut off, is left out."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents.append([]) if token == END else documents[-1].append(token)
    return documents[:-1]
