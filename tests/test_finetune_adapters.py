"""Runs of `finetune/run.py` with an adapter: what they train and save, how they resume, how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_run import ROOT, Interruption, base, data, flags, interrupt_at_save  # noqa: F401
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eval_passkey.models import find_subject
from eval_passkey.models import load_model as load_subject
from finetune.adapters import four_bit
from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS, checkpoints
from finetune.run import main
from landmark_llama import load_adapter
from landmark_llama.adapters.folder import ADAPTER_WEIGHTS, LANDMARK_ROW
from landmark_llama.merge import merge_adapter

LORA = ("--lora_rank", "2", "--lora_dropout", "0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base: Path, data: Path) -> Path:  # noqa: F811
    """The output folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("adapters") / "finished"
    main(flags(base, data, output, *LORA))
    return output


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / ADAPTER_WEIGHTS) for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_saves_an_adapter_that_loads(finished: Path) -> None:
    assert not list(finished.rglob("model*.safetensors"))
    model, tokenizer = load_adapter(finished), AutoTokenizer.from_pretrained(finished)
    assert model.config.train_context_length == 64 and model.config.block_size == 8
    assert model.config.landmark_token_id == tokenizer.convert_tokens_to_ids("<landmark>") == 500
    assert model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[1] <= 5
    metrics = json.loads((finished / METRICS).read_text())
    # two layers of seven matrices, 16 or 24 wide, and the landmark's row
    assert metrics["trained_parameters"] == 2 * 2 * (4 * 32 + 3 * 40) + 16
    row, embedding = load_file(finished / ADAPTER_WEIGHTS)[LANDMARK_ROW], model.get_input_embeddings().weight
    assert torch.equal(embedding[500], row[0])
    assert not torch.allclose(row[0], embedding[:500].mean(0), atol=1e-4)


def test_a_checkpoint_holds_what_was_trained_and_its_optimiser_no_more(finished: Path) -> None:
    for checkpoint in checkpoints(finished):
        weights = load_file(checkpoint / ADAPTER_WEIGHTS)
        trained = sum(weight.numel() for weight in weights.values())
        assert trained == json.loads((finished / METRICS).read_text())["trained_parameters"]
        moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
        assert sum(moment["exp_avg"].numel() for moment in moments) == trained
        assert not list(checkpoint.glob("model*"))
        load_adapter(checkpoint)  # as complete as the finished folder


@pytest.mark.parametrize("gathered", [False, True])
def test_an_adapter_is_saved_whole_where_layers_are_wrapped(gathered: bool, finished: Path, tmp_path: Path) -> None:
    model = load_adapter(finished)
    layers = model.get_base_model().model.layers
    layers[0] = offload_wrapper(checkpoint_wrapper(layers[0]))
    layers[1] = torch.compile(layers[1], backend="eager")
    # FSDP gathers weights by the names that they had before
    model.save_pretrained(tmp_path, state_dict=load_adapter(finished).state_dict() if gathered else None)
    assert same_weights(tmp_path, finished)


@pytest.mark.parametrize("save", [2, 3])
def test_an_interrupted_run_resumes_bit_for_bit(
    save: int,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_at_save(monkeypatch, save, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path, *LORA))
    monkeypatch.undo()
    for more in ((), ("--lora_rank", "3"), LORA[2:]):
        with pytest.raises(UserError, match="unfinished run with lora_rank=2, not|--lora_rank is missing"):
            main(flags(base, data, tmp_path, *more))
    main(flags(base, data, tmp_path, *LORA))
    assert same_weights(tmp_path, finished)
    assert json.loads((tmp_path / METRICS).read_text()) == json.loads((finished / METRICS).read_text())


def test_a_run_interrupted_after_its_last_step_only_evaluates_and_saves(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda self: (_ for _ in ()).throw(Interruption()))
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path, *LORA))
    monkeypatch.undo()
    main(flags(base, data, tmp_path, *LORA))
    assert same_weights(tmp_path, finished)


def test_the_folders_owner_keeps_a_readme_when_the_run_is_thrown_away(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "README.md").write_text("mine")
    main(flags(base, data, tmp_path, *LORA, "--max_steps", "1"))
    main(flags(base, data, tmp_path, "--max_steps", "1", "--overwrite_output_dir"))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("adapter*")) and not (tmp_path / "landmark_adapter.json").exists()


def test_an_adapter_is_trained_with_gradient_checkpointing_to_the_same_weights(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    finished: Path,
    tmp_path: Path,
) -> None:
    main(flags(base, data, tmp_path, *LORA, "--gradient_checkpointing", "true"))
    assert same_weights(tmp_path, finished)


@pytest.mark.slow
def test_two_processes_train_as_one_does_that_accumulates_their_batches(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    main(flags(base, data, tmp_path / "one", *LORA[:2], "--gradient_accumulation_steps", "2"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = str(ROOT / "finetune" / "run.py")
    subprocess.run(
        [*launch, script, *flags(base, data, tmp_path / "two", *LORA[:2])], check=True, stdout=subprocess.DEVNULL
    )
    one, two = (json.loads((tmp_path / name / METRICS).read_text()) for name in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert same_weights(tmp_path / "one", tmp_path / "two")
    load_adapter(tmp_path / "two")


def test_a_merged_model_is_as_good_as_the_run_says(base: Path, data: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    merge_adapter(finished, tmp_path / "merged")
    # a step that cannot be felt: the run evaluates what it was given
    main(flags(tmp_path / "merged", data, tmp_path / "out", "--max_steps", "1", "--learning_rate", "1e-30"))
    before, after = (json.loads((folder / METRICS).read_text()) for folder in (finished, tmp_path / "out"))
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)


def test_the_pass_key_test_takes_an_adapter_and_other_retrieval_settings(finished: Path) -> None:
    subject = find_subject("--model", str(finished), {"num_retrieved_blocks": 1})
    assert subject.is_landmark and subject.training_context == 64
    model = load_subject("--model", subject, "auto", "cpu")
    assert model.config.num_retrieved_blocks == 1 and not model.training


def test_an_adapter_is_no_checkpoint_to_train_on(finished: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="no checkpoint could be loaded: .*an adapter, not a whole model"):
        main(flags(finished, data, tmp_path))


def test_missing_packages_are_one_sentence(base: Path, data: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--load_in_4bit: needs bitsandbytes, .* pip install 'landmark-llama\[qlora\]'"
    ):
        four_bit(torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="--lora_rank 2: needs peft, which is not installed"):
        main(flags(base, data, tmp_path, *LORA))


def test_a_base_of_4_bits_is_trained_and_its_adapter_goes_onto_the_full_one_too(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    wide = LlamaConfig.from_pretrained(base, hidden_size=64, intermediate_size=64, head_dim=32)  # as its kernels want
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    run = flags(tmp_path / "base", data, tmp_path / "out", *LORA, "--load_in_4bit", "true")
    main(run)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    metrics = json.loads((tmp_path / "out" / METRICS).read_text())
    assert metrics["trained_parameters"] == 2 * 2 * 7 * 128 + 64
    in_4_bits = load_adapter(tmp_path / "out", quantization_config=four_bit(torch.float32))
    projection = in_4_bits.get_base_model().model.layers[0].mlp.up_proj
    assert projection.base_layer.weight.dtype == torch.uint8
    assert in_4_bits.get_output_embeddings().weight.dtype == torch.float32
    full, ids = load_adapter(tmp_path / "out"), torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        near, exact = in_4_bits(ids).logits, full(ids).logits
    assert 0 < (near - exact).std() < exact.std()  # as far as a model that knows nothing would be
    merge_adapter(tmp_path / "out", tmp_path / "merged")
