"""Memory that outgrows the device: reading, and a question afterwards, by length, tier and budget.

    python benchmarks/memory.py
    python benchmarks/memory.py --lengths 1000000 --tiers file --budgets 128 --dense_lengths 0
    python benchmarks/memory.py --model DIR --text BOOK.txt --lengths 1000000
    python benchmarks/memory.py --lengths 1000000 --tiers file --budgets 128 --dense_lengths 0 --equal_memory true
    python benchmarks/memory.py --lengths 16777216 --tiers file --budgets 128 --dense_lengths 0 --folder FOLDER

Each measurement runs in a process of its own. It reads a text of so many tokens, in calls of `--piece` tokens, then a
question of `--question` tokens, and answers with `--answer` tokens. A row says how long that took, the most memory that
the process held, what was read from the tier and how much of what was asked for was still on the device. Beside the
tiers stands `device`, where all blocks stay on the device, and the dense model: on a GPU with transformers' offloaded
cache, on a CPU with its default one. At last, how many of a query block's choices the one before it had made, too.

Rows go to `--output`, failures to a file beside it. A Markdown table of them is printed.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# the repository root replaces this folder on the path, as in generation.py
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, Cache, DynamicCache, HfArgumentParser, PreTrainedModel

from benchmarks.measure import (
    MeasurementFailed,
    PeakMemory,
    ResultsFile,
    Stopwatch,
    exit_with,
    isolated,
    machine,
    process_peak,
    versions,
)
from benchmarks.models import DENSE, ModelArguments, landmark_config, load_model, random_text, shape_of
from landmark_llama import LandmarkCache, LandmarkLlamaConfig
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage

DEVICE, HOST, FILE = "device", "host", "file"


@dataclass
class Arguments:
    """What is measured."""

    lengths: list[int] = field(
        default_factory=lambda: [32768, 131072, 1000000], metadata={"help": "Tokens that are read."}
    )
    tiers: list[str] = field(
        default_factory=lambda: [DEVICE, HOST, FILE], metadata={"help": "Where blocks live: device, host, file."}
    )
    budgets: list[int] = field(
        default_factory=lambda: [16, 128], metadata={"help": "MiB of blocks that a tier keeps on the device."}
    )
    dense_lengths: list[int] = field(
        default_factory=lambda: [32768], metadata={"help": "Tokens that the dense model reads, too; 0: none."}
    )
    equal_memory: bool = field(
        default=False, metadata={"help": "Beside each tier, the longest text that dense reads in the same memory."}
    )
    granularity: str = field(default="head", metadata={"help": "Setting of retrieval_granularity."})
    text: str | None = field(
        default=None, metadata={"help": "File to read, over and over, with --model; default: random tokens."}
    )
    reading_retrieved_blocks: int | None = field(
        default=None, metadata={"help": "Blocks that a query retrieves before the question; default: as many as there."}
    )
    piece: int = field(default=65536, metadata={"help": "Tokens of a call."})
    question: int = field(default=16, metadata={"help": "Tokens of the question."})
    answer: int = field(default=8, metadata={"help": "Tokens of the answer."})
    overlap_length: int = field(
        default=65536, metadata={"help": "Tokens over which the overlap of choices is counted; 0: not at all."}
    )
    folder: str | None = field(default=None, metadata={"help": "Where the file tier lies; default: a temporary one."})
    output: str = field(
        default=str(Path(__file__).parent / "results" / "memory.jsonl"),
        metadata={"help": "File that rows are added to."},
    )

    def __post_init__(self) -> None:
        for tier in self.tiers:
            if tier not in (DEVICE, HOST, FILE):
                raise ValueError(f"--tiers {tier}: must be {DEVICE}, {HOST} or {FILE}")
        for name in ("piece", "question", "answer"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("lengths", "dense_lengths", "budgets"):
            for number in getattr(self, name):
                least = 1 if name == "lengths" else 0
                if number < least:
                    raise ValueError(f"--{name} {number}: must be at least {least}")


@torch.inference_mode()
def measure(
    model_args: ModelArguments, config: LandmarkLlamaConfig, args: Arguments, tier: str, budget: int, length: int
) -> dict[str, Any]:
    """One measurement, in this process. `tier`: one of the tiers, or `DENSE`; `budget`: MiB."""
    model = load_model(model_args, config, DENSE if tier == DENSE else "landmark")
    text = text_of(model_args, config, args.text, length + args.question)
    warm = LandmarkCache(config) if tier != DENSE else DynamicCache(config=model.config)
    model(text[:, :1024].long(), past_key_values=warm, logits_to_keep=1)
    before, memory = process_peak(), PeakMemory(model_args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = _cache(model, tier, budget << 20, folder)
        if tier != DENSE:  # so that landmarks never move, which would hold them twice
            ordinary = length + args.question + args.answer
            cache.expect(ordinary + ordinary // (config.block_size - 1))
        watch = Stopwatch(model_args.device)
        how = {} if tier == DENSE else {"num_retrieved_blocks": args.reading_retrieved_blocks}
        for piece in text[:, :length].split(args.piece, dim=1):
            model(piece.long(), past_key_values=cache, use_cache=True, logits_to_keep=1, **how)
        read = watch.lap()
        token = text[:, length:].long()
        for _ in range(args.answer):
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
        if not logits.isfinite().all():
            raise ValueError(f"the logits after {length} tokens are not all finite")
        asked = watch.lap()
        size = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
        row = {
            "read_seconds": round(read, 3),
            "question_seconds": round(asked, 4),
            "peak_memory_mib": round(memory.mib(), 1),
            "resident_mib": round(process_peak() / 2**20, 1),
            "resident_before_mib": round(before / 2**20, 1),
            "file_mib": round(size / 2**20, 1),
        }
        return row | (_traffic(cache) if tier in (HOST, FILE) else {})


def check_text(model_args: ModelArguments, path: str | None) -> None:
    """Raises ValueError if there is no tokenizer to read the file `path` with."""
    if path is not None and model_args.model is None:
        raise ValueError(f"--text {path}: needs --model, whose tokenizer reads it")


def what_is_read(model_args: ModelArguments, config: LandmarkLlamaConfig, path: str | None) -> dict[str, Any]:
    """What rows say of the model, the text and the machine."""
    return {
        "model": Path(model_args.model).name if model_args.model else "random weights",
        "text": Path(path).name if path else "random tokens",
        "shape": shape_of(config),
        "dtype": model_args.dtype,
        "machine": machine(model_args.device, model_args.threads),
        "versions": versions(),
    }


def text_of(model_args: ModelArguments, config: LandmarkLlamaConfig, path: str | None, length: int) -> Tensor:
    """(1, length) ids, int32: random ones, or of the file `path`, repeated as often as is needed."""
    if path is None:
        return random_text(model_args, config, length).int()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model)
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor([ids], dtype=torch.int32, device=model_args.device)
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length].clone()


def _cache(model: PreTrainedModel, tier: str, budget: int, folder: str) -> Cache:
    if tier == DENSE:
        return DynamicCache(config=model.config, offloading=model.device.type == "cuda")
    storage = {
        DEVICE: lambda: DeviceStorage,
        HOST: lambda: HostStorage(budget=budget),
        FILE: lambda: FileStorage(folder, budget=budget),
    }[tier]()
    return LandmarkCache(model.config, storage=storage)


def most_that_could_fit(config: LandmarkLlamaConfig, memory: float, dtype: torch.dtype, offloaded: bool) -> int:
    """Tokens (at least one) whose keys and values alone take `memory` MiB in the dense model, on a GPU those of two
    layers. Masks and copies come on top.
    """
    layers = min(2, config.num_hidden_layers) if offloaded else config.num_hidden_layers
    token = 2 * layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return max(1, int(memory * 2**20) // token)


def longest_that_fits(measured: Callable[[int], dict[str, Any]], memory: float, most: int) -> dict[str, Any]:
    """Figures of the longest text that was measured to take at most `memory` MiB, with its `length`.

    Short ones first, since a text too long may take hours; the next that was too long is at most a sixteenth longer.

    Args:
        measured: length -> figures, with `peak_memory_mib`.
        most: tokens from which on nothing is tried.

    Raises:
        MeasurementFailed: none fits.
    """
    fits, too_long, figures = 0, most + 1, None
    length = max(1, most // 64)
    while too_long - fits > max(1, too_long // 16):
        found = measured(length)
        if found["peak_memory_mib"] <= memory:
            fits, figures = length, {"length": length, **found}
        else:
            too_long = length
        length = min(2 * fits or too_long, (fits + too_long) // 2)
    if figures is None:
        raise MeasurementFailed(f"dense takes more than {memory} MiB for a single token")
    return figures


def _traffic(cache: LandmarkCache) -> dict[str, Any]:
    """What was read from the tier, and how much of what was asked for was on the device, by layer."""
    held = [storage.held for storage in cache.storages]
    return {
        "tier_mib_read": round(sum(layer.bytes_read for layer in held) / 2**20, 1),
        "hit_rate": [round(1 - layer.missed / max(1, layer.asked), 4) for layer in held],
    }


class ObservedStorage:
    """A storage that counts how many of each query block's choices the query block before it made, too."""

    def __init__(self, block_size: int) -> None:
        self._storage = DeviceStorage(block_size)
        self.chosen = self.again = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockStorage.gather`; choices have a dimension for groups, queries and blocks each."""
        if blocks.dim() == 6 and blocks.shape[3] > 1:
            block = blocks.flatten(-2)
            same = block[..., 1:, :].unsqueeze(-1) == block[..., :-1, :].unsqueeze(-2)
            self.chosen += same[..., 0].numel()
            self.again += int(same.any(-1).sum())
        return self._storage.gather(blocks)


@torch.inference_mode()
def overlap(model_args: ModelArguments, config: LandmarkLlamaConfig, args: Arguments) -> dict[str, Any]:
    """The share of a query block's choices that the one before it made, too, by layer whose output is computed."""
    model = load_model(model_args, config, "landmark")
    cache = LandmarkCache(config, storage=ObservedStorage)
    model(text_of(model_args, config, args.text, args.overlap_length).long(), past_key_values=cache, logits_to_keep=1)
    storages = [storage for storage in cache.storages if storage.chosen]
    return {"overlap": [round(storage.again / storage.chosen, 4) for storage in storages]}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the rows that have figures."""
    lines = [
        "| tokens | blocks in | on the device | read | question | resident, at most | from the tier | hits by layer |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        hits = " ".join(f"{100 * rate:.1f} %" for rate in row.get("hit_rate", [])) or "-"
        held = "all" if row["budget_mib"] is None else f"{row['budget_mib']} MiB"
        tier = f"{row['tier_mib_read']:,.0f} MiB" if "tier_mib_read" in row else "-"
        lines.append(
            f"| {row['length']:,} | {row['implementation']} | {held} | {row['read_seconds']:.1f} s | "
            f"{row['question_seconds']:.2f} s | {row['resident_mib']:,.0f} MiB | {tier} | {hits} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if something could not be measured."""
    model, args = HfArgumentParser((ModelArguments, Arguments)).parse_args_into_dataclasses(argv)
    check_text(model, args.text)
    config = landmark_config(model, args.granularity)
    common = {
        "benchmark": "memory",
        **what_is_read(model, config, args.text),
        "granularity": args.granularity,
        "reading_retrieved_blocks": args.reading_retrieved_blocks,
        "piece": args.piece,
        "question_tokens": args.question,
        "answer_tokens": args.answer,
    }
    results, rows = ResultsFile(Path(args.output), common), []
    run = functools.partial(isolated, threads=model.threads)
    wanted: list[tuple[str, int | None, int]] = []
    for length in sorted({*args.lengths, *args.dense_lengths} - {0}):
        wanted += [(DENSE, None, length)] if length in args.dense_lengths else []
        for tier in args.tiers if length in args.lengths else []:
            wanted += [(tier, budget, length) for budget in ([None] if tier == DEVICE else args.budgets)]
    for tier, budget, length in tqdm(wanted, unit="run", dynamic_ncols=True, leave=False):
        row = {"quantity": "reading", "implementation": tier, "budget_mib": budget, "length": length}
        _add(results, rows, row, lambda what=(tier, budget or 0, length): run(measure, model, config, args, *what))
        if args.equal_memory and tier in (HOST, FILE) and rows and rows[-1].items() >= row.items():
            memory = rows[-1]["peak_memory_mib"]
            most = most_that_could_fit(config, memory, getattr(torch, model.dtype), model.device != "cpu")
            row = {"quantity": "reading", "implementation": DENSE, "budget_mib": None}
            row["memory_of"] = f"{tier}, {budget} MiB, {length}"
            dense = functools.partial(run, measure, model, config, args, DENSE, 0)
            _add(results, rows, row, functools.partial(longest_that_fits, dense, memory, most))
    if args.overlap_length:
        row = {"quantity": "overlap", "implementation": "landmark", "length": args.overlap_length}
        _add(results, [], row, lambda: run(overlap, model, config, args))
    print(markdown(rows))
    return results.report()


def _add(results: ResultsFile, rows: list[dict], row: dict[str, Any], figures: Callable[[], dict[str, Any]]) -> None:
    try:
        rows.append({**row, **figures()})
        results.add(rows[-1])
    except MeasurementFailed as error:
        results.add_failure(row, str(error))


if __name__ == "__main__":
    exit_with(main, kept="the rows of finished measurements")
