"""Arguments of the Trainer that would do something else than they say: refused, or made to work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_run import Interruption, base, data, flags  # noqa: F401
from transformers import Trainer

from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS, checkpoints, delete_checkpoint
from finetune.run import main

BEST = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1")
BEST = (*BEST, "--max_steps", "4", "--save_total_limit", "1")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--push_to_hub", "true"), "--push_to_hub True: .*when the run is done, `hf upload REPO OUTPUT_DIR`"),
        (("--enable_jit_checkpoint", "true"), "--enable_jit_checkpoint True: .*goes on from the last of --save_steps"),
        (("--save_only_model", "true"), "--save_only_model True: a run could not go on from such a checkpoint"),
        (("--save_on_each_node", "true"), "--save_on_each_node True: .*that all nodes share"),
        (("--ignore_data_skip", "true"), "--ignore_data_skip True: .*the same rows again"),
        (("--auto_find_batch_size", "true"), "--auto_find_batch_size True: .*--gradient_accumulation_steps"),
        (("--bf16_full_eval", "true"), "--bf16_full_eval True: it would round the weights"),
        (("--label_smoothing_factor", "0.1"), "--label_smoothing_factor 0.1: .*no perplexity"),
        (("--use_liger_kernel", "true"), "--use_liger_kernel True: it has no kernels for landmark attention"),
        ((*BEST, "--save_steps", "2"), "--eval_steps 1, --save_steps 2: .*give the same for both"),
        ((*BEST, "--metric_for_best_model", "accuracy"), "--metric_for_best_model accuracy: only the loss is measured"),
    ],
)
def test_what_would_silently_do_something_else_is_refused_before_anything_is_written(
    given: tuple[str, ...],
    why: str,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=why):
        main(flags(base, data, tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights_of(first), weights_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def best_is_step_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is trained, the held-out loss is lowest after the second step."""
    evaluate = Trainer.evaluation_loop

    def valued(self: Trainer, *args, **settings):
        output = evaluate(self, *args, **settings)
        output.metrics["eval_loss"] = 1.0 + abs(self.state.global_step - 2)
        return output

    monkeypatch.setattr(Trainer, "evaluation_loop", valued)


@pytest.mark.parametrize("lora", [(), ("--lora_rank", "2")], ids=["all", "lora"])
def test_the_best_model_is_kept_and_saved_also_by_a_run_that_was_interrupted_at_its_end(
    lora: tuple[str, ...],
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    best_is_step_2: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = flags(base, data, tmp_path, *BEST, *lora)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.run.save_finished_model", lambda *_: (_ for _ in ()).throw(Interruption()))
        with pytest.raises(Interruption):
            main(run)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    main(run)
    assert same_weights(tmp_path, tmp_path / "checkpoint-2")
    assert not same_weights(tmp_path, tmp_path / "checkpoint-4")
    assert json.loads((tmp_path / METRICS).read_text())["steps"] == 4
    main([*run, "--overwrite_output_dir"])
    assert same_weights(tmp_path, tmp_path / "checkpoint-2")
    (tmp_path / METRICS).unlink()
    delete_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="--load_best_model_at_end: .*checkpoint-2, the best checkpoint, is gone"):
        main(run)
