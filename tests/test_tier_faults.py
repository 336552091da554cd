"""Tiers when it breaks: a full disk, a file that was cut or changed, two writers, no permission, a killed process."""

import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_model

from landmark_llama import LandmarkCache
from landmark_llama.reading.tiered_storage import FileStorage
from landmark_llama.reading.tiers import TierError

READ, MORE = 300, 60  # tokens


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@torch.no_grad()
def read(folder: Path, tokens: int = READ) -> LandmarkCache:
    """A cache that has read so many tokens, none of whose blocks stay in memory."""
    cache = LandmarkCache(tiny_model().config, storage=FileStorage(folder, budget=0))
    tiny_model()(random_ids(1, tokens), past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(cache: LandmarkCache, tokens: int = MORE) -> torch.Tensor:
    return tiny_model()(random_ids(1, tokens, seed=1), past_key_values=cache).logits


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("blocks-*.bin"))


def test_a_full_disk_is_one_sentence_and_what_was_read_before_is_good(small_disk: Path, tmp_path: Path) -> None:
    expected = go_on(read(tmp_path / "roomy"))
    cache = read(small_disk)
    with pytest.raises(
        TierError, match="cannot be stored .No space left on device.; what earlier calls read is intact"
    ):
        go_on(cache, tokens=2000)
    assert cache.get_seq_length() == READ
    assert torch.equal(go_on(cache), expected)


def test_room_that_is_made_is_used(small_disk: Path, tmp_path: Path) -> None:
    cache, filler = read(small_disk), small_disk / "filler"
    status = os.statvfs(small_disk)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize))
    with pytest.raises(TierError, match="make room there and make this call again"):
        go_on(cache, tokens=200)
    filler.unlink()
    assert torch.equal(go_on(cache, tokens=200), go_on(read(tmp_path / "roomy"), tokens=200))


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    cache = read(tmp_path)
    for path in files(tmp_path):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(TierError, match=r"blocks-1\.bin: \d+ bytes, and \d+ were written: something else cut the file"):
        go_on(cache)


@pytest.mark.parametrize("bit", [1, 1 << 7])
def test_a_changed_bit_is_noticed(tmp_path: Path, bit: int) -> None:
    cache = read(tmp_path)
    path = files(tmp_path)[1]
    content = bytearray(path.read_bytes())
    for place in range(1024, len(content), 256):  # one in every record of 256 bytes, but those of page 0
        content[place + place // 256 % 256] ^= bit
    path.write_bytes(content)
    with pytest.raises(TierError, match=r"blocks-2\.bin: bytes \d+ to \d+ have not the checksum of what was written"):
        go_on(cache)


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    cache = read(tmp_path)
    with pytest.raises(TierError, match="another cache keeps its blocks in .*: give each a folder of its own"):
        FileStorage(tmp_path)
    go_on(cache)
    assert files(tmp_path)
    del cache
    assert not files(tmp_path), "the files go with the cache"
    read(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TierError, match="cannot be written to .*: give one that can be, or change its permissions"):
        FileStorage(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TierError, match="cannot be written to .Permission denied."):
        FileStorage(tmp_path)


def _read_on(folder: Path, started: Path) -> None:
    cache = read(folder, tokens=30)
    started.touch()
    while True:
        go_on(cache, tokens=7)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_folder_that_the_next_one_uses(tmp_path: Path) -> None:
    expected, folder, started = go_on(read(tmp_path / "undisturbed")), tmp_path / "tier", tmp_path / "started"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_tier_faults"])
    delays = random.Random(0)
    for _ in range(10):
        started.unlink(missing_ok=True)
        process: BaseProcess = context.Process(target=_read_on, args=(folder, started), daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while not started.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.is_alive()
        with pytest.raises(TierError, match="another cache"):
            FileStorage(folder)
        time.sleep(delays.uniform(0, 0.05))
        process.kill()
        process.join()
        assert len(files(folder)) == 2, "a killed process cannot tidy up"
        assert torch.equal(go_on(read(folder)), expected)
        assert not files(folder)
