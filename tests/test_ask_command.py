"""`python -m landmark_llama.ask` and `.inspect`: answers from a memory, and the passages that they were read from."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from byte_models import byte_tokenizer, save_dense, save_landmark, some_text
from checkpoints import refusal
from memories import files

from landmark_llama import LandmarkLlamaForCausalLM, ask, inspect, read
from landmark_llama.memories import passages
from landmark_llama.memories.asking import Memory
from landmark_llama.memories.page import page, token_texts
from landmark_llama.reading.trace import RetrievedStep

TEXT = some_text(3, 400)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return save_landmark(save_dense(folder / "dense"), folder / "landmark", num_retrieved_blocks=1)


@pytest.fixture(scope="module")
def memory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read with other settings than the model's own."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "novel.txt").write_text(TEXT, "utf-8")
    arguments = [model, folder / "novel.txt", "--memory", folder / "memory", "--num_retrieved_blocks", "3"]
    read.main([str(x) for x in arguments])
    return folder / "memory"


@pytest.fixture
def opened(model: Path, memory: Path) -> Memory:
    return ask.open_memory(str(model), str(memory), "cpu")


def printed(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    ask.main([*map(str, arguments), "--device", "cpu", "--max_new_tokens", "6"])
    return capsys.readouterr().out


def test_the_answer_is_what_the_model_says_after_text_and_question(model: Path, opened: Memory) -> None:
    loaded, tokenizer = LandmarkLlamaForCausalLM.from_pretrained(model).eval(), byte_tokenizer()
    ids = tokenizer(TEXT + "Who?", return_tensors="pt").input_ids
    expected = loaded.generate(ids, max_new_tokens=9, do_sample=False, num_retrieved_blocks=3)[0, ids.shape[1] :]
    answer = opened.ask("Who?", as_it_is=True, max_new_tokens=9)
    assert answer.ids == expected.tolist() and answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_question_may_read_more_than_the_text_did(model: Path, memory: Path) -> None:
    opened = ask.open_memory(str(model), str(memory), "cpu", retrieval={"num_retrieved_blocks": 5})
    settings = opened.model.config.retrieval()
    assert settings.num_retrieved_blocks == 5 and settings.num_direct_blocks == 3, "as the text was read"
    as_read = ask.open_memory(str(model), str(memory), "cpu").ask("Who?", as_it_is=True, show=True, max_new_tokens=3)
    answer = opened.ask("Who?", as_it_is=True, show=True, max_new_tokens=3)
    assert [x.retrieved[0].block.shape[-1] for x in (as_read, answer)] == [3, 5]
    whole = opened.model.config.train_context_length // opened.model.config.block_size
    most = ask.open_memory(str(model), str(memory), "cpu", retrieval={"num_retrieved_blocks": whole - 3})
    assert most.model.config.retrieval().num_direct_blocks == 1, "what is left of the window"
    with pytest.raises(ValueError, match=f"num_retrieved_blocks={whole}"):
        ask.open_memory(str(model), str(memory), "cpu", retrieval={"num_retrieved_blocks": whole})


def test_a_question_leaves_no_trace_and_costs_no_text(opened: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = opened.model.model.forward
    monkeypatch.setattr(
        opened.model.model,
        "forward",
        lambda input_ids=None, **given: lengths.append(input_ids.shape[1]) or forward(input_ids, **given),
    )
    before = files(opened.folder)
    first, _, again = (opened.ask(x, max_new_tokens=5) for x in ("Who was it?", "Why did she?", "Who was it?"))
    assert first.ids == again.ids and files(opened.folder) == before
    question = len(opened.prompt("Why did she?"))
    assert max(lengths) <= question and sum(lengths) <= 3 * (question + 5)


def test_questions_go_into_the_chat_template_where_there_is_one(opened: Memory) -> None:
    tokenizer = opened.tokenizer
    assert tokenizer.decode(opened.prompt("Who?")) == "\n\nQuestion: Who?\nAnswer:"
    assert tokenizer.decode(opened.prompt("Who?", as_it_is=True)) == "Who?"
    tokenizer.chat_template = "{{ bos_token }}[{{ messages[0]['content'] }}]{% if add_generation_prompt %}>{% endif %}"
    assert tokenizer.decode(opened.prompt("Who?")) == "[Who?]>"


def test_one_question_is_printed_and_shown_with_its_passages(
    model: Path, memory: Path, opened: Memory, capsys: pytest.CaptureFixture
) -> None:
    out = printed(capsys, model, memory, "Who?", "--show", "3")
    expected = opened.ask("Who?", show=True, max_new_tokens=6)
    assert out.startswith(expected.text.rstrip("\n")[:3])
    shown = re.findall(r"^ *([\d.]+)%  (.*), line (\d+)$", out, re.MULTILINE)
    assert len(shown) == 3 and all(name.endswith("novel.txt") for _, name, _ in shown)
    assert [float(x) for x, _, _ in shown] == sorted((float(x) for x, _, _ in shown), reverse=True)


def test_an_answer_does_not_depend_on_where_the_blocks_are_copied(
    model: Path, memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = printed(capsys, model, memory, "Who?")
    for where in ["device"], ["host", "--budget", "0"], [f"file:{tmp_path / 'blocks'}", "--budget", "1"]:
        assert printed(capsys, model, memory, "Who?", "--cache", *where) == expected
    assert "--budget 3: needs --cache host" in refusal(ask.main, model, memory, "Who?", "--budget", "3")
    assert "cache 'tape': must be device, host" in refusal(ask.main, model, memory, "Who?", "--cache", "tape")


def test_a_file_of_questions_gives_a_line_of_json_each(
    model: Path, memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "questions.txt").write_text("Who?\n\nWhy?\n")
    out = printed(capsys, model, memory, "--questions", tmp_path / "questions.txt", "--json", "--show", "2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["question"] for row in rows] == ["Who?", "Why?"]
    for row in rows:
        assert 1 <= row["tokens"] <= 6 and row["seconds"] > 0 and len(row["passages"]) == 2
        for found in row["passages"]:
            # blocks may begin and end inside a character of several bytes
            whole = found["text"].strip("\N{REPLACEMENT CHARACTER}")
            assert whole in TEXT[found["character"] : found["character"] + 4]
            assert found["line"] == 1 + TEXT.count("\n", 0, found["character"])


def test_a_passage_is_the_text_of_its_block(opened: Memory) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT).input_ids
    for block in (0, 5, 60):
        found = passages.passage(opened, block)
        assert (found.first, found.last) == (3 * block, 3 * block + 2)
        assert found.text == tokenizer.decode(ids[3 * block : 3 * block + 3], skip_special_tokens=True)
        assert found.after == tokenizer.decode(ids[3 * block + 3 : 3 * block + 27], skip_special_tokens=True)


def test_weights_are_means_over_steps_layers_and_heads_without_the_first_layer() -> None:
    # two layers, one row, two heads, two blocks each; block 9 is beyond the text
    block = torch.tensor([[[[0, 1], [0, 1]]], [[[2, 9], [-1, 2]]]])
    weight = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.4, 0.6], [0.0, 0.2]]]])
    found = passages.block_weights([RetrievedStep(block, weight)], 4, first_layer=1)
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0.3, 0]]]))


def test_mistakes_end_in_one_sentence(model: Path, memory: Path, tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        return refusal(ask.main, *arguments, "--device", "cpu")

    assert "nowhere: there is no such folder" in said(model, tmp_path / "nowhere", "Who?")
    assert "nowhere: there is no such folder" in said(tmp_path / "nowhere", memory, "Who?")
    assert "give one question" in said(model, memory)
    assert "give one question" in said(model, memory, "Who?", "--prompt", "He")
    assert "the question is empty" in said(model, memory, "  ")
    assert "must be at least 1" in said(model, memory, "Who?", "--max_new_tokens", "0")
    assert "no.txt" in said(model, memory, "--questions", tmp_path / "no.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no question" in said(model, memory, "--questions", tmp_path / "empty.txt")
    other = save_landmark(save_dense(tmp_path / "dense", seed=1), tmp_path / "other")
    assert "its weights are not those of the model" in said(other, memory, "Who?")
    shutil.copytree(memory, tmp_path / "cut")
    blocks = tmp_path / "cut" / "blocks.safetensors"
    blocks.write_bytes(blocks.read_bytes()[:-1])
    assert "the file was cut" in said(model, tmp_path / "cut", "Who?")


def test_bytes_of_one_character_are_shown_with_the_last_of_them() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé日", add_special_tokens=False).input_ids
    assert token_texts(tokenizer, ids) == ["a", "", "é", "", "", "日"]


def test_the_page_needs_nothing_else_and_escapes_what_is_in_the_text(opened: Memory) -> None:
    answer = opened.ask("</script><b>Who?", show=True, max_new_tokens=4)
    text = page(opened, answer)
    assert text.count("</script>") == 2 and "<b>Who" not in text and "{{" not in text
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", text)


def test_inspect_writes_the_page_and_a_heat_map(model: Path, memory: Path, tmp_path: Path) -> None:
    arguments = [model, memory, "Who?", "--output", tmp_path / "out", "--max_new_tokens", "5", "--device", "cpu"]
    inspect.main([str(x) for x in arguments])
    assert (tmp_path / "out" / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "give one question" in refusal(inspect.main, model, memory, "--output", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "file" in refusal(inspect.main, model, memory, "Who?", "--output", tmp_path / "file", "--device", "cpu")


def test_the_module_inspect_shadows_nothing() -> None:
    code = "import landmark_llama, inspect; print(inspect.__file__); inspect.signature(print)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "landmark_llama" not in found


@pytest.mark.slow
def test_in_a_browser_a_token_shows_its_passages_when_the_mouse_is_over_it(opened: Memory, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    answer = opened.ask("Who?", show=True, min_new_tokens=6, max_new_tokens=6)
    events = """<script>
      const spans = document.querySelectorAll("#answer span"), seen = [];
      const look = () => [...document.querySelectorAll("#passages li")].map(x => x.querySelector("b").textContent);
      seen.push(look());
      spans[4].dispatchEvent(new MouseEvent("mouseenter")); seen.push(look());
      document.getElementById("layer").value = "1";
      document.getElementById("layer").dispatchEvent(new Event("change")); seen.push(look());
      document.getElementById("layer").value = "0";
      document.getElementById("answer").dispatchEvent(new MouseEvent("mouseleave")); seen.push(look());
      spans[2].focus(); seen.push([String([...spans].findIndex(x => x.classList.contains("chosen")))]);
      document.body.innerHTML = ""; document.body.dataset.seen = encodeURIComponent(JSON.stringify(seen));
    </script>"""
    (tmp_path / "page.html").write_text(page(opened, answer).replace("</body>", events + "</body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [browser, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    first, fifth, one_layer, back, focused = json.loads(unquote(re.search(r'data-seen="([^"]*)"', dom)[1]))

    def expected(step: int, layer: int | None = None) -> list[str]:
        weights = passages.block_weights(answer.retrieved, passages.text_blocks(opened), first_layer=1)[step, 1:]
        weights = weights.mean(0) if layer is None else weights[layer]
        best = [b for b in weights.argsort(descending=True, stable=True).tolist() if weights[b] > 5e-6][:8]
        return [passages.passage(opened, b).text for b in best]

    assert sorted(first) == sorted(back) == sorted(expected(0))
    assert sorted(fifth) == sorted(expected(4)) and sorted(one_layer) == sorted(expected(4, 0))
    assert first[0] == expected(0)[0] and fifth[0] == expected(4)[0] and focused == ["2"]
