"""RULER's own tasks: its wording, what is hidden where, and that noise is cut between lines only."""

import re

import pytest
from prompt_tokenizers import TOKENIZERS, byte_level_tokenizer, sentencepiece_like_tokenizer

from eval_passkey.haystack import TextHaystack
from eval_passkey.prompts import Encoder, InputError, Prompt, Task
from eval_passkey.ruler import NIAH
from eval_passkey.tasks import TaskName, make_task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BOOK = "The grey heron waits, patient as ever; no fish comes. Was it always so? Nobody can tell! " * 3
NUMBER, UUID = "[0-9]{7}", "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


def task_of(name: str, chat: str | None = None) -> Task:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = chat
    encoder = Encoder(tokenizer, chat is not None)
    return make_task(name, encoder, TextHaystack(encoder, BOOK, "book"))


def text_of(task: Task, prompt: Prompt) -> str:
    return task.encoder.tokenizer.decode(prompt.input_ids)


def test_a_single_needle_in_noise_is_rulers_text_word_for_word():
    task = task_of("niah_single_1")
    for seed in range(6):
        prompt = task.prompt(3000, seed)
        lines = text_of(task, prompt).split("\n")
        name = re.search("number for ([a-z]+-[a-z]+) mentioned", lines[-1])[1]
        assert lines[0] == (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards."
        )
        assert lines.count(f"One of the special magic numbers for {name} is: {prompt.key}.") == 1
        assert set(lines[1:-2]) == {NOISE, f"One of the special magic numbers for {name} is: {prompt.key}."}
        assert NOISE.startswith(lines[-2])  # where the length ends
        assert lines[-1] == (
            f"What is the special magic number for {name} mentioned in the provided text? "
            f"The special magic number for {name} mentioned in the provided text is"
        )


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [("niah_single_2", NUMBER, 1), ("niah_single_3", UUID, 1), ("niah_multikey_1", NUMBER, 4)],
)
def test_needles_in_a_text_are_whole_sentences_of_which_one_is_asked(name: str, value: str, count: int):
    task = task_of(name)
    places = set()
    for seed in range(8):
        prompt = task.prompt(4000, seed)
        opening, body, question = text_of(task, prompt).split("\n")
        found = re.findall(rf" One of the special magic (number|uuid)s for ([a-z]+-[a-z]+) is: ({value})\.", body)
        assert len({owner for _, owner, _ in found}) == len({said for _, _, said in found}) == count
        (asked,) = [owner for _, owner, said in found if said == prompt.key]
        what = "uuid" if value is UUID else "number"
        assert {kind for kind, _, _ in found} == {what} and f"about the {what} afterwards" in opening
        assert question.count(f"magic {what} for {asked} mentioned") == 2
        assert "grass is green" not in body and "grey heron waits" in body
        places.add([owner for _, owner, _ in found].index(asked))
    assert len(places) == count  # the asked one stands anywhere among the others


def test_variable_tracking_shows_another_chain_and_asks_for_this_one():
    task = task_of("ruler_vt:2")
    for seed in range(6):
        prompt = task.prompt(6000, seed)
        example, rest = re.split(r"\n\n(?=Memorize)", text_of(task, prompt))
        first, second, third = prompt.answers
        assigned = [line for line in rest.split("\n") if line.startswith("VAR")]
        value = re.fullmatch(rf"VAR {first} = ([0-9]{{5}})", assigned[0])[1]
        assert assigned[1:] == [f"VAR {second} = VAR {first}", f"VAR {third} = VAR {second}"]
        assert rest.endswith(f"3 variables are assigned the value {value}, they are:")
        assert not any(label in example for label in prompt.answers)
        shown = re.search(r"they are: (\w{5}) (\w{5}) (\w{5})$", example).groups()
        assert f"VAR {shown[2]} = VAR {shown[1]}" in example and example.count(NOISE) == 12


def test_noise_is_cut_between_lines_whatever_the_tokenizer():
    for make in TOKENIZERS["sentencepiece-like"], TOKENIZERS["byte-level, merging line ends"]:
        task = make_task("niah_single_1", make())
        lines = task.encoder.tokenizer.decode(task.prompt(2500, seed=1).input_ids).split("\n")
        needle = next(i for i, line in enumerate(lines) if line.startswith("One of"))
        assert 1 < needle < len(lines) - 2 and set(lines[1 : needle - 1] + lines[needle + 1 : -2]) == {NOISE}


def test_the_depth_is_where_the_needle_stands():
    for name in NIAH:
        task = task_of(name)
        for depth in (0.0, 0.4, 1.0):
            prompt = task.prompt(20_000, seed=2, depth=depth)
            text = text_of(task, prompt)
            assert prompt.depth == pytest.approx(depth, abs=0.01)
            assert text.index(prompt.key) / len(text) == pytest.approx(depth, abs=0.05)


def test_in_a_chat_the_model_begins_with_rulers_answer_prefix():
    chat = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    chat += "[assistant]\n{{ '' }}"
    for name in ("niah_single_2", "ruler_vt:2"):
        task = task_of(name, chat)
        text = text_of(task, task.prompt(4000, seed=0))
        start = "The special magic number" if name in NIAH else "Answer: According to the chain(s)"
        assert text.startswith("[user] ") and text.split("[assistant]\n")[1].startswith(start)


def test_an_essay_task_without_a_text_is_refused():
    with pytest.raises(InputError, match="^--task niah_single_2: needs a text, --haystack FILE"):
        make_task("niah_single_2", sentencepiece_like_tokenizer())
    assert make_task("niah_single_1", sentencepiece_like_tokenizer()).name == "niah_single_1"
    assert TaskName.parse("niah_multikey_1").text and not TaskName.parse("ruler_vt:2").text
