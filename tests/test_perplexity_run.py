"""The perplexity command: its files, resuming, refusals; with tiny dense and landmark models."""

import json
import shutil
import subprocess
import sys
from math import exp, log
from pathlib import Path

import pytest
from byte_models import POSITIONS, byte_tokenizer, save_dense, save_landmark, some_text
from transformers import GPT2Config, GPT2LMHeadModel

from eval_passkey.prompts import InputError
from eval_perplexity import run
from eval_perplexity.methods import Scorer
from landmark_llama import LandmarkLlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
ROW = ["method", "document", "digest", "length", "end", "tokens", "bytes", "nll", "seconds"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def landmark(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_landmark(dense, tmp_path_factory.mktemp("landmark"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 300 characters, about 450 bytes."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": some_text(seed)}) + "\n" for seed in range(6)))
    return path


def command(model: Path, data: Path, output: Path, *more: str) -> int:
    return run.main(["--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu", *more])


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Length and scored tokens of every window that a model was asked for."""
    asked, real = [], Scorer.nll

    def nll(self, input_ids, tokens):
        asked.append((input_ids.shape[1] - 1, tokens))
        return real(self, input_ids, tokens)

    monkeypatch.setattr(Scorer, "nll", nll)
    return asked


def test_a_run_writes_rows_summaries_and_a_picture(landmark, dense, data, tmp_path, capsys):
    methods = ("--baseline", str(dense), "--baseline_methods", "dense", "window", "interpolation", "ntk", "yarn")
    assert command(landmark, data, tmp_path, "--lengths", "160", "40", *methods) == 0
    rows, summary = rows_of(tmp_path), summary_of(tmp_path)
    assert all(list(row) == ROW for row in rows) and {row["method"] for row in rows} == {"landmark"}
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    labels = ["landmark", "dense", "window", "interpolation", "ntk", "yarn"]
    assert [(entry["method"], entry["length"]) for entry in summary["rows"]] == [
        (label, length) for label in labels for length in (40, 160)
    ]
    assert [(entry["against"], entry["length"]) for entry in summary["differences"]] == [
        (label, length) for label in labels[1:] for length in (40, 160)
    ]
    for length, entry in zip((40, 160), summary["rows"], strict=False):
        nll, tokens, size = (
            sum(row[name] for row in rows if row["length"] == length) for name in ("nll", "tokens", "bytes")
        )
        assert entry["perplexity"] == pytest.approx(exp(nll / tokens))
        assert entry["bits_per_byte"] == pytest.approx(nll / log(2) / size)
        assert entry["ci_low"] < entry["perplexity"] < entry["ci_high"]
    assert summary["rows"][0]["tokens"] == summary["rows"][1]["tokens"] and summary["context_gains"] == []
    assert summary["training_context"] == POSITIONS and "torch" in summary["versions"] and summary["device"]
    printed = capsys.readouterr().out
    for name in ("results.jsonl", "summary.json", "perplexity.png", "baseline/yarn/results.jsonl"):
        assert (tmp_path / name).is_file() and str(tmp_path / name) in printed
    assert "landmark / this" in printed and "bits/byte" in printed


def test_windows_of_several_sizes_stand_beside_each_other(dense, data, tmp_path):
    windows = ["window:16", "window_sinks:16", "window_sinks:160", "window"]
    baseline = ("--baseline", str(dense), "--baseline_methods", *windows, "--baseline_window", "40")
    command(dense, data, tmp_path, "--lengths", "160", *baseline)
    of = {entry["method"]: entry["perplexity"] for entry in summary_of(tmp_path)["rows"]}
    assert list(of) == ["dense", *windows] and len({round(value, 4) for value in of.values()}) == 4
    assert of["window_sinks:160"] == pytest.approx(of["dense"], rel=1e-5)
    settings = summary_of(tmp_path / "baseline" / "window_sinks_16")["settings"]
    assert (settings["window"], settings["sinks"]) == (16, 4)
    assert "sinks" not in summary_of(tmp_path / "baseline" / "window_16")["settings"]


def test_methods_read_what_they_say(dense, data, tmp_path):
    methods = ("--baseline", str(dense), "--baseline_methods", "dense", "window", "interpolation")
    command(dense, data, tmp_path, "--lengths", "40", "160", *methods)
    summary = summary_of(tmp_path)
    of = {(entry["method"], entry["length"]): entry["perplexity"] for entry in summary["rows"]}
    assert of["baseline dense", 40] == of["dense", 40] == of["interpolation", 40]
    # 40 tokens fit the window and the positions, 160 do not
    assert of["window", 40] == pytest.approx(of["dense", 40], rel=1e-5)
    assert len({round(of[name, 160], 3) for name in ("dense", "window", "interpolation")}) == 3
    same = [entry for entry in summary["differences"] if entry["against"] == "baseline dense"]
    assert [(entry["perplexity_ratio"], entry["ci_low"], entry["ci_high"]) for entry in same] == [(1.0, 1.0, 1.0)] * 2


def test_the_last_tokens_are_the_same_at_every_length_and_gains_are_paired(landmark, data, tmp_path, capsys):
    command(landmark, data, tmp_path, "--protocol", "last", "--lengths", "40", "80", "160")
    rows, summary = rows_of(tmp_path), summary_of(tmp_path)
    by_length = [
        [(row["digest"], row["end"], row["tokens"], row["bytes"]) for row in rows if row["length"] == length]
        for length in (40, 80, 160)
    ]
    assert by_length[0] == by_length[1] == by_length[2] and {row["tokens"] for row in rows} == {20}
    assert [(gain["length"], gain["against"]) for gain in summary["context_gains"]] == [(80, 40), (160, 40)]
    first, second, _ = (entry["perplexity"] for entry in summary["rows"])
    assert summary["context_gains"][0]["perplexity_ratio"] == pytest.approx(second / first)
    assert "this / shortest" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_and_gives_the_summary_of_an_uninterrupted_one(
    landmark, dense, data, tmp_path, monkeypatch
):
    arguments = ("--lengths", "40", "160", "--documents", "2", "--baseline", str(dense))
    command(landmark, data, tmp_path / "whole", *arguments)
    total = len(rows_of(tmp_path / "whole"))
    real, calls = Scorer.nll, []

    def interrupted(self, *window):
        calls.append(window)
        if len(calls) == total - 1:
            raise KeyboardInterrupt
        return real(self, *window)

    monkeypatch.setattr(Scorer, "nll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(landmark, data, tmp_path / "torn", *arguments)
    results = tmp_path / "torn/results.jsonl"
    assert len(results.read_text().splitlines()) == total - 2
    with results.open("a") as file:
        file.write('{"method": "landmark", "docu')
    command(landmark, data, tmp_path / "torn", *arguments)
    assert len(calls) == (total - 1) + 2 + total
    for folder in ("", "baseline/dense"):
        torn, whole = (rows_of(tmp_path / name / folder) for name in ("torn", "whole"))
        assert without_seconds(torn) == without_seconds(whole)
    torn, whole = (summary_of(tmp_path / name) for name in ("torn", "whole"))
    assert without_seconds(torn["rows"]) == without_seconds(whole["rows"])
    assert torn["differences"] == whole["differences"]


def test_a_finished_run_takes_more_lengths_documents_and_methods_and_scores_nothing_again(
    landmark, dense, data, tmp_path, scored
):
    command(landmark, data, tmp_path, "--lengths", "40", "160", "--documents", "1")
    before = len(scored)
    command(landmark, data, tmp_path, "--lengths", "40", "160", "--documents", "1")
    assert len(scored) == before
    command(landmark, data, tmp_path, "--lengths", "40", "80", "160", "--documents", "2", "--baseline", str(dense))
    assert len(scored) > 2 * before
    assert len({tuple(row[name] for name in ROW[2:6]) for row in rows_of(tmp_path)}) == len(rows_of(tmp_path))
    assert [entry["documents"] for entry in summary_of(tmp_path)["rows"]] == [2] * 6
    # what is no longer asked for stays in the rows, and out of the summary
    command(landmark, data, tmp_path, "--lengths", "40", "160", "--documents", "1")
    assert [(entry["documents"], entry["length"]) for entry in summary_of(tmp_path)["rows"]] == [(1, 40), (1, 160)]


def test_a_changed_text_is_scored_anew(landmark, tmp_path, scored):
    text = tmp_path / "text.txt"
    text.write_text(some_text(1))
    command(landmark, text, tmp_path / "out", "--lengths", "160")
    before = len(scored)
    text.write_text(some_text(1) + "!")
    command(landmark, text, tmp_path / "out", "--lengths", "160")
    assert len(scored) == 2 * before and summary_of(tmp_path / "out")["rows"][0]["windows"] == before


def test_results_of_other_settings_are_refused_and_left_as_they_are(landmark, dense, data, tmp_path):
    arguments = ("--lengths", "40", "--documents", "1", "--baseline", str(dense), "--baseline_methods", "window")
    command(landmark, data, tmp_path, *arguments)
    before = (tmp_path / "results.jsonl").read_bytes(), (tmp_path / "summary.json").read_bytes()
    with pytest.raises(InputError, match=r"settings\.window was 64 and is 16\); choose another --output"):
        command(landmark, data, tmp_path, *arguments, "--baseline_window", "16")
    with pytest.raises(InputError, match=r"settings\.retrieval\.num_retrieved_blocks was 2 and is 1"):
        command(landmark, data, tmp_path, *arguments, "--num_retrieved_blocks", "1")
    with pytest.raises(InputError, match=r"settings\.always_stream was false and is true"):
        command(landmark, data, tmp_path, *arguments[:4], "--always_stream", "true")
    with pytest.raises(InputError, match="fingerprint was"):
        command(dense, data, tmp_path, *arguments)
    assert before == ((tmp_path / "results.jsonl").read_bytes(), (tmp_path / "summary.json").read_bytes())


def test_retrieval_settings_reach_the_model(landmark, data, tmp_path):
    arguments = ("--lengths", "160", "--documents", "1")
    command(landmark, data, tmp_path / "two", *arguments)
    command(landmark, data, tmp_path / "none", *arguments, "--num_retrieved_blocks", "0", "--num_local_blocks", "1")
    two, none = (summary_of(tmp_path / name) for name in ("two", "none"))
    assert none["settings"]["retrieval"]["num_retrieved_blocks"] == 0
    assert two["rows"][0]["perplexity"] != pytest.approx(none["rows"][0]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_model_that_looks_ahead_is_refused_before_anything_is_written(granularity, landmark, data, tmp_path):
    with pytest.raises(InputError, match=f"^--model .*retrieval_granularity='{granularity}' looks at later tokens"):
        command(landmark, data, tmp_path / "out", "--retrieval_granularity", granularity)
    assert not (tmp_path / "out").exists()


def test_a_baseline_that_fails_at_a_length_is_skipped_there_and_the_model_goes_on(dense, data, tmp_path, capsys):
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=1, n_positions=100, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    baseline = ("--baseline", str(tmp_path / "gpt2"))
    assert command(dense, data, tmp_path / "out", "--lengths", "40", "160", "--documents", "2", *baseline) == 0
    assert {row["length"] for row in rows_of(tmp_path / "out")} == {40, 160}
    assert {row["length"] for row in rows_of(tmp_path / "out/baseline/dense")} == {40}
    (skipped,) = summary_of(tmp_path / "out")["skipped"]
    assert (skipped["method"], skipped["length"]) == ("baseline dense", 160) and "IndexError" in skipped["reason"]
    assert "baseline dense: 160 tokens are skipped (IndexError" in capsys.readouterr().err
    with pytest.raises(InputError, match="interpolation scales plain rotary positions, and this model has 'none'"):
        command(dense, data, tmp_path / "out", *baseline, "--baseline_methods", "interpolation")


def test_a_model_that_lacks_memory_or_overflows_skips_the_length_but_other_errors_are_not_hidden(
    dense, data, tmp_path, monkeypatch
):
    def fail(outcome: Exception | float):
        def nll(self, input_ids, tokens):
            if input_ids.shape[1] - 1 < 160:
                return 1.0
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return nll

    arguments = ("--lengths", "40", "160", "--documents", "1")
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for number, outcome in enumerate((lack, float("nan"))):
        monkeypatch.setattr(Scorer, "nll", fail(outcome))
        assert command(dense, data, tmp_path / str(number), *arguments) == 1
        assert {row["length"] for row in rows_of(tmp_path / str(number))} == {40}
    assert "is nan" in summary_of(tmp_path / "1")["skipped"][0]["reason"]
    monkeypatch.setattr(Scorer, "nll", fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        command(dense, data, tmp_path / "0", *arguments)


def test_a_baseline_with_other_tokens_is_refused(landmark, dense, data, tmp_path):
    shutil.copytree(dense, tmp_path / "other")
    byte_tokenizer(bos=False).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="other: its tokenizer cuts the texts into other tokens"):
        command(landmark, data, tmp_path / "out", "--lengths", "40", "--baseline", str(tmp_path / "other"))
    byte_tokenizer(merges=(("b", "c"),)).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="other: its tokenizer cuts the texts into other tokens"):
        command(landmark, data, tmp_path / "out", "--lengths", "40", "--baseline", str(tmp_path / "other"))


def test_another_landmark_model_can_be_the_baseline(landmark, dense, data, tmp_path):
    other = save_landmark(dense, tmp_path / "other", block_size=8, num_local_blocks=2)
    assert command(landmark, data, tmp_path / "out", "--lengths", "160", "--baseline", str(other)) == 0
    assert [entry["method"] for entry in summary_of(tmp_path / "out")["rows"]] == ["landmark", "baseline landmark"]
    with pytest.raises(InputError, match="--baseline_methods needs a dense model, this one has landmarks"):
        command(landmark, data, tmp_path / "out", "--baseline", str(other), "--baseline_methods", "window")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "512", "0"], "^--lengths 0: must be at least 1"),
        (["--documents", "0"], "^--documents 0: must be at least 1"),
        (["--stride", "-1"], "^--stride -1: must be at least 1"),
        (["--stride", "41", "--lengths", "40"], "^--stride 41: must not exceed the shortest of --lengths, 40"),
        (["--stride", "4", "--protocol", "last"], "^--stride 4: belongs to --protocol segments"),
        (["--score_tokens", "4"], "^--score_tokens 4: belongs to --protocol last"),
        (["--protocol", "last", "--score_tokens", "4097"], "^--score_tokens 4097: must not exceed 4096, the shortest"),
        (
            ["--protocol", "last", "--lengths", "9", "10", "--score_tokens", "10"],
            "^--score_tokens 10: must not exceed 9",
        ),
        (
            ["--baseline", "x", "--baseline_methods", "dense:4"],
            "^--baseline_methods dense:4: a whole number from 2 may",
        ),
        (["--baseline", "x", "--baseline_methods", "window:1"], "^--baseline_methods window:1: a whole number from 2"),
        (["--baseline", "x", "--baseline_sinks", "0"], "^--baseline_sinks 0: must be at least 1"),
        (["--tokens_per_document", "99"], "^--tokens_per_document 99: is less than the longest of --lengths, 8192"),
        (["--lengths", "4096"], "^--data .*: none of 6 documents has 4096 tokens to score, the longest has"),
        (["--data", "nowhere.txt"], "^--data nowhere.txt: there is no such file or folder"),
        (["--baseline", "./nowhere"], "^--baseline ./nowhere: there is no such folder"),
        (["--baseline_methods", "window"], "^--baseline_methods: needs a --baseline"),
        (["--rope_factor", "2"], "^--rope_factor: needs a --baseline"),
        (["--baseline", "x", "--baseline_methods", "alibi"], "^--baseline_methods alibi: must be one of dense, window"),
        (["--baseline", "x", "--baseline_window", "9"], "^--baseline_window 9: needs --baseline_methods window"),
        (["--baseline", "x", "--baseline_methods", "window", "--baseline_window", "1"], "must be at least 2"),
        (["--baseline", "x", "--rope_factor", "2"], "^--rope_factor 2.0: needs one of interpolation, ntk, yarn"),
        (["--baseline", "x", "--baseline_methods", "yarn", "--rope_factor", "0.5"], "^--rope_factor 0.5: must be"),
        (["--num_retrieved_blocks", "2"], "^--model .*: --num_retrieved_blocks needs a landmark model"),
        (["--always_stream", "true"], "^--model .*: --always_stream needs a landmark model"),
        (["--device", "abacus", "--lengths", "40"], "^--model .*: the model cannot be loaded"),
    ],
)
def test_bad_arguments_get_one_sentence(more, message, dense, data, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        command(dense, data, tmp_path, *more)
    assert "\n" not in str(error.value)


def test_the_script_says_one_sentence_and_fails(tmp_path):
    script = [sys.executable, str(ROOT / "eval_perplexity/run.py"), "--data", "x", "--output", str(tmp_path / "out")]
    script += ["--model", str(tmp_path / "nowhere")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"eval_perplexity: --model {tmp_path / 'nowhere'}: there is no such folder"


def test_a_pretrained_llama_reads_a_book_beside_its_landmark_form(landmark_data, tmp_path):
    folder, books = landmark_data / "models/stories260K/gqa", sorted((landmark_data / "books").glob("[0-9]*.txt"))
    if not folder.is_dir() or not books:
        pytest.skip(f"LANDMARK_DATA: no {folder} or no books")
    tokenizer = run.find_subject("--model", str(folder), {}).tokenizer
    LandmarkLlamaForCausalLM.from_llama(folder, tokenizer, block_size=16).save_pretrained(tmp_path / "landmark")
    tokenizer.save_pretrained(tmp_path / "landmark")
    arguments = ("--lengths", "15", "600", "--tokens_per_document", "600", "--baseline", str(folder))
    assert command(tmp_path / "landmark", books[0], tmp_path / "out", *arguments) == 0
    landmark, dense = rows_of(tmp_path / "out"), rows_of(tmp_path / "out/baseline/dense")
    # inside its first block a converted model is the LLaMA it was, but for the little that the landmark's logit takes
    pairs = [(a["nll"], b["nll"]) for a, b in zip(landmark, dense, strict=True) if a["length"] == 15]
    assert len(pairs) == 40 and all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)
    text = books[0].read_bytes().decode("utf-8-sig")  # line ends as they are
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:600]
    long = next(row for row in landmark if row["length"] == 600)
    assert long["bytes"] == len(tokenizer.decode(ids).encode("utf-8"))
