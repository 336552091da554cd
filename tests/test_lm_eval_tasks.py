"""Tasks of lm-evaluation-harness that need the network, on tiny local files; skips where it is not installed.

Everything but the data set is the harness's own task: prompt, few-shot examples, what is asked of the model, metrics.
"""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from test_lm_eval import folder  # noqa: F401
from transformers import AutoTokenizer

from landmark_llama import LandmarkLlamaForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm_eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = pytest.mark.slow
TASKS = Path(lm_eval.__file__).parent / "tasks"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "lm_eval"
LONG = "The ferry left the harbour at nine and nobody on the quay looked up. " * 40
LIMITED = {"generation_kwargs": {"do_sample": False, "max_gen_toks": 4, "until": []}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(model: Path, task: str, include: list[Path], **metadata: Any) -> dict:
    """Results and samples of one task."""
    manager = TaskManager(include_path=[str(path) for path in include], metadata=metadata)
    settings = {"task_manager": manager, "device": "cpu", "bootstrap_iters": 0, "batch_size": 1}
    found = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": str(model)}, tasks=[task], **settings)
    return {"scores": found["results"][task], "samples": found["samples"][task]}


def stand_in(folder: Path, original: str, split: str, rows: list[dict], **settings: Any) -> str:  # noqa: F811
    """A task like the harness's `original` (a file below its tasks) but for its data; the new task's name."""
    name = f"local_{Path(original).stem}"
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"include": str(TASKS / original), "task": name, "tag": None, "dataset_path": "json", "dataset_name": None}
    task |= {"dataset_kwargs": {"data_files": {split: str(folder / f"{name}.jsonl")}}, "custom_dataset": None}
    (folder / f"{name}.yaml").write_text(json.dumps(task | {"test_split": split} | settings))  # JSON is YAML
    return name


def negative_log_likelihood(model: Path, text: str) -> float:
    """In nats, of a text read by one forward call."""
    tokenizer, landmark = AutoTokenizer.from_pretrained(model), LandmarkLlamaForCausalLM.from_pretrained(model)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
    assert ids.shape[1] > 512
    with torch.no_grad():
        return float(landmark(ids, labels=ids).loss) * (ids.shape[1] - 1)


def test_medmcqa_asks_for_the_likeliest_of_its_choices(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    question = {"question": "Which organ pumps blood?", "opa": "Liver", "opb": "Heart", "opc": "Lung", "opd": "Skin"}
    unused = {"training_split": None, "validation_split": None}
    task = stand_in(tmp_path, "medmcqa/medmcqa.yaml", "test", [{**question, "cop": 1}], **unused)
    found = evaluate(folder, task, [tmp_path])
    (sample,) = found["samples"]
    likelihoods = [score for score, _ in sample["filtered_resps"]]
    assert len(likelihoods) == 4 and max(likelihoods) < 0.0
    assert found["scores"]["acc,none"] == float(max(range(4), key=likelihoods.__getitem__) == 1)


def test_babilong_asks_about_a_text_longer_than_the_window(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    row = {"input": f"{LONG}Mary went to the garden. {LONG}", "question": "Where is Mary?", "target": "garden"}
    task = stand_in(tmp_path, "babilong/babilong_qa1.yaml", "qa1", [row], **LIMITED)
    found = evaluate(folder, task, [tmp_path])
    (sample,) = found["samples"]
    (prompt, _) = sample["arguments"][0]
    assert LONG.strip() in prompt and prompt.count("Where is") == 3  # two examples before it
    assert found["scores"]["acc,none"] == float("garden" in sample["resps"][0][0].lower())


def test_longbench_scores_an_answer_about_long_passages(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lm-eval[longbench]'")
    row = {"context": LONG, "question": "When did the ferry leave?", "answers": ["nine"], "all_classes": None}
    task = stand_in(tmp_path, "longbench/hotpotqa.yaml", "test", [row], **LIMITED)
    found = evaluate(folder, task, [tmp_path])
    assert LONG.strip() in found["samples"][0]["arguments"][0][0]
    assert 0.0 <= found["scores"]["qa_f1_score,none"] <= 1.0


def test_the_pile_is_measured_in_bits_per_byte_of_whole_documents(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    task = stand_in(tmp_path, "pile/pile_arxiv.yaml", "train", [{"text": LONG}])
    found = evaluate(folder, task, [tmp_path])
    expected = negative_log_likelihood(folder, LONG) / len(LONG.encode()) / math.log(2)
    assert found["scores"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_books_and_papers_of_ones_own_are_measured_in_bits_per_byte(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    texts = [LONG, LONG.upper()]
    books = tmp_path / "books"
    books.mkdir()
    for number, text in enumerate(texts):
        (books / f"{number}.txt").write_text(text)
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps({"text": text, "meta": 1}) + "\n" for text in texts))
    bits = sum(negative_log_likelihood(folder, text) for text in texts) / math.log(2)
    for files in (str(books), str(tmp_path / "papers.jsonl")):
        found = evaluate(folder, "long_text", [EXAMPLES], files=files)
        assert len(found["samples"]) == 2
        expected = bits / sum(len(text.encode()) for text in texts)
        assert found["scores"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4), files
