"""Several processes on a CPU: the same losses as one, checkpoints that one loads; the accelerate configurations."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_finetune_run import ROOT, base, data, flags  # noqa: F401
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM
from transformers.trainer import TRAINER_STATE_NAME
from two_processes import ACCELERATE, ENDED, observe, run_in_two

from finetune import distributed
from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS, checkpoints, delete_checkpoint
from finetune.checkpoints.resume import SETTINGS
from finetune.demo.corpus import write_corpus
from finetune.run import main
from landmark_llama import LandmarkLlamaForCausalLM, load_adapter
from landmark_llama.modeling import LandmarkLlamaDecoderLayer

EVERY_STEP = ("--logging_steps", "1")
UNCLIPPED = (*EVERY_STEP, "--max_grad_norm", "0")  # FSDP adds up the norm of a gradient in another order


def launch(configuration: str, *arguments: str) -> None:
    """Runs the script in two CPU processes under an accelerate configuration of the project, as users do."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ACCELERATE / configuration), "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", str(ROOT / "finetune" / "run.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def logged(output: Path, name: str) -> list[float]:
    """What was logged as `name`, step by step."""
    state = json.loads((checkpoints(output)[-1] / TRAINER_STATE_NAME).read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base: Path, data: Path) -> Path:  # noqa: F811
    """The output folder of one process that accumulates the batches of two: the same sums in the same order."""
    output = tmp_path_factory.mktemp("distributed") / "alone"
    main(flags(base, data, output, *UNCLIPPED, "--gradient_accumulation_steps", "2"))
    return output


@pytest.mark.slow
def test_two_processes_train_as_one_does_that_accumulates_their_batches_bit_for_bit(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    launch("ddp.yaml", *flags(base, data, tmp_path, *UNCLIPPED))
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-6)
    assert len(logged(tmp_path, "loss")) == len(logged(tmp_path, "tokens_per_second")) == 6
    one, two = (json.loads((folder / METRICS).read_text()) for folder in (alone, tmp_path))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert same_weights(weights_of(alone), weights_of(tmp_path))


@pytest.mark.slow
def test_fsdp_trains_as_one_process_does_bit_for_bit_and_saves_what_one_process_loads(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    run = flags(base, data, tmp_path, *UNCLIPPED)
    codes, printed = run_in_two("fsdp.yaml", run, tmp_path / "printed", mixed_precision="no")
    assert codes == [0, 0] and "gathered" in printed, printed  # it was FSDP
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-6)
    assert same_weights(weights_of(alone), weights_of(tmp_path))
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


# All weights, held in fp32, on rows longer than the window; or an adapter, on a base held in bf16.
ALL, LORA = ("--segments", "2"), ("--lora_rank", "2", "--dtype", "bfloat16")
BF16 = {"loss": {"float32"}, "held-out loss": {"float32"}, "table": {"float32"}, "rotated": {"bfloat16"}}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def dtypes(printed: str) -> dict[str, set[str]]:
    """What `observe` printed."""
    lines = re.findall(r"^([\w -]+): torch\.(\w+)$", printed, re.MULTILINE)
    return {name: {dtype for other, dtype in lines if other == name} for name, _ in lines}


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory, base: Path, data: Path) -> Callable[..., SimpleNamespace]:  # noqa: F811
    """Four steps in bf16, ended before the evaluation; then the same command; and once more from the second step.

    Gives the folder, what was printed each time, and the weights that the second and the third saved.
    """

    @cache
    def made(configuration: str, *more: str, **settings: str) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("bf16")
        run = flags(base, data, folder / "run", *EVERY_STEP, "--max_steps", "4", *more)
        start = partial(run_in_two, configuration, run, folder, **settings)
        codes, ended = start(partial(observe, end_before_evaluation=True))
        assert codes == [ENDED, ENDED], ended
        assert [path.name for path in checkpoints(folder / "run")] == ["checkpoint-2", "checkpoint-4"]
        codes, finished = start(observe)
        assert codes == [0, 0], finished
        weights, losses = weights_of(folder / "run"), logged(folder / "run", "loss")
        (folder / "run" / METRICS).unlink()
        delete_checkpoint(folder / "run" / "checkpoint-4")
        codes, resumed = start(observe)
        assert codes == [0, 0], resumed
        again = weights_of(folder / "run"), logged(folder / "run", "loss")
        return SimpleNamespace(
            folder=folder / "run",
            printed=(ended, finished, resumed),
            weights=(weights, again[0]),
            losses=(losses, again[1]),
        )

    return made


@pytest.mark.slow
@pytest.mark.parametrize("trained", [ALL, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp.yaml"])
def test_a_run_in_bf16_goes_on_where_it_ended_and_saves_all_that_it_trained(
    configuration: str, trained: tuple[str, ...], in_bf16: Callable[..., SimpleNamespace]
) -> None:
    run = in_bf16(configuration, *trained)
    ended, finished, resumed = run.printed
    steps = [re.findall(r"^step (\d)/4  loss", printed, re.MULTILINE) for printed in run.printed]
    assert steps == [["1", "2", "3", "4"], [], ["3", "4"]]
    assert ("gathered" in ended) == (configuration == "fsdp.yaml")
    assert same_weights(*run.weights) and run.losses[0] == run.losses[1] and len(run.losses[0]) == 4
    if trained == LORA:
        model = load_adapter(run.folder)  # refuses one that is not complete
        changed = {name: weight for name, weight in run.weights[0].items() if "lora_B" in name}
        assert len(run.weights[0]) == 29 and len(changed) == 14
        assert all(weight.dtype == torch.float32 and weight.any() for weight in changed.values())
    else:
        model = AutoModelForCausalLM.from_pretrained(run.folder)
        assert isinstance(model, LandmarkLlamaForCausalLM)
        assert run.weights[0].keys() == dict(model.named_parameters()).keys()
    assert (run.folder / METRICS).exists()
    assert json.loads((run.folder / SETTINGS).read_text())["bf16"]  # as the accelerate configuration says


@pytest.mark.slow
@pytest.mark.parametrize("trained", [ALL, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp.yaml"])
def test_losses_and_rotary_tables_are_fp32_where_layers_compute_in_bf16(
    configuration: str, trained: tuple[str, ...], in_bf16: Callable[..., SimpleNamespace]
) -> None:
    seen, expected = dtypes("\n".join(in_bf16(configuration, *trained).printed)), dict(BF16)
    if trained == ALL:  # queries are rotated once more, to blocks of earlier segments, and that in fp32
        expected["rotated"] = {"bfloat16", "float32"}
    assert seen == expected


@pytest.mark.slow
def test_shards_are_saved_resumed_and_put_together(in_bf16: Callable[..., SimpleNamespace]) -> None:
    whole, shards = in_bf16("fsdp.yaml", *ALL), in_bf16("fsdp.yaml", *ALL, fsdp_state_dict_type="SHARDED_STATE_DICT")
    assert not list(shards.folder.glob("checkpoint-*/*model.safetensors"))
    assert len(list(shards.folder.glob("checkpoint-4/pytorch_model_fsdp_0/*.distcp"))) == 2
    assert same_weights(*shards.weights) and same_weights(shards.weights[0], whole.weights[0])
    assert isinstance(AutoModelForCausalLM.from_pretrained(shards.folder), LandmarkLlamaForCausalLM)


@pytest.mark.slow
def test_fsdp_saves_the_best_model_where_that_is_asked_for(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    best = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1")
    run = flags(base, data, tmp_path, *best, "--save_total_limit", "1", "--max_steps", "3", "--lora_rank", "2")
    codes, printed = run_in_two("fsdp.yaml", run, tmp_path / "printed", partial(observe, best_step=2))
    assert codes == [0, 0], printed
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert same_weights(weights_of(tmp_path), weights_of(tmp_path / "checkpoint-2"))
    assert not same_weights(weights_of(tmp_path), weights_of(tmp_path / "checkpoint-3"))


@pytest.mark.slow
@pytest.mark.parametrize("context_length", ["512", "1021", "2050", "4096"])
def test_long_rows_of_any_length_train_with_gradient_accumulation_as_in_one_batch(
    context_length: str,
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    write_corpus(tmp_path / "data", 400, retrieval_characters=(200, 400))
    more = ("--context_length", context_length, "--block_size", "32", "--max_steps", "2", "--save_steps", "2")
    more += ("--max_heldout_rows", "1")
    output, positions = tmp_path / "out", int(context_length)
    main(flags(base, tmp_path / "data", tmp_path / "whole", *more))
    more += ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    main(flags(base, tmp_path / "data", output, *more))
    metrics, whole = (json.loads((folder / METRICS).read_text()) for folder in (output, tmp_path / "whole"))
    assert metrics["ordinary_tokens_per_row"] == positions - positions // 32
    assert metrics["eval_loss"] < math.log(500)  # it was that of guessing among the vocabulary
    assert metrics["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)  # the sums' order is another
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
    alone = {"deepspeed_plugin": None, "n_gpu": 1, "max_nan_steps": 0, "gradient_checkpointing": False}
    return SimpleNamespace(**{**alone, "context_parallel_size": 1, **settings})


@pytest.mark.parametrize(
    ("version", "checkpointing", "refused"),
    [
        (2, False, None),
        (1, False, "fsdp_version 1: set fsdp_version: 2"),
        (2, True, "--gradient_checkpointing and fsdp_activation_checkpointing: .* leave the first one out"),
    ],
)
def test_fsdp_of_another_version_or_that_recomputes_layers_twice_is_refused(
    version: int, checkpointing: bool, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, activation_checkpointing=True, cpu_ram_efficient_loading=False
    )
    monkeypatch.setattr(distributed, "fsdp_settings", lambda run: plugin)
    with nullcontext() if refused is None else pytest.raises(UserError, match=refused):
        distributed.check_distribution(run_with(gradient_checkpointing=checkpointing))


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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fsdp_sums_gradients_in_fp32_and_leaves_losses_as_they_are(precision: str) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision(precision)
    weights = plugin.mixed_precision_policy.param_dtype
    distributed.compute_losses_in_fp32(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(weights, reduce_dtype=torch.float32)
    assert weights.itemsize == 2


def test_fsdp_wraps_the_layer_that_there_is() -> None:
    settings = load_config_from_file(str(ACCELERATE / "fsdp.yaml")).fsdp_config
    assert settings["fsdp_transformer_layer_cls_to_wrap"] == LandmarkLlamaDecoderLayer.__name__
    assert settings["fsdp_version"] == 2
