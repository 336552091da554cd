"""Merges an adapter into its base model and writes a whole landmark checkpoint with its tokenizer. Needs no peft.

    python -m landmark_llama.merge ADAPTER OUT
    python -m landmark_llama.merge ADAPTER OUT --base meta-llama/Llama-2-7b-hf --max_shard_size 4GB

The adapter's change is added in fp32 and rounded once, to the base's dtype. Tensors are read one at a time and shards
written one at a time. So memory never holds the whole model: only one shard (twice while it is written) and a few
copies of the largest tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from landmark_llama.adapters.folder import ADAPTER_WEIGHTS, LANDMARK_ROW, PREFIX, Adapter
from landmark_llama.calibration import CALIBRATION
from landmark_llama.checkpoints.conversion import mean_of_other_rows
from landmark_llama.checkpoints.files import (
    GENERATION_CONFIG,
    INPUT_ROWS,
    OUTPUT_ROWS,
    Checkpoint,
    check_output,
    copy_files,
    staged,
    write_weights,
)
from landmark_llama.configuration import LandmarkConfig
from landmark_llama.families import landmark_class

# Fields of adapter_config.json that change what an adapter computes and that this file does not implement.
UNSUPPORTED_FIELDS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layer_replication", "modules_to_save", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


def merge_adapter(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "2GB",
) -> None:
    """Merges the adapter in `folder` into `base` and writes the result to `output`.

    Args:
        folder: the adapter, a local folder or a hub id.
        output: a new or empty folder. It appears only when everything in it is written.
        base: the model that the adapter was trained on (a folder or a hub id); by default the one that it names.
        max_shard_size: largest weight file: bytes, or a text such as "2GB".

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the adapter does not belong to the base or uses a method that is not supported here, or `output` is
            not empty.
    """
    adapter = Adapter.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(adapter.folder)
    adapter.check_tokenizer(tokenizer)
    output, base = Path(output), base or adapter.base
    check_output(output)
    weights = Checkpoint.open(base)
    base_config = _full_precision_config(base, weights.folder)
    adapter.check_base(base_config, base)
    is_vanilla = not isinstance(base_config, LandmarkConfig)
    meta = _merged_meta(adapter, weights)
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as adapter_weights:
        merged = _merger(adapter, is_vanilla, adapter_weights, weights, set(meta))
        with staged(output) as staging:
            write_weights(staging, meta, merged, max_shard_size)
            tokenizer.save_pretrained(staging)
            copy_files(weights.folder, staging, (GENERATION_CONFIG,))
            config = adapter.config
            config.architectures, config.use_cache = [landmark_class(config).__name__], True
            config.dtype = meta[INPUT_ROWS].dtype
            config.save_pretrained(staging)


def _full_precision_config(base: str | os.PathLike[str], folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: a quantised checkpoint; give --base the one in full precision that it was made from")
    return config


def _merged_meta(adapter: Adapter, base: Checkpoint) -> dict[str, Tensor]:
    """A meta tensor for each weight of the merged model: the base's, with the adapter's vocabulary size."""
    meta = {}
    for name in base.names():
        if name == OUTPUT_ROWS and adapter.config.tie_word_embeddings:
            continue
        weight = base.meta[name]
        rows = adapter.config.vocab_size if name in (INPUT_ROWS, OUTPUT_ROWS) else len(weight)
        meta[name] = weight.new_empty(rows, *weight.shape[1:])
    if INPUT_ROWS not in meta:
        raise OSError(f"{base.folder}: its weight files hold no {INPUT_ROWS}, so they are no language model's")
    return meta | {name: meta[INPUT_ROWS].new_empty(shape) for name, shape in adapter.calibration().items()}


def _merger(
    adapter: Adapter, is_vanilla: bool, weights: safe_open, base: Checkpoint, names: set[str]
) -> Callable[[str], Tensor]:
    """Returns a function that takes a tensor's name and returns the merged tensor.

    Args:
        is_vanilla: the base has no landmark yet; it then gets the same rows as from `from_dense`.
        weights: the adapter's weight file, opened.
        base: the base's weights.
        names: the merged model's tensors. Every target of the adapter must be one of them.
    """
    peft = adapter.peft
    _refuse_unsupported(adapter)
    targets, calibration = _lora_targets(adapter, names), adapter.calibration()
    rank = peft["r"]
    scale = peft["lora_alpha"] / (rank**0.5 if peft.get("use_rslora") else rank)
    vocab_size, landmark_id = adapter.config.vocab_size, adapter.config.landmark_token_id

    def merged(name: str) -> Tensor:
        if name in calibration:
            return weights.get_tensor(PREFIX + name).to(base.meta[INPUT_ROWS].dtype)
        weight = base.read(name)
        if name in (INPUT_ROWS, OUTPUT_ROWS):
            if is_vanilla:
                row = mean_of_other_rows(weight, landmark_id)
                weight = torch.cat([weight, row.expand(vocab_size - len(weight), -1)])
                weight[landmark_id] = row
            if name == INPUT_ROWS:
                weight[landmark_id] = weights.get_tensor(LANDMARK_ROW)[0].to(weight.dtype)
        if name in targets:
            module = PREFIX + name.removesuffix(".weight")
            a, b = (weights.get_tensor(f"{module}.lora_{x}.weight").float() for x in "AB")
            weight = weight.float().addmm_(b, a, alpha=scale).to(weight.dtype)
        return weight

    return merged


def _refuse_unsupported(adapter: Adapter) -> None:
    """Raises ValueError unless the adapter is plain LoRA, which is all that can be merged here."""
    peft = adapter.peft
    supported = {"modules_to_save": [CALIBRATION]}
    unsupported = [name for name in UNSUPPORTED_FIELDS if peft.get(name) and peft[name] != supported.get(name)]
    if peft.get("bias", "none") != "none":
        unsupported.append("bias")
    if peft.get("init_lora_weights", True) not in (True, False, "gaussian"):
        unsupported.append("init_lora_weights")
    if peft.get("peft_type") != "LORA" or unsupported:
        field = unsupported[0] if unsupported else "peft_type"
        raise ValueError(
            f"{adapter.folder}: {field}={peft.get(field)!r} cannot be merged here; merge it with peft's "
            "merge_and_unload"
        )


def _lora_targets(adapter: Adapter, names: set[str]) -> set[str]:
    """Names of the base's weights that the adapter changes. Raises ValueError unless each has both LoRA matrices."""
    matrices = adapter.names - {LANDMARK_ROW} - {PREFIX + name for name in adapter.calibration()}
    targets = {name.removeprefix(PREFIX).partition(".lora_")[0] + ".weight" for name in matrices}
    expected = {f"{PREFIX}{target.removesuffix('.weight')}.lora_{x}.weight" for target in targets for x in "AB"}
    unpaired_or_unknown = (matrices ^ expected) | (targets - names)
    if unpaired_or_unknown:
        raise ValueError(
            f"{adapter.folder}: {min(unpaired_or_unknown)} belongs to no pair of LoRA matrices of a weight "
            "of the base: the adapter is damaged, or was trained on another model"
        )
    return targets


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.merge", description="Merges an adapter into its base model.")
    parser.add_argument("adapter", help="the adapter: a folder or a hub id")
    parser.add_argument("output", help="the folder for the merged model; must be new or empty")
    parser.add_argument(
        "--base", help="the model that the adapter was trained on, if it has moved: a folder or a hub id"
    )
    parser.add_argument("--max_shard_size", default="2GB", help="largest weight file (default: 2GB)")
    args = parser.parse_args(argv)
    try:
        merge_adapter(args.adapter, args.output, args.base, args.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the merged model is in {args.output}")


if __name__ == "__main__":
    main()
