"""The output folder: what it may hold at the start, which checkpoints are complete, when a run counts as finished.

A checkpoint counts once `complete.json` stands in it, written after everything else has reached the disk; only then are
older ones deleted. A run counts as finished once `metrics.json` is there, the last file written. A run that was
killed at any moment, or whose disk filled, goes on from the last complete checkpoint.
"""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.arguments import RunArguments, UserError
from finetune.checkpoints.resume import COMPLETE, SETTINGS, file_sizes, refuse_another_run, refuse_damage
from finetune.disk import flush_to_disk, is_disk_full, write_json
from landmark_llama.hub import LOADER
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.model_card import CARD, is_own_card, model_card, write_card

METRICS = "metrics.json"
QUALITIES = ("perplexity", "landmark_divergence")  # of held-out rows; metrics hold the one that was trained for
# What a run writes beside its checkpoints; `--overwrite_output_dir` deletes these and nothing else.
RUN_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "training_args.bin", "*.partial", LOADER,
    "adapter_config.json", "adapter_model.safetensors", "landmark_adapter.json", METRICS, SETTINGS,
)  # fmt: skip


def checkpoints(output_dir: Path, complete: bool = True) -> list[Path]:
    """The complete (or the incomplete) checkpoints in `output_dir`, the oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    found = [path for path in found if (path / COMPLETE).is_file() == complete]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all of it is on the disk, and only then deletes the oldest, beyond the last `keep`.

    The best one stays, where `load_best_model_at_end` will ask for it. The Trainer's own `save_total_limit` deletes
    before the mark can be set, so the limit is given here instead.
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
                flush_to_disk(path)
        write_json(checkpoint / COMPLETE, {"step": state.global_step, "files": file_sizes(checkpoint)})
        best = Path(state.best_model_checkpoint or "").name if args.load_best_model_at_end else None
        for old in checkpoints(output_dir)[: -self.keep] if self.keep else []:
            if old.name != best:
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
        (staging / CARD).unlink(missing_ok=True)  # `write_run_card` knows more, and a README may be somebody's own
        for path in staging.iterdir():
            flush_to_disk(path)
            os.replace(path, output_dir / path.name)
        staging.rmdir()


def held_out(metrics: dict) -> dict[str, str]:
    """What the run reached on held-out rows, as words and number."""
    return {f"held-out {name.replace('_', ' ')}": f"{metrics[name]:.4f}" for name in QUALITIES if name in metrics}


def write_run_card(output_dir: Path, model: PreTrainedModel, base: str | None, data: list[str], metrics: dict) -> None:
    """The card of a whole landmark model: what it was made from, trained on, and what came out."""
    if isinstance(model, LandmarkForCausalLM):
        results = {
            **held_out(metrics),
            "steps": metrics["steps"],
            "parameters": f"{metrics['parameters']:,}",
        }
        write_card(output_dir, model_card(model.config, base=base, data=data, results=results))


def prepare_output(settings: dict, run_args: RunArguments, sources: list[str]) -> str | None:
    """Makes the output folder ready and returns the checkpoint to go on from, or None for a fresh start.

    Args:
        settings: `run_settings` of this run.
        sources: folders that the run starts from, which it must not write to.

    Raises:
        UserError: the folder cannot be written, or holds a run that this one may neither continue nor replace; the
            checkpoint to go on from is damaged or of a run with other settings.
    """
    output_dir = Path(run_args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if run_args.process_index == 0:
            _claim(output_dir, run_args, sources)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--output_dir {output_dir}: {error.strerror or error}") from error
    checkpoint = _resume_point(output_dir, run_args.resume_from_checkpoint)
    if checkpoint and run_args.process_index == 0:
        refuse_another_run(Path(checkpoint), settings, run_args.resume_from_checkpoint)
        refuse_damage(Path(checkpoint))
    return checkpoint


def record_run(settings: dict, contents: dict, run_args: RunArguments, checkpoint: str | None) -> None:
    """Writes down what this run is made of, once it is known that it may go on from `checkpoint`.

    Raises:
        UserError: the checkpoint was trained on something else.
    """
    if run_args.process_index == 0:
        if checkpoint:
            refuse_another_run(Path(checkpoint), contents, run_args.resume_from_checkpoint)
        output_dir = Path(run_args.output_dir)
        (output_dir / METRICS).unlink(missing_ok=True)
        write_json(output_dir / SETTINGS, settings | contents)


def _claim(output_dir: Path, run_args: RunArguments, sources: list[str]) -> None:
    """Refuses or clears what `output_dir` holds, where it is not to be continued."""
    if output_dir.resolve() in [Path(name).resolve() for name in sources]:
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
    for incomplete in checkpoints(output_dir, complete=False):
        print(f"{incomplete} was not saved completely: deleting it", flush=True)
        delete_checkpoint(incomplete)


def _clear(output_dir: Path) -> None:
    for path in [*checkpoints(output_dir), *checkpoints(output_dir, complete=False)]:
        delete_checkpoint(path)
    for path in (path for pattern in RUN_FILES for path in list(output_dir.glob(pattern))):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if is_own_card(output_dir / CARD):
        (output_dir / CARD).unlink()


def _resume_point(output_dir: Path, asked: str | None) -> str | None:
    if asked and asked.lower() not in ("true", "last"):
        if not (Path(asked) / COMPLETE).is_file():
            raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint (it holds no {COMPLETE})")
        return asked
    complete = checkpoints(output_dir)
    if asked and not complete:
        raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint in {output_dir}")
    return str(complete[-1]) if complete else None


def disk_full_message(output_dir: Path) -> str:
    """One sentence: what happened, what survived, what to do."""
    complete = checkpoints(output_dir)
    kept = f"{complete[-1]} is complete" if complete else "no checkpoint had been saved"
    return f"the disk is full; {kept}: make room and start the same command again to go on from there"
