"""Tools for measuring: fresh processes, clocks, peak memory, and rows that describe the machine."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import transformers

import landmark_llama

Result = TypeVar("Result")


class MeasurementFailed(Exception):
    """A measurement gave no figure. The message says why."""


def isolated(function: Callable[..., Result], *args: Any, threads: int = 0) -> Result:
    """Calls `function(*args)` in a fresh process, without memory or threads of earlier calls.

    Args:
        threads: how many threads PyTorch uses there; 0: its default.

    Raises:
        MeasurementFailed: the call raises, or its process is killed (usually for lack of memory).
    """
    context = multiprocessing.get_context("forkserver")
    # the server has these modules imported and has computed nothing, so a new process starts fast and clean
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "landmark_llama"])
    initializer = (torch.set_num_threads, (threads,)) if threads else (None, ())
    with ProcessPoolExecutor(1, context, *initializer) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise MeasurementFailed("its process was killed, most likely for lack of memory") from error
        except Exception as error:  # no failure may stop the other measurements
            message = (str(error).strip() or "no message").splitlines()[0]
            raise MeasurementFailed(f"{type(error).__name__}: {message}") from error


def imported(name: str) -> Callable[..., Any]:
    """The function that `--against module:function` names. Raises ValueError if it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--against {name}: no such module:function ({error})") from error


class Stopwatch:
    """Measures the seconds between `lap()` calls. On a GPU it waits for the device first."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class PeakMemory:
    """The peak memory since this object was made, beyond what was in use then.

    On a GPU it is the memory of PyTorch's tensors, on a CPU that of the process.
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        self._device = device if torch.device(device).type == "cuda" else None
        if self._device:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _forgetprocess_peak()
        self._before = self._peak()

    def mib(self) -> float:
        """The peak so far, in MiB."""
        return (self._peak() - self._before) / 2**20

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device else process_peak()


def process_peak() -> int:
    """Peak memory of this process in bytes.

    Uses Linux's VmHWM if there is one: `ru_maxrss` would start at the size of the process that launched this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _forgetprocess_peak() -> None:
    """Resets the peak to the present size. If the system cannot, a peak lower than an earlier one goes unnoticed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def statistics_of(values: list[float]) -> dict[str, Any]:
    """Median, spread and values of repeated measurements, rounded to 6 digits."""
    values = [float(f"{value:.6g}") for value in values]
    median = float(f"{statistics.median(values):.6g}")
    return {"median": median, "min": min(values), "max": max(values), "repetitions": len(values), "values": values}


def machine(device: str, threads: int) -> dict[str, Any]:
    """The properties of the machine that the figures depend on. The machine's name is not among them."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        # shows other work on the machine: should be near 0
        "load_before": round(os.getloadavg()[0], 2),
        "device": torch.device(device).type,
    }
    if described["device"] == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return described


def _cpu_name() -> str:
    """The processor's name, or "unknown"."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of the software that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "landmark_llama": landmark_llama.__version__,
    }


class ResultsFile:
    """Appends the rows of a run to a JSONL file, one by one. Failures go to `NAME.failed.jsonl` beside it.

    Args:
        path: the file. Earlier runs in it are kept.
        common: fields that are added to every row of this run.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self.failed_path = path, path.with_suffix(".failed.jsonl")
        self.run = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._common = {"run": self.run, **common}
        self.failures = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ValueError(f"--output {path}: cannot be written ({error.strerror})") from error

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row immediately."""
        self._append(self.path, row)

    def add_failure(self, row: dict[str, Any], reason: str) -> None:
        """Writes a row without figures to the file of failures."""
        self.failures += 1
        self._append(self.failed_path, {**row, "reason": reason})

    def report(self) -> int:
        """Prints where the rows are. Returns the command's exit code: 1 if something could not be measured."""
        print(self.path)
        if self.failures:
            print(self.failed_path)
        return 1 if self.failures else 0

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self._common}) + "\n")


def exit_with(
    main: Callable[[], int], kept: str | None = None, mistakes: tuple[type[Exception], ...] = (ValueError,)
) -> NoReturn:
    """Runs a benchmark as a command. A user's mistake or an interruption ends it with one sentence.

    Args:
        main: the command; returns the exit code.
        kept: what an interrupted run leaves behind, for the message.
        mistakes: the exceptions that a user's mistake raises.
    """
    try:
        sys.exit(main())
    except mistakes as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit(f"benchmarks: interrupted{f'; {kept} are kept' if kept else ''}")
