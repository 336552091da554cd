"""Compiles kernels ahead of time, for chips that need not be there: `python tests/triton_compilation.py CAPABILITY`.

Kernels are compiled as they are called: launching is replaced by recording, so that arguments, tiles and
specialisation are those of the real call. Prints a JSON row a kernel: registers and spilled bytes a thread, shared
memory of a program. It is a process of its own because a process either interprets kernels or compiles them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
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


class Recorder:
    """Stands where kernels are launched and keeps each call: `calls` holds (kernel, arguments by name, options)."""

    def __init__(self) -> None:
        self.calls: list[tuple[triton.JITFunction, dict[str, Any], dict[str, Any]]] = []

    def run(self, kernel: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        self.calls.append((kernel, named, kwargs))


def compile_call(
    kernel: triton.JITFunction, arguments: dict[str, Any], options: dict[str, Any], capability: int
) -> dict[str, Any]:
    """Compiles one recorded call for a chip of `capability`, specialised as a launch would be."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        **resources(compiled.asm["ptx"], capability),
    }


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers a thread and bytes that a thread spills, as the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        chip = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={chip}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
    }


SHAPES = {
    # heads, kv_heads, head_dim, block_size, k, dtype, queries of a group
    "7b": (32, 32, 128, 64, 8, torch.bfloat16, 64),
    "8b_grouped": (32, 8, 128, 64, 8, torch.float16, 64),
    "decoding": (32, 8, 128, 64, 8, torch.bfloat16, 1),
    "published": (32, 32, 128, 51, 5, torch.bfloat16, 51),
    "demo": (4, 4, 32, 16, 4, torch.float32, 16),
    "wide": (8, 8, 256, 256, 4, torch.bfloat16, 256),
    "full_precision": (32, 8, 128, 64, 8, torch.float32, 64),
}


def inference_calls(name: str, capability: int) -> list[tuple[triton.JITFunction, dict[str, Any], dict[str, Any]]]:
    """What reading through the cache launches at one of `SHAPES`, for a choice of each query and a shared one."""
    from landmark_llama.attention import triton_selection, triton_table
    from landmark_llama.attention.rotary import RotaryTable
    from landmark_llama.attention.triton_rows import QueryRows

    heads, kv_heads, head_dim, block_size, k, dtype, queries = SHAPES[name]
    memory = {80: 163, 90: 227}[capability] * 1024
    triton_table.shared_memory = lambda device: memory
    groups, capacity = 2, 2048
    query = torch.empty(1, groups * queries, kv_heads, heads // kv_heads, head_dim, dtype=dtype)
    landmark = torch.empty(1, kv_heads, capacity, head_dim, dtype=dtype)
    block = landmark.unsqueeze(3).expand(-1, -1, -1, block_size, -1)  # never read
    index = torch.zeros(1, groups, queries, dtype=torch.long)
    rows = QueryRows(index, index.bool(), index, index[..., 0].contiguous())
    table = torch.empty(16, head_dim // 2)
    settings = {"block_size": block_size, "rotary": RotaryTable(table, table), "scale": 0.1}
    recorder = Recorder()
    triton.JITFunction.run = lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)
    for share, tie in ((False, False), (True, False), (False, True), (True, True)):
        choice = triton_selection.select_blocks(query, landmark, rows, k=k, share=share, landmarks_tie=tie, **settings)
        triton_table.attend_table(query, block, block, rows, choice, one_block=not tie, **settings)
    triton_table.attend_table(query, block, block, rows, None, one_block=True, **settings)
    return recorder.calls


def rows(capability: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """A row for every different kernel of the shapes `names`."""
    for name in names:
        seen = set()
        for kernel, arguments, options in inference_calls(name, capability):
            constants = {k: v for k, v in arguments.items() if not isinstance(v, (torch.Tensor, float))}
            key = (kernel.fn.__name__, *sorted(constants.items()), *sorted(options.items()))
            if key not in seen:
                seen.add(key)
                yield {
                    "shape": name,
                    "rows": arguments.get("ROWS"),
                    **compile_call(kernel, arguments, options, capability),
                }


if __name__ == "__main__":
    for row in rows(int(sys.argv[1]), sys.argv[2:] or list(SHAPES)):
        print(json.dumps(row), flush=True)
