"""The output folder: what it may hold at the start, which checkpoints are complete, when a run counts as finished.

A checkpoint counts once `complete.json` stands in it, written after everything else has reached the disk; only then are
older ones deleted. A run counts as finished once `metrics.json` is there, the last file written. A run that was
killed at any moment, or whose disk filled, goes on from the last complete checkpoint.
"""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.arguments import AdapterArguments, DataArguments, ModelArguments, RunArguments, UserError

COMPLETE, SETTINGS, METRICS = "complete.json", "run.json", "metrics.json"
# What a run writes beside its checkpoints; `--overwrite_output_dir` deletes these and nothing else.
RUN_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "training_args.bin", "*.partial",
    "adapter_config.json", "adapter_model.safetensors", "landmark_adapter.json", METRICS, SETTINGS,
)  # fmt: skip
# The training settings that decide what a run computes: a run goes on with the ones that it started with.
RESULT_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip
LOCATION_SETTINGS = ("corpus_folder", "preprocessing_workers")


def write_json(path: Path, content: dict) -> None:
    """Writes `content` so that `path` holds either the old or the new text, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def checkpoints(output_dir: Path, complete: bool = True) -> list[Path]:
    """The complete (or the incomplete) checkpoints in `output_dir`, the oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    found = [path for path in found if (path / COMPLETE).is_file() == complete]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all of it is on the disk, and only then deletes the oldest, beyond the last `keep`.

    The Trainer's own `save_total_limit` deletes before the mark can be set, so the limit is given here instead.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        # Other processes write their own random state into the same folder.
        if args.world_size > 1:
            import torch

            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        output_dir = Path(args.output_dir)
        checkpoint = output_dir / f"checkpoint-{state.global_step}"
        for path in checkpoint.rglob("*"):
            if path.is_file():
                _flush_to_disk(path)
        write_json(checkpoint / COMPLETE, {"step": state.global_step})
        for old in checkpoints(output_dir)[: -self.keep] if self.keep else []:
            delete_checkpoint(old)


def delete_checkpoint(checkpoint: Path) -> None:
    """Deletes the mark first: what an interruption leaves is then no complete checkpoint."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def save_finished_model(trainer: Trainer, output_dir: Path) -> None:
    """Saves model and tokenizer so that no half-written file ever stands under a final name."""
    staging = output_dir / "model.partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in staging.iterdir():
            _flush_to_disk(path)
            os.replace(path, output_dir / path.name)
        staging.rmdir()


def prepare_output(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, adapter_args: AdapterArguments
) -> str | None:
    """Makes the output folder ready and returns the checkpoint to go on from, or None for a fresh start.

    Raises:
        UserError: the folder cannot be written, or holds a run that this one may neither continue nor replace.
    """
    output_dir = Path(run_args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if run_args.process_index == 0:
            _claim(output_dir, model_args, data_args, run_args, adapter_args)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--output_dir {output_dir}: {error.strerror or error}") from error
    return _resume_point(output_dir, run_args.resume_from_checkpoint)


def _claim(
    output_dir: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    adapter_args: AdapterArguments,
) -> None:
    """Refuses, clears or continues what `output_dir` holds, and records this run's settings there."""
    settings = run_settings(model_args, data_args, run_args, adapter_args)
    sources = [Path(name).resolve() for name in (model_args.model_name_or_path, model_args.tokenizer_name) if name]
    if output_dir.resolve() in sources:
        raise UserError(f"--output_dir {output_dir}: is what the run starts from; give another folder")
    holds_model = any((output_dir / name).exists() for name in ("config.json", METRICS, SETTINGS))
    if run_args.overwrite_output_dir:
        if run_args.resume_from_checkpoint:
            raise UserError("--overwrite_output_dir and --resume_from_checkpoint contradict each other")
        _clear(output_dir)
    elif holds_model and not run_args.resume_from_checkpoint:
        if (output_dir / METRICS).exists() or not (output_dir / SETTINGS).exists():
            raise UserError(
                f"--output_dir {output_dir}: already holds a finished model; give another folder, "
                "--overwrite_output_dir or --resume_from_checkpoint"
            )
        _check_same_settings(output_dir, settings)
    for incomplete in checkpoints(output_dir, complete=False):
        print(f"{incomplete} was not saved completely: deleting it")
        delete_checkpoint(incomplete)
    (output_dir / METRICS).unlink(missing_ok=True)
    write_json(output_dir / SETTINGS, settings)


def run_settings(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, adapter_args: AdapterArguments
) -> dict:
    """Everything that decides what the run computes, as JSON values."""
    training = run_args.to_dict()
    settings = {
        **dataclasses.asdict(model_args),
        **dataclasses.asdict(data_args),
        # a run of all weights has none of the others
        **(dataclasses.asdict(adapter_args) if adapter_args.lora_rank else {"lora_rank": None}),
        **{name: training[name] for name in RESULT_SETTINGS},
        "processes": run_args.world_size,
    }
    settings = {name: value for name, value in settings.items() if name not in LOCATION_SETTINGS}
    return json.loads(json.dumps(settings, default=str))


def _check_same_settings(output_dir: Path, settings: dict) -> None:
    try:
        before = json.loads((output_dir / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{output_dir / SETTINGS} is not JSON; start afresh with --overwrite_output_dir") from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"--output_dir {output_dir}: holds an unfinished run with {name}={before.get(name)}, not {settings[name]}; "
            "use the same settings to go on with it, or --overwrite_output_dir to drop it"
        )


def _clear(output_dir: Path) -> None:
    for path in [*checkpoints(output_dir), *checkpoints(output_dir, complete=False)]:
        delete_checkpoint(path)
    for path in (path for pattern in RUN_FILES for path in list(output_dir.glob(pattern))):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _resume_point(output_dir: Path, asked: str | None) -> str | None:
    if asked and asked.lower() not in ("true", "last"):
        if not (Path(asked) / COMPLETE).is_file():
            raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint (it holds no {COMPLETE})")
        return asked
    complete = checkpoints(output_dir)
    if asked and not complete:
        raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint in {output_dir}")
    return str(complete[-1]) if complete else None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind `error`; safetensors and torch wrap the operating system's own error."""
    # "unexpected pos" is what torch.save says when a write came out shorter than asked for.
    signs = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos ")
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(output_dir: Path) -> str:
    """One sentence: what happened, what survived, what to do."""
    complete = checkpoints(output_dir)
    kept = f"{complete[-1]} is complete" if complete else "no checkpoint had been saved"
    return f"the disk is full; {kept}: make room and start the same command again to go on from there"


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
