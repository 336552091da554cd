"""Folders as others meet them: loaded by the Auto classes in processes that never import landmark_llama."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM, LandmarkLlamaModel
from landmark_llama.hub import LOADER
from tests.tiny import random_ids, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, *arguments: Path, modules: Path) -> subprocess.CompletedProcess:
    """A new process, in a folder from which nothing can be imported by accident."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=modules.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer."""
    tiny_model().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ROOT / "finetune" / "tiny_base").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_auto_classes_load_a_folder_and_generate_where_the_package_was_not_imported(folder: Path) -> None:
    result = run(
        "import json, sys, torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "folder, again, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])\n"
        "classes = (AutoTokenizer, AutoConfig, AutoModel, AutoModelForCausalLM)\n"
        "assert 'landmark_llama' not in sys.modules\n"
        "tokenizer, config, body, model = (c.from_pretrained(folder, trust_remote_code=True) for c in classes)\n"
        "model.save_pretrained(again)\n"
        "second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)\n"
        "import landmark_llama as ours\n"
        "wanted = [ours.LandmarkLlamaConfig, ours.LandmarkLlamaModel] + 2 * [ours.LandmarkLlamaForCausalLM]\n"
        "assert [type(x) for x in (config, body, model, second)] == wanted\n"
        "assert type(second.config) is type(config) and tokenizer('a').input_ids\n"
        "print([m.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist() for m in (model, second)])\n",
        folder,
        folder.with_name("again"),
        Path(str(random_ids(40).tolist())),
        modules=folder.with_name("modules"),
    )
    expected = tiny_model().generate(random_ids(1, 40), max_new_tokens=5, do_sample=False)[0].tolist()
    assert result.stdout.splitlines()[-1:] == [str([expected, expected])], result.stderr
    assert (folder.with_name("again") / LOADER).read_text() == (folder / LOADER).read_text()  # no copy of a class


@pytest.mark.slow
def test_the_missing_package_is_named(folder: Path) -> None:
    result = run(
        "import sys\n"
        "class Nowhere:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'landmark_llama':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Nowhere)\n"
        "from transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "except ImportError as error:\n    print(error)\n",
        folder,
        modules=folder.with_name("modules"),
    )
    assert "pip install landmark_llama" in result.stdout, result.stdout + result.stderr


def test_where_the_package_was_imported_no_code_of_a_folder_is_run(folder: Path) -> None:
    (folder / LOADER).write_text("raise AssertionError('this code was run')\n")
    for trust in (None, True, False):
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is LandmarkLlamaConfig


def test_registering_for_the_auto_classes_makes_no_second_class(tmp_path: Path) -> None:
    for ours in (LandmarkLlamaConfig, LandmarkLlamaModel, LandmarkLlamaForCausalLM):
        ours.register_for_auto_class()
        assert ours._auto_class is None
    tiny_config().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", LOADER]


def test_a_configuration_from_the_hub_names_the_code_beside_it_once_saved(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = {"AutoConfig": "somebody/model--landmark_llama_classes.LandmarkLlamaConfig", "AutoX": "mine.X"}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written.pop("AutoX") == "mine.X"
    assert set(written.values()) == {
        f"landmark_llama_classes.{name}"
        for name in ("LandmarkLlamaConfig", "LandmarkLlamaModel", "LandmarkLlamaForCausalLM")
    }
