"""One process a GPU; the main one may take longer to prepare a run than any collective operation may wait."""

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.arguments import UserError
from finetune.processes import main_process_first, refuse_data_parallel

LIMIT, PREPARING = 0.5, 1.5  # seconds


def prepare(rank: int, folder: Path) -> None:
    """Waits for the main process; a process notes what it found."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT)
    )
    run = SimpleNamespace(world_size=2, local_process_index=rank)
    with main_process_first(run):
        if rank == 0:
            time.sleep(PREPARING)
            (folder / "tokens").touch()
        (folder / f"seen-by-{rank}").write_text(str((folder / "tokens").exists()))
    torch.distributed.destroy_process_group()


def test_the_others_wait_longer_than_the_limit_of_collective_operations(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(prepare, (tmp_path,), nprocs=2, start_method="fork")
    assert (tmp_path / "seen-by-1").read_text() == "True"


def fail(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with pytest.raises(OSError), main_process_first(SimpleNamespace(world_size=2, local_process_index=rank)):
        raise OSError("no such data")
    (folder / f"failed-{rank}").touch()


def test_an_error_of_the_main_process_reaches_the_others(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(fail, (tmp_path,), nprocs=2, start_method="fork")
    assert (tmp_path / "failed-0").exists() and (tmp_path / "failed-1").exists()


def test_one_process_with_several_gpus_is_refused() -> None:
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(UserError, match="sees 2 GPUs: .*accelerate launch .*--num_processes 2, or use one: CUDA"):
        refuse_data_parallel(SimpleNamespace(n_gpu=2))


def test_one_process_waits_for_nobody() -> None:
    with main_process_first(SimpleNamespace(world_size=1)):
        pass
