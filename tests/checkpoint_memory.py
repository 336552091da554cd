"""Makes a model of random weights on the disk; prints the peak of memory of each command that reads it, in bytes.

    python tests/checkpoint_memory.py FOLDER --hidden_size 2048 --layers 17 --vocab_size 32000 --max_shard_size 500MB

is a model of 2 GB; FOLDER then holds five such models, and can be deleted. Prints one JSON object.
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
    """Bytes that a command takes beyond `before` at most; the kernel counts the peak anew from here (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what an earlier command has left
    CLEAR_REFS.write_text("5")
    command()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")) - before


def save_random_models(folder: Path, config: LlamaConfig, max_shard_size: str) -> int:
    """A base in safetensors files, and a released-style model in .bin files, with two tokens more; returns its size."""
    words = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(str, range(config.vocab_size - 3))])}
    for name, added in (("base", 0), ("released", 2)):
        (folder / name).mkdir()
        config.vocab_size += added
        with torch.device("meta"):
            planned = {name: weight.half() for name, weight in LlamaForCausalLM(config).state_dict().items()}
        write_weights(
            folder / name, planned, lambda name, of=planned: torch.randn(of[name].shape).half(), max_shard_size
        )
        config.save_pretrained(folder / name)
    fields = {**config.to_dict(), "model_type": "llama_with_landmark", "mem_id": config.vocab_size - 1, "mem_freq": 63}
    (folder / "released/config.json").write_text(json.dumps(fields))
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "released/tokenizer.json"))
    to_bin(folder / "released")
    return sum(weight.nbytes for weight in planned.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--max_shard_size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peaks(args.folder / "small", 64, 1, 100, "1GB")  # what libraries take for themselves
    print(json.dumps(peaks(args.folder / "large", args.hidden_size, args.layers, args.vocab_size, args.max_shard_size)))


def peaks(folder: Path, hidden_size: int, layers: int, vocab_size: int, shard: str) -> dict[str, int]:
    """Bytes of the weights, and of the peak of each command."""
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
