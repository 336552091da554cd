"""Memories for tests: their files, processes that are killed while they write one, users without permission."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CALL_POSITIONS = 64  # few, so that a short text takes many calls


def files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a memory, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "writing.lock"}


def read_in_small_calls(model: Path, text: Path, memory: Path, die_at: str | None = None) -> None:
    """Reads `text` in small calls, each of which goes to the disk; with `die_at`, as in `die_before`."""
    import torch

    from landmark_llama.memories import reader
    from landmark_llama.memories.models import load_model
    from landmark_llama.memories.texts import Sources

    torch.set_num_threads(1)
    reader.CALL_POSITIONS = CALL_POSITIONS
    loaded = load_model(str(model), device="cpu")
    if die_at is not None:
        die_before(die_at)
    reader.read_texts(*loaded, Sources([str(text)]), memory, saved_every=0)


def start_reading(model: Path, text: Path, memory: Path, die_at: str | None = None) -> BaseProcess:
    """Reads in another process, forked from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["landmark_llama.memories.reader", "landmark_llama.memories.models"])
    process = context.Process(target=read_in_small_calls, args=(model, text, memory, die_at), daemon=True)
    process.start()
    return process


def die_before(step: str) -> None:
    """Lets this process kill itself when it writes the memory's second state, or the first that has a tail.

    step: `append` (half of the blocks written), or the file that is about to take its place: `tail`, `memory.json`.
    """
    from landmark_llama.saved import folder, growing

    seen = []

    def die() -> None:
        seen.append(step)
        if len(seen) == (1 if step == "tail" else 2):
            os.kill(os.getpid(), signal.SIGKILL)

    replace, as_bytes = os.replace, growing._bytes

    def replacing(source: object, target: object) -> None:
        if Path(target).name.startswith(step):
            die()
        replace(source, target)

    def writing(tensor: object) -> memoryview:
        content = as_bytes(tensor)
        if step == "append" and len(tensor.shape) == 7:
            seen.append(step)
            if len(seen) == 2:
                # what a write leaves that is cut off
                path = next(Path(folder_of_blocks).glob("blocks.safetensors"))
                with open(path, "ab") as file:
                    file.write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return content

    folder_of_blocks = None
    commit = folder.Writer.append

    def append(self: object, *args: object) -> None:
        nonlocal folder_of_blocks
        folder_of_blocks = self.folder
        commit(self, *args)

    folder.Writer.append = append
    folder.os.replace = replacing
    growing._bytes = writing


def without_permission(folder: Path, action: Callable[[], object]) -> str:
    """What `action` says where nobody may write to `folder`: its error, or "fine"."""

    def said() -> str:
        try:
            action()
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "fine"

    folder.chmod(0o555)
    if os.geteuid() != 0:
        return said()
    # nobody forbids root anything
    receiving, sending = os.pipe()
    if child := os.fork():
        os.close(sending)
        with open(receiving) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return answer
    os.setgid(65534)
    os.setuid(65534)
    os.write(sending, said().encode())
    os._exit(0)
