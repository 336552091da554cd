"""Compiles kernels ahead of time, for GPUs that this machine need not have.

    python tests/triton_compilation.py training 90 7b published      # without shapes: all

Families: training, inference; with a query and a bias of the landmarks' own training_landmarks, inference_landmarks;
where blocks weigh what their tokens do training_exact, inference_exact.

The launches of a real call are recorded instead of run, so arguments, tiles and specialisation are those of that call.
Prints one JSON row per kernel: registers and spilled bytes of a thread, shared memory of a program; `waits`: for how
many groups of loads it waits, where 0 alone means that no load overlaps the work. Runs as a process
of its own, because a process either interprets kernels or compiles them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


Call = tuple[triton.JITFunction, dict[str, Any], dict[str, Any]]  # kernel, arguments by name, options

MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # shared memory in bytes that one program may take, by capability


class Recorder:
    """Replaces the launching of kernels and records each call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, kernel: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        self.calls.append((kernel, named, kwargs))


def compile_call(
    kernel: triton.JITFunction, arguments: dict[str, Any], options: dict[str, Any], capability: int
) -> dict[str, Any]:
    """Compiles one recorded call for a GPU of `capability`, specialised as a launch would be."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def specialise(value: Any, path: tuple[int, ...], constant: bool = False) -> Any:
        if isinstance(value, tuple):
            parts = [specialise(x, (*path, i)) for i, x in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)  # a named tuple keeps its names
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"

    for i, parameter in enumerate(kernel.params):
        signature[parameter.name] = specialise(arguments[parameter.name], (i,), parameter.is_constexpr)
    source = ASTSource(kernel, signature, constants, attributes)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "waits": sorted({int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", compiled.asm["ptx"])}),
        **resources(said.getvalue()),
    }


def resources(said: str) -> dict[str, int]:
    """Registers and spilled bytes of a thread, from what the assembler said when Triton called it."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
    }


SHAPES = {
    # heads, kv_heads, head_dim, block_size, k, dtype, queries of a group (k and these in inference only)
    "7b": (32, 32, 128, 64, 8, torch.bfloat16, 64),
    "8b_grouped": (32, 8, 128, 64, 8, torch.float16, 64),
    "decoding": (32, 8, 128, 64, 8, torch.bfloat16, 1),
    "published": (32, 32, 128, 51, 5, torch.bfloat16, 51),
    "demo": (4, 4, 32, 16, 4, torch.float32, 16),
    "narrow": (32, 8, 64, 64, 8, torch.bfloat16, 64),
    "wide_blocks": (8, 8, 256, 256, 4, torch.bfloat16, 256),
    "wide": (8, 8, 256, 64, 4, torch.bfloat16, 64),
    "full_precision": (32, 8, 128, 64, 8, torch.float32, 64),
}


def training_calls(name: str, recorder: Recorder, own: str) -> Iterator[list[Call]]:
    """The launches of a training step at one of `SHAPES`: for each kernel its tiles, largest first.

    own: `"landmarks"`: with a query or a bias of the landmarks' own; `"exact"`: blocks weigh what their tokens do.
    """
    from landmark_llama.attention import fused

    heads, kv_heads, head_dim, block_size, _, dtype, _ = SHAPES[name]
    query, key = (torch.empty(1, n, 4096, head_dim, dtype=dtype) for n in (heads, kv_heads))
    lse = torch.empty(query.shape[:3])
    logits = torch.empty(*lse.shape, 4096 // block_size) if own == "landmarks" else None
    settings = (block_size, 0.1, logits, own == "exact")
    every = fused.tiles
    for kernel in fused.TILES:
        tiles = every(kernel, head_dim, dtype)
        for tile in tiles:
            fused.tiles = lambda *_, tile=tile: (tile,)
            torch.ops.landmark_llama.attention_forward(query, key, key, *settings)
            torch.ops.landmark_llama.attention_backward(query, query, key, key, query, lse, *settings)
        recorded, recorder.calls = recorder.calls, []
        yield [call for call in recorded if call[0].fn.__name__ == f"{kernel}_kernel"]
    fused.tiles = every


def inference_calls(name: str, recorder: Recorder, memory: int, own: str) -> Iterator[list[Call]]:
    """The launches of reading through the cache at one of `SHAPES`, with a choice per query and with a shared one.

    own: `"landmarks"`: with a query and a bias of the landmarks' own; `"exact"`: with sinks, and blocks weigh what
        their tokens do.
    """
    from landmark_llama.attention.rotary import RotaryTable
    from landmark_llama.reading import choice_triton, table_triton
    from landmark_llama.reading.groups import QueryGroups

    heads, kv_heads, head_dim, block_size, k, dtype, queries = SHAPES[name]
    table_triton.shared_memory = lambda device: memory
    num_groups, capacity = 2, 2048
    query = torch.empty(1, num_groups * queries, kv_heads, heads // kv_heads, head_dim, dtype=dtype)
    landmark = torch.empty(1, kv_heads, capacity, head_dim, dtype=dtype)
    block = landmark.unsqueeze(3).expand(-1, -1, -1, block_size, -1)  # never read
    groups = QueryGroups.of(
        torch.tensor([64 * block_size]),
        torch.tensor([num_groups * queries]),
        num_direct_blocks=1,
        tile_blocks=1,
        chunked=False,
        share=queries > 1,
        block_size=block_size,
    )
    table = torch.empty(16, head_dim // 2)
    settings = {"block_size": block_size, "rotary": RotaryTable(table, table), "scale": 0.1}
    settings["bias"] = torch.empty(landmark.shape[:-1]) if own == "landmarks" else None
    weighing = {"landmark_query": query if own == "landmarks" else None, "exact": own == "exact"}
    for share, tie in ((False, False), (True, False), (False, True), (True, True)):
        if own == "landmarks" and tie:
            continue
        choice = choice_triton.select_blocks(
            query, landmark, groups, k=k, share=share, landmarks_tie=tie, num_sink_blocks=own == "exact", **settings
        )
        table_triton.attend_table(query, block, block, groups, choice, one_block=not tie, **weighing, **settings)
    table_triton.attend_table(query, block, block, groups, None, one_block=True, **weighing, **settings)
    recorded, recorder.calls = recorder.calls, []
    yield from ([call] for call in recorded)


def constants(value: Any) -> Any:
    """What a kernel may be compiled for: numbers that are no floats, also inside tuples; None for everything else."""
    if isinstance(value, tuple):
        return tuple(constants(x) for x in value)
    return value if isinstance(value, int) else None


def compiled_rows(family: str, capability: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each distinct kernel of a family at the shapes `names`; families: as in the first line of usage.

    Of a kernel's tiles the first counts that the chip has room for, or the last.
    """
    recorder, memory = Recorder(), MEMORY[capability]
    # Triton chooses an assembler by chip and version; it tells what that said, unless a kernel is in its cache
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    triton.JITFunction.run = lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)
    for name in names:
        seen = set()
        kernels, _, own = family.partition("_")
        if kernels == "training":
            calls = training_calls(name, recorder, own)
        else:
            calls = inference_calls(name, recorder, memory, own)
        for tiles in calls:
            kernel, arguments, options = tiles[0]
            key = (kernel.fn.__name__, *((k, constants(v)) for k, v in arguments.items()), *sorted(options.items()))
            if key in seen:
                continue
            seen.add(key)
            for kernel, arguments, options in tiles:
                row = compile_call(kernel, arguments, options, capability)
                if row["shared"] <= memory:
                    break
            tile = {name: arguments[name] for name in ("M", "N") if name in arguments}
            yield {"shape": name, "tile": tile, **row}


if __name__ == "__main__":
    for row in compiled_rows(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(SHAPES)):
        print(json.dumps(row), flush=True)
