"""Several processes on a CPU: the same losses as one, checkpoints that one loads; the accelerate configurations."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_finetune_run import ROOT, base, data, flags  # noqa: F401
from transformers import AutoModelForCausalLM
from transformers.trainer import TRAINER_STATE_NAME

from finetune import distributed
from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS, checkpoints
from finetune.demo.corpus import write_corpus
from finetune.run import main
from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.modeling import LandmarkLlamaDecoderLayer

ACCELERATE = ROOT / "finetune" / "configs" / "accelerate"
EVERY_STEP = ("--logging_steps", "1")


def launch(configuration: str, script: str, *arguments: str) -> str:
    """Runs `script` in two CPU processes under an accelerate configuration of the project; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ACCELERATE / configuration), "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", str(ROOT / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def logged(output: Path, name: str) -> list[float]:
    """What was logged as `name`, step by step."""
    state = json.loads((checkpoints(output)[-1] / TRAINER_STATE_NAME).read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def same_weights_within_rounding(first: Path, second: Path) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base: Path, data: Path) -> Path:  # noqa: F811
    """The output folder of one process with the batch of two."""
    output = tmp_path_factory.mktemp("distributed") / "alone"
    main(flags(base, data, output, *EVERY_STEP, "--per_device_train_batch_size", "4"))
    return output


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_twice_the_batch(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    launch("ddp.yaml", "finetune/run.py", *flags(base, data, tmp_path, *EVERY_STEP))
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    assert len(logged(tmp_path, "loss")) == len(logged(tmp_path, "tokens_per_second")) == 6
    one, two = (json.loads((folder / METRICS).read_text()) for folder in (alone, tmp_path))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    same_weights_within_rounding(alone, tmp_path)


@pytest.mark.slow
def test_fsdp_trains_as_one_process_does_and_saves_what_one_process_loads(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    printed = launch("fsdp.yaml", "tests/fsdp_on_cpu.py", *flags(base, data, tmp_path, *EVERY_STEP))
    assert "gathered" in printed  # it was FSDP
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    same_weights_within_rounding(alone, tmp_path)
    for folder in (tmp_path, *checkpoints(tmp_path)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(model, LandmarkLlamaForCausalLM)
    metrics = json.loads((tmp_path / METRICS).read_text())
    assert metrics == json.loads((alone / METRICS).read_text()) | {
        name: metrics[name] for name in ("train_loss", "eval_loss", "perplexity")
    }
    # one process evaluates what FSDP saved as FSDP did
    main(flags(tmp_path, data, tmp_path / "again", "--max_steps", "1", "--learning_rate", "1e-30"))
    again = json.loads((tmp_path / "again" / METRICS).read_text())
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("context_length", ["512", "1021", "2050", "4096"])
def test_long_rows_of_any_length_train_with_gradient_accumulation(
    context_length: str,
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    write_corpus(tmp_path / "data", 400, retrieval_characters=(200, 400))
    more = ("--context_length", context_length, "--block_size", "32", "--max_steps", "2", "--save_steps", "2")
    more += ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_heldout_rows", "1")
    output = tmp_path / "out"
    main(flags(base, tmp_path / "data", output, *more))
    metrics = json.loads((output / METRICS).read_text())
    positions = int(context_length)
    assert metrics["ordinary_tokens_per_row"] == positions - positions // 32
    assert metrics["eval_loss"] < 7
    assert AutoModelForCausalLM.from_pretrained(output).config.train_context_length == positions


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one_gpu.yaml", DistributedType.NO),
        ("ddp.yaml", DistributedType.MULTI_GPU),
        ("fsdp.yaml", DistributedType.FSDP),
        ("zero3.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_every_accelerate_configuration_is_one_that_accelerate_knows(name: str, kind: DistributedType) -> None:
    configuration = load_config_from_file(str(ACCELERATE / name))
    assert configuration.distributed_type == kind and configuration.mixed_precision == "bf16"
    assert len(list(ACCELERATE.glob("*.yaml"))) == 4


def run_with(**settings: object) -> SimpleNamespace:
    """What `check_distribution` looks at, of a run on one device unless said otherwise."""
    return SimpleNamespace(**{"deepspeed_plugin": None, "n_gpu": 1, "max_nan_steps": 0, **settings})


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp_that_could_not_save_the_model_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False)
    monkeypatch.setattr(distributed, "fsdp_settings", lambda run: plugin)
    if kind == "FULL_STATE_DICT":
        distributed.check_distribution(run_with())
    else:
        with pytest.raises(UserError, match="fsdp_state_dict_type SHARDED_STATE_DICT: .* FULL_STATE_DICT alone"):
            distributed.check_distribution(run_with())


@pytest.mark.parametrize(("deepspeed", "gpus"), [(object(), 1), (None, 2)])
def test_segments_are_refused_where_a_batch_has_one_backward_or_one_process_several_gpus(
    deepspeed: object, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "fsdp_settings", lambda run: None)
    run = run_with(deepspeed_plugin=deepspeed, n_gpu=gpus)
    distributed.check_distribution(run)
    with pytest.raises(UserError, match="--segments 2: .*(use DDP|accelerate launch)"):
        distributed.check_distribution(run, segments=2)


def test_deepspeed_is_refused_where_a_step_may_have_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "fsdp_settings", lambda run: None)
    distributed.check_distribution(run_with(max_nan_steps=3))
    with pytest.raises(UserError, match="--max_nan_steps 3: DeepSpeed can leave no step out"):
        distributed.check_distribution(run_with(deepspeed_plugin=object(), max_nan_steps=3))


def test_fsdp_wraps_the_layer_that_there_is() -> None:
    settings = load_config_from_file(str(ACCELERATE / "fsdp.yaml")).fsdp_config
    assert settings["fsdp_transformer_layer_cls_to_wrap"] == LandmarkLlamaDecoderLayer.__name__
    assert settings["fsdp_version"] == 2
