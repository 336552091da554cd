"""All tasks of the harness: exact lengths, whole parts, what is asked and how it is judged, chat templates."""

import json
import random
import re

import pytest
from prompt_tokenizers import TOKENIZERS, byte_level_tokenizer, sentencepiece_like_tokenizer
from transformers import PreTrainedTokenizerFast

from eval_passkey.haystack import TextHaystack
from eval_passkey.names import holds_benchmark_key, names, pool
from eval_passkey.prompts import Encoder, InputError, Prompt, Task
from eval_passkey.tasks import KINDS, TaskName, make_task

NAMES = [
    "passkey", "passkey:once", "passkey:twice", "passkey:text", "multi_key:4", "multi_key:16", "multi_value:4",
    "multi_query:3:text", "variable_tracking:2", "variable_tracking:4:text", "key_value", "line_retrieval",
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "ruler_vt:2",
]  # fmt: skip
BOOK = "The grey heron waits, patient as ever; no fish comes. Was it always so? Nobody can tell!\n\n  Later it flew. "
CHAT = (
    "{{ '<s>' }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def task_of(name: str, tokenizer: PreTrainedTokenizerFast, chat_template: bool = False) -> Task:
    encoder = Encoder(tokenizer, chat_template)
    return make_task(name, encoder, TextHaystack(encoder, BOOK * 3, "book"))


def text_of(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    return tokenizer.decode(prompt.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.mark.parametrize("name", NAMES)
def test_every_task_hits_every_length_exactly(name, tokenizer):
    task = task_of(name, tokenizer)
    minimum = task.minimum_length()
    for length in [*range(minimum + 8, minimum + 28), 6000]:
        assert len(task.prompt(length, seed=length).input_ids) == length
    with pytest.raises(InputError, match=rf"^length=9: .* need [0-9]+ tokens of this tokenizer \({name}\)"):
        task.prompt(9, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_stands_whole_in_the_prompt_and_is_judged_right(name, tokenizer):
    task = task_of(name, tokenizer)
    for seed in range(5):
        prompt = task.prompt(6000, seed)
        assert all(answer in text_of(tokenizer, prompt) for answer in prompt.answers)
        right = task.judge(" " + ", ".join(prompt.answers) + ".", prompt)
        assert right.correct and right.recall == 1
        wrong = task.judge(" nothing of the kind", prompt)
        assert not wrong.correct and wrong.recall == 0
        room = tokenizer(" " + ", ".join(prompt.answers), add_special_tokens=False).input_ids
        assert prompt.max_new_tokens > len(room)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_prompt_and_another_seed_another_one(name, byte_level):
    task, again = task_of(name, byte_level), task_of(name, byte_level)
    again.prompt(9000, seed=3)
    assert task.prompt(6000, seed=7) == again.prompt(6000, seed=7)
    prompts = [task.prompt(6000, seed=seed) for seed in range(20)]
    assert len({prompt.key for prompt in prompts}) == 20
    assert len({prompt.depth for prompt in prompts}) > 15


def needles_of(text: str, value: str) -> str:
    """The line that holds a value, without it."""
    return next(line for line in text.split("\n") if value in line).replace(value, "#")


@pytest.mark.parametrize("count", [4, 16, 64])
def test_multi_key_asks_for_one_of_its_names(count, byte_level):
    task = task_of(f"multi_key:{count}", byte_level)
    wordings = set()
    for seed in range(12):
        prompt = task.prompt(9000, seed)
        text = text_of(byte_level, prompt)
        values = re.findall(r"[0-9]{7}", text)
        assert len(values) == len(set(values)) == count and len(prompt.answers) == 1
        asked = next(name for name in names_in(text.split("\n")[-1]))
        assert asked in needles_of(text, prompt.key)
        assert sum(asked in line for line in text.split("\n")) == 2  # its needle, and the question
        wordings.add(text.split("\n")[0])
    assert len(wordings) > 3  # drawn anew for each prompt


def names_in(text: str) -> list[str]:
    """The drawn names in a text, in order."""
    pairs = re.findall(r"(?=\b([a-z]+ [a-z]+)\b)", text)
    return [pair for pair in pairs if pair.split()[0] in pool("adjectives") and pair.split()[1] in pool("nouns")]


def test_multi_value_hides_all_values_under_one_name_and_multi_query_one_under_each(byte_level):
    for name, different in (("multi_value:4", 1), ("multi_query:4", 4)):
        task = task_of(name, byte_level)
        for seed in range(8):
            prompt = task.prompt(5000, seed)
            text = text_of(byte_level, prompt)
            assert len(set(prompt.answers)) == 4 and set(re.findall(r"[0-9]{7}", text)) == set(prompt.answers)
            owners = {names_in(needles_of(text, value))[0] for value in prompt.answers}
            assert len(owners) == different and owners <= set(names_in(text.split("\n")[-1]))


@pytest.mark.parametrize("hops", [2, 4])
def test_variable_tracking_needs_every_link_in_order(hops, byte_level):
    task = task_of(f"variable_tracking:{hops}", byte_level)
    for seed in range(8):
        prompt = task.prompt(5000, seed)
        text = text_of(byte_level, prompt)
        example, chain = text.split("\n\n")
        assert len(prompt.answers) == hops + 1 and not any(name in example for name in prompt.answers)
        lines = [line for line in chain.split("\n") if any(name in line for name in prompt.answers)]
        assert [[name in line for name in prompt.answers].count(True) for line in lines] == [1] + [2] * hops
        assert all(prompt.answers[i] in line for i, line in enumerate(lines))
        value = re.search(r"[0-9]{5}", lines[0])[0]
        assert value in chain.split("\n")[-1] and value not in "".join(lines[1:])
        shown = re.findall(r"\b[A-Z]{5}\b", example.split("\n")[-1])
        assert len(shown) == hops + 1  # the worked example is answered


def test_key_value_is_json_that_holds_the_answer(byte_level):
    task = task_of("key_value", byte_level)
    prompt = task.prompt(6000, seed=1)
    text = text_of(byte_level, prompt)
    table = json.loads(text[text.index("{") : text.index("}") + 1])
    asked = re.findall(r'"([0-9a-f-]{36})"', text.split("\n")[-1])[0]
    assert table[asked] == prompt.key and len(table) > 10


def test_records_fill_the_length_and_the_depth_says_which_is_asked(byte_level):
    for name, line in (("key_value", r'^"[0-9a-f-]{36}": "'), ("line_retrieval", r"<[0-9]{5}>$")):
        task = task_of(name, byte_level)
        for depth in (0.0, 0.5, 1.0, None):
            prompt = task.prompt(6000, seed=4, depth=depth)
            lines = text_of(byte_level, prompt).split("\n")
            records = [i for i, text in enumerate(lines) if re.search(line, text)]
            place = next(i for i in records if prompt.key in lines[i])
            assert prompt.depth == pytest.approx((place - records[0]) / (len(records) - 1))
            assert depth is None or prompt.depth == pytest.approx(depth, abs=0.03)
            filler = 0 if lines[1] == "{" else len(byte_level("\n" + lines[1]).input_ids)
            longest = max(len(byte_level("\n" + lines[i]).input_ids) for i in records)
            assert filler <= 1.5 * longest


@pytest.mark.parametrize("name", ["multi_key:16", "multi_query:4", "variable_tracking:4", "passkey:text"])
def test_the_asked_depth_is_where_the_needle_stands(name, byte_level):
    task = task_of(name, byte_level)
    for depth in (0.0, 0.3, 1.0):
        prompt = task.prompt(20_000, seed=2, depth=depth)
        assert prompt.depth == pytest.approx(depth, abs=0.01)
        place = text_of(byte_level, prompt).index(prompt.answers[0]) / len(text_of(byte_level, prompt))
        assert place == pytest.approx(depth, abs=0.1)


def test_string_match_counts_each_expected_answer_whatever_its_case():
    task = task_of("multi_query:4", sentencepiece_like_tokenizer())
    prompt = Prompt([], ("1000371", "ABCDE", "1000372", "1000373"), 0.5, 0, 9)
    verdict = task.judge("They are 1000371 and abcde, or 999.", prompt)
    assert (verdict.correct, verdict.recall) == (False, 0.5)


def test_hidden_numbers_are_among_those_kept_from_the_training_text(byte_level):
    for name in ("multi_key:16", "multi_value", "line_retrieval", "variable_tracking:2"):
        for number in re.findall(r"[0-9]{5,}", text_of(byte_level, task_of(name, byte_level).prompt(6000, 0))):
            assert holds_benchmark_key(int(number))
    assert holds_benchmark_key(1000600) and not holds_benchmark_key(10_004) and not holds_benchmark_key(9)


def test_names_never_run_out_and_are_never_said_twice():
    pairs = len(pool("adjectives")) * len(pool("nouns"))
    stream = names(random.Random(0))
    drawn = [next(stream) for _ in range(pairs)]
    assert len(set(drawn)) == pairs > 40_000
    assert {len(name.split()) for name in drawn} == {2, 3} and len(drawn[0].split()) == 2


# -- names of tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("passkey", "passkey"), ("passkey:paper", "passkey"), ("passkey:once:text", "passkey:once:text"),
        ("passkey:text:once", "passkey:once:text"), ("multi_key", "multi_key:4"), ("multi_key:016", "multi_key:16"),
        ("variable_tracking", "variable_tracking:4"), ("key_value:text", "key_value:text"),
        ("niah_single_2", "niah_single_2"), ("ruler_vt", "ruler_vt:4"), ("ruler_vt:02", "ruler_vt:2"),
    ],
)  # fmt: skip
def test_a_task_has_one_name(given, name):
    assert str(TaskName.parse(given)) == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pass_key", "there is no 'pass_key'; choose from " + ", ".join(KINDS)),
        ("passkey:papre", "wording 'papre' is neither paper, twice, once nor a .json file"),
        ("multi_key:0", "'0' must be a whole number from 1, as in multi_key:4"),
        ("multi_key:many", "'many' must be a whole number from 1"),
        ("multi_key:4:16", "'4:16' says more than a task takes"),
        ("key_value:4", "'4' says more than a task takes"),
        ("niah_single_1:4", "'4' says more than a task takes"),
        ("ruler_vt:2:text", "whether ruler_vt has a text is RULER's own; leave 'text' out"),
    ],
)
def test_what_is_no_task_is_refused_with_the_choices(given, message):
    with pytest.raises(InputError, match=f"^--task {given}: {message}"):
        TaskName.parse(given)


# -- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passkey", "passkey:text", "multi_key:4", "variable_tracking:2", "key_value"])
@pytest.mark.parametrize("make", [sentencepiece_like_tokenizer, byte_level_tokenizer])
def test_in_a_chat_the_user_asks_and_the_model_has_begun_to_answer(name, make):
    tokenizer = make()
    tokenizer.chat_template = CHAT if tokenizer.bos_token else CHAT.replace("<s>", "")
    task, plain = task_of(name, tokenizer, chat_template=True), task_of(name, tokenizer)
    hidden = task.hide(random.Random(f"{task.kind} 5 3000"), 3000, None)
    prompt = task.prompt(3000, seed=5)
    assert len(prompt.input_ids) == 3000
    text = tokenizer.decode(prompt.input_ids)
    assert text.startswith("<s>" if tokenizer.bos_token else "[user] ") and text.count("<s>") <= 1
    assert f"[user] {hidden.parts[0]}" in text
    assert text.endswith(f"\n{hidden.question}\n[assistant]\n{hidden.answer_start}")
    assert prompt.answers == plain.prompt(3000, seed=5).answers or name == "key_value"  # there, as many as fit


def test_a_chat_is_tokenised_as_its_whole_text_would_be():
    tokenizer = sentencepiece_like_tokenizer()
    tokenizer.chat_template = CHAT
    prompt = task_of("passkey", tokenizer, chat_template=True).prompt(2000, seed=0)
    text = tokenizer.decode(prompt.input_ids)
    start = tokenizer(text.removeprefix("<s>").lstrip()).input_ids[:60]
    assert prompt.input_ids[:60] == start


def test_a_tokenizer_without_a_chat_template_or_with_a_useless_one_is_refused():
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match="^--chat_template true: the tokenizer has no chat template; leave it out"):
        Encoder(tokenizer, chat_template=True)
    for template, message in (("hello", "does not say what the user says once"), ("{{ 1 / 0 }}", "template fails")):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message):
            Encoder(tokenizer, chat_template=True)
