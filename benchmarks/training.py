"""One training step (forward, backward, optimizer): the landmark model beside transformers' dense LLaMA with SDPA.

    python benchmarks/training.py
    python benchmarks/training.py --train_context_length 512 --batch_sizes 8 16 --repetitions 15
    python benchmarks/training.py --device cuda --dtype bfloat16 --output FILE

Both models train on the same ordinary tokens. With landmarks they fill the landmark model's window; the dense model has
somewhat fewer positions. The models' steps alternate in one process. Rows go to `--output`, failures to a file beside
it. `python benchmarks/table.py FILE` makes a Markdown table of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

# The repository root replaces this folder on the path. So the script runs from anywhere, and transformers does not take
# the kernels.py here for the package `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.checks import check_attention, checked_shape
from benchmarks.measure import (
    MeasurementFailed,
    ResultsFile,
    Stopwatch,
    exit_with,
    isolated,
    machine,
    statistics_of,
    versions,
)
from benchmarks.models import DENSE, LANDMARK, ModelArguments, landmark_config, load_model, random_text, shape_of
from landmark_llama.configuration import LandmarkConfig
from landmark_llama.tokenization import plain_length


@dataclass
class TrainedModelArguments(ModelArguments):
    """Shape of both models. Rows are as long as the window."""

    train_context_length: int = field(default=512, metadata={"help": "Landmarked positions of a window and of a row."})


@dataclass
class Arguments:
    """What is measured, and how often."""

    batch_sizes: list[int] = field(
        default_factory=lambda: [8, 16], metadata={"help": "Batch sizes to measure, in rows."}
    )
    repetitions: int = field(default=15, metadata={"help": "Steps measured per model."})
    warmup_steps: int = field(default=3, metadata={"help": "Steps per model before the clock starts."})
    output: str = field(
        default=str(Path(__file__).parent / "results" / "training.jsonl"),
        metadata={"help": "File that rows are added to."},
    )

    def __post_init__(self) -> None:
        for batch in self.batch_sizes:
            if batch < 1:
                raise ValueError(f"--batch_sizes {batch}: a batch has at least one row")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: must be at least 1")


class Trainee:
    """A model, its optimizer, and the durations of its steps in seconds."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        self.seconds: list[float] = []

    def step(self, text: torch.Tensor) -> torch.Tensor:
        """One training step on `text` (batch, length); returns the loss."""
        loss = self.model(input_ids=text, labels=text, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed_step(self, text: torch.Tensor) -> None:
        """As `step`, and records the time. Raises ValueError if the loss is not finite."""
        watch = Stopwatch(str(text.device))
        loss = self.step(text)
        self.seconds.append(watch.lap())
        if not loss.isfinite():
            raise ValueError(f"the loss of a step is {loss.item()}")


def measure(
    model: ModelArguments, config: LandmarkConfig, tokens: int, batch: int, repetitions: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each model's steps, in this process. Both get the same `batch` rows of `tokens` ordinary tokens."""
    text = random_text(model, config, tokens, batch)
    trainees = {name: Trainee(load_model(model, config, name)) for name in (DENSE, LANDMARK)}
    for _ in range(warmup):
        for trainee in trainees.values():
            trainee.step(text)
    for repetition in range(repetitions):
        order = list(trainees.values())
        for trainee in order if repetition % 2 == 0 else order[::-1]:
            trainee.timed_step(text)
    return {name: trainee.seconds for name, trainee in trainees.items()}


def run(model: ModelArguments, args: Arguments) -> ResultsFile:
    """Checks the attention, then measures every batch size. Raises ValueError if the settings do not fit each other."""
    config = landmark_config(model, "token_and_head")
    length = config.train_context_length
    tokens = plain_length(length, config.block_size)
    common = {
        "benchmark": "training",
        "model": Path(model.model).name if model.model else "random weights",
        "shape": shape_of(config),
        "dtype": model.dtype,
        "machine": machine(model.device, model.threads),
        "versions": versions(),
    }
    results = ResultsFile(Path(args.output), common)
    problem = _problem(model, config)
    for batch in tqdm(args.batch_sizes, unit="batch size", dynamic_ncols=True):
        try:
            if problem:
                raise MeasurementFailed(problem)
            what = (model, config, tokens, batch, args.repetitions, args.warmup_steps)
            seconds = isolated(measure, *what, threads=model.threads)
        except MeasurementFailed as error:
            results.add_failure({"implementation": LANDMARK, "length": length, "batch": batch}, str(error))
            tqdm.write(f"batch {batch}: {error}", file=sys.stderr)
            continue
        _add_rows(results, length, tokens, batch, seconds)
    return results


def _problem(model: ModelArguments, config: LandmarkConfig) -> str | None:
    """None if the attention is right, otherwise the reason why nothing is measured."""
    try:
        problem = isolated(check_attention, *checked_shape(model, config), threads=model.threads)
    except MeasurementFailed as error:
        return str(error)
    return f"not measured, its result is wrong: {problem}" if problem else None


def _add_rows(results: ResultsFile, length: int, tokens: int, batch: int, seconds: dict[str, list[float]]) -> None:
    dense = statistics_of(seconds[DENSE])["median"]
    for name, values in seconds.items():
        figures = statistics_of(values)
        results.add(
            {
                "quantity": "step_seconds",
                "implementation": name,
                "length": length,
                "ordinary_tokens": tokens,
                "batch": batch,
                **figures,
                "ratio_to_dense": round(figures["median"] / dense, 4),
            }
        )
        tqdm.write(f"batch {batch:>3}  {name:<10} {figures['median']:.4g} s a step", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if something could not be measured."""
    model, args = HfArgumentParser((TrainedModelArguments, Arguments)).parse_args_into_dataclasses(argv)
    results = run(model, args)
    return results.report()


if __name__ == "__main__":
    exit_with(main, kept="the rows of finished batch sizes")
