"""Importing the package: versions it was not made for get one sentence, nothing is done at import."""

import subprocess
import sys
from pathlib import Path

import pytest

from landmark_llama._versions import SUPPORTED, check_versions

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("package", "found", "accepted"),
    [
        ("transformers", "5.17.0", True),
        ("transformers", "5.99.1", True),
        ("transformers", "5.17.0.dev0", True),
        ("transformers", "5.16.3", False),
        ("transformers", "4.57.1", False),
        ("transformers", "6.0.0", False),
        ("torch", "2.11.0", True),
        ("torch", "2.13.0+cu130", True),
        ("torch", "3.0.1", True),
        ("torch", "2.10.1+cpu", False),
        ("torch", "2.9.0a0+git123", False),
    ],
)
def test_versions_it_was_not_made_for_are_refused_in_one_sentence(
    package: str, found: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"torch": "2.13.0", "transformers": "5.23.0"}
    monkeypatch.setattr("landmark_llama._versions.version", lambda name: {**good, package: found}[name])
    if accepted:
        check_versions()
        return
    lowest = ".".join(map(str, SUPPORTED[package][0]))
    with pytest.raises(ImportError, match=rf"^landmark_llama needs {package} >= {lowest}") as error:
        check_versions()
    assert str(error.value).endswith(f"found {package} {found}") and "\n" not in str(error.value)


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_the_sentence_comes_before_anything_else_is_imported() -> None:
    result = run(
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "m.version = lambda name: '5.3.0' if name == 'transformers' else real(name)\n"
        "try:\n    import landmark_llama\n"
        "except ImportError as error:\n    print(error)\n"
        "print('transformers' in sys.modules, 'torch' in sys.modules)\n"
    )
    assert result.stdout.splitlines() == [
        "landmark_llama needs transformers >= 5.17, < 6; found transformers 5.3.0",
        "False False",
    ], result.stderr


@pytest.mark.slow
def test_importing_prints_nothing_and_imports_no_heavy_or_optional_package() -> None:
    result = run(
        "import sys, transformers.models.llama.modeling_llama\n"
        "before = set(sys.modules)  # transformers imports triton where it is installed\n"
        "import landmark_llama\n"
        "heavy = ('triton', 'matplotlib', 'bitsandbytes', 'faiss', 'datasets', 'peft')\n"
        "ours = 'landmark_llama.attention.'\n"
        "kernels = [name for name in sys.modules if name.startswith((ours + 'triton', ours + 'fused'))]\n"
        "print([name for name in heavy if name in sys.modules and name not in before] + kernels)\n"
    )
    assert result.stdout == "[]\n" and result.stderr == ""


def test_attention_knows_tensors_only() -> None:
    imports = [
        line
        for path in (ROOT / "landmark_llama" / "attention").glob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import ", "from "))
    ]
    assert imports and not any("transformers" in line for line in imports)
