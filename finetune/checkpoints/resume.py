"""What a run may go on from: a checkpoint of the same run, whose files are whole.

`run.json` in a run's folder says what its checkpoints were trained on: the settings, and what was found under the
names in them (the tokenizer, the data files, the model's weights). `complete.json` in a checkpoint lists its files.
No pickle runs: weights are safetensors, the optimiser's state is read with `weights_only=True`, shards as said below.
"""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import safe_globals

from finetune.arguments import AdapterArguments, DataArguments, ModelArguments, RunArguments, UserError
from finetune.data.prepare import Rows
from finetune.data.tokens import tokenizer_state

COMPLETE, SETTINGS = "complete.json", "run.json"
# The training settings that decide what a run computes: a run goes on with the ones that it started with.
RESULT_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "optim", "optim_args", "optim_target_modules", "neftune_noise_alpha", "seed",
    "data_seed", "bf16", "fp16",
)  # fmt: skip
# What decides where and how fast, and `skip_bad_rows`: rows before a bad one are the same with and without it.
FREE_SETTINGS = ("corpus_folder", "preprocessing_workers", "skip_bad_rows", "kernels")
# What may change where `--resume_from_checkpoint` asks for it: how long, and how a step's rows are shared out.
LENGTH_SETTINGS = ("max_steps", "num_train_epochs")
BATCH_SETTINGS = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
SHARDS = ".metadata"  # of each folder of shards that FSDP saves
SHARD_MODULES = (
    "torch", "torch.serialization", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
    "pathlib", "pathlib._local",
)  # fmt: skip
ROWS = "plain"  # since rows hold no landmarks; their fingerprint has changed then, the training has not
SAMPLED = 64  # values of each weight that its fingerprint is made of


def run_settings(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, adapter_args: AdapterArguments
) -> dict:
    """Every setting that decides what the run computes, as JSON values."""
    training = run_args.to_dict()
    data = dataclasses.asdict(data_args)
    demo = data.pop("demo")
    settings = {
        **dataclasses.asdict(model_args),
        **data,
        **(demo if data_args.data == ["embedded"] else {}),
        # a run of all weights has none of the others
        **(dataclasses.asdict(adapter_args) if adapter_args.lora_rank else {"lora_rank": None}),
        **{name: training[name] for name in RESULT_SETTINGS},
        "processes": run_args.world_size,
    }
    if data_args.streaming:
        settings["dataloader_num_workers"] = run_args.dataloader_num_workers  # they share the files out
    settings = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return json.loads(json.dumps(settings, default=str))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A name for the weights, from a few values of each: training changes them all."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def run_contents(model: PreTrainedModel, weights: str, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> dict:
    """What stands behind the names in the settings, as JSON values: what is changed in a file shows here alone.

    Args:
        weights: `weights_fingerprint` of what the run started from, before any adapter.
    """
    return {
        "landmark token": getattr(model.config, "landmark_token_id", None),
        "positions of a block": getattr(model.config, "block_size", None),
        "tokenizer's content": tokenizer_state(tokenizer),
        "base model's weights": weights,
        "data files": rows.files,
        "data_fingerprint": rows.fingerprint,
        "rows": ROWS,
    }


def refuse_another_run(checkpoint: Path, now: dict, asked: str | None) -> None:
    """Raises `UserError` if what stands in `now` was something else in the run that `checkpoint` is of.

    Args:
        asked: the value of `--resume_from_checkpoint`, if that is why the run goes on.
    """
    file = checkpoint.parent / SETTINGS
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read, and alone says what {checkpoint.name} was trained on: copy it from the run's "
            "folder, or start afresh with --overwrite_output_dir"
        ) from error
    if "rows" not in before:  # written when rows still held landmarks: `data files` and the settings have to do
        now = {name: value for name, value in now.items() if name not in ("rows", "data_fingerprint")}
    if asked:
        before, now = _without_free(before), _without_free(now)
    changed = [f"{name}={before.get(name)}, not {value}" for name, value in now.items() if before.get(name) != value]
    if changed and asked:
        raise UserError(
            f"--resume_from_checkpoint {asked}: {checkpoint} is of a run with {'; '.join(changed)}: only "
            f"{', '.join(LENGTH_SETTINGS)} and how the rows of a step are shared out may change"
        )
    if changed:
        raise UserError(
            f"--output_dir {checkpoint.parent}: holds an unfinished run with {'; '.join(changed)}; use the same to go "
            "on with it, or --overwrite_output_dir to drop it"
        )


def _without_free(settings: dict) -> dict:
    """What must be the same even where it was asked to go on."""
    if not all(name in settings for name in BATCH_SETTINGS):
        return settings
    rows = 1
    for name in BATCH_SETTINGS:
        rows *= settings[name]
    rest = {name: value for name, value in settings.items() if name not in (*LENGTH_SETTINGS, *BATCH_SETTINGS)}
    return rest | {"rows of a step": rows}


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each file but `complete.json`, by its path in the checkpoint."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / COMPLETE]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def refuse_damage(checkpoint: Path) -> None:
    """Raises `UserError` that names a file of `checkpoint` which is missing, broken off, or not of its kind."""
    found = file_sizes(checkpoint)
    try:
        complete = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(checkpoint, COMPLETE, "not JSON") from error
    for name, size in complete.get("files", {}).items():
        if name not in found:
            raise _damaged(checkpoint, name, "missing")
        if found[name] != size:
            raise _damaged(checkpoint, name, f"{found[name]:,} bytes in place of {size:,}")
    for name in sorted(found):
        try:
            _read(checkpoint / name)
        except Exception as error:  # readers raise many kinds, none of which is worth a traceback
            raise _damaged(checkpoint, name, str(error).strip().partition("\n")[0]) from error


def _read(path: Path) -> None:
    """Reads what says how a file is laid out; tensors stay on the disk."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):
        with safe_globals():
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.name == SHARDS:
        with path.open("rb") as file:
            _ShardsUnpickler(file).load()


class _ShardsUnpickler(pickle.Unpickler):
    """Reads which tensors stand where in a sharded checkpoint, a pickle; makes torch's own values and calls no more.

    torch itself would call whatever such a file asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in SHARD_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, (type, torch.dtype)) or name == "_get_layout":
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _damaged(checkpoint: Path, name: str, what: str) -> UserError:
    return UserError(
        f"{checkpoint / name}: is damaged ({what}); delete {checkpoint}, and the same command goes on from the "
        "checkpoint before it"
    )
