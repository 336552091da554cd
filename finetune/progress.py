"""Progress of a run as plain lines, for output that goes to a file instead of a terminal."""

import sys
import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PASS_KEY = "eval_passkey_"


class ProgressLines(TrainerCallback):
    """One line each time something is logged: the step, the loss, the time left and the speed."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **_) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            speed = (state.global_step - self.first_step) / (time.monotonic() - self.start)
            minutes, seconds = divmod(round((state.max_steps - state.global_step) / speed), 60)
            line = (
                f"loss {float(logs['loss']):.4f}  rate {float(logs['learning_rate']):.2e}  {minutes}:{seconds:02d} left"
            )
            if "tokens_per_second" in logs:
                line += f"  {float(logs['tokens_per_second']):,.0f} tokens/s"
            if "mfu" in logs:
                line += f"  {float(logs['mfu']):.1%} of the peak"
        elif "eval_loss" in logs:
            line = f"held-out loss {float(logs['eval_loss']):.4f}"
        elif found := [(name, share) for name, share in logs.items() if name.startswith(PASS_KEY)]:
            line = "pass keys  " + "  ".join(f"{name.removeprefix(PASS_KEY)}: {share:.0%}" for name, share in found)
        else:
            return
        print(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr, flush=True)
