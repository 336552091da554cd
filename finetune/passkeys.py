"""Pass keys while training: a few prompts at a few lengths every `--eval_passkey_steps`. A loss hides failed retrieval.

The prompts are those of `eval_passkey/`, from seeds that its command does not use: the same at each measurement.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eval_passkey.measure import accuracy, block_tokens
from eval_passkey.prompts import InputError
from eval_passkey.tasks import make_task
from finetune.arguments import RunArguments, UserError
from finetune.distributed import fsdp_settings, is_zero3

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK, FIRST_SEED = "passkey", 1_000_000


class PassKeys(TrainerCallback):
    """Logs `eval_passkey_LENGTH`, the share of right answers, to the run's log and its trackers.

    Processes that hold all weights share the prompts out; where weights are sharded, all of them answer each prompt.
    What is trained does not depend on it: the random state is put back.

    Args:
        trainer: whose model answers; one at a time.
        lengths: tokens of the prompts.

    Raises:
        UserError: a length cannot hold the task.
    """

    def __init__(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, run: RunArguments, lengths: list[int]
    ) -> None:
        self.trainer, self.lengths = trainer, sorted(set(lengths))
        self.every, self.samples = run.eval_passkey_steps, run.eval_passkey_samples
        self.sharded = fsdp_settings(run) is not None or is_zero3(run)
        self.task = make_task(TASK, tokenizer)
        shortest = self.lengths[0] - (block_tokens(trainer.model.config) or 1) + 1  # a prompt is up to a block shorter
        try:
            self.task.prompt(shortest, FIRST_SEED)
        except InputError as error:
            raise UserError(f"--eval_passkey_lengths {self.lengths[0]}: too short ({error})") from error

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            should_log = control.should_log
            self.trainer.log(self.measure())
            control.should_log = should_log  # the step's loss is still to be logged

    def measure(self) -> dict[str, float]:
        """`eval_passkey_LENGTH` of each length; all processes have to call."""
        args = self.trainer.args
        processes, mine = (1, 0) if self.sharded else (args.world_size, args.process_index)
        first, stop = (self.samples * number // processes for number in (mine, mine + 1))
        right = dict.fromkeys(self.lengths, 0.0)
        with same_random_state(args.device):
            if stop > first:
                shares = accuracy(
                    self.trainer.model, self.task.encoder.tokenizer, self.task, self.lengths, stop - first,
                    FIRST_SEED + first,
                )  # fmt: skip
                right = {length: share * (stop - first) for length, share in shares.items()}
        total = torch.tensor(list(right.values()), device=args.device)
        if processes > 1:
            total = reduce(total, "sum")
        return {
            f"eval_passkey_{length}": round(count) / self.samples
            for length, count in zip(right, total.tolist(), strict=True)
        }


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Puts the random states of Python, NumPy and torch back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
