"""The Trainer, with two guards: over steps that are not finite, and over what is saved.

A step whose loss or gradient is not finite changes nothing and is reported: the Trainer itself would write NaN into
every weight, and from there into the next checkpoint. Whatever is saved is looked through for every trained weight.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from finetune.arguments import UserError
from finetune.checkpoints.resume import COMPLETE
from finetune.checkpoints.saved import find_loss, trained_weights
from finetune.context_parallel import ContextParallelTrainer
from finetune.distributed import compute_losses_in_fp32, saves_in_shards
from finetune.segments import SegmentTrainer

NAMED_ROWS = 32  # of a step that is left out; each by so many characters of its beginning:
NAMED_CHARACTERS = 80
SKIPPED = "skipped_steps"


class LandmarkTrainer(Trainer):
    """Leaves out up to `args.max_nan_steps` steps of a run, and stops it at one more; all processes decide alike.

    Such a step still counts as one: its rows are used up, the learning rate goes on. How many there were stands in the
    state's log, so that a run that goes on from a checkpoint knows it. The decision costs one number a step that is
    fetched from the device. Gradients that overflow in fp16 are no such step: they are the loss scaler's business.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._trained = trained_weights(self.model)
        self._batches: list[tuple[Tensor, Tensor]] = []  # of this step: ids (rows, columns), and their loss
        self._steps = self._left_out = 0  # since the last logged loss

    @property
    def skipped_steps(self) -> int:
        """Steps of the whole run that were left out."""
        return max((entry[SKIPPED] for entry in self.state.log_history if SKIPPED in entry), default=0)

    def get_batch_samples(self, *args: Any, **settings: Any) -> tuple[list, Any]:
        """Raises `UserError` where a stream ends, which happens if none of its files is left; a batch may be short."""
        try:
            batches, items = super().get_batch_samples(*args, **settings)
        except ValueError as error:
            if "Batch does not contain any data" not in str(error):  # accelerate's words
                raise
            batches = []
        if not batches and isinstance(self.train_dataset, IterableDataset):
            raise UserError(
                f"--data: no row is left to read at step {self.state.global_step}: put the files back, and the same "
                "command goes on from the last checkpoint"
            )
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any) -> Tensor:
        if not self._batches:
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, *args, **settings)
        self._batches.append((inputs["input_ids"], loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last that the Trainer does before it updates the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._steps += 1
        if self._is_broken(grad_norm):
            self._leave_out(model)
        self._batches.clear()
        return grad_norm

    def _is_broken(self, grad_norm: Any) -> bool:
        """Whether any process has a loss that is not finite, or the gradient, which all share, is not."""
        values = torch.stack([loss.float() for _, loss in self._batches])
        if self.accelerator.scaler is None and grad_norm is not None:
            whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            values = torch.cat([values, torch.as_tensor(whole, dtype=values.dtype, device=values.device).reshape(1)])
        broken = (~values.isfinite()).any().float()
        return bool(reduce(broken, "sum") if self.args.world_size > 1 else broken)

    def _leave_out(self, model: nn.Module) -> None:
        """Takes the step's gradients, so that the optimiser passes over every weight, and its loss; names its rows."""
        model.zero_grad(set_to_none=True)
        self._tr_loss.copy_(self._loss_before)
        self._left_out += 1
        skipped, step = self.skipped_steps + 1, self.state.global_step + 1
        self.state.log_history.append({SKIPPED: skipped, "step": step})
        broken = [batch for batch, loss in self._batches if not loss.isfinite()]
        rows = gather_object([self._beginning(ids) for batch in broken for ids in batch])
        what = "loss" if rows else "gradient"
        rows = rows or gather_object([self._beginning(ids) for batch, _ in self._batches for ids in batch])
        limit = self.args.max_nan_steps
        if self.is_world_process_zero():
            more = [f"and {len(rows) - NAMED_ROWS} more"] if len(rows) > NAMED_ROWS else []
            print(
                f"step {step}: the {what} is not finite; the step is left out ({skipped}; --max_nan_steps {limit}). "
                "Its rows begin:",
                *rows[:NAMED_ROWS], *more, sep="\n  ", file=sys.stderr, flush=True,
            )  # fmt: skip
        if skipped > limit:
            raise UserError(
                f"the {what} is not finite at step {step}, in the rows that begin {', '.join(rows[:2])}"
                f"{', ...' if len(rows) > 2 else ''}: look at them, lower --learning_rate or warm up longer; the same "
                f"command with --max_nan_steps {limit + 1} goes on without the step"
            )

    def _beginning(self, ids: Tensor) -> str:
        text = self.processing_class.decode(ids[:NAMED_CHARACTERS], skip_special_tokens=True)
        return json.dumps(" ".join(text.split())[:NAMED_CHARACTERS], ensure_ascii=False)

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """The mean loss is that of the steps that were not left out; there is none if all were."""
        if "loss" in logs:
            taken = self._steps - self._left_out
            if not taken:
                del logs["loss"]
            elif self._left_out:
                logs["loss"] *= self._steps / taken
            self._steps = self._left_out = 0
            if self.skipped_steps:
                logs[SKIPPED] = self.skipped_steps
        super().log(logs, *args, **settings)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        compute_losses_in_fp32(self.accelerator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Without the Trainer's copy of the arguments: a pickle that nothing reads. `run.json` says the same.

        A checkpoint that FSDP saves in shards (`_internal_call`) holds no model; the finished one is put together.

        Raises:
            RuntimeError: in all processes, if a trained weight is not in the saved file.
        """
        folder = Path(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)
        if saves_in_shards(self.accelerator):
            if _internal_call:
                return
            self._save(str(folder), state_dict=self.accelerator.get_state_dict(self.model))
        problem = None
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            problem = find_loss(folder, self._trained)
        problems = [problem for problem in gather_object([problem]) if problem]
        if problems:
            raise RuntimeError(problems[0])

    def take_over(self, checkpoint: Path, state: TrainerState) -> None:
        """Makes of `checkpoint`, the one after the last step, what training would have left: the Trainer would add one.

        Args:
            state: of the checkpoint.
        """
        self.state.global_step, self.state.log_history = state.global_step, state.log_history
        if self.is_fsdp_enabled:  # takes a model and its optimiser, or neither
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(checkpoint.with_name(Path(state.best_model_checkpoint).name))
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _load_best_model(self) -> None:
        """Raises `UserError` where the Trainer would keep the last one: the best is gone."""
        best = Path(self.state.best_model_checkpoint)
        if not (best / COMPLETE).is_file():
            raise UserError(f"--load_best_model_at_end: {best}, the best checkpoint, is gone or not complete")
        super()._load_best_model()


class LandmarkSegmentTrainer(LandmarkTrainer, SegmentTrainer):
    """The same guard around steps over several segments."""


class LandmarkContextTrainer(LandmarkTrainer, ContextParallelTrainer):
    """The same guard around steps over rows that several processes hold together."""
