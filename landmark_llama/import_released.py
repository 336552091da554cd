"""Imports a model that was made with the paper's released code (epfml/landmark-attention).

    python -m landmark_llama.import_released FOLDER OUT
    python -m landmark_llama.import_released FOLDER OUT --base LLAMA     # FOLDER is a released weight difference

The released code saves `model_type: llama_with_landmark` with four fields of its own (`RELEASED_FIELDS`), rotary
buffers among the weights, and a SentencePiece tokenizer. `docs/checkpoints.md` says how each of them is converted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from landmark_llama import self_test
from landmark_llama.checkpoints.files import (
    GENERATION_CONFIG,
    INPUT_ROWS,
    OUTPUT_ROWS,
    Checkpoint,
    check_output,
    copy_files,
    local_folder,
    read_json,
    staged,
    write_weights,
)
from landmark_llama.checkpoints.released_difference import CHECKSUM, ReleasedDifference, rotary_frequencies
from landmark_llama.checkpoints.released_tokenizer import released_tokenizer
from landmark_llama.configuration import LandmarkLlamaConfig
from landmark_llama.modeling import LandmarkLlamaForCausalLM
from landmark_llama.tokenization import LANDMARK_TOKEN

MODEL_TYPE = "llama_with_landmark"
# The released code's own fields, with the defaults of its configuration class.
RELEASED_FIELDS = {"mem_id": 32001, "mem_freq": 50, "train_context_length": 512, "include_landmark_in_loss": True}
# LLaMA's fields that the released code reads. It ignores RoPE settings and always uses a base of 10,000.
LLAMA_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
RETRIEVED_BLOCKS = 5  # as in the released code's own pass key test


def import_released(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    num_retrieved_blocks: int | None = None,
    legacy: bool = False,
    max_shard_size: int | str = "2GB",
) -> str | None:
    """Converts a model made with the released code and writes it to `output`.

    Args:
        folder: the model, or with `base` the weight difference: a local folder or a hub id.
        output: a new or empty folder. It appears only when everything in it is written.
        base: the LLaMA that a weight difference was made from.
        tokenizer: a folder whose tokenizer to use instead of the model's own. It gains the landmark token.
        num_retrieved_blocks: by default 5, as in the released code's test, or as many as fit the window.
        legacy: the model was made with the released code's first version (`llama_legacy`), which saves a plain LLaMA's
            configuration. It means blocks of 50 tokens, a context of 512, and the landmark id of the tokenizer.
        max_shard_size: largest weight file: bytes, or a text such as "2GB".

    Returns:
        With `base`, what the checksum of the weight difference says; None without.

    Raises:
        OSError: a file is missing, truncated or damaged.
        ValueError: `folder` holds another kind of model; its fields, weights, tokenizer or base do not fit each other;
            or `output` is not empty.
    """
    output = Path(output)
    check_output(output)
    weights = Checkpoint.open(folder)
    fields = _released_fields(weights.folder, legacy)
    tokenizer_folder = weights.folder if tokenizer is None else local_folder(tokenizer)
    fast = released_tokenizer(tokenizer_folder, None if legacy else fields["mem_id"], fields["vocab_size"])
    config = _landmark_config(fields, fast, num_retrieved_blocks)
    meta = _checked_meta(weights, config)
    _check_base_is_needed(folder, base, _is_difference(weights, config))
    read, finding = weights.read, None
    if base is not None:
        difference = ReleasedDifference.open(weights, Checkpoint.open(base), meta)
        finding = difference.check_sum(config)
        read, meta = difference.recovered, {name: tensor.float() for name, tensor in meta.items()}
    with staged(output) as staging:
        write_weights(staging, meta, read, max_shard_size)
        fast.save_pretrained(staging)
        copy_files(weights.folder, staging, (GENERATION_CONFIG,))
        config.architectures, config.dtype = ["LandmarkLlamaForCausalLM"], meta[INPUT_ROWS].dtype
        config.save_pretrained(staging)
    return finding


def _check_base_is_needed(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None, is_difference: bool | None
) -> None:
    """Raises ValueError if a weight difference comes without a base, or a whole model with one."""
    if is_difference and base is None:
        raise ValueError(f"{folder}: a weight difference, not a model; give the LLaMA it was made from with --base")
    if base is not None and is_difference is False:
        raise ValueError(f"{folder}: a whole model, no weight difference; import it without --base={base}")


def is_released(folder: Path) -> bool:
    """Whether a local folder holds a model or weight difference of the released code."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def _released_fields(folder: Path, legacy: bool) -> dict[str, Any]:
    """The fields of config.json, checked; missing ones have the released code's defaults."""
    fields = read_json(folder / "config.json")
    model_type, expected = fields.get("model_type"), "llama" if legacy else MODEL_TYPE
    if model_type != expected:
        hint = "; if it was made with llama_legacy, add --legacy" if model_type == "llama" else ""
        raise ValueError(f"{folder}: model_type is {model_type!r}, not {expected!r} as the released code saves{hint}")
    fields = {**RELEASED_FIELDS, "tie_word_embeddings": False, **fields}
    kinds = {name: type(value) for name, value in RELEASED_FIELDS.items()} | {"vocab_size": int}
    for name, kind in kinds.items():
        if type(value := fields.get(name)) is not kind or (name in ("mem_freq", "train_context_length") and value < 1):
            raise ValueError(f"{folder}: {name}={value!r} in config.json: the released code saves no such value")
    if not legacy and not 0 <= fields["mem_id"] < fields["vocab_size"]:
        raise ValueError(
            f"{folder}: mem_id={fields['mem_id']} in config.json is outside the vocabulary of {fields['vocab_size']} "
            "tokens: the embedding was not resized, or config.json is another model's"
        )
    return fields


def _landmark_config(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, num_retrieved_blocks: int | None
) -> LandmarkLlamaConfig:
    """The landmark configuration that computes what the released model computes."""
    block_size = fields["mem_freq"] + 1
    if num_retrieved_blocks is None:  # leaves room for the empty prefix slot and a chunk of one block
        num_retrieved_blocks = max(0, min(RETRIEVED_BLOCKS, fields["train_context_length"] // block_size - 2))
    llama = {name: fields[name] for name in LLAMA_FIELDS if name in fields}
    pad = llama.get("pad_token_id")
    if pad is None or not 0 <= pad < fields["vocab_size"]:  # early LLaMA conversions have -1
        llama["pad_token_id"] = tokenizer.pad_token_id
    try:
        return LandmarkLlamaConfig(
            **llama,
            tie_word_embeddings=fields["tie_word_embeddings"],
            landmark_token_id=tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN),
            block_size=block_size,
            train_context_length=fields["train_context_length"],
            num_retrieved_blocks=num_retrieved_blocks,
            local_attention="chunked",
            # with landmarks in the loss, a block's last token learnt to predict the landmark, the landmark what follows
            predict_from_landmark=fields["include_landmark_in_loss"],
        )
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def _checked_meta(weights: Checkpoint, config: LandmarkLlamaConfig) -> dict[str, Tensor]:
    """A meta tensor for each weight to write. Raises ValueError if names or shapes do not fit the configuration."""
    with torch.device("meta"):
        expected = LandmarkLlamaForCausalLM(config).state_dict()
    found = {name: weights.meta[name] for name in weights.names()}
    if config.tie_word_embeddings:
        expected.pop(OUTPUT_ROWS)
        found.pop(OUTPUT_ROWS, None)
    for name in sorted(expected.keys() ^ found.keys()):
        what = "its weights lack" if name in expected else "its weights hold, besides the model's,"
        raise ValueError(f"{weights.folder}: {what} {name}: a file is missing, or config.json is another model's")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{weights.folder}: {name} has the shape {tuple(tensor.shape)}, config.json says "
                f"{tuple(expected[name].shape)}"
            )
    return found


def _is_difference(weights: Checkpoint, config: LandmarkLlamaConfig) -> bool | None:
    """Whether these weights are a difference from a base model; None if that cannot be told.

    The rotary frequencies tell: they are the same in every model, so their difference is 0.
    """
    frequencies = [weights.read(name).float() for name in weights.meta if name.endswith("inv_freq")]
    if frequencies and all(not frequency.any() for frequency in frequencies):
        return True
    expected = rotary_frequencies(config)
    for frequency in frequencies:  # the loose tolerance allows for rounding to half precision
        if frequency.shape != expected.shape or not torch.allclose(frequency, expected, rtol=0.01, atol=0):
            raise ValueError(f"{weights.folder}: its rotary frequencies are not the released code's, of base 10,000")
    if frequencies:
        return False
    return True if (weights.folder / CHECKSUM).is_file() else None


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="landmark_llama.import_released", description="Imports a model made with the paper's released code."
    )
    parser.add_argument("folder", help="the model or weight difference: a folder or a hub id")
    parser.add_argument("output", help="the folder for the imported model; must be new or empty")
    parser.add_argument("--base", help="the LLaMA that a released weight difference was made from")
    parser.add_argument("--tokenizer", help="a folder whose tokenizer to use, if the model's is missing or wrong")
    parser.add_argument("--num_retrieved_blocks", type=int, help="(default: 5, or as many as fit the window)")
    parser.add_argument(
        "--legacy", action="store_true", help="the model was made with llama_legacy: model_type is llama"
    )
    parser.add_argument("--max_shard_size", default="2GB", help="largest weight file (default: 2GB)")
    parser.add_argument("--no_self_test", action="store_true", help="skip loading the model and asking it a pass key")
    args = parser.parse_args(argv)
    try:
        finding = import_released(
            args.folder, args.output, args.base, args.tokenizer, args.num_retrieved_blocks, args.legacy,
            args.max_shard_size,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if finding:
        print(finding)
    print(f"the imported model is in {args.output}")
    if not args.no_self_test:
        print(self_test.report(Path(args.output)))


if __name__ == "__main__":
    main()
