"""Fine-tunes a LLaMA with landmark attention, or a dense one on the same rows.

    accelerate launch finetune/run.py --config finetune/configs/tiny.yaml
    accelerate launch finetune/run.py --config finetune/configs/tiny.yaml --learning_rate 1e-3 --output_dir runs/other
    accelerate launch --config_file finetune/configs/accelerate/fsdp.yaml finetune/run.py --config RECIPE --data FILES
    python finetune/run.py --model_name_or_path DIR --data FOLDER --output_dir runs/mine --resume_from_checkpoint true
    python finetune/run.py --model_name_or_path DIR --data FOLDER --output_dir runs/mine --lora_rank 16

Flags override the file. The output folder gets the model, its configuration, the tokenizer with its landmark token and
`metrics.json`. An interrupted run goes on from its last complete checkpoint when the same command is started again.
`accelerate launch --quiet` leaves out accelerate's own traceback after an error.
"""

import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# bitsandbytes, which the Trainer imports where it is installed, would warn of a package that is no use here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, default_data_collator, set_seed
from transformers.trainer import TRAINER_STATE_NAME

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from any folder
from finetune.adapters import add_adapter
from finetune.arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    UserError,
    parse_arguments,
)
from finetune.checkpoints.output import (
    METRICS,
    CompleteCheckpoints,
    disk_full_message,
    held_out,
    prepare_output,
    record_run,
    save_finished_model,
    write_run_card,
)
from finetune.checkpoints.resume import run_contents, run_settings, weights_fingerprint
from finetune.context_parallel import ContextParallel
from finetune.data.prepare import Rows, make_rows
from finetune.demo.corpus import embedded_files
from finetune.disk import is_disk_full, write_json
from finetune.distributed import check_context_parallel, check_distribution, whole_weights
from finetune.kernel_check import KernelCheck
from finetune.landmarks import LandmarksOnlyTrainer, freeze_all_but_landmarks
from finetune.memory import memory_lines
from finetune.models import load_model, load_tokenizer
from finetune.passkeys import PassKeys
from finetune.processes import main_process_first, refuse_data_parallel
from finetune.progress import ProgressLines
from finetune.refused import refuse_arguments
from finetune.segments import EVALUATED_WITH, Segments
from finetune.throughput import Throughput, device_peak
from finetune.trainer import LandmarkContextTrainer, LandmarkSegmentTrainer, LandmarkTrainer

EXIT_INTERRUPTED = 130


def main(argv: list[str]) -> None:
    model_args, data_args, run_args, adapter_args = parse_arguments(argv)
    try:
        finetune(model_args, data_args, run_args, adapter_args)
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(disk_full_message(Path(run_args.output_dir))) from error


def finetune(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, adapter_args: AdapterArguments
) -> dict:
    """Trains, evaluates and saves; returns what `metrics.json` holds.

    Raises:
        UserError: the model, the data or the output folder cannot be used as asked.
    """
    _set_up_process(run_args)
    refuse_arguments(run_args)
    refuse_data_parallel(run_args)
    check_distribution(run_args, data_args.segments)
    with main_process_first(run_args):
        start = _prepare(model_args, data_args, run_args, adapter_args)
    if run_args.process_index == 0:
        print(*start.describe(run_args), sep="\n", flush=True)
    trainer = _make_trainer(start, run_args)
    if not _had_finished_training(trainer, start.resume_from):
        trainer.train(resume_from_checkpoint=start.resume_from)
    evaluation = trainer.evaluate()
    start.model.config.use_cache = True  # the Trainer turns it off; whoever loads the model wants to generate
    save_finished_model(trainer, Path(run_args.output_dir))
    metrics = _metrics(trainer, evaluation["eval_loss"], start)
    if trainer.is_world_process_zero():
        output_dir = Path(run_args.output_dir)
        write_run_card(output_dir, start.model, model_args.model_name_or_path, data_args.data, metrics)
        write_json(output_dir / METRICS, metrics)
        print(*(f"{name} {value};" for name, value in held_out(metrics).items()), f"the model is in {output_dir}")
    return metrics


@dataclass
class Start:
    """What a run starts with. `landmark_token_id` is None for a dense model, `resume_from` for a new run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    segments: Segments | None
    block_size: int
    landmark_token_id: int | None
    landmarks_only: bool
    resume_from: str | None

    def describe(self, run_args: RunArguments) -> list[str]:
        """Lines: the rows, the model, the memory that it will take."""
        trained = self.model.num_parameters(only_trainable=True)
        lines = [f"{self.rows.describe()}; {self.model.num_parameters():,} parameters, {trained:,} of them trained"]
        positions, tokens = self.rows.packing.context_length, self.rows.row_tokens
        if self.segments is not None:
            positions, tokens = self.segments.positions, self.segments.tokens
            lines.append(self.segments.describe())
            if self.model.config.retrieval_granularity != EVALUATED_WITH:
                lines.append(f"evaluated with retrieval_granularity {EVALUATED_WITH}: other choices may look ahead")
        elif self.landmark_token_id is None:
            positions = tokens
        if not self.landmarks_only:  # which takes little beside the weights
            held_by = run_args.context_parallel_size
            lines += memory_lines(self.model, run_args, -(-positions // held_by), -(-tokens // held_by))
        return [*lines, f"going on from {self.resume_from}"] if self.resume_from else lines


def _prepare(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, adapter_args: AdapterArguments
) -> Start:
    """Claims the output folder, loads model and tokenizer, reads and tokenises the data."""
    settings = run_settings(model_args, data_args, run_args, adapter_args)
    sources = [name for name in (model_args.model_name_or_path, model_args.tokenizer_name) if name]
    resume_from = prepare_output(settings, run_args, sources)
    is_main = run_args.process_index == 0
    embedded = None
    if data_args.data == ["embedded"]:
        embedded = embedded_files(data_args.demo, run_args.output_dir, is_main)
    tokenizer = load_tokenizer(model_args, data_args, embedded)
    with whole_weights(run_args):
        model = load_model(model_args, data_args, tokenizer, adapter_args.load_in_4bit)
    # Process 0 alone compares them, and with FSDP it alone holds them.
    weights = weights_fingerprint(model) if is_main else ""
    if model_args.landmarks_only:
        freeze_all_but_landmarks(model)
    if adapter_args.lora_rank:
        model = add_adapter(model, tokenizer, adapter_args, model_args.model_name_or_path)
    if run_args.context_parallel_size > 1:
        check_context_parallel(model, run_args.context_parallel_size, data_args.context_length)
    block_size, landmark_token_id = model_args.block_size_of(model.config)
    segments = Segments.of(model.config, data_args.segments) if data_args.segments > 1 else None
    rows = make_rows(data_args, tokenizer, block_size, embedded, run_args.seed, segments)
    record_run(settings, run_contents(model, weights, tokenizer, rows), run_args, resume_from)
    return Start(
        model, tokenizer, rows, segments, block_size, landmark_token_id, model_args.landmarks_only, resume_from
    )


def _make_trainer(start: Start, run_args: RunArguments) -> LandmarkTrainer:
    throughput = Throughput(start.block_size, start.landmark_token_id, device_peak(run_args))
    segments = start.segments
    keep, run_args.save_total_limit = run_args.save_total_limit, None
    trainer_class = LandmarkTrainer
    if start.landmarks_only:
        trainer_class = LandmarksOnlyTrainer
    elif segments is not None:
        trainer_class = partial(LandmarkSegmentTrainer, segments=segments)
    elif run_args.context_parallel_size > 1:
        context = ContextParallel.of(run_args.context_parallel_size, start.block_size)
        trainer_class = partial(LandmarkContextTrainer, context=context)
    trainer = trainer_class(
        model=start.model,
        args=run_args,
        train_dataset=start.rows.train,
        eval_dataset=start.rows.heldout,
        data_collator=default_data_collator,
        processing_class=start.tokenizer,
        callbacks=[CompleteCheckpoints(keep)],
    )
    trainer.callback_handler.callbacks.insert(0, throughput)  # first, so that trackers and lines see what it adds
    if start.landmark_token_id is not None:
        trainer.add_callback(KernelCheck(trainer))
    if run_args.eval_passkey_steps:
        context = start.rows.packing.context_length
        lengths = run_args.eval_passkey_lengths or [context, 4 * context]
        trainer.add_callback(PassKeys(trainer, start.tokenizer, run_args, lengths))
    if run_args.disable_tqdm:
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(ProgressLines())
    return trainer


def _had_finished_training(trainer: LandmarkTrainer, checkpoint: str | None) -> bool:
    """Whether `checkpoint` is the one after the last step, in which case it is loaded: the Trainer would add a step."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if trainer.args.max_steps > 0:
        finished = state.global_step >= trainer.args.max_steps
    else:
        finished = state.global_step >= state.max_steps and state.num_train_epochs >= trainer.args.num_train_epochs
    if finished:
        trainer.take_over(Path(checkpoint), state)
    return finished


def _metrics(trainer: LandmarkTrainer, eval_loss: float, start: Start) -> dict:
    rows, model = start.rows, start.model
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "train_loss": losses[-1] if losses else None,
        "eval_loss": eval_loss,
        # Every row has as many ordinary tokens, landmarks or not: dense and landmark perplexities compare.
        **({"landmark_divergence": eval_loss} if start.landmarks_only else {"perplexity": math.exp(eval_loss)}),
        "steps": trainer.state.global_step,
        "train_rows": rows.train_rows,
        "eval_rows": len(rows.heldout),
        "ordinary_tokens_per_row": rows.row_tokens,
        "data_fingerprint": rows.fingerprint,
        # a stream's are counted by the process that reads it: by none of these where workers do
        "bad_rows_skipped": None if rows.train_rows is None and trainer.args.dataloader_num_workers else rows.bad_rows,
        "steps_skipped": trainer.skipped_steps,
        "parameters": model.num_parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _set_up_process(run_args: RunArguments) -> None:
    set_seed(run_args.seed)
    if run_args.device.type == "cpu":
        # `accelerate launch` gives a CPU process one thread; use the cores that there are.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(run_args.cpu_threads or max(1, cores // run_args.world_size))
    if run_args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last complete checkpoint", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
