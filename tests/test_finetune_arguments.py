"""The YAML file, the flags that override it, and what is refused before anything is read."""

from pathlib import Path

import pytest
from transformers import training_args

from finetune.arguments import UserError, parse_arguments
from finetune.models import LANDMARK_SETTINGS
from landmark_llama import LandmarkLlamaConfig

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "finetune" / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: some/model\n"
        "data: [a.jsonl, b.jsonl]\n"
        "output_dir: out   # a comment\n"
        "learning_rate: 1.0e-3\n"
        "skip_bad_rows: true\n"
        "num_local_blocks: null\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.2}\n"
    )
    return path


def test_the_file_is_read_and_flags_override_it(config: Path) -> None:
    model, data, run, _ = parse_arguments(["--learning_rate", "5e-4", "--config", str(config), "--data", "c.jsonl"])
    assert model.model_name_or_path == "some/model" and model.num_local_blocks is None
    assert data.data == ["c.jsonl"] and data.skip_bad_rows is True
    assert run.learning_rate == 5e-4 and run.output_dir == "out" and run.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert parse_arguments(["--config", str(config), "--skip_bad_rows", "false"])[1].skip_bad_rows is False
    assert parse_arguments(["--config", str(config)])[1].data == ["a.jsonl", "b.jsonl"]


def test_the_demos_flags_are_read_though_help_does_not_list_them(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "corpus_seed: 3\ncorpus_retrieval_characters: [50, 90]\n")
    data = parse_arguments(["--config", str(config), "--data", "embedded", "--corpus_documents", "7"])[1]
    assert (data.demo.corpus_seed, data.demo.corpus_documents) == (3, 7)
    assert data.demo.corpus_retrieval_characters == [50, 90]
    with pytest.raises(UserError, match="unknown flag --corpus_sed; did you mean corpus_seed?"):
        parse_arguments(["--config", str(config), "--corpus_sed", "1"])
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    listed = capsys.readouterr().out
    assert "--context_length" in listed and "--corpus" not in listed and "--vocabulary_size" not in listed


def test_the_default_schedule_is_a_cosine_with_a_floor(config: Path) -> None:
    config.write_text("model_name_or_path: m\ndata: [a.jsonl]\noutput_dir: out\n")
    run = parse_arguments(["--config", str(config)])[2]
    assert run.lr_scheduler_type == "cosine_with_min_lr" and run.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("xyzzy: 1\n", "unknown key 'xyzzy'"),
        ("- a\n- b\n", "expected `key: value` lines, found list"),
        ("data: [a\n", "is not valid YAML"),
        ("learning_rate: fast\n", "learning_rate"),
        ("attention: sparse\n", "attention"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_named(text: str, message: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(config)])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean learning_rate?"),
        (["--model_name_or_path"], "expected one argument"),
        (["--config_name", "c.json"], "give one of --model_name_or_path"),
        (["--block_size", "1"], "--block_size 1: a block needs at least one token"),
        (["--block_size", "32", "--context_length", "40"], "--context_length 40: a row must hold two blocks"),
        (["--heldout_share", "1.5"], "--heldout_share 1.5: must lie between 0 and 1"),
        (["--corpus_retrieval_characters", "500"], "--corpus_retrieval_characters [500]: give the shortest and the"),
        (["--corpus_retrieval_characters", "500", "90"], "--corpus_retrieval_characters [500, 90]: give the"),
        (["--tokenizer_name", "embedded"], "--tokenizer_name embedded needs --data embedded"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--segments", "0"], "--segments 0: a row has at least one"),
        (["--segments", "2", "--attention", "dense"], "--segments 2 needs --attention landmark"),
        (["--segments", "2", "--pack_documents", "apart"], "--segments 2 needs --pack_documents join"),
        (["--pad_vocabulary_to_multiple_of", "0"], "--pad_vocabulary_to_multiple_of 0: must be 1 or more"),
        (["--pad_vocabulary_to_multiple_of", "64", "--attention", "dense"], "of 64 needs --attention landmark"),
        (["--pad_vocabulary_to_multiple_of", "64", "--lora_rank", "8"], "an adapter is loaded onto its base"),
        (["--eval_passkey_steps", "-1"], "--eval_passkey_steps -1: must be 0"),
        (["--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
        (["--load_in_4bit", "true"], "--lora_rank is missing"),
        (["--lora_alpha", "8"], "--lora_rank is missing"),
        (["--lora_rank", "8", "--lora_alpha", "0"], "--lora_alpha 0.0: must be larger than 0"),
        (["--lora_rank", "8", "--lora_dropout", "1"], "--lora_dropout 1.0: must lie between 0 and 1"),
        (["--lora_rank", "8", "--lora_target_modules", "lm_head"], "--lora_target_modules lm_head: must be some of"),
        (["--lora_rank", "8", "--attention", "dense"], "--lora_rank 8: only for --attention landmark"),
    ],
)
def test_flags_that_cannot_be_are_one_sentence(flags: list[str], message: str, config: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(config), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config .*missing.yaml: No such file"):
        parse_arguments(["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(UserError, match="--data is missing"):
        parse_arguments(["--model_name_or_path", "m", "--output_dir", "out"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU computes in bf16, which recipes ask for."""
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_project_is_valid_as_it_stands(path: Path, gpu: None) -> None:
    model, data, run, _ = parse_arguments(["--config", str(path)])
    assert run.output_dir and data.data
    assert run.bf16 == (not path.name.startswith(("tiny", "smollm2")))  # which are trained on CPUs, in fp32
    if model.attention == "landmark":
        settings = {name: getattr(model, name) for name in LANDMARK_SETTINGS}
        settings = {name: value for name, value in settings.items() if value is not None}
        LandmarkLlamaConfig(block_size=model.block_size, train_context_length=data.context_length, **settings)


LANDMARK_CONFIGS = [path for path in CONFIGS if not path.name.startswith("tiny_base")]


@pytest.mark.parametrize("path", LANDMARK_CONFIGS, ids=lambda path: path.name)
def test_a_recipes_rows_hold_the_distance_at_which_older_blocks_are_scored(path: Path, gpu: None) -> None:
    model, data, _, _ = parse_arguments(["--config", str(path)])
    blocks = data.context_length // model.block_size
    scored = model.num_retrieved_blocks + 1 + model.num_local_blocks
    assert scored <= 2 / 3 * blocks  # docs/positions.md: nearly the whole row is too far


LLAMA_CONFIGS = [path for path in CONFIGS if path.name.startswith("llama")]


@pytest.mark.parametrize("path", LLAMA_CONFIGS, ids=lambda path: path.name)
def test_a_step_of_a_llama_recipe_sees_the_papers_tokens(path: Path, gpu: None) -> None:
    _, data, run, adapter = parse_arguments(["--config", str(path)])
    devices = 1 if adapter.lora_rank else 8
    rows = devices * run.per_device_train_batch_size * run.gradient_accumulation_steps
    assert rows * data.context_length == 128 * 512
