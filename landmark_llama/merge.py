"""Folds an adapter into its base: a whole landmark checkpoint, with its tokenizer.

    python -m landmark_llama.merge ADAPTER OUT
    python -m landmark_llama.merge ADAPTER OUT --base meta-llama/Llama-2-7b-hf --max_shard_size 4GB

The base is read tensor by tensor from its safetensors files, the adapter's change is added in fp32 and rounded once to
the base's own dtype, and shards are written one after another: memory holds a shard (twice while it is written) and a
few copies of the largest tensor, never the model. Needs no peft.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from landmark_llama.adapters import ADAPTER_WEIGHTS, LANDMARK_ROW, Adapter
from landmark_llama.configuration import LandmarkLlamaConfig
from landmark_llama.conversion import mean_of_other_rows

INPUT_ROWS, OUTPUT_ROWS = "model.embed_tokens.weight", "lm_head.weight"
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
        OSError: a file is missing or damaged, or the base has no safetensors files.
        ValueError: the adapter does not belong to the base, or is of a kind that cannot be merged here; or `output` is
            not empty.
    """
    adapter = Adapter.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(adapter.folder)
    adapter.check_tokenizer(tokenizer)
    output, base = Path(output), base or adapter.base
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is not empty; give a folder that does not exist yet")
    files = _base_files(base)
    base_config = _full_precision_config(base, files)
    adapter.check_base(base_config, base)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    is_vanilla = not isinstance(base_config, LandmarkLlamaConfig)
    dtype = _write_weights(adapter, is_vanilla, files, staging, max_shard_size)
    tokenizer.save_pretrained(staging)
    generation = files[0].parent / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, staging / generation.name)
    config = adapter.config
    config.architectures, config.dtype, config.use_cache = ["LandmarkLlamaForCausalLM"], dtype, True
    config.save_pretrained(staging)
    if output.exists():
        output.rmdir()
    os.replace(staging, output)


def _base_files(base: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a checkpoint, local or from the hub."""
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(base), allow_patterns=["*.json", "*.safetensors"]))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise OSError(f"{base}: holds no {file.name}; merging reads checkpoints of safetensors files")
    return files


def _full_precision_config(base: str | os.PathLike[str], files: list[Path]) -> LlamaConfig:
    config = AutoConfig.from_pretrained(files[0].parent)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: a quantised checkpoint; give --base the one in full precision that it was made from")
    return config


def _write_weights(
    adapter: Adapter, is_vanilla: bool, files: list[Path], staging: Path, max_shard_size: int | str
) -> torch.dtype:
    """Writes the shards and their index; returns the dtype of the embedding."""
    sources, planned = _plan(adapter, files)
    shards = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as weights:
        change = _changes(adapter, is_vanilla, weights, set(planned))
        for file_name, names in shards.filename_to_tensors.items():
            shard = {}
            for name in names:
                with _opened(sources[name]) as file:
                    shard[name] = change(name, file.get_tensor(name)).contiguous()
            save_file(shard, staging / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return planned[INPUT_ROWS].dtype


def _plan(adapter: Adapter, files: list[Path]) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Which file holds each tensor, and a tensor without memory of the shape and dtype that it will have."""
    sources, planned = {}, {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold what follows from the configuration
                    continue
                if name == OUTPUT_ROWS and adapter.config.tie_word_embeddings:
                    continue
                sources[name] = path
                part = file.get_slice(name)
                rows, *rest = part.get_shape()
                if name in (INPUT_ROWS, OUTPUT_ROWS):
                    rows = adapter.config.vocab_size
                dtype = part[:1].dtype
                planned[name] = torch.empty(rows, *rest, dtype=dtype, device="meta")
    if INPUT_ROWS not in planned:
        raise OSError(f"{files[0].parent}: its safetensors files hold no {INPUT_ROWS}: not the weights of a LLaMA")
    return sources, planned


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


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise OSError(f"{path}: truncated or damaged ({error}); fetch or save the checkpoint again") from error


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
