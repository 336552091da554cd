"""The passkey prompt: exact lengths with every kind of tokenizer, whole parts, true depths, honest judgement."""

import json
import random
from pathlib import Path

import pytest
from prompt_tokenizers import DATA, TOKENIZERS, byte_level_tokenizer, closing_tokenizer, sentencepiece_like_tokenizer
from transformers import PreTrainedTokenizerFast

from eval_passkey.names import is_benchmark_key
from eval_passkey.passkey import DEFAULT_TEMPLATE, TEMPLATES, PasskeyTask, Template, draw_key, judge, load_template
from eval_passkey.prompts import Encoder, InputError, drawn_length


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def other_wording(tmp_path: Path, **changes: object) -> Path:
    fields = json.loads(DEFAULT_TEMPLATE.read_text(encoding="utf-8"))
    fields.update(changes)
    path = tmp_path / "template.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}), encoding="utf-8")
    return path


def passkey(tokenizer: PreTrainedTokenizerFast, template: Template | None = None) -> PasskeyTask:
    return PasskeyTask("passkey", Encoder(tokenizer), template or load_template())


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_every_length_is_hit_exactly(tokenizer):
    task = passkey(tokenizer)
    minimum = task.minimum_length()
    for length in [*range(minimum, minimum + 90), 1000, 4096, 32768]:
        assert len(task.prompt(length, seed=length).input_ids) == length


@pytest.mark.parametrize("wording", TEMPLATES)
def test_task_needle_and_question_are_never_cut(tokenizer, wording):
    template = load_template(TEMPLATES[wording])
    task = passkey(tokenizer, template)
    for extra in range(60):
        prompt = task.prompt(task.minimum_length() + extra, seed=extra)
        text = text_of(tokenizer, prompt.input_ids)
        assert text.count(template.task) == 1
        assert text.count("\n" + template.needle.replace("{key}", str(prompt.key))) == 1
        assert text.endswith(f"\n{template.question} {template.answer_start}")


def test_joints_get_no_space_of_the_tokenizers_own(tokenizer):
    task = passkey(tokenizer)
    _, _, needle, _, question = task.encoder.parts(task.hide(random.Random(0), 0, None))
    for ids in (needle, question):
        assert tokenizer.decode([*tokenizer("a", add_special_tokens=False).input_ids, *ids]).startswith("a\n")
    assert "\n " not in text_of(tokenizer, task.prompt(2000, seed=0).input_ids)


def test_a_prompt_between_words_is_tokenised_as_its_text_would_be():
    tokenizer = sentencepiece_like_tokenizer()
    task = passkey(tokenizer)
    filler = len(task.encoder.encode("\n" + task.template.filler))
    prompt = task.prompt(task.minimum_length() + 2 * filler, seed=0, depth=0.5)
    parts = [
        task.template.filler if "filler" in part else task.template.text(part, prompt.key)
        for part in task.template.layout
    ]
    assert prompt.input_ids == tokenizer("\n".join(parts) + " " + task.template.answer_start).input_ids


def test_special_tokens_stand_at_the_start_and_nowhere_else():
    for make, start in ((sentencepiece_like_tokenizer, [1]), (closing_tokenizer, [1]), (byte_level_tokenizer, [])):
        tokenizer = make()
        ids = passkey(tokenizer).prompt(700, seed=3).input_ids
        assert ids[: len(start)] == start
        assert not set(ids[len(start) :]) & set(tokenizer.all_special_ids)
        assert text_of(tokenizer, ids).startswith(load_template().task)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_where_the_needle_really_stands(depth):
    tokenizer = sentencepiece_like_tokenizer()
    task = passkey(tokenizer)
    prompt = task.prompt(3001, seed=1, depth=depth)
    needle = task.encoder.encode("\n" + task.template.text("needle", prompt.key))
    start = next(i for i in range(3001) if prompt.input_ids[i : i + len(needle)] == needle)
    opening = len(tokenizer(task.template.task).input_ids)  # with BOS
    rest = task.encoder.encode(f"\n{task.template.question} {task.template.answer_start}")
    assert prompt.depth == (start - opening) / (3001 - opening - len(needle) - len(rest))
    assert prompt.depth == pytest.approx(depth, abs=1e-3)


def test_a_seed_gives_one_prompt_and_another_seed_another():
    task, again = (passkey(sentencepiece_like_tokenizer()) for _ in range(2))
    again.prompt(5000, seed=8)
    assert task.prompt(900, seed=7) == again.prompt(900, seed=7)
    prompts = [task.prompt(900, seed=seed) for seed in range(20)]
    assert len({prompt.key for prompt in prompts}) > 15
    assert len({prompt.depth for prompt in prompts}) > 15


def test_default_keys_are_those_kept_from_the_training_text():
    rng, paper, once = random.Random(0), load_template(), load_template(TEMPLATES["once"])
    keys = [draw_key(paper, rng) for _ in range(2000)]
    assert all(is_benchmark_key(key) and key in range(10_000, 99_999) and key % 7 == 3 for key in keys)
    assert len({key // 10_000 for key in keys}) == 4  # the paper's go up to 50,000
    keys = [draw_key(once, rng) for _ in range(2000)]
    assert all(map(is_benchmark_key, keys)) and len({key // 10_000 for key in keys}) == 9
    assert not any(map(is_benchmark_key, (3, 9999, 10_000, 99_999, 100_005, 48_213)))


def test_a_template_without_the_rule_draws_from_its_whole_range(tmp_path):
    template = load_template(other_wording(tmp_path, benchmark_keys_only=None, key_range=[1, 3]))
    rng = random.Random(0)
    assert {draw_key(template, rng) for _ in range(100)} == {1, 2, 3}


def test_another_wording_makes_prompts_of_exact_length(tokenizer, tmp_path):
    stored = DATA / "templates/landmark_paper.json"
    changed = {"needle": "It is {key}. {key} it is.", "joiner": " ", "answer_start": None}
    path = stored if stored.is_file() else other_wording(tmp_path, **changed)
    template = load_template(path)
    task = passkey(tokenizer, template)
    prompt = task.prompt(800, seed=0)
    assert len(prompt.input_ids) == 800
    assert template.needle.replace("{key}", str(prompt.key)) in text_of(tokenizer, prompt.input_ids)


@pytest.mark.parametrize("joiner", [" ", "", "\n\n", " -- "])
def test_any_joiner_hits_the_length(tokenizer, joiner, tmp_path):
    task = passkey(tokenizer, load_template(other_wording(tmp_path, joiner=joiner)))
    assert len(task.prompt(777, seed=0).input_ids) == 777


def test_filler_on_one_side_alone_puts_the_needle_at_that_end(tmp_path):
    tokenizer = sentencepiece_like_tokenizer()
    path = other_wording(tmp_path, layout=["filler prefix", "needle", "question"])
    prompt = passkey(tokenizer, load_template(path)).prompt(600, seed=0, depth=0.3)
    assert (len(prompt.input_ids), prompt.depth) == (600, 1.0)
    path = other_wording(tmp_path, layout=["task", "needle", "filler suffix", "question"])
    assert passkey(tokenizer, load_template(path)).prompt(600, seed=0, depth=0.3).depth == 0.0


def test_a_length_without_room_is_refused_with_the_minimum(tokenizer):
    task = passkey(tokenizer)
    minimum = task.minimum_length()
    assert all(len(task.prompt(minimum, seed=seed).input_ids) == minimum for seed in range(200))
    with pytest.raises(InputError, match=f"^length=20: task, needle and question alone need {minimum} tokens"):
        task.prompt(20, seed=0)


def test_answers_have_room_for_more_than_the_key(tokenizer):
    prompt = passkey(tokenizer).prompt(700, seed=0)
    longer = tokenizer(f" {prompt.key}00", add_special_tokens=False).input_ids
    assert prompt.max_new_tokens > len(longer)


@pytest.mark.parametrize("field", ["task", "filler", "needle", "question", "layout", "joiner", "key_range"])
def test_a_template_that_lacks_a_field_is_refused_by_name(field, tmp_path):
    path = other_wording(tmp_path, **{field: None})
    with pytest.raises(InputError, match=f"template .*template.json: lacks the field '{field}'"):
        load_template(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needle": "No number here."}, r"\{key\} must stand in needle, and nowhere else: see needle"),
        ({"question": "Is it {key}?"}, r"\{key\} must stand in needle, and nowhere else: see question"),
        ({"filler": ""}, "filler must be a text that is not empty"),
        ({"task": 7}, "task must be a text that is not empty, not 7"),
        ({"answer_start": 7}, "answer_start must be a text that is not empty, not 7"),
        ({"answer_start": "{key}"}, r"\{key\} must stand in needle, and nowhere else: see answer_start"),
        ({"layout": ["task", "needle", "question"]}, "layout must hold needle and a filler"),
        ({"layout": ["needle", "question", "filler suffix"]}, "layout must .* end with question"),
        ({"layout": ["filler prefix", "needle", "needle", "question"]}, "at most once"),
        ({"layout": ["needle", "filler prefix", "question"]}, "filler prefix before needle"),
        ({"layout": ["haystack", "needle", "question"]}, "layout must list each of"),
        ({"key_range": [5, 2]}, "key_range must be"),
        ({"key_range": [1, 100]}, "holds no benchmark key"),
        ({"key_range": "all"}, "key_range must be"),
        ({"benchmark_keys_only": "maybe"}, "benchmark_keys_only must be true or false"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_the_reason(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_template(other_wording(tmp_path, **changes))


def test_a_template_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: cannot be read as a JSON file"):
        load_template(tmp_path / "no.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="must be a JSON object"):
        load_template(tmp_path / "list.json")
    (tmp_path / "torn.json").write_text('{"task": ')
    with pytest.raises(InputError, match="cannot be read as a JSON file"):
        load_template(tmp_path / "torn.json")


@pytest.mark.parametrize(
    ("answer", "correct", "prediction"),
    [
        ("48213", True, "48213"),
        (" 48213.\nAnd so on, 17 times.", True, "48213"),
        ("\n48213, said the clerk", True, "48213"),
        ("482137", False, "482137"),
        ("048213", False, "048213"),
        ("4821", False, "4821"),
        ("4821 3", False, "4821"),
        ("48213.5", False, "48213.5"),
        ("48213,000", False, "48213,000"),
        ("-48213", False, "-48213"),
        ("the 48213", False, "the 48213"),
        ("\uff14\uff18", False, "\uff14\uff18"),
        ("", False, ""),
        ("x" * 100, False, "x" * 40),
    ],
)
def test_only_the_whole_key_and_nothing_but_the_key_is_right(answer, correct, prediction):
    assert judge(answer, "48213") == (correct, prediction)


def test_the_default_is_the_papers_wording(tmp_path):
    template = load_template()
    assert template.needle.count("{key}") == 2 and template.layout.index("needle") == 2
    stored = DATA / "templates/landmark_paper.json"
    if not stored.is_file():
        pytest.skip(f"LANDMARK_DATA: {stored} is not there")
    paper = load_template(stored)
    for name in ("task", "filler", "needle", "layout", "joiner", "key_range"):
        assert getattr(template, name) == getattr(paper, name)
    assert f"{template.question} {template.answer_start}" == paper.question


def test_a_round_of_seeds_has_every_length_of_a_block_once_in_an_order_of_its_own():
    rounds = [[drawn_length(1000, seed, 15) for seed in range(start, start + 15)] for start in (0, 15, 30)]
    assert all(sorted(lengths) == list(range(986, 1001)) for lengths in rounds)
    assert len(set(map(tuple, rounds))) == 3 and [drawn_length(1000, seed, 15) for seed in range(15)] == rounds[0]
    other = [drawn_length(2000, seed, 15) - 1000 for seed in range(15)]
    assert other != rounds[0] and drawn_length(1000, 7, 1) == 1000
