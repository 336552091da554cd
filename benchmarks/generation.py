"""Reading a prompt and generating from it: the landmark model beside transformers' dense LLaMA with SDPA.

    python benchmarks/generation.py
    python benchmarks/generation.py --lengths 2048 8192 --granularity head --repetitions 5
    python benchmarks/generation.py --model DIR --device cuda --dtype bfloat16 --output FILE
    python benchmarks/generation.py --against package.module:function

Measures, for each prompt length, the seconds to read the prompt, the milliseconds per generated token, and the peak
memory. Each measurement runs in a process of its own, and the implementations take turns. Rows go to `--output`,
failures to a file beside it. `python benchmarks/table.py FILE` makes a Markdown table of them.

`--against` measures another model in the same run. The function receives the landmark model's configuration, which
includes LLaMA's fields. It returns a causal language model with transformers' interface. Its results are not checked.
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The repository root replaces this folder on the path. So the script runs from anywhere, and transformers does not take
# the kernels.py here for the package `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.checks import check_attention, check_reading
from benchmarks.measure import (
    MeasurementFailed,
    PeakMemory,
    ResultsFile,
    Stopwatch,
    exit_with,
    imported,
    isolated,
    machine,
    statistics_of,
    versions,
)
from benchmarks.models import (
    AGAINST,
    DENSE,
    LANDMARK,
    ModelArguments,
    landmark_config,
    load_model,
    random_text,
    shape_of,
)
from landmark_llama import LandmarkCache, LandmarkLlamaConfig

CHECKED_LAYERS = 4  # random layers are all alike, and many large ones do not fit twice in float64
QUANTITIES = ("prefill_seconds", "decode_ms_per_token", "peak_memory_mib")


@dataclass
class Arguments:
    """What is measured, and how often."""

    lengths: list[int] = field(
        default_factory=lambda: [2048, 8192, 32768, 131072], metadata={"help": "Prompt lengths in ordinary tokens."}
    )
    granularity: list[str] = field(
        default_factory=lambda: ["head", "token_and_head"],
        metadata={"help": "Settings of retrieval_granularity to measure."},
    )
    decode_tokens: int = field(
        default=32, metadata={"help": "Tokens generated after the prompt; 16 or more, to hold the end of a block."}
    )
    repetitions: int = field(default=3, metadata={"help": "Processes per implementation and length."})
    dense: bool = field(default=True, metadata={"help": "Whether to measure the dense model, too."})
    against: str = field(default="", metadata={"help": "Another model to measure, as module:function."})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "Whether the landmark model replays its decoding steps as CUDA graphs."}
    )
    slow_seconds: float = field(default=60.0, metadata={"help": "A prompt that takes longer is read only once."})
    warmup_tokens: int = field(
        default=0,
        metadata={"help": "Tokens read before the clock starts; 0: 1024 on a CPU, the whole prompt on a GPU."},
    )
    output: str = field(
        default=str(Path(__file__).parent / "results" / "generation.jsonl"),
        metadata={"help": "File that rows are added to."},
    )

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < 1:
                raise ValueError(f"--lengths {length}: a prompt has at least one token")
        if self.decode_tokens < 16:
            raise ValueError(f"--decode_tokens {self.decode_tokens}: a median needs at least 16")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: must be at least 1")
        self.lengths = sorted(set(self.lengths))
        if self.against:
            imported(self.against)


def measure(
    args: ModelArguments,
    config: LandmarkLlamaConfig,
    implementation: str,
    length: int,
    decode_tokens: int,
    warmup: int,
    against: str = "",
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """One measurement, in this process: reads `length` tokens, then generates `decode_tokens` greedily.

    Args:
        implementation: `DENSE`, `AGAINST`, or a name that begins with `LANDMARK`.
        against: the function that makes the `AGAINST` model, as module:function.
        cuda_graphs: whether the landmark model replays its decoding steps.

    Returns:
        The `QUANTITIES`, and `decode_ms`, the milliseconds of each generated token.
    """
    if implementation == AGAINST:
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = imported(against)(config).to(args.device, args.torch_dtype).eval()
    else:
        model = load_model(args, config, implementation)
    text = random_text(args, config, length)
    landmark = config.landmark_token_id
    recorded = cuda_graphs and implementation.startswith(LANDMARK)
    # PyTorch loads parts of itself on first use: that memory must not count as the model's
    _read_and_generate(model, text[:, :32], 4, landmark, recorded)
    memory = PeakMemory(args.device)
    warmup = warmup or (length if torch.device(args.device).type == "cuda" else 1024)
    _read_and_generate(model, text[:, :warmup], 4, landmark, recorded)
    seconds, steps = _read_and_generate(model, text, decode_tokens, landmark, recorded)
    milliseconds = [step * 1000 for step in steps]
    measured = (seconds, statistics.median(milliseconds), memory.mib())
    return {**dict(zip(QUANTITIES, measured, strict=True)), "decode_ms": milliseconds}


@torch.inference_mode()
def _read_and_generate(
    model: PreTrainedModel, text: torch.Tensor, new_tokens: int, landmark_token_id: int, cuda_graphs: bool
) -> tuple[float, list[float]]:
    """Seconds to read `text` (1, length) in one call, and seconds of each of the `new_tokens` decoding steps."""
    cache = LandmarkCache(model.config, cuda_graphs=True) if cuda_graphs else None
    watch, steps = Stopwatch(str(text.device)), []
    outputs = model(text, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = _greedy(outputs.logits, landmark_token_id)
    prefill = watch.lap()
    for _ in range(new_tokens):
        outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
        token = _greedy(outputs.logits, landmark_token_id)
        steps.append(watch.lap())
    if not outputs.logits.isfinite().all():
        raise ValueError(f"the logits after {text.shape[1]} + {new_tokens} tokens are not all finite")
    return prefill, steps


def _greedy(logits: torch.Tensor, landmark_token_id: int) -> torch.Tensor:
    """The most likely next token (1, 1) that is not the landmark."""
    logits = logits[:, -1].index_fill(-1, torch.tensor(landmark_token_id, device=logits.device), -torch.inf)
    return logits.argmax(-1, keepdim=True)


class GenerationBenchmark:
    """The whole run: checks each implementation, then measures them at every length."""

    def __init__(self, model: ModelArguments, args: Arguments) -> None:
        self.model, self.args = model, args
        configs = {f"{LANDMARK} {name}": landmark_config(model, name) for name in args.granularity}
        any_of_them = next(iter(configs.values()))
        self.configs = {DENSE: any_of_them, **configs} if args.dense else configs
        if args.against:
            self.configs[AGAINST] = any_of_them
        common = {
            "benchmark": "generation",
            "model": Path(model.model).name if model.model else "random weights",
            "shape": shape_of(any_of_them),
            "dtype": model.dtype,
            "cuda_graphs": args.cuda_graphs,
            "machine": machine(model.device, model.threads),
            "versions": versions(),
        }
        self.results = ResultsFile(Path(args.output), common)

    def run(self) -> None:
        """Measures everything. Shows a progress bar and, after each length, its figures on standard error."""
        rounds = len(self.args.lengths) * self.args.repetitions * len(self.configs)
        with tqdm(total=rounds, unit="run", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
            right = [name for name in self.configs if not name.startswith(LANDMARK) or self._is_right(name)]
            bar.total = len(self.args.lengths) * self.args.repetitions * len(right)
            for length in self.args.lengths:
                self._measure_length(length, right, bar)

    def _is_right(self, implementation: str) -> bool:
        config = copy.deepcopy(self.configs[implementation])
        if self.model.model is None:
            config.num_hidden_layers = min(config.num_hidden_layers, CHECKED_LAYERS)
        try:
            for check in (check_attention, check_reading):
                problem = isolated(check, self.model, config, threads=self.model.threads)
                if problem:
                    raise MeasurementFailed(f"not measured, its result is wrong: {problem}")
        except MeasurementFailed as error:
            self._fail(implementation, None, error)
            return False
        return True

    def _measure_length(self, length: int, implementations: list[str], bar: tqdm) -> None:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in implementations}
        failed: set[str] = set()
        for repetition in range(self.args.repetitions):
            # alternating order, so that no implementation always runs after the same one
            for name in implementations if repetition % 2 == 0 else implementations[::-1]:
                bar.set_postfix_str(f"{length} tokens, {name}", refresh=sys.stderr.isatty())
                slow = any(one["prefill_seconds"] > self.args.slow_seconds for one in measured[name])
                if name not in failed and not slow:
                    try:
                        measured[name].append(self._measure_once(name, length))
                    except MeasurementFailed as error:
                        failed.add(name)
                        self._fail(name, length, error)
                bar.update()
        for quantity in QUANTITIES:
            dense = measured.get(DENSE, []) if DENSE not in failed else []
            baseline = statistics_of([one[quantity] for one in dense])["median"] if dense else None
            for name in implementations:
                if name not in failed:
                    self._add_row(quantity, name, length, measured[name], baseline)

    def _measure_once(self, name: str, length: int) -> dict[str, Any]:
        args = self.args
        counts = (length, args.decode_tokens, args.warmup_tokens)
        what = (self.model, self.configs[name], name, *counts, args.against, args.cuda_graphs)
        return isolated(measure, *what, threads=self.model.threads)

    def _add_row(
        self, quantity: str, name: str, length: int, measured: list[dict[str, Any]], baseline: float | None
    ) -> None:
        figures = statistics_of([one[quantity] for one in measured])
        row = {"quantity": quantity, "implementation": name, "length": length, **figures}
        row["ratio_to_dense"] = round(figures["median"] / baseline, 4) if baseline else None
        if len(measured) < self.args.repetitions:
            wanted, seconds = self.args.repetitions, self.args.slow_seconds
            row["note"] = f"measured {len(measured)} instead of {wanted} times: reading took over {seconds:g} s"
        if quantity == "decode_ms_per_token":
            row["tokens"] = self.args.decode_tokens
            # the median hides two slow steps: the last token of a block comes with a landmark, and the cache may grow
            row["mean"] = round(statistics.mean(x for one in measured for x in one["decode_ms"]), 4)
            row["slowest"] = round(max(x for one in measured for x in one["decode_ms"]), 4)
        self.results.add(row)
        tqdm.write(f"{length:>8} tokens  {name:<24} {quantity:<20} {figures['median']:>10.4g}", file=sys.stderr)

    def _fail(self, implementation: str, length: int | None, error: MeasurementFailed) -> None:
        self.results.add_failure({"implementation": implementation, "length": length}, str(error))
        where = "" if length is None else f" at {length} tokens"
        tqdm.write(f"{implementation}{where}: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if something could not be measured."""
    model, args = HfArgumentParser((ModelArguments, Arguments)).parse_args_into_dataclasses(argv)
    benchmark = GenerationBenchmark(model, args)
    benchmark.run()
    return benchmark.results.report()


if __name__ == "__main__":
    exit_with(main, kept="the rows of finished lengths")
