"""Runs of `finetune/run.py` whose processes hold each row together: the same losses, weights and evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_finetune_distributed import UNCLIPPED, logged, weights_of
from test_finetune_run import base, data, flags  # noqa: F401
from tiny import tiny_model
from two_processes import run_in_two

from finetune.arguments import UserError, parse_arguments
from finetune.checkpoints.output import METRICS
from finetune.distributed import check_context_parallel, check_distribution
from finetune.run import main

SHARED = ("--context_parallel_size", "2", "--context_length", "61")  # the last part ends inside a block


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base: Path, data: Path) -> Path:  # noqa: F811
    """The output folder of one process that accumulates the batches of two."""
    output = tmp_path_factory.mktemp("context") / "alone"
    main(flags(base, data, output, *UNCLIPPED, "--context_length", "61", "--gradient_accumulation_steps", "2"))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp.yaml"])
def test_two_processes_that_hold_rows_together_train_as_one(
    configuration: str,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    run = flags(base, data, tmp_path / "run", *UNCLIPPED, *SHARED)
    codes, printed = run_in_two(configuration, run, tmp_path / "printed", mixed_precision="no")
    assert codes == [0, 0], printed
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    one, two = (json.loads((folder / METRICS).read_text()) for folder in (alone, tmp_path / "run"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert len(logged(tmp_path / "run", "tokens_per_second")) == 6
    assert weights_of(tmp_path / "run").keys() == weights_of(alone).keys()


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (("--context_parallel_size", "3"), "--context_parallel_size 3: must divide the number of processes, 2"),
        (("--context_parallel_size", "2", "--attention", "dense"), "needs --attention landmark"),
        (("--context_parallel_size", "2", "--segments", "2"), "--segments 2"),
        (("--context_parallel_size", "2", "--pack_documents", "apart"), "--pack_documents join"),
        (("--context_parallel_size", "2", "--average_tokens_across_devices", "false"), "tokens_across_devices true"),
    ],
)
def test_runs_that_cannot_share_rows_are_refused(
    more: tuple[str, ...], refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.arguments.RunArguments.world_size", 2)
    with pytest.raises(UserError, match=refused):
        parse_arguments(flags(tmp_path, tmp_path, tmp_path / "output", *more))


@pytest.mark.parametrize(
    ("settings", "size", "refused"),
    [
        ({}, 3, "4 attention heads"),
        ({}, 4, "a row has 2 blocks"),
        ({"block_weight": "exact"}, 2, "--block_weight exact"),
    ],
)
def test_models_whose_rows_cannot_be_shared_are_refused(settings: dict, size: int, refused: str) -> None:
    check_context_parallel(tiny_model(), 2, context_length=8)
    with pytest.raises(UserError, match=refused):
        check_context_parallel(tiny_model(**settings), size, context_length=8)


def test_deepspeed_is_refused_where_processes_hold_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.distributed.fsdp_settings", lambda run: None)
    settings = {"n_gpu": 1, "max_nan_steps": 0, "gradient_checkpointing": False, "context_parallel_size": 2}
    check_distribution(SimpleNamespace(deepspeed_plugin=None, **settings))
    with pytest.raises(UserError, match="--context_parallel_size 2: DeepSpeed"):
        check_distribution(SimpleNamespace(deepspeed_plugin=object(), **settings))
