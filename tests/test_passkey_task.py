"""The passkey prompt: exact lengths with every kind of tokenizer, whole parts, true depths, honest judgement."""

import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval_passkey.task import (
    DEFAULT_TEMPLATE,
    InputError,
    PasskeyTask,
    draw_key,
    is_benchmark_key,
    judge,
    load_template,
)

DATA = Path(os.environ.get("LANDMARK_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
TEXT = ["The number of the lamp is 48213, and the sky above 907 roofs was green.\nHere we go, again and again.\n"] * 4
# As LLaMA 3 cuts text, where a full stop takes the line end along.
LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """As LLaMA's: a space before the text, merges over several words, bytes for unknown characters, BOS."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n\d]+|."), "isolated")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {piece: i for piece, i in model["vocab"].items() if piece != "\n"}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(model["vocab"]) + byte
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_tokenizer(words: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's, or with another pattern of words; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts BOS before and EOS behind every text."""
    tokenizer = sentencepiece_like_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def stored_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    if not (DATA / folder).is_dir():
        pytest.skip(f"LANDMARK_DATA: {DATA / folder} is not there")
    return AutoTokenizer.from_pretrained(DATA / folder)


TOKENIZERS = {
    "sentencepiece-like": sentencepiece_like_tokenizer,
    "byte-level": byte_level_tokenizer,
    "byte-level, merging line ends": lambda: byte_level_tokenizer(LLAMA3_WORDS),
    "with EOS at the end": closing_tokenizer,
    "LLaMA": lambda: stored_tokenizer("tokenizers/llama"),
    "stories260K": lambda: stored_tokenizer("models/stories260K/gqa"),
}


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def other_wording(tmp_path: Path, **changes: object) -> Path:
    fields = json.loads(DEFAULT_TEMPLATE.read_text(encoding="utf-8"))
    fields.update(changes)
    path = tmp_path / "template.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}), encoding="utf-8")
    return path


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_every_length_is_hit_exactly(tokenizer):
    task = PasskeyTask(tokenizer, load_template())
    minimum = task.minimum_length()
    for length in [*range(minimum, minimum + 90), 1000, 4096, 32768]:
        assert len(task.prompt(length, seed=length).input_ids) == length


def test_task_needle_and_question_are_never_cut(tokenizer):
    template = load_template()
    task = PasskeyTask(tokenizer, template)
    for extra in range(60):
        prompt = task.prompt(task.minimum_length() + extra, seed=extra)
        text = text_of(tokenizer, prompt.input_ids)
        assert text.count(template.task) == 1
        assert text.count("\n" + template.needle.replace("{key}", str(prompt.key))) == 1
        assert text.endswith("\n" + template.question)


def test_joints_get_no_space_of_the_tokenizers_own(tokenizer):
    task = PasskeyTask(tokenizer, load_template())
    for part in ("needle", "question"):
        ids = task._fixed_parts(key=10_002)[part]
        assert tokenizer.decode([*tokenizer("a", add_special_tokens=False).input_ids, *ids]).startswith("a\n")
    assert "\n " not in text_of(tokenizer, task.prompt(2000, seed=0).input_ids)


def test_a_prompt_between_words_is_tokenised_as_its_text_would_be():
    tokenizer = sentencepiece_like_tokenizer()
    task = PasskeyTask(tokenizer, load_template())
    filler = len(task._encode("\n" + task.template.filler, first=False))
    prompt = task.prompt(task._length_without_filler(task.prompt(2000, 0).key) + 2 * filler, seed=0, depth=0.5)
    key = str(prompt.key)
    parts = [
        task.template.filler if "filler" in part else task.template.text(part, key) for part in task.template.layout
    ]
    assert prompt.input_ids == tokenizer("\n".join(parts)).input_ids


def test_special_tokens_stand_at_the_start_and_nowhere_else():
    for make, start in ((sentencepiece_like_tokenizer, [1]), (closing_tokenizer, [1]), (byte_level_tokenizer, [])):
        tokenizer = make()
        ids = PasskeyTask(tokenizer, load_template()).prompt(700, seed=3).input_ids
        assert ids[: len(start)] == start
        assert not set(ids[len(start) :]) & set(tokenizer.all_special_ids)
        assert text_of(tokenizer, ids).startswith(load_template().task)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_where_the_needle_really_stands(depth):
    tokenizer = sentencepiece_like_tokenizer()
    task = PasskeyTask(tokenizer, load_template())
    prompt = task.prompt(3001, seed=1, depth=depth)
    needle = task._fixed_parts(prompt.key)["needle"]
    start = next(i for i in range(3001) if prompt.input_ids[i : i + len(needle)] == needle)
    before = start - len(task.special_ids) - len(task._fixed_parts(prompt.key)["task"])
    assert prompt.depth == before / (3001 - task._length_without_filler(prompt.key))
    assert prompt.depth == pytest.approx(depth, abs=1e-3)


def test_a_seed_gives_one_prompt_and_another_seed_another():
    task, again = (PasskeyTask(sentencepiece_like_tokenizer(), load_template()) for _ in range(2))
    again.prompt(5000, seed=8)
    assert task.prompt(900, seed=7) == again.prompt(900, seed=7)
    prompts = [task.prompt(900, seed=seed) for seed in range(20)]
    assert len({prompt.key for prompt in prompts}) > 15
    assert len({prompt.depth for prompt in prompts}) > 15


def test_default_keys_are_those_kept_from_the_training_text():
    rng = random.Random(0)
    keys = [draw_key(load_template(), rng) for _ in range(2000)]
    assert all(is_benchmark_key(key) and key in range(10_000, 99_999) and key % 7 == 3 for key in keys)
    assert len({key // 10_000 for key in keys}) == 9
    assert not any(map(is_benchmark_key, (3, 9999, 10_000, 99_999, 100_005, 48_213)))


def test_a_template_without_the_rule_draws_from_its_whole_range(tmp_path):
    template = load_template(other_wording(tmp_path, benchmark_keys_only=None, key_range=[1, 3]))
    rng = random.Random(0)
    assert {draw_key(template, rng) for _ in range(100)} == {1, 2, 3}


def test_another_wording_makes_prompts_of_exact_length(tokenizer, tmp_path):
    stored = DATA / "templates/landmark_paper.json"
    path = stored if stored.is_file() else other_wording(tmp_path, needle="It is {key}. {key} it is.", joiner=" ")
    template = load_template(path)
    task = PasskeyTask(tokenizer, template)
    prompt = task.prompt(800, seed=0)
    assert len(prompt.input_ids) == 800
    assert template.needle.replace("{key}", str(prompt.key)) in text_of(tokenizer, prompt.input_ids)


@pytest.mark.parametrize("joiner", [" ", "", "\n\n", " -- "])
def test_any_joiner_hits_the_length(tokenizer, joiner, tmp_path):
    task = PasskeyTask(tokenizer, load_template(other_wording(tmp_path, joiner=joiner)))
    assert len(task.prompt(777, seed=0).input_ids) == 777


def test_filler_on_one_side_alone_puts_the_needle_at_that_end(tmp_path):
    tokenizer = sentencepiece_like_tokenizer()
    path = other_wording(tmp_path, layout=["filler prefix", "needle", "question"])
    prompt = PasskeyTask(tokenizer, load_template(path)).prompt(600, seed=0, depth=0.3)
    assert (len(prompt.input_ids), prompt.depth) == (600, 1.0)
    path = other_wording(tmp_path, layout=["task", "needle", "filler suffix", "question"])
    assert PasskeyTask(tokenizer, load_template(path)).prompt(600, seed=0, depth=0.3).depth == 0.0


def test_a_length_without_room_is_refused_with_the_minimum(tokenizer):
    task = PasskeyTask(tokenizer, load_template())
    minimum = task.minimum_length()
    assert all(len(task.prompt(minimum, seed=seed).input_ids) == minimum for seed in range(200))
    with pytest.raises(InputError, match=f"^length=20: task, needle and question alone need {minimum} tokens"):
        task.prompt(20, seed=0)


def test_answers_have_room_for_more_than_the_key(tokenizer):
    prompt = PasskeyTask(tokenizer, load_template()).prompt(700, seed=0)
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
    assert judge(answer, 48213) == (correct, prediction)
