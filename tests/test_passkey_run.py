"""The passkey command: its files, resuming, refusals; with tiny dense and landmark models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prompt_tokenizers import DATA, byte_tokenizer, save_dense
from transformers import GPT2Config, GPT2LMHeadModel

from eval_passkey import measure, run
from eval_passkey.prompts import InputError
from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.configuration import RETRIEVAL_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
ROW = [
    "task", "length", "prompt_tokens", "phase", "depth", "seed", "key", "prediction", "correct", "recall", "seconds",
]  # fmt: skip
SUMMARY_ROW = [
    "task", "length", "samples", "correct", "accuracy", "ci_low", "ci_high", "recall", "part", "seconds_per_prompt",
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def landmark(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("landmark"), byte_tokenizer()
    LandmarkLlamaForCausalLM.from_llama(dense, tokenizer, block_size=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def clairvoyant(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Lets every prompt of 400 tokens or more be answered rightly; lists length and seed of what was asked."""
    asked = []

    def answer(model, tokenizer, prompt, cache=None):
        asked.append((len(prompt.input_ids), prompt.seed))
        return f" {prompt.key}." if len(prompt.input_ids) >= 400 else f" {prompt.key}1."

    monkeypatch.setattr(measure, "generate_answer", answer)
    return asked


def command(model: Path, output: Path, *more: str) -> int:
    return run.main(["--model", str(model), "--output", str(output), "--device", "cpu", *more])


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_writes_rows_summary_and_pictures_and_prints_their_paths(dense, tmp_path, capsys):
    output = tmp_path / "out"
    assert command(dense, output, "--baseline", str(dense), "--lengths", "500", "350", "--samples", "2") == 0
    for folder in (output, output / "baseline"):
        rows = rows_of(folder)
        assert [(row["length"], row["seed"]) for row in rows] == [(350, 0), (350, 1), (500, 0), (500, 1)]
        assert all(list(row) == ROW and row["prompt_tokens"] == row["length"] for row in rows)
        assert all(row["task"] == "passkey" and row["phase"] is None for row in rows)
        assert all(row["seconds"] > 0 and not row["correct"] and 0 <= row["depth"] <= 1 for row in rows)
        summary = json.loads((folder / "summary.json").read_text())
        assert [list(row) for row in summary["rows"]] == [SUMMARY_ROW] * 2
        assert [(row["length"], row["samples"], row["correct"]) for row in summary["rows"]] == [
            (350, 2, 0),
            (500, 2, 0),
        ]
        assert summary["model"] == str(dense) and summary["training_context"] == 128
        assert summary["by_phase"] == [] and summary["settings"]["length_spread"] == 1
        assert summary["settings"]["seed"] == 0 and summary["device"].startswith("cpu")
        assert summary["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for name in ("results.jsonl", "summary.json", "accuracy.png", "depth.png", "baseline/results.jsonl"):
        assert (output / name).is_file() and str(output / name) in printed
    assert "length" in printed and "baseline (" in printed


def test_only_whole_keys_count(dense, clairvoyant, tmp_path):
    command(dense, tmp_path, "--lengths", "399", "400", "--samples", "3")
    assert [row["accuracy"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]] == [0.0, 1.0]
    longer, right = rows_of(tmp_path)[0], rows_of(tmp_path)[3]
    assert longer["prediction"] == longer["key"] + "1" and right["prediction"] == right["key"]


def test_grid_depths_are_taken_in_turn(dense, clairvoyant, tmp_path):
    command(dense, tmp_path, "--lengths", "800", "--samples", "6", "--depths", "grid", "--num_depths", "3")
    assert [row["depth"] for row in rows_of(tmp_path)] == pytest.approx([0, 0.5, 1, 0, 0.5, 1], abs=2e-3)
    assert len({row["key"] for row in rows_of(tmp_path)}) == 6


def test_an_interrupted_run_goes_on_and_gives_the_rows_of_an_uninterrupted_one(dense, tmp_path, monkeypatch):
    arguments = ("--lengths", "350", "500", "--samples", "2")
    command(dense, tmp_path / "whole", *arguments)
    real, calls = measure.generate_answer, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measure, "generate_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(dense, tmp_path / "torn", *arguments)
    results = tmp_path / "torn/results.jsonl"
    assert len(results.read_text().splitlines()) == 2
    with results.open("a") as file:
        file.write('{"length": 500, "prompt_tok')
    command(dense, tmp_path / "torn", *arguments)
    assert len(calls) == 3 + 2
    assert without_seconds(rows_of(tmp_path / "torn")) == without_seconds(rows_of(tmp_path / "whole"))


def test_a_finished_run_asks_nothing_again_and_takes_more_lengths_and_samples(dense, clairvoyant, tmp_path):
    command(dense, tmp_path, "--lengths", "400", "--samples", "2")
    command(dense, tmp_path, "--lengths", "400", "--samples", "2")
    assert clairvoyant == [(400, 0), (400, 1)]
    command(dense, tmp_path, "--lengths", "400", "450", "--samples", "3")
    assert clairvoyant[2:] == [(400, 2), (450, 0), (450, 1), (450, 2)]
    assert [row["samples"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]] == [3, 3]


def test_results_of_other_settings_are_refused_and_left_as_they_are(dense, clairvoyant, tmp_path):
    output = tmp_path / "out"
    command(dense, output, "--lengths", "400", "--samples", "1")
    before = (output / "results.jsonl").read_bytes(), (output / "summary.json").read_bytes()
    with pytest.raises(InputError, match=r"settings.seed was 0 and is 5\); choose another --output"):
        command(dense, output, "--lengths", "400", "--seed", "5")
    wording = json.loads((ROOT / "eval_passkey/template_paper.json").read_text()) | {"needle": "It is {key}."}
    (tmp_path / "other.json").write_text(json.dumps(wording))
    with pytest.raises(InputError, match=r"tasks.passkey.template.needle was .* and is \"It is {key}.\""):
        command(dense, output, "--lengths", "400", "--template", str(tmp_path / "other.json"))
    with pytest.raises(InputError, match=r"settings.length_spread was 1 and is 15\); choose another --output"):
        command(dense, output, "--lengths", "400", "--length_spread", "15")
    with pytest.raises(InputError, match="fingerprint was"):
        command(save_dense(tmp_path / "retrained", seed=1), output, "--lengths", "400")
    assert before == ((output / "results.jsonl").read_bytes(), (output / "summary.json").read_bytes())


def test_a_moved_model_is_still_the_same_one(dense, clairvoyant, tmp_path):
    command(dense, tmp_path / "out", "--lengths", "400", "--samples", "1")
    shutil.copytree(dense, tmp_path / "moved")
    command(tmp_path / "moved", tmp_path / "out", "--lengths", "400", "--samples", "1")
    assert clairvoyant == [(400, 0)]


def test_a_broken_row_in_the_middle_is_refused_by_line(dense, clairvoyant, tmp_path):
    command(dense, tmp_path, "--lengths", "400", "--samples", "2")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([lines[0], "oops", lines[1]]) + "\n")
    with pytest.raises(InputError, match=r"results\.jsonl, line 2: is no row of results"):
        command(dense, tmp_path, "--lengths", "400", "--samples", "2")


def test_a_baseline_that_fails_at_a_length_is_skipped_there_and_the_model_goes_on(dense, tmp_path, capsys):
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=1, n_positions=400, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    lengths = ("--lengths", "350", "450", "--samples", "2")
    assert command(dense, tmp_path / "out", "--baseline", str(tmp_path / "gpt2"), *lengths) == 0
    assert len(rows_of(tmp_path / "out")) == 4
    assert [row["length"] for row in rows_of(tmp_path / "out/baseline")] == [350, 350]
    (skipped,) = json.loads((tmp_path / "out/baseline/summary.json").read_text())["skipped"]
    assert skipped["length"] == 450 and "IndexError" in skipped["reason"]
    captured = capsys.readouterr()
    assert "baseline: 450 tokens are skipped, generation failed (IndexError" in captured.err
    assert "not run" in captured.out


def test_a_model_that_lacks_memory_skips_the_length_but_other_errors_are_not_hidden(dense, tmp_path, monkeypatch):
    def fail(error: Exception):
        def answer(model, tokenizer, prompt, cache=None):
            if len(prompt.input_ids) == 450:
                raise error
            return "0"

        return answer

    arguments = ("--lengths", "400", "450", "--samples", "2")
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(measure, "generate_answer", fail(lack))
    assert command(dense, tmp_path / "out", *arguments) == 1
    assert {row["length"] for row in rows_of(tmp_path / "out")} == {400}
    monkeypatch.setattr(measure, "generate_answer", fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        command(dense, tmp_path / "out", *arguments)


def test_a_landmark_model_runs_with_retrieval_settings_of_the_command(landmark, dense, tmp_path):
    settings = (
        "--exact_lengths", "--num_retrieved_blocks", "2", "--num_local_blocks", "1", "--retrieval_granularity", "head",
        "--local_attention", "chunked",
    )  # fmt: skip
    arguments = ("--baseline", str(dense), "--lengths", "600", "--samples", "2")
    assert command(landmark, tmp_path, *arguments, *settings) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    retrieval = summary["settings"]["retrieval"]
    assert [retrieval[name] for name in RETRIEVAL_SETTINGS] == [2, 1, "chunked", "head"]
    assert summary["training_context"] == 128
    assert json.loads((tmp_path / "baseline/summary.json").read_text())["settings"]["retrieval"] == {}
    with pytest.raises(InputError, match=r"settings\.retrieval\.num_retrieved_blocks was 2 and is 3"):
        command(landmark, tmp_path, *arguments, *settings[:1], *settings[3:], "--num_retrieved_blocks", "3")


def test_the_settings_reach_the_landmark_model_itself(landmark, tmp_path):
    arguments = run.Arguments(model=str(landmark), output=str(tmp_path), lengths=[400], num_retrieved_blocks=1)
    subject = run.find_subjects(arguments)["model"]
    model = run.load_model("--model", subject, "auto", "cpu")
    assert model.config.num_retrieved_blocks == 1 and not model.training


def test_retrieval_settings_that_do_not_fit_are_refused(landmark, dense, tmp_path):
    with pytest.raises(InputError, match=r"--num_retrieved_blocks, --local_attention needs a landmark model.*'llama'"):
        command(dense, tmp_path, "--num_retrieved_blocks", "2", "--local_attention", "chunked")
    with pytest.raises(InputError, match="num_retrieved_blocks=99"):
        command(landmark, tmp_path, "--num_retrieved_blocks", "99")
    with pytest.raises(InputError, match="retrieval_granularity='row'"):
        command(landmark, tmp_path, "--retrieval_granularity", "row")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "512", "0"], "^--lengths 0: a prompt has at least one token"),
        (["--lengths", "-5"], "^--lengths -5"),
        (["--samples", "0"], "^--samples 0: must be at least 1"),
        (["--depths", "grid", "--samples", "7"], "^--samples 7: must be a multiple of --num_depths 5"),
        (["--lengths", "100"], "^length=100: task, needle and question alone need [0-9]+ tokens"),
        (["--template", "nowhere.json"], "^template nowhere.json: cannot be read"),
        (["--baseline", "./nowhere"], "^--baseline ./nowhere: there is no such folder"),
        (["--baseline", "nowhere"], "^--baseline nowhere: there is no such folder"),
        (["--task", "needle"], "^--task needle: there is no 'needle'; choose from passkey, "),
        (["--task", "passkey:text"], "^--task passkey:text: needs a text, --haystack FILE"),
        (["--haystack", "a.txt"], "^--haystack a.txt: no task reads it; write --task passkey:text"),
        (["--task", "passkey:text", "--haystack", "nowhere.txt"], "^--haystack nowhere.txt: cannot be read"),
        (["--task", "passkey:once", "--template", "a.json"], "^--template a.json: no task has it"),
        (["--chat_template", "true"], "^--chat_template true: the tokenizer has no chat template"),
        (["--length_spread", "0"], "^--length_spread 0: must be at least 1"),
        (["--length_spread", "9", "--exact_lengths"], "^--length_spread 9: contradicts --exact_lengths"),
        (["--lengths", "300", "--length_spread", "90"], "^--lengths 300: prompts have up to 89 tokens less; length=2"),
        (["--device", "abacus"], "^--model .*: the model cannot be loaded"),
    ],
)
def test_bad_arguments_get_one_sentence(more, message, dense, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        command(dense, tmp_path, *more)
    assert "\n" not in str(error.value)


def test_bad_folders_get_one_sentence(dense, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be read and written"):
        command(dense, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no configuration and tokenizer can be read there"):
        command(tmp_path / "empty", tmp_path / "out")
    shutil.copytree(dense, tmp_path / "torn")
    os.truncate(tmp_path / "torn/model.safetensors", 5000)
    with pytest.raises(InputError, match="torn: the model cannot be loaded"):
        command(tmp_path / "torn", tmp_path / "out", "--lengths", "400")


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "deeper")
    config = json.loads((dense / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "deeper/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"deeper: lacks 9 weights, the first being model.layers.2"):
        command(tmp_path / "deeper", tmp_path / "out", "--lengths", "400")


def test_the_script_says_one_sentence_and_fails(tmp_path):
    script = [sys.executable, str(ROOT / "eval_passkey/run.py")]
    arguments = ["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    done = subprocess.run(script + arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"eval_passkey: --model {tmp_path / 'nowhere'}: there is no such folder"


def test_a_pretrained_llama_and_its_landmark_form_run_side_by_side(tmp_path):
    folder = DATA / "models/stories260K/gqa"
    if not folder.is_dir():
        pytest.skip(f"LANDMARK_DATA: {folder} is not there")
    tokenizer = run.find_subject("--model", str(folder), {}).tokenizer
    LandmarkLlamaForCausalLM.from_llama(folder, tokenizer, block_size=16).save_pretrained(tmp_path / "landmark")
    tokenizer.save_pretrained(tmp_path / "landmark")
    arguments = ("--baseline", str(folder), "--lengths", "300", "700", "--samples", "1")
    assert command(tmp_path / "landmark", tmp_path / "out", *arguments) == 0
    for rows in (rows_of(tmp_path / "out"), rows_of(tmp_path / "out/baseline")):
        assert [row["length"] for row in rows] == [300, 700]
        assert all(0 <= row["length"] - row["prompt_tokens"] < 15 for row in rows)


# -- lengths, phases and tasks ---------------------------------------------------------------------------------------


def test_model_and_baseline_get_the_same_prompts_of_every_phase(landmark, dense, clairvoyant, tmp_path, capsys):
    arguments = ("--baseline", str(dense), "--lengths", "400", "500", "--samples", "14")
    assert command(landmark, tmp_path, *arguments) == 0
    ours, theirs = rows_of(tmp_path), rows_of(tmp_path / "baseline")
    same = ("length", "prompt_tokens", "phase", "depth", "seed", "key")
    assert [[row[name] for name in same] for row in ours] == [[row[name] for name in same] for row in theirs]
    for length in (400, 500):
        tokens = [row["prompt_tokens"] for row in ours if row["length"] == length]
        assert sorted(tokens) == sorted(2 * list(range(length - 6, length + 1)))  # blocks of 7 ordinary tokens
    assert all(row["phase"] == row["prompt_tokens"] % 7 for row in ours)
    assert [tokens for tokens, _ in clairvoyant] == 2 * [row["prompt_tokens"] for row in ours]
    by_phase = json.loads((tmp_path / "summary.json").read_text())["by_phase"]
    assert [(entry["task"], entry["phase"], entry["samples"]) for entry in by_phase] == [
        ("passkey", phase, 4) for phase in range(7)
    ]
    assert [entry["correct"] for entry in by_phase] == [2, 4, 2, 2, 2, 2, 2]  # right from 400 tokens on: 400 % 7 == 1
    assert (tmp_path / "phase.png").is_file() and str(tmp_path / "phase.png") in (printed := capsys.readouterr().out)
    assert "tokens in the last block (0 to 6)" in printed


def test_exact_lengths_are_what_they_say(landmark, clairvoyant, tmp_path):
    command(landmark, tmp_path, "--lengths", "400", "--samples", "3", "--exact_lengths")
    assert [(row["prompt_tokens"], row["phase"]) for row in rows_of(tmp_path)] == [(400, 400 % 7)] * 3
    with pytest.raises(InputError, match=r"settings.length_spread was 1 and is 7"):
        command(landmark, tmp_path, "--lengths", "400", "--samples", "3")


def test_results_of_the_former_protocol_are_refused(landmark, clairvoyant, tmp_path):
    command(landmark, tmp_path, "--lengths", "400", "--samples", "1", "--exact_lengths")
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("protocol", "length_spread", "phases", "chat_template"):
        del summary["settings"][name]
    summary["settings"]["template"] = summary.pop("tasks")["passkey"]["template"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (row,) = rows_of(tmp_path)
    former = {name: value for name, value in row.items() if name not in ("task", "phase", "recall")}
    (tmp_path / "results.jsonl").write_text(json.dumps(former) + "\n")
    with pytest.raises(
        InputError, match=r"another run \(settings.protocol was null and is 2; .*choose another --output"
    ):
        command(landmark, tmp_path, "--lengths", "400", "--samples", "1", "--exact_lengths")


def test_several_tasks_are_rows_of_one_table_and_more_can_be_added(dense, clairvoyant, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("Herons wait. No fish comes, as ever. " * 9)
    text = ("--haystack", str(tmp_path / "book.txt"))
    arguments = ("--lengths", "1200", "--samples", "2")
    command(dense, tmp_path / "out", *arguments, "--task", "passkey", "passkey:text", *text)
    asked = len(clairvoyant)
    tasks = ["passkey:once", "passkey:text", "multi_key:2"]
    command(dense, tmp_path / "out", *arguments, "--task", *tasks, *text)
    assert (asked, len(clairvoyant)) == (4, 8)
    rows = rows_of(tmp_path / "out")
    names = ["passkey", "passkey:text", "passkey:once", "multi_key:2"]
    assert [row["task"] for row in rows] == [name for name in names for _ in range(2)]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [(entry["task"], entry["accuracy"]) for entry in summary["rows"]] == [(name, 1.0) for name in names]
    assert sorted(summary["tasks"]) == sorted(names) and "text" in summary["tasks"]["passkey:text"]["haystack"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if "1200 |" in line][-4:] == names
    (tmp_path / "book.txt").write_text("Another one.")
    with pytest.raises(InputError, match=r"tasks.passkey:text.haystack.text was"):
        command(dense, tmp_path / "out", *arguments, "--task", *tasks, *text)


def test_a_task_with_several_answers_reports_their_recall(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        measure, "generate_answer", lambda model, tokenizer, prompt, cache: " ".join(prompt.answers[:3])
    )
    command(dense, tmp_path, "--task", "multi_query:4", "--lengths", "1500", "--samples", "2")
    (entry,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert (entry["correct"], entry["recall"], entry["part"]) == (0, 0.75, 1.0)
    assert "recall" in (printed := capsys.readouterr().out) and "75.0 %" in printed


def test_the_baseline_can_be_spared_the_long_prompts(dense, clairvoyant, tmp_path, capsys):
    arguments = ("--baseline", str(dense), "--baseline_max_length", "400", "--lengths", "400", "500", "--samples", "1")
    command(dense, tmp_path, *arguments)
    assert [row["length"] for row in rows_of(tmp_path)] == [400, 500]
    assert [row["length"] for row in rows_of(tmp_path / "baseline")] == [400]
    assert "not run" in capsys.readouterr().out


def test_a_chat_model_is_asked_in_its_template(dense, clairvoyant, tmp_path):
    shutil.copytree(dense, tmp_path / "chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path / "chat")
    arguments = ("--lengths", "400", "--samples", "1", "--output", str(tmp_path / "out"), "--device", "cpu")
    assert run.main(["--model", str(tmp_path / "chat"), "--chat_template", "true", *arguments]) == 0
    assert clairvoyant == [(400, 0)]
    with pytest.raises(InputError, match="settings.chat_template was true and is false"):
        run.main(["--model", str(tmp_path / "chat"), *arguments])
