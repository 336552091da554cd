"""Landmark attention's kernels beside flash attention: training steps, and prompts read through a cache.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --lengths 8192 --block_size 51 --repetitions 50
    python benchmarks/kernels.py --against package.module:function

Needs a GPU; without one it says so and exits with code 2. Dense attention is causal `scaled_dot_product_attention`,
restricted to its flash backend (`flash`) or to cuDNN's (`cudnn`). `--against` times another landmark attention in the
same run, called as `function(query, key, value, block_size=...)`. Implementations take turns in one process. Rows go to
`--output`, failures to a file beside it.

Each time is also divided by its floor, the least time that the work can take: its operations at the rate of a large
matrix product, or its bytes at the rate of a large copy, whichever is longer. Both rates are measured in the same run.

Reading means the attention of one layer over a whole prompt, with keys and values in the cache. The prompt is cut into
chunks as the model does it. Dense attention does the same in one call.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

# The repository root replaces this folder on the path. So the script runs from anywhere, and transformers does not take
# the kernels.py here for the package `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import HfArgumentParser

from benchmarks.checks import check_attention, check_reading, checked_shape
from benchmarks.measure import PeakMemory, ResultsFile, Stopwatch, exit_with, imported, machine, statistics_of, versions
from benchmarks.models import AGAINST, LANDMARK, ModelArguments, landmark_config
from landmark_llama import landmark_attention
from landmark_llama.attention import availability
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.groups import CHUNK_POSITIONS, QueryGroups
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.table import attend_through_table

FLASH, CUDNN = "flash", "cudnn"
GRANULARITIES = ("head", "token_and_head")
SHAPE = ("heads", "kv_heads", "head_dim", "block_size", "num_retrieved_blocks", "num_local_blocks")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Arguments:
    """What is measured, and how often."""

    lengths: list[int] = field(
        default_factory=lambda: [4096, 8192, 32768], metadata={"help": "Lengths of a row to measure, in positions."}
    )
    reading_lengths: list[int] = field(
        default_factory=lambda: [32768, 131072], metadata={"help": "Lengths of a prompt to read, in positions."}
    )
    num_retrieved_blocks: int = field(default=8, metadata={"help": "Blocks that a query retrieves while reading."})
    num_local_blocks: int = field(default=8, metadata={"help": "Blocks before its own that it reads directly."})
    tokens: int = field(default=32768, metadata={"help": "Positions in a batch; with shorter rows it has more rows."})
    heads: int = field(default=32, metadata={"help": "Query heads."})
    kv_heads: int = field(default=0, metadata={"help": "Key and value heads; 0: as many as query heads."})
    head_dim: int = field(default=128, metadata={"help": "Width of a head."})
    block_size: int = field(default=64, metadata={"help": "Positions of a block, its landmark included."})
    dtype: Literal["bfloat16", "float16"] = field(default="bfloat16", metadata={"help": "Of queries, keys and values."})
    repetitions: int = field(default=20, metadata={"help": "Calls measured per implementation."})
    warmup: int = field(default=3, metadata={"help": "Calls per implementation before the clock starts."})
    against: str = field(default="", metadata={"help": "Another landmark attention, as module:function."})
    device: str = field(default="cuda", metadata={"help": "A GPU: cuda, cuda:1, ..."})
    rate_size: int = field(
        default=8192, metadata={"help": "Rows of the square matrices whose product measures the GPU's rate."}
    )
    output: str = field(
        default=str(Path(__file__).parent / "results" / "kernels-gpu.jsonl"),
        metadata={"help": "File that rows are added to."},
    )

    def __post_init__(self) -> None:
        self.kv_heads = self.kv_heads or self.heads
        for flag in ("lengths", "reading_lengths"):
            for length in getattr(self, flag):
                if length < 1:
                    raise ValueError(f"--{flag} {length}: a row has at least one position")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: must be at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        return getattr(torch, self.dtype)


class Rates(NamedTuple):
    """The GPU's speed, measured in this run."""

    operations_per_second: float
    bytes_per_second: float

    def floor(self, args: Arguments, length: int, batch: int, backward: bool) -> float:
        """The least seconds that causal attention can take."""
        # two matrix products forward, five backward; half of each product is masked
        products = 7 if backward else 2
        operations = products * batch * args.heads * length**2 * args.head_dim
        query = batch * args.heads * length * args.head_dim * args.torch_dtype.itemsize
        key = query * args.kv_heads // args.heads
        # forward: q, k, v in, o out; backward: q, k, v, o, do in, dq, dk, dv out
        moved = 2 * query + 2 * key + (4 * query + 4 * key if backward else 0)
        return self._seconds(operations, moved)

    def reading_floor(self, args: Arguments, length: int) -> float:
        """The least seconds that reading one row can take: scoring all landmarks, and reading each query's blocks."""
        pairs = length * length / args.block_size / 2
        table = length * args.block_size * (args.num_retrieved_blocks + args.num_local_blocks + 0.5)
        operations = 2 * args.heads * args.head_dim * (pairs + 2 * table)
        query = args.heads * length * args.head_dim * args.torch_dtype.itemsize
        return self._seconds(operations, 2 * query + 2 * query * args.kv_heads // args.heads)

    def _seconds(self, operations: float, moved: float) -> float:
        return max(operations / self.operations_per_second, moved / self.bytes_per_second)


def measure_rates(args: Arguments) -> Rates:
    """The rates of a large matrix product and of a large copy."""
    size = args.rate_size
    x, y = (torch.randn(size, size, device=args.device, dtype=args.torch_dtype) for _ in range(2))
    source = torch.empty(16 * size**2, device=args.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls = {"product": lambda: x @ y, "copy": lambda: target.copy_(source)}
    product, copy = (statistics_of(x)["median"] for _, x in _time(args.device, calls, 20, 3))
    return Rates(2 * size**3 / product, 2 * source.numel() / copy)


def implementations(args: Arguments) -> dict[str, Attention]:
    """The attentions to time, by name. Raises ValueError if `--against` cannot be imported."""
    found: dict[str, Attention] = {
        FLASH: partial(_dense, SDPBackend.FLASH_ATTENTION),
        CUDNN: partial(_dense, SDPBackend.CUDNN_ATTENTION),
        LANDMARK: partial(landmark_attention, block_size=args.block_size),
    }
    if args.against:
        found[AGAINST] = partial(imported(args.against), block_size=args.block_size)
    return found


def _dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )


def _time(
    device: str, calls: dict[str, Callable[[], object]], repetitions: int, warmup: int
) -> Iterator[tuple[str, list[float]]]:
    """The name and the seconds of each call, `repetitions` times, given as soon as its last one is done.

    The calls take turns, in alternating order; the first one ends first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    for left in reversed(range(repetitions)):
        order = list(calls.items())
        for name, call in order if left % 2 == 0 else order[::-1]:
            watch = Stopwatch(device)
            call()
            seconds[name].append(watch.lap())
            if not left:
                yield name, seconds[name]


def _forward(attend: Attention, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    with torch.no_grad():
        attend(*inputs)


def _forward_backward(attend: Attention, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(attend(*inputs), inputs, grad)


def measure(args: Arguments, length: int, attentions: dict[str, Attention], rates: Rates, results: ResultsFile) -> None:
    """Times one length and adds its rows. An implementation that cannot run is recorded as a failure."""
    batch = max(1, args.tokens // length)
    generator = torch.Generator(args.device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(
            batch, heads, length, args.head_dim, generator=generator, device=args.device, dtype=args.torch_dtype
        )
        for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    )
    inputs = tuple(x.requires_grad_() for x in (query, key, value))
    rows, able = _Rows(results, {"length": length, "batch": batch}), {}
    for name, attend in attentions.items():
        try:
            _forward_backward(attend, inputs, grad)  # compiles
            peak = PeakMemory(args.device)
            _forward_backward(attend, inputs, grad)
        except (RuntimeError, ValueError) as error:
            rows.fail(name, error)
        else:
            able[name] = attend
            rows.add("peak_memory_mib", name, [peak.mib()])
    for quantity, step in (("forward_seconds", _forward), ("forward_backward_seconds", _forward_backward)):
        calls = {name: partial(step, attend, inputs, grad) for name, attend in able.items()}
        floor = rates.floor(args, length, batch, backward=step is _forward_backward)
        for name, seconds in _time(args.device, calls, args.repetitions, args.warmup):
            rows.add(quantity, name, seconds, floor)


class Reader:
    """The attention of one layer over a prompt of `length` positions whose keys and values are in a cache."""

    def __init__(self, args: Arguments, length: int, granularity: str, key: Tensor, value: Tensor) -> None:
        self.args, self.granularity = args, granularity
        self.storage = DeviceStorage(args.block_size)
        self.storage.expect(-(-length // args.block_size))
        self.storage.write(key.transpose(1, 2), value.transpose(1, 2), torch.zeros(1, dtype=torch.long))
        tile = args.num_local_blocks
        step = max(1, CHUNK_POSITIONS // args.block_size // tile) * tile * args.block_size
        self.chunks = [
            (
                start,
                QueryGroups.of(
                    torch.tensor([start]),
                    torch.tensor([min(step, length - start)]),
                    num_direct_blocks=args.num_local_blocks,
                    tile_blocks=tile,
                    chunked=False,
                    share=granularity == "head",
                    block_size=args.block_size,
                ).to(torch.device(args.device)),
            )
            for start in range(0, length, step)
        ]
        positions = (args.num_retrieved_blocks + 2 + args.num_local_blocks + tile) * args.block_size
        angle = torch.arange(positions).unsqueeze(1) * 1e4 ** -torch.linspace(0, 1, args.head_dim // 2)
        self.rotary = RotaryTable(angle.cos(), angle.sin()).to(torch.device(args.device))

    @torch.no_grad()
    def __call__(self, query: Tensor) -> None:
        """`query`: (1, heads, length, head_dim)."""
        rows = query.transpose(1, 2).unflatten(2, (self.args.kv_heads, -1))
        for start, groups in self.chunks:
            attend_through_table(
                rows[:, start : start + groups.slot.shape[1]],
                self.storage,
                groups,
                num_retrieved_blocks=self.args.num_retrieved_blocks,
                granularity=self.granularity,
                rotary=self.rotary,
                scale=self.args.head_dim**-0.5,
                landmarks_tie=False,
            )


def measure_reading(args: Arguments, length: int, granularities: list[str], rates: Rates, results: ResultsFile) -> None:
    """Times the attention of one prompt and adds its rows."""
    generator = torch.Generator(args.device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, args.head_dim, generator=generator, device=args.device, dtype=args.torch_dtype)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    calls: dict[str, Callable[[], object]] = {
        name: partial(_forward, partial(_dense, backend), (query, key, value), query)
        for name, backend in ((FLASH, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION))
    }
    for granularity in granularities:
        calls[f"{LANDMARK} {granularity}"] = partial(Reader(args, length, granularity, key, value), query)
    rows = _Rows(results, {"length": length, "batch": 1})
    for name, call in list(calls.items()):
        try:
            call()  # compiles
        except (RuntimeError, ValueError) as error:
            rows.fail(name, error)
            del calls[name]
    dense, sparse = rates.floor(args, length, 1, backward=False), rates.reading_floor(args, length)
    for name, seconds in _time(args.device, calls, args.repetitions, args.warmup):
        rows.add("reading_seconds", name, seconds, sparse if name.startswith(LANDMARK) else dense)


class _Rows:
    """The rows of one length, each written as it is measured. `where`: fields of all of them."""

    def __init__(self, results: ResultsFile, where: dict[str, int]) -> None:
        self._results, self._where = results, where
        self._flash: dict[str, float] = {}  # medians by quantity; flash attention is measured first

    def add(self, quantity: str, name: str, values: list[float], floor: float | None = None) -> None:
        """Adds a row. `floor`: the least seconds it can take, if known."""
        row = statistics_of(values)
        if name == FLASH:
            self._flash[quantity] = row["median"]
        flash = self._flash.get(quantity)
        ratio = {"ratio_to_flash": round(row["median"] / flash, 4) if flash else None}
        if floor is not None:
            ratio |= {"floor_seconds": float(f"{floor:.6g}"), "ratio_to_floor": round(row["median"] / floor, 3)}
        self._results.add({"quantity": quantity, "implementation": name, **self._where, **row, **ratio})
        print(f"{self._where['length']:>7,}  {quantity:<25} {name:<9} {row['median']:>10.4g}  {ratio}", file=sys.stderr)

    def fail(self, name: str, error: Exception) -> None:
        """Adds a row without figures to the file of failures."""
        self._results.add_failure({"implementation": name, **self._where}, (str(error).strip() or "?").splitlines()[0])


def _right(
    args: Arguments, attentions: dict[str, Attention], results: ResultsFile
) -> tuple[dict[str, Attention], list[str]]:
    """The implementations and granularities to time: landmark attention is left out where a check finds it wrong."""
    table = (args.num_retrieved_blocks + args.num_local_blocks + 2) * args.block_size
    whole = ModelArguments(
        vocab_size=256,
        hidden_size=args.heads * args.head_dim,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        block_size=args.block_size,
        train_context_length=max(table, 16 * args.block_size),
        num_retrieved_blocks=args.num_retrieved_blocks,
        num_local_blocks=args.num_local_blocks,
        dtype=args.dtype,
        device=args.device,
    )
    right, reading = dict(attentions), []
    for name in (LANDMARK, AGAINST):
        shape = checked_shape(whole, landmark_config(whole, "head"))
        problem = check_attention(*shape, right[name]) if name in right else None
        if problem:
            results.add_failure({"implementation": name}, f"not measured, its result is wrong: {problem}")
            del right[name]
    for granularity in GRANULARITIES:
        problem = check_reading(*checked_shape(whole, landmark_config(whole, granularity)))
        if problem:
            name = f"{LANDMARK} {granularity}"
            results.add_failure({"implementation": name}, f"not measured, its result is wrong: {problem}")
        else:
            reading.append(granularity)
    return right, reading


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 if something could not be measured, or 2 without a GPU."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    attentions = implementations(args)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available() or not availability.kernels_run_on(device):
        print("benchmarks: no GPU was found, and the kernels run on nothing else", file=sys.stderr)
        return 2
    rates = measure_rates(args)
    common = {
        "benchmark": "kernels",
        "model": "random tensors",
        "shape": {name: getattr(args, name) for name in SHAPE},
        "dtype": args.dtype,
        **rates._asdict(),
        "machine": machine(args.device, 0),
        "versions": {**versions(), "triton": importlib.metadata.version("triton")},
    }
    results = ResultsFile(Path(args.output), common)
    attentions, reading = _right(args, attentions, results)
    for length in args.lengths:
        measure(args, length, attentions, rates, results)
    for length in args.reading_lengths:
        measure_reading(args, length, reading, rates, results)
    return results.report()


if __name__ == "__main__":
    exit_with(main, kept="the rows of finished lengths")
