"""Folds an adapter into its base: a whole landmark checkpoint, with its tokenizer.

    python -m landmark_llama.merge ADAPTER OUT
    python -m landmark_llama.merge ADAPTER OUT --base meta-llama/Llama-2-7b-hf --max_shard_size 4GB

The base is read tensor by tensor, the adapter's change is added in fp32 and rounded once to the base's own dtype, and
shards are written one after another: memory holds a shard (twice while it is written) and a few copies of the largest
tensor, never the model. Needs no peft.
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
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from landmark_llama.adapters.folder import ADAPTER_WEIGHTS, LANDMARK_ROW, Adapter
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
from landmark_llama.configuration import LandmarkLlamaConfig

PREFIX = "base_model.model."
# Fields of adapter_config.json that change what an adapter computes, beside those that are understood here.
OTHER_METHODS = (
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
    """Writes the landmark checkpoint that `base` with the adapter in `folder` is.

    Args:
        folder: the adapter, a local folder or a hub id.
        output: a folder that does not exist yet, or is empty; it appears when everything in it is written.
        base: what the adapter was trained on (a folder or a hub id); by default what the adapter names.
        max_shard_size: of the files of weights: bytes, or a text such as "2GB".

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the adapter does not belong to the base, or is of a kind that cannot be merged here; or `output` is
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
    is_vanilla = not isinstance(base_config, LandmarkLlamaConfig)
    planned = _plan(adapter, weights)
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as adapted:
        change = _changes(adapter, is_vanilla, adapted, set(planned))
        with staged(output) as staging:
            write_weights(staging, planned, lambda name: change(name, weights.read(name)), max_shard_size)
            tokenizer.save_pretrained(staging)
            copy_files(weights.folder, staging, (GENERATION_CONFIG,))
            config = adapter.config
            config.architectures, config.use_cache = ["LandmarkLlamaForCausalLM"], True
            config.dtype = planned[INPUT_ROWS].dtype
            config.save_pretrained(staging)


def _full_precision_config(base: str | os.PathLike[str], folder: Path) -> LlamaConfig:
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: a quantised checkpoint; give --base the one in full precision that it was made from")
    return config


def _plan(adapter: Adapter, base: Checkpoint) -> dict[str, Tensor]:
    """A tensor without memory for each that will be written, of its shape and dtype."""
    planned = {}
    for name in base.names():
        if name == OUTPUT_ROWS and adapter.config.tie_word_embeddings:
            continue
        like = base.shapes[name]
        rows = adapter.config.vocab_size if name in (INPUT_ROWS, OUTPUT_ROWS) else len(like)
        planned[name] = like.new_empty(rows, *like.shape[1:])
    if INPUT_ROWS not in planned:
        raise OSError(f"{base.folder}: its files of weights hold no {INPUT_ROWS}: not the weights of a LLaMA")
    return planned


def _changes(
    adapter: Adapter, is_vanilla: bool, weights: safe_open, names: set[str]
) -> Callable[[str, Tensor], Tensor]:
    """A function from a base tensor and its name to the merged tensor.

    is_vanilla: the base has no landmark yet, which then gets the rows that `from_llama` gives it.
    weights: the adapter's opened file.
    names: of the base's tensors, among which the adapter's targets have to be.
    """
    peft = adapter.peft
    others = [field for field in OTHER_METHODS if peft.get(field)]
    others += ["bias"] * (peft.get("bias", "none") != "none")
    others += ["init_lora_weights"] * (peft.get("init_lora_weights", True) not in (True, False, "gaussian"))
    if peft.get("peft_type") != "LORA" or others:
        what = f"{others[0]}={peft[others[0]]!r}" if others else f"peft_type={peft.get('peft_type')!r}"
        raise ValueError(f"{adapter.folder}: {what} cannot be merged here; merge it with peft's merge_and_unload")
    targets = {name.removeprefix(PREFIX).partition(".lora_")[0] + ".weight" for name in adapter.names - {LANDMARK_ROW}}
    complete = {f"{PREFIX}{target.removesuffix('.weight')}.lora_{x}.weight" for target in targets for x in "AB"}
    strange = (adapter.names - {LANDMARK_ROW}) ^ complete
    strange |= targets - names
    if strange:
        raise ValueError(
            f"{adapter.folder}: {min(strange)} is no pair of LoRA matrices of a weight of the base: the adapter is "
            "damaged, or was trained on another model"
        )
    rank = peft["r"]
    scale = peft["lora_alpha"] / (rank**0.5 if peft.get("use_rslora") else rank)
    vocab_size, landmark = adapter.config.vocab_size, adapter.config.landmark_token_id

    def change(name: str, weight: Tensor) -> Tensor:
        if name in (INPUT_ROWS, OUTPUT_ROWS):
            if is_vanilla:
                row = mean_of_other_rows(weight, landmark)
                weight = torch.cat([weight, row.expand(vocab_size - len(weight), -1)])
                weight[landmark] = row
            if name == INPUT_ROWS:
                weight[landmark] = weights.get_tensor(LANDMARK_ROW)[0].to(weight.dtype)
        if name in targets:
            module = PREFIX + name.removesuffix(".weight")
            a, b = (weights.get_tensor(f"{module}.lora_{x}.weight").float() for x in "AB")
            weight = weight.float().addmm_(b, a, alpha=scale).to(weight.dtype)
        return weight

    return change


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.merge", description="Folds an adapter into its base.")
    parser.add_argument("adapter", help="the adapter: a folder or a hub id")
    parser.add_argument("output", help="the folder for the whole model; must not exist, or be empty")
    parser.add_argument("--base", help="what the adapter was trained on, if it has moved: a folder or a hub id")
    parser.add_argument("--max_shard_size", default="2GB", help="of the files of weights (default: 2GB)")
    args = parser.parse_args(argv)
    try:
        merge_adapter(args.adapter, args.output, args.base, args.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the merged model is in {args.output}")


if __name__ == "__main__":
    main()
