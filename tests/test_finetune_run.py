"""Whole runs of `finetune/run.py`, tiny: what they save, how they resume, how they refuse."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from finetune.arguments import UserError, parse_arguments
from finetune.checkpoints.output import COMPLETE, METRICS, checkpoints
from finetune.checkpoints.resume import SETTINGS
from finetune.data.prepare import make_rows
from finetune.demo.corpus import write_corpus
from finetune.demo.tokenizer import to_fast_tokenizer, train_sentencepiece
from finetune.run import finetune, main
from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.model_card import CARD
from landmark_llama.tokenization import LANDMARK_TOKEN

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of documents, as JSONL."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder, 120, retrieval_characters=(80, 300))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, data: Path) -> Path:
    """A tiny dense LLaMA with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = to_fast_tokenizer(train_sentencepiece([json.loads(row)["text"] for row in rows], 500), 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(base), "--data", str(data), "--output_dir", str(output), "--block_size", "8",
        "--context_length", "64", "--num_retrieved_blocks", "2", "--max_steps", str(STEPS), "--save_steps", "2",
        "--logging_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--max_heldout_rows", "4", "--heldout_share", "0.1",
        "--preprocessing_workers", "1", "--cpu_threads", "1", "--use_cpu", "true",
        "--save_total_limit", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base: Path, data: Path) -> Path:
    """The output folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    main(flags(base, data, output))
    return output


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Interruption(BaseException):
    """What a test raises in the middle of a run."""


def interrupt_at_save(monkeypatch, number: int, error: BaseException) -> None:
    """Makes the `number`-th save of the optimiser fail, after the model's weights were written."""
    original, calls = Trainer._save_optimizer_and_scheduler, []

    def save(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)


def test_a_finished_folder_is_complete_and_loads(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert isinstance(model, LandmarkLlamaForCausalLM)
    assert model.config.train_context_length == 64 and model.config.block_size == 8 and model.config.use_cache
    assert model.config.landmark_token_id == tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN)
    generated = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= 5
    metrics = json.loads((finished / METRICS).read_text())
    assert metrics["steps"] == STEPS and metrics["eval_rows"] == 4 and metrics["ordinary_tokens_per_row"] == 56
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).double().exp().item())
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-4", "checkpoint-6"]


def test_the_card_tells_what_came_out_and_a_readme_of_somebody_stays(
    finished: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    card, metrics = (finished / CARD).read_text(), json.loads((finished / METRICS).read_text())
    assert f"| held-out perplexity | {metrics['perplexity']:.4f} |" in card and f"Data: {data.name}." in card
    assert "56 tokens (64 positions" in card and str(data.parent) not in card
    (tmp_path / CARD).write_text("mine")
    main(flags(base, data, tmp_path, "--max_steps", "1"))
    assert (tmp_path / CARD).read_text() == "mine"
    for own in (True, False):  # what the run wrote itself is written anew, or deleted with the rest
        if own:
            (tmp_path / CARD).unlink()
        main(flags(base, data, tmp_path, "--max_steps", "1", "--overwrite_output_dir", "true"))
        assert "held-out perplexity" in (tmp_path / CARD).read_text()


def test_training_changes_the_landmark_row_and_the_other_weights(finished: Path, base: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, finished))
    landmark = AutoTokenizer.from_pretrained(finished).convert_tokens_to_ids(LANDMARK_TOKEN)
    mean = before["model.embed_tokens.weight"].mean(0)
    assert not torch.allclose(after["model.embed_tokens.weight"][landmark], mean, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("save", [2, 3])
def test_a_run_interrupted_while_it_saves_resumes_bit_for_bit(
    save: int, base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt_at_save(monkeypatch, save, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path))
    assert [path.name for path in checkpoints(tmp_path, complete=False)] == [f"checkpoint-{2 * save}"]
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{2 * save - 2}"
    monkeypatch.undo()
    main(flags(base, data, tmp_path))
    assert same_weights(tmp_path, finished)
    assert json.loads((tmp_path / METRICS).read_text()) == json.loads((finished / METRICS).read_text())


def test_a_run_interrupted_after_its_last_step_only_evaluates_and_saves(
    base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(Interruption()))
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path))
    assert not (tmp_path / METRICS).exists() and not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    main(flags(base, data, tmp_path))
    assert same_weights(tmp_path, finished)


def test_a_run_that_began_when_rows_still_held_landmarks_goes_on_bit_for_bit(
    base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt_at_save(monkeypatch, 2, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path))
    monkeypatch.undo()
    record = json.loads((tmp_path / SETTINGS).read_text())
    del record["rows"]
    (tmp_path / SETTINGS).write_text(json.dumps(record | {"data_fingerprint": "of rows with landmarks"}))
    main(flags(base, data, tmp_path))
    assert same_weights(tmp_path, finished)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_one_sentence(base: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "finetune" / "run.py"), *flags(base, data, tmp_path, "--max_steps", "100000")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # tests that a shell runs in the background ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "goes on from the last complete checkpoint" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1834304 vs 1834196"),
    ],
)
def test_a_full_disk_while_saving_is_one_sentence_and_the_checkpoint_before_survives(
    error: Exception, base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt_at_save(monkeypatch, 2, error)
    with pytest.raises(UserError, match=r"the disk is full; .*checkpoint-2 is complete"):
        main(flags(base, data, tmp_path))
    monkeypatch.undo()
    main(flags(base, data, tmp_path))
    assert same_weights(tmp_path, finished)


def test_old_checkpoints_are_deleted_only_after_the_new_one_is_complete(
    base: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt_at_save(monkeypatch, 3, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path, "--save_total_limit", "1"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_finished_run_is_neither_overwritten_nor_continued_unasked(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    main(flags(base, data, output))
    before = load_file(output / "model.safetensors")
    with pytest.raises(UserError, match="already holds a finished model; give another folder, --overwrite_output_dir"):
        main(flags(base, data, output))
    (output / "notes.txt").write_text("mine")
    main(flags(base, data, output, "--seed", "7", "--overwrite_output_dir"))
    after = load_file(output / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (output / "notes.txt").read_text() == "mine"
    main(flags(base, data, output, "--seed", "7", "--max_steps", "8", "--resume_from_checkpoint", "true"))
    assert json.loads((output / METRICS).read_text())["steps"] == 8


def test_an_unfinished_run_goes_on_with_its_own_settings_only(
    base: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt_at_save(monkeypatch, 2, Interruption())
    with pytest.raises(Interruption):
        main(flags(base, data, tmp_path))
    with pytest.raises(UserError, match=r"unfinished run with learning_rate=0\.01, not 0\.02"):
        main(flags(base, data, tmp_path, "--learning_rate", "0.02"))


def test_a_folder_with_another_model_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="already holds a finished model"):
        main(flags(base, data, tmp_path))
    with pytest.raises(UserError, match="is what the run starts from"):
        main(flags(base, data, base, "--overwrite_output_dir"))


def test_resuming_from_a_checkpoint_that_is_not_complete_is_refused(
    base: Path, data: Path, finished: Path, tmp_path
) -> None:
    with pytest.raises(UserError, match="no complete checkpoint in"):
        main(flags(base, data, tmp_path, "--resume_from_checkpoint", "true"))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match=f"no complete checkpoint .it holds no {COMPLETE}"):
        main(flags(base, data, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")))


def test_an_output_folder_that_cannot_be_made_is_one_sentence(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--output_dir .*file/run: Not a directory"):
        main(flags(base, data, tmp_path / "file" / "run"))


def test_dense_and_landmark_runs_are_measured_on_the_same_tokens(
    base: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    main(flags(base, data, tmp_path, "--attention", "dense"))
    dense, landmark = (json.loads((folder / METRICS).read_text()) for folder in (tmp_path, finished))
    for name in ("train_rows", "eval_rows", "ordinary_tokens_per_row", "steps"):
        assert dense[name] == landmark[name]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path).config, "landmark_token_id")
    model, data_args, run, _ = parse_arguments(flags(base, data, tmp_path))
    rows = make_rows(data_args, AutoTokenizer.from_pretrained(base), model.block_size, None, run.seed).heldout
    ids = torch.stack([row["input_ids"] for row in rows])
    for folder, metrics in ((tmp_path, dense), (finished, landmark)):
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss
        assert math.log(metrics["perplexity"]) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_documents_kept_apart_are_trained_on_as_if_alone(
    base: Path, data: Path, tmp_path: Path, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    step = Trainer.compute_loss

    def recorded(self, model, inputs, *args, **kwargs):
        batches.append({name: x.clone() for name, x in inputs.items()})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", recorded)
    main(flags(base, data, tmp_path / "run", "--pack_documents", "apart", "--streaming", streaming))
    assert json.loads((tmp_path / "run" / METRICS).read_text())["steps"] == STEPS
    model = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "run")
    several = 0
    for batch in batches:
        logits = model(**batch).logits
        for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
            begins = (batch["position_ids"][row, :real] == 0).nonzero().flatten().tolist()
            several += len(begins) > 1
            for begin, end in zip(begins, [*begins[1:], real], strict=True):
                document = model(batch["input_ids"][row : row + 1, begin:end]).logits[0]
                torch.testing.assert_close(logits[row, begin:end], document, rtol=1e-4, atol=1e-5)
    assert several


def test_a_landmark_checkpoint_is_trained_on_with_its_own_blocks(finished: Path, data: Path, tmp_path: Path) -> None:
    arguments = flags(finished, data, tmp_path, "--context_length", "96")
    metrics = finetune(*parse_arguments(arguments))
    assert metrics["ordinary_tokens_per_row"] == 84
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.train_context_length == 96 and config.block_size == 8
    with pytest.raises(UserError, match="--block_size 16: .* has blocks of 8"):
        main(flags(finished, data, tmp_path / "b", "--block_size", "16"))
    with pytest.raises(UserError, match="cannot be trained with --attention dense"):
        main(flags(finished, data, tmp_path / "c", "--attention", "dense"))


def test_a_run_starts_from_a_configuration_and_the_embedded_corpus(tmp_path: Path, base: Path) -> None:
    arguments = flags(base, tmp_path, tmp_path / "out", "--data", "embedded", "--corpus_documents", "150")
    arguments[:2] = ["--config_name", str(base / "config.json")]
    main([*arguments, "--tokenizer_name", "embedded", "--vocabulary_size", "500", "--max_steps", "2"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 501  # and the landmark
    assert (tmp_path / "out" / "corpus" / "train.jsonl").exists()


@pytest.mark.parametrize("segments", ["1", "3"])
def test_gradient_accumulation_gives_the_weights_of_the_larger_batch(
    segments: str, base: Path, data: Path, tmp_path: Path
) -> None:
    common = ("--segments", segments, "--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "2")
    common = (*common, "--save_steps", "100")
    main(flags(base, data, tmp_path / "a", *common, "--per_device_train_batch_size", "4"))
    main(flags(base, data, tmp_path / "b", *common, "--gradient_accumulation_steps", "2"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    start = load_file(base / "model.safetensors")["lm_head.weight"]
    moved = (a["lm_head.weight"][: len(start)] - start).abs().max()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-3 * moved, name


def test_a_broken_checkpoint_and_models_that_are_no_llama_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(broken)
    AutoTokenizer.from_pretrained(base).save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="broken: no checkpoint could be loaded: .*(truncated|damaged)"):
        main(flags(broken, data, tmp_path / "out"))
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type 'gpt2' is not a LLaMA"):
        main(flags(broken, data, tmp_path / "out2"))
    with pytest.raises(UserError, match="--context_length|num_retrieved_blocks=20"):
        main(flags(base, data, tmp_path / "out3", "--num_retrieved_blocks", "20"))


def test_a_tokenizer_of_another_model_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer has 502 tokens, more than the 500 of"):
        main(flags(base, data, tmp_path / "out", "--tokenizer_name", str(tmp_path / "tokenizer")))


@pytest.mark.slow
def test_a_users_mistake_ends_the_script_with_one_sentence_and_a_code(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, str(ROOT / "finetune" / "run.py"), *flags(base, tmp_path / "empty", tmp_path / "out")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: --data ") and "holds no .jsonl" in result.stderr
