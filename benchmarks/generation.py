"""Reading a prompt and generating from it: the landmark model beside transformers' dense LLaMA with SDPA.

    python benchmarks/generation.py
    python benchmarks/generation.py --lengths 2048 8192 --granularity head --repetitions 5
    python benchmarks/generation.py --batch_size 8 --lengths 2048 8192
    python benchmarks/generation.py --model DIR --device cuda --dtype bfloat16 --output FILE
    python benchmarks/generation.py --against package.module:function

Measures, for each prompt length, the seconds to read the prompt, the milliseconds per generated token, and the peak
memory. The dense model generates twice: with transformers' default cache, which is copied at each token, and with its
preallocated `StaticCache`. Each measurement runs in a process of its own, and the implementations take turns. Rows go
to `--output`, failures to a file beside it. `python benchmarks/table.py FILE` makes a Markdown table of them.

`--against` measures another model in the same run. The function receives the landmark model's configuration, which
includes LLaMA's fields. It returns a causal language model with transformers' interface. Its results are not checked.
"""

from __future__ import annotations

import functools
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
from transformers import Cache, DynamicCache, HfArgumentParser, PreTrainedModel, StaticCache

from benchmarks.checks import check_attention, check_reading, checked_shape
from benchmarks.fitting import longest_fitting, memory_of
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
    DENSE_STATIC,
    LANDMARK,
    ModelArguments,
    landmark_config,
    load_model,
    random_text,
    shape_of,
)
from landmark_llama import LandmarkCache
from landmark_llama.configuration import LandmarkConfig

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
    batch_size: int = field(default=1, metadata={"help": "Rows that are read and generated together."})
    decode_tokens: int = field(
        default=32, metadata={"help": "Tokens generated after the prompt; 16 or more, to hold the end of a block."}
    )
    repetitions: int = field(default=3, metadata={"help": "Processes per implementation and length."})
    dense: bool = field(default=True, metadata={"help": "Whether to measure the dense model, too."})
    against: str = field(default="", metadata={"help": "Another model to measure, as module:function."})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "Whether the landmark model replays its decoding steps as CUDA graphs."}
    )
    fit_memory: bool = field(
        default=False, metadata={"help": "Whether prompts too long for the device's memory are cut to what fits."}
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
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: must be at least 1")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: must be at least 1")
        self.lengths = sorted(set(self.lengths))
        if self.against:
            imported(self.against)


def measure(
    args: ModelArguments,
    config: LandmarkConfig,
    implementation: str,
    length: int,
    batch_size: int,
    decode_tokens: int,
    warmup: int,
    against: str = "",
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """One measurement, in this process: reads `length` tokens a row, then generates `decode_tokens` greedily.

    Args:
        implementation: `DENSE`, `AGAINST`, or a name that begins with `LANDMARK`.
        against: the function that makes the `AGAINST` model, as module:function.
        cuda_graphs: whether the landmark model replays its decoding steps.

    Returns:
        The `QUANTITIES`, and `decode_ms`, the milliseconds of each generated token (of all rows). For `DENSE` also
        `static`, the same of decoding alone with a preallocated cache.

    Raises:
        ValueError: the two caches of the dense model do not give the same logits, or logits are not finite.
    """
    if implementation == AGAINST:
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = imported(against)(config).to(args.device, args.torch_dtype).eval()
    else:
        model = load_model(args, config, implementation)
    text = random_text(args, config, length, batch_size)
    recorded = cuda_graphs and implementation.startswith(LANDMARK)
    run = functools.partial(_read_and_generate, model, config.landmark_token_id, recorded, implementation == DENSE)
    # PyTorch loads parts of itself on first use: that memory must not count as the model's
    run(PeakMemory(args.device), text[:, :32], 4)
    memory = PeakMemory(args.device)
    warmup = warmup or (length if torch.device(args.device).type == "cuda" else 1024)
    run(memory, text[:, :warmup], 4)
    return run(memory, text, decode_tokens)


@torch.inference_mode()
def _read_and_generate(
    model: PreTrainedModel,
    landmark_token_id: int,
    cuda_graphs: bool,
    with_static_cache: bool,
    memory: PeakMemory,
    text: torch.Tensor,
    new_tokens: int,
) -> dict[str, Any]:
    """What `measure` returns, of reading `text` (batch, length) in one call and generating `new_tokens`."""
    cache = LandmarkCache(model.config, cuda_graphs=True) if cuda_graphs else None
    watch = Stopwatch(str(text.device))
    outputs = model(text, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, cache = _greedy(outputs.logits, landmark_token_id), outputs.past_key_values
    prefill = watch.lap()
    decoding, logits = _generate(model, token, cache, new_tokens, landmark_token_id)
    measured = {"prefill_seconds": prefill, **decoding, "peak_memory_mib": memory.mib()}
    if with_static_cache:
        cache.crop(-new_tokens)
        cache = preallocated(cache, model, new_tokens)
        measured["static"], others = _generate(model, token, cache, new_tokens, landmark_token_id)
        error, size = ((x.double().square().mean().sqrt()) for x in (others - logits, logits))
        if not error <= size * torch.finfo(logits.dtype).eps ** 0.5:
            raise ValueError(f"logits with a StaticCache are off by {error:.3g} of {size:.3g}")
    return measured


def preallocated(cache: DynamicCache, model: PreTrainedModel, room: int) -> StaticCache:
    """What `cache` holds, moved into a `StaticCache` with room for as many tokens more.

    So a prompt is read once, as fast as the dense model can: with a `StaticCache` it would need a mask over all of it.
    """
    static = StaticCache(model.config, max_cache_len=cache.get_seq_length() + room)
    for layer_idx, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, layer_idx)
        layer.keys = layer.values = None  # one layer at a time is held twice
    return static


def _generate(
    model: PreTrainedModel, token: torch.Tensor, cache: Cache, new_tokens: int, landmark_token_id: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """The quantity of decoding and `decode_ms`, and the logits (batch, 1, vocab_size) of the first step.

    Later ones follow from greedy choices, in which rounding may decide.
    """
    watch, steps, logits = Stopwatch(str(token.device)), [], []
    for _ in range(new_tokens):
        outputs = model(token, past_key_values=cache, use_cache=True)
        token = _greedy(outputs.logits, landmark_token_id)
        steps.append(watch.lap() * 1000)
        logits.append(outputs.logits)
    if not logits[-1].isfinite().all():
        raise ValueError(f"the logits after {new_tokens} generated tokens are not all finite")
    return {"decode_ms_per_token": statistics.median(steps), "decode_ms": steps}, logits[0]


def _greedy(logits: torch.Tensor, landmark_token_id: int) -> torch.Tensor:
    """The most likely next token of each row, (batch, 1), that is not the landmark."""
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
            "batch": args.batch_size,
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
            for length in self._fitting_lengths() if self.args.fit_memory else self.args.lengths:
                self._measure_length(length, right, bar)

    def _fitting_lengths(self) -> list[int]:
        """The lengths, those too long for the memory cut to what fits."""
        config, memory = next(iter(self.configs.values())), memory_of(self.model.device)
        shape = (config, self.model.torch_dtype, self.args.batch_size, memory)
        lengths = [longest_fitting(length, *shape, dense=self.args.dense) for length in self.args.lengths]
        for length, fitting in zip(self.args.lengths, lengths, strict=True):
            if fitting < length:
                has = f"--lengths {length}: {memory / 2**30:.1f} GiB of memory have room for {fitting} tokens"
                if not fitting:
                    self.results.add_failure({"implementation": None, "length": length}, has)
                tqdm.write(f"{has}, which are measured instead" if fitting else has, file=sys.stderr)
        return sorted(set(lengths) - {0})

    def _is_right(self, implementation: str) -> bool:
        shape = checked_shape(self.model, self.configs[implementation])
        try:
            for check in (check_attention, check_reading):
                problem = isolated(check, *shape, threads=self.model.threads)
                if problem:
                    raise MeasurementFailed(f"not measured, its result is wrong: {problem}")
        except MeasurementFailed as error:
            self._fail(implementation, None, error)
            return False
        return True

    def _measure_length(self, length: int, implementations: list[str], bar: tqdm) -> None:
        """Measures one length. An implementation's rows are written when its last repetition is done."""
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in implementations}
        failed: set[str] = set()
        for left in reversed(range(self.args.repetitions)):
            # alternating order, so that no implementation always runs after the same one; the dense model ends first
            for name in implementations if left % 2 == 0 else implementations[::-1]:
                bar.set_postfix_str(f"{length} tokens, {name}", refresh=sys.stderr.isatty())
                slow = any(one["prefill_seconds"] > self.args.slow_seconds for one in measured[name])
                if name not in failed and not slow:
                    try:
                        measured[name].append(self._measure_once(name, length))
                    except MeasurementFailed as error:
                        failed.add(name)
                        self._fail(name, length, error)
                if not left and name not in failed:
                    self._add_rows(name, length, measured[name], [] if DENSE in failed else measured.get(DENSE, []))
                bar.update()

    def _add_rows(
        self, implementation: str, length: int, measured: list[dict[str, Any]], dense: list[dict[str, Any]]
    ) -> None:
        """Writes what was measured of one implementation. `dense`: what was measured of the dense model."""
        static = [one["static"] for one in dense if "static" in one]
        for quantity in QUANTITIES:
            # what a user would run: the dense model at its fastest
            medians = [
                statistics_of([one[quantity] for one in ones])["median"]
                for ones in (dense, static)
                if ones and quantity in ones[0]
            ]
            baseline = min(medians, default=None)
            self._add_row(quantity, implementation, length, measured, baseline)
            if implementation == DENSE and static and quantity in static[0]:
                self._add_row(quantity, DENSE_STATIC, length, static, baseline)

    def _measure_once(self, name: str, length: int) -> dict[str, Any]:
        args = self.args
        counts = (length, args.batch_size, args.decode_tokens, args.warmup_tokens)
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
            steps = [x for one in measured for x in one["decode_ms"]]
            row["quartiles"] = [round(x, 4) for x in statistics.quantiles(steps, n=4)[::2]]
            row["mean"], row["slowest"] = round(statistics.mean(steps), 4), round(max(steps), 4)
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
