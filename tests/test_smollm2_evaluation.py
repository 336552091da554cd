"""`examples/smollm2/evaluate.py` on tiny models: every part leaves rows, tables, pictures; interrupted, it goes on."""

import json
import random
import shutil
from pathlib import Path

import pytest
from byte_models import byte_tokenizer, save_dense
from transformers import AutoTokenizer, LlamaForCausalLM

from eval_passkey.prompts import InputError
from eval_perplexity.documents import Document, encode
from examples.smollm2 import answers, cloze, evaluate
from examples.smollm2.goals import Goal, find_goals
from landmark_llama import LandmarkLlamaForCausalLM

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
WORDS = [
    first + middle + last
    for first in "bcdfghjklmnprstvwz"
    for middle in "ade emi lilu oro uri ydo ano epi".split()
    for last in "lda rna sto nda lfa rne sko ntu".split()
]
SMALL = [
    "--passkey", "600:2", "800:1", "--ruler", "2600:1", "2800:1", "--dense_max_length", "2600",
    "--perplexity_lengths", "64", "128", "300", "--documents", "2", "--score_tokens", "100", "--dense_longest", "128",
    "--cloze", "12", "--answers", "1", "--reading", "0",
]  # fmt: skip


def a_book(seed: int, sentences: int = 500) -> str:
    """Sentences of which every third ends with a word of the one before it."""
    rng, said = random.Random(seed), []
    for i in range(sentences):
        words = rng.choices(WORDS, k=7)
        words[-1] = said[-1].split()[2] if i % 3 == 2 else words[-1]
        said.append(f"Then {' '.join(words)}.")
    return " ".join(said)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A landmark model with exact weights and its dense self."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_dense(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(dense)
    model = LandmarkLlamaForCausalLM.from_llama(
        LlamaForCausalLM.from_pretrained(dense), tokenizer, block_size=8, num_retrieved_blocks=2, num_local_blocks=1,
        block_weight="exact", landmark_key="pooled", num_sink_blocks=1, retrieval_granularity="head",
    )  # fmt: skip
    model.save_pretrained(folder / "landmark")
    tokenizer.save_pretrained(folder / "landmark")
    return folder / "landmark", dense


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed in range(2):
        (folder / f"book_{seed}.txt").write_text(a_book(seed))
    return folder


def run(models: tuple[Path, Path], data: Path, output: Path, *more: str) -> Path:
    landmark, dense = map(str, models)
    haystack = str(data / "book_0.txt")
    argv = ["--model", landmark, "--dense", dense, "--data", str(data), "--haystack", haystack]
    evaluate.main(["--output", str(output), *argv, *SMALL, *more])
    return output / "evaluation"


@pytest.fixture(scope="module")
def finished(models: tuple[Path, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(models, data, tmp_path_factory.mktemp("run"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def test_every_part_leaves_its_rows_a_table_and_pictures(finished: Path) -> None:
    page = (finished / "results.md").read_text()
    for title in ("What it must reach", "Perplexity", "Pass keys", "RULER's tasks", "Short tasks", "Chat answers"):
        assert f"## {title}" in page
    for name in ("passkey.png", "ruler.png", "perplexity.png"):
        assert f"({name})" in page and (finished / name).stat().st_size > 1000
    keys = rows_of(finished / "passkey" / "results.jsonl")
    assert sorted((row["length"], row["seed"]) for row in keys) == [(600, 0), (600, 1), (800, 0)]
    ruler, dense = (rows_of(finished / "ruler" / name / "results.jsonl") for name in ("", "baseline"))
    assert {(row["task"], row["length"]) for row in ruler} == {
        (task, length) for task in evaluate.RULER_TASKS for length in (2600, 2800)
    }
    assert {row["length"] for row in dense} == {2600}
    of = {(row["task"], row["length"]): row for row in ruler}
    assert all(of[row["task"], row["length"]]["key"] == row["key"] for row in dense)  # the same prompts


def test_perplexity_has_the_windows_of_what_a_query_reads(finished: Path) -> None:
    methods = {path.name for path in (finished / "perplexity" / "baseline").iterdir()}
    # blocks of 7 tokens: one before the query's own and that; and two that it chooses, one of
    # which is the first, the sinks
    assert methods == {"dense", "yarn", "window_14", "window_sinks_14", "window_sinks_21"}
    rows = json.loads((finished / "perplexity" / "summary.json").read_text())["rows"]
    assert {row["length"] for row in rows if row["method"] == "dense"} == {64, 128}
    assert {row["tokens"] for row in rows} == {2 * 100} and {row["documents"] for row in rows} == {2}


def test_a_second_run_measures_nothing_again(finished: Path, models, data, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "evaluation")
    before = {path: path.read_bytes() for path in tmp_path.rglob("results.jsonl")}
    assert len(before) > 8
    run(models, data, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("results.jsonl")}


def test_an_interrupted_run_goes_on_and_more_samples_are_added(finished: Path, models, data, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "evaluation")
    shutil.rmtree(tmp_path / "evaluation" / "perplexity")
    rows = tmp_path / "evaluation" / "passkey" / "results.jsonl"
    whole = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(whole[:1]) + '{"task": "pas')
    run(models, data, tmp_path, "--passkey", "600:3", "800:1", "--ruler", "2600:1")
    again = rows_of(rows)
    assert sorted((row["length"], row["seed"]) for row in again) == [(600, 0), (600, 1), (600, 2), (800, 0)]
    earlier = {(row["length"], row["seed"]): row["prediction"] for row in map(json.loads, whole)}
    assert earlier.items() <= {(row["length"], row["seed"]): row["prediction"] for row in again}.items()
    assert (tmp_path / "evaluation" / "perplexity" / "results.jsonl").is_file()


def test_each_sample_is_a_line_as_soon_as_it_is_measured(models, data, tmp_path: Path, capsys) -> None:
    nothing = ["--ruler", "2600:0", "--documents", "0", "--cloze", "0", "--answers", "0"]
    run(models, data, tmp_path, "--passkey", "600:2", *nothing)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("passkey, 600 tokens")]
    assert len(lines) == 4 and all(" s); " in line and "in this step" in line for line in lines)
    assert {line.split(",")[2].strip() for line in lines} == {"landmark", "dense"}


@pytest.mark.slow
def test_reading_is_measured_once_for_each_model_and_length(models, data, tmp_path: Path) -> None:
    nothing = ["--passkey", "600:0", "--ruler", "2600:0", "--documents", "0", "--cloze", "0", "--answers", "0"]
    for _ in range(2):
        folder = run(models, data, tmp_path, *nothing, "--reading", "500")
    rows = rows_of(folder / "reading" / "results.jsonl")
    assert [(row["model"], row["length"]) for row in rows] == [("landmark", 500), ("dense", 500)]
    assert all(row["read_seconds"] > 0 and row["resident_mib"] > 0 for row in rows)
    assert "| dense | 500 |" in (folder / "results.md").read_text()


# -- the parts ---------------------------------------------------------------------------------------------------------


def document(text: str, name: str = "book") -> Document:
    return Document(name, name, text, *encode(byte_tokenizer(), text), 0)


def test_the_last_word_of_a_passage_has_stood_in_an_earlier_sentence() -> None:
    found = cloze.passages([document(a_book(0), "a"), document(a_book(1), "b")], 30)
    assert len(found) == 30 and len({passage.name for passage in found}) == 30
    assert {passage.name.split(":")[0] for passage in found} == {"a", "b"}
    for passage in found:
        *earlier, _ = passage.context.split(". ")
        assert any(passage.word in sentence.split() for sentence in earlier) and passage.context.endswith(" ")
        assert 200 <= len(passage.context + passage.word) <= 800
    with pytest.raises(InputError, match="holds no passage"):
        cloze.passages([document("No word comes again here. Nothing else. It ends.")], 5)


def test_a_word_that_a_text_says_all_the_time_is_not_asked() -> None:
    often = a_book(0).replace(". Then", " always. Then")
    assert "always" not in {passage.word for passage in cloze.passages([document(often + " " + a_book(1))], 200)}


def test_a_last_word_is_right_if_every_token_of_it_is_the_most_likely(models) -> None:
    model = LlamaForCausalLM.from_pretrained(models[1]).eval()
    tokenizer = byte_tokenizer()
    ids = tokenizer("Once more, and").input_ids
    begun = LlamaForCausalLM.generate(
        model, tokenizer("Once more, and", return_tensors="pt").input_ids, max_new_tokens=1, do_sample=False
    )[0, len(ids) :]
    for token in (begun.item(), (begun.item() + 1) % 250 + 2):
        passage = cloze.Passage("x", "Once more, and ", "q")

        class OneToken:
            """Gives the word as one chosen token."""

            bos_token_id = 0

            def __call__(self, text: str, token: int = token, **_) -> dict:
                return {"input_ids": [token]} if text == " q" else tokenizer(text, **_)

        row = cloze.score(model, OneToken(), passage)
        assert row["correct"] == (token == begun.item()) and row["nll"] > 0 and row["tokens"] == 1
        assert row["read"] == len(ids) + 1


def test_chat_answers_are_of_short_documents_of_many_sizes() -> None:
    some = answers.documents(10)
    sizes = [len(text) for _, text in some]
    assert len({name for name, _ in some}) == 10 and sizes == sorted(sizes) and 1000 <= sizes[0] < sizes[-1] < 8000
    assert answers.documents(10) == some and len(answers.documents(1)) == 1


def test_rounds_take_a_share_of_the_samples_and_long_lengths_come_later() -> None:
    counts = {2048: 20, 32768: 5, 131072: 2}
    assert evaluate.due(counts, 0.2) == {1: [32768], 4: [2048]}
    assert evaluate.due(counts, 0.5) == {1: [131072], 2: [32768], 10: [2048]}
    assert evaluate.due(counts, 1.0) == {2: [131072], 5: [32768], 20: [2048]}


def test_a_goal_is_sure_if_its_whole_interval_says_the_same() -> None:
    def goal(value: float, low: float | None, high: float | None, **limit: float) -> tuple[bool, bool]:
        found = Goal("", "", value, low, high, **limit)
        return found.reached, found.sure

    assert goal(1.0, 0.99, 1.0, at_least=0.98) == (True, True)
    assert goal(1.0, 0.84, 1.0, at_least=0.98) == (True, False)
    assert goal(0.5, 0.3, 0.7, at_least=0.98) == (False, True)
    assert goal(1.01, 0.99, 1.05, at_most=1.03) == (True, False)
    assert goal(1.05, 1.04, 1.06, at_most=1.03) == (False, True)
    assert goal(0.9, None, None, at_most=1.0) == (True, False)


def test_goals_compare_the_same_prompts_and_the_lengths(tmp_path: Path) -> None:
    def write(folder: str, rows: list[dict]) -> None:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def row(length: int, seed: int, correct: bool) -> dict:
        return {"task": "niah_single_1", "length": length, "seed": seed, "correct": correct, "recall": float(correct)}

    write("ruler", [row(4096, i, i < 9) for i in range(10)] + [row(32768, i, i < 5) for i in range(10)])
    write("ruler/baseline", [row(4096, i, i < 8) for i in range(9)])
    write(
        "reading", [{"model": name, "length": 8192, "read_seconds": s} for name, s in (("dense", 9), ("landmark", 3))]
    )
    goals = {goal.what: goal for goal in find_goals(tmp_path)}
    near = goals["niah_single_1 at 4,096 tokens: within 5 points of dense"]
    assert near.value == pytest.approx(1 / 9) and near.reached and not near.sure
    far = goals["all tasks at 32,768 tokens: within 5 points of 4,096"]
    assert far.value == pytest.approx(-0.4) and not far.reached
    assert goals["reading 8,192 tokens: faster than dense"].reached


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--passkey", "2048"], "--passkey 2048: must be LENGTH:SAMPLES, as 2048:20"),
        (["--ruler", "4k:5"], "--ruler 4k:5: must be LENGTH:SAMPLES"),
        (["--documents", "-1"], "--documents -1: must be at least 0"),
        (["--model", "DENSE", "--dense", "DENSE"], "--model must be a landmark model and --dense none"),
    ],
)
def test_bad_arguments_get_one_sentence(argv: list[str], sentence: str, models, tmp_path: Path) -> None:
    argv = [str(models[1]) if word == "DENSE" else word for word in argv]
    with pytest.raises(InputError) as error:
        evaluate.main(["--output", str(tmp_path / "out"), *argv])
    assert sentence in str(error.value) and not (tmp_path / "out" / "evaluation").exists()
