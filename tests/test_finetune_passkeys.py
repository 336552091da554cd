"""Pass keys while training: what is logged, that training does not notice, and how processes share the prompts."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_finetune_run import STEPS, base, data, finished, flags, same_weights  # noqa: F401
from transformers import AutoTokenizer, TrainerState
from two_processes import run_in_two

import finetune.passkeys
from finetune.arguments import RunArguments, UserError
from finetune.passkeys import FIRST_SEED, PassKeys, same_random_state
from finetune.run import main
from landmark_llama import LandmarkLlamaForCausalLM

PASS_KEYS = ("--eval_passkey_steps", "2", "--eval_passkey_samples", "2", "--eval_passkey_lengths", "300", "400")


def log_of(run: Path) -> list[dict]:
    return TrainerState.load_from_json(str(run / f"checkpoint-{STEPS}" / "trainer_state.json")).log_history


def test_a_run_asks_pass_keys_beside_its_losses_and_trains_the_same_bits(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(flags(base, data, tmp_path, *PASS_KEYS))
    asked = [entry for entry in log_of(tmp_path) if "eval_passkey_300" in entry]
    assert [entry["step"] for entry in asked] == [2, 4, 6]
    assert all(0 <= entry[name] <= 1 for entry in asked for name in ("eval_passkey_300", "eval_passkey_400"))
    assert capsys.readouterr().err.count("pass keys  300: ") == 3
    assert same_weights(tmp_path, finished)
    losses = [[entry["loss"] for entry in log_of(run) if "loss" in entry] for run in (tmp_path, finished)]
    assert losses[0] == losses[1]


def test_a_length_that_cannot_hold_a_prompt_is_refused_before_training(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--eval_passkey_lengths 20: too short"):
        main(flags(base, data, tmp_path, "--eval_passkey_steps", "1", "--eval_passkey_lengths", "400", "20"))
    with pytest.raises(UserError, match="--eval_passkey_samples 0: at least one prompt"):
        main(flags(base, data, tmp_path, "--eval_passkey_samples", "0"))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_prompts_out(
    processes: int,
    finished: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def every_second_is_right(model, tokenizer, task, lengths, samples: int, seed: int) -> dict[int, float]:
        asked.extend(range(seed, seed + samples))
        return {length: sum(number % 2 for number in range(seed, seed + samples)) / samples for length in lengths}

    monkeypatch.setattr(finetune.passkeys, "accuracy", every_second_is_right)
    monkeypatch.setattr(finetune.passkeys, "reduce", lambda total, how: total)
    run = RunArguments(output_dir=str(tmp_path), use_cpu=True, eval_passkey_steps=1, eval_passkey_samples=5)
    model, tokenizer = LandmarkLlamaForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    shares = 0.0
    for process in range(processes):
        args = SimpleNamespace(world_size=processes, process_index=process, device=torch.device("cpu"))
        passkeys = PassKeys(SimpleNamespace(model=model, args=args), tokenizer, run, [400, 300])
        shares += passkeys.measure()["eval_passkey_300"]
    assert asked == list(range(FIRST_SEED, FIRST_SEED + 5)) and shares == pytest.approx(2 / 5)


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with same_random_state(torch.device("cpu")):
        assert draw() == expected
    assert draw() == expected


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp.yaml"])
def test_two_processes_ask_pass_keys_and_train_the_same_bits(
    configuration: str,
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    losses = []
    for name, more in (("without", ()), ("with", PASS_KEYS)):
        codes, printed = run_in_two(configuration, flags(base, data, tmp_path / name, *more), tmp_path)
        assert codes == [0, 0], printed
        losses.append([entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert [entry["step"] for entry in log_of(tmp_path / "with") if "eval_passkey_400" in entry] == [2, 4, 6]
