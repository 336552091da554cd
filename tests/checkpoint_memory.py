"""Writes a model of random weights to disk and measures the peak memory, in bytes, of each command that reads it.

    python tests/checkpoint_memory.py FOLDER --hidden_size 2048 --layers 17 --vocab_size 32000 --max_shard_size 500MB

makes a model of 2 GB and prints one JSON object. FOLDER then holds five such models and can be deleted.
"""

import argparse
import ctypes
import json
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import to_bin
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from landmark_llama.checkpoints.files import write_weights
from landmark_llama.import_released import import_released
from landmark_llama.weight_difference import make, recover

CLEAR_REFS = Path("/proc/self/clear_refs")


def in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(command: Callable[[], object], before: int) -> int:
    """Peak memory of a command beyond `before`, in bytes (Linux only)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns memory that an earlier command has freed
    CLEAR_REFS.write_text("5")  # resets the kernel's peak
    command()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")) - before


def save_random_models(folder: Path, config: LlamaConfig, max_shard_size: str) -> int:
    """Saves a base (safetensors) and a released-style model (.bin) with two more tokens; returns the size in bytes."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(str, range(config.vocab_size - 3))])}
    for name, added in (("base", 0), ("released", 2)):
        (folder / name).mkdir()
        config.vocab_size += added
        with torch.device("meta"):
            meta = {name: weight.half() for name, weight in LlamaForCausalLM(config).state_dict().items()}
        write_weights(folder / name, meta, lambda name, of=meta: torch.randn(of[name].shape).half(), max_shard_size)
        config.save_pretrained(folder / name)
    fields = {**config.to_dict(), "model_type": "llama_with_landmark", "mem_id": config.vocab_size - 1, "mem_freq": 63}
    (folder / "released/config.json").write_text(json.dumps(fields))
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "released/tokenizer.json"))
    to_bin(folder / "released")
    return sum(weight.nbytes for weight in meta.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--max_shard_size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peaks(args.folder / "small", 64, 1, 100, "1GB")  # lets libraries allocate what they need for themselves
    print(json.dumps(peaks(args.folder / "large", args.hidden_size, args.layers, args.vocab_size, args.max_shard_size)))


def peaks(folder: Path, hidden_size: int, layers: int, vocab_size: int, shard: str) -> dict[str, int]:
    """Bytes of the weights, and the peak memory of each command in bytes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
    )
    folder.mkdir()
    commands = {
        "import": lambda: import_released(folder / "released", folder / "tuned", max_shard_size=shard),
        "make": lambda: make(folder / "tuned", folder / "base", folder / "difference", shard),
        "recover": lambda: recover(folder / "difference", folder / "base", folder / "recovered", shard),
    }
    before = in_use()
    size = save_random_models(folder, config, shard)
    return {"weights": size, **{name: peak_of(command, before) for name, command in commands.items()}}


if __name__ == "__main__":
    main()
