"""Training and evaluation from the command line, for each family: whole runs of tiny models."""

import json
import math
from pathlib import Path

import pytest
import torch
from byte_models import byte_tokenizer, some_text
from families import CASES, dense_model, every_family
from safetensors.torch import load_file
from test_finetune_run import data, flags  # noqa: F401  (data: a fixture)
from transformers import AutoConfig, AutoModelForCausalLM

import eval_passkey.run
import eval_perplexity.run
from benchmarks.models import DENSE, LANDMARK, ModelArguments, dense_config, landmark_config, load_model
from finetune.arguments import UserError
from finetune.run import main
from landmark_llama import from_dense, load_adapter
from landmark_llama.families import FAMILIES

# two rows to spare: AutoTokenizer makes a Qwen2Tokenizer of what lies beside a Qwen2, which has a token more
SHAPE = {"vocab_size": 260, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense checkpoint of each family, whose tokens are bytes."""
    folders = {family: tmp_path_factory.mktemp(family) for family in CASES}
    for family, folder in folders.items():
        dense_model(family, **SHAPE).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two documents of letters."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": some_text(seed)}) + "\n" for seed in range(2)))
    return path


@every_family
def test_a_dense_checkpoint_is_trained_with_landmarks_and_measured(
    family: str,
    bases: dict[str, Path],
    data: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    main(flags(bases[family], data, out, "--max_steps", "2"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is FAMILIES[family] and model.config.train_context_length == 64
    before, after = load_file(bases[family] / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(not torch.equal(after[name][: len(weight)], weight) for name, weight in before.items())
    assert "held-out perplexity" in (out / "README.md").read_text()

    measured = ["--model", str(out), "--baseline", str(bases[family]), "--device", "cpu"]
    assert not eval_passkey.run.main(
        [*measured, "--output", str(tmp_path / "keys"), "--lengths", "400", "--samples", "1"]
    )
    assert json.loads((tmp_path / "keys" / "summary.json").read_text())["by_phase"]  # it knows the blocks
    methods = ["--baseline_methods", "dense", "window", "yarn", "--data", str(text), "--lengths", "40", "160"]
    assert not eval_perplexity.run.main([*measured, *methods, "--output", str(tmp_path / "losses")])
    rows = json.loads((tmp_path / "losses" / "summary.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"landmark", "dense", "window", "yarn"}
    assert all(math.isfinite(row["perplexity"]) for row in rows)


@every_family
def test_an_adapter_is_trained_on_a_dense_checkpoint_and_measured(
    family: str,
    bases: dict[str, Path],
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    main(flags(bases[family], data, tmp_path / "run", "--max_steps", "2", "--lora_rank", "2"))
    assert type(load_adapter(tmp_path / "run").get_base_model()) is FAMILIES[family]
    measured = ["--model", str(tmp_path / "run"), "--device", "cpu", "--lengths", "400", "--samples", "1"]
    assert not eval_passkey.run.main([*measured, "--output", str(tmp_path / "keys")])


def test_a_configuration_of_any_family_is_trained_from_random_weights(
    bases: dict[str, Path],
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = bases["smollm3"]
    arguments = flags(base, data, tmp_path / "run", "--max_steps", "1", "--tokenizer_name", str(base))
    arguments[:2] = ["--config_name", str(base / "config.json")]
    main(arguments)
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert config.model_type == "landmark_smollm3" and config.no_rope_layers == [1, 0, 1]
    arguments[1], arguments[5] = str(tmp_path / "run" / "config.json"), str(tmp_path / "again")
    with pytest.raises(UserError, match="give the dense model's own configuration; landmark settings are flags"):
        main(arguments)


def test_a_context_beyond_a_sliding_window_is_refused_in_one_sentence(
    bases: dict[str, Path],
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    dense_model("mistral", **{**SHAPE, "sliding_window": 32}).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="train_context_length=64: .* sliding_window=32 tokens") as error:
        main(flags(tmp_path / "base", data, tmp_path / "run"))
    assert "\n" not in str(error.value)


@every_family
def test_a_benchmark_compares_a_checkpoint_with_the_dense_model_of_its_family(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    from_dense(bases[family], tokenizer, 8).save_pretrained(tmp_path)
    args = ModelArguments(model=str(tmp_path), device="cpu", dtype="float32")
    config = landmark_config(args, "token_and_head")
    assert dense_config(config).model_type == family
    dense, landmark = (load_model(args, config, kind) for kind in (DENSE, LANDMARK))
    assert dense.config.model_type == family and type(landmark) is FAMILIES[family]
    ids = torch.arange(2, 9).unsqueeze(0)  # within a block they are the same function
    torch.testing.assert_close(landmark(ids).logits[..., :260], dense(ids).logits[..., :260], rtol=1e-3, atol=1e-3)


@every_family
def test_the_likelihood_that_lm_eval_measures_is_that_of_one_forward_call(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm_eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_tokenizer()
    from_dense(bases[family], tokenizer, 8, num_retrieved_blocks=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    harness = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    text = some_text(0)
    (found,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor([[harness.prefix_token_id, *harness.tok_encode(text)]])
    assert ids.shape[1] > 4 * SHAPE["max_position_embeddings"]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tmp_path)(ids, labels=ids).loss
    assert found == pytest.approx(float(-loss * (ids.shape[1] - 1)), rel=1e-4)
