"""trl trains a landmark model on conversations: packed rows read each one alone, the loss is over answers only."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from landmark_llama import LandmarkLlamaForCausalLM, load_adapter
from tests.tiny import tiny_llama

pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[sft]'")

from finetune import sft  # noqa: E402

TINY_BASE = Path(__file__).resolve().parents[1] / "finetune" / "tiny_base"
ANSWERS = [f"It is {number + 1}." for number in range(12)]


def conversation(number: int) -> dict:
    question = {"role": "user", "content": f"What comes after {number}?"}
    return {"messages": [question, {"role": "assistant", "content": ANSWERS[number]}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A landmark checkpoint whose window of 256 positions holds several conversations, and `chats.jsonl`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    base = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model = LandmarkLlamaForCausalLM.from_llama(base, tokenizer, block_size=8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps(conversation(number)) for number in range(len(ANSWERS))]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    return tmp_path


def arguments(folder: Path, *further: str) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "chats.jsonl"), "--output_dir", str(folder / "out")),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"),
        *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true", *further),
    ]


def test_packed_conversations_have_the_loss_that_their_answers_have_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    monkeypatch.setattr(sft.SFTTrainer, "train", lambda self: trainers.append(self))
    sft.main(arguments(folder))
    (trainer,) = trainers
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "cu_seq_lens_q" in batch and "seq_idx" in batch

    tokenizer, labels = trainer.processing_class, batch["labels"]
    answers = tokenizer.decode(labels[labels != -100]).split(tokenizer.eos_token)[:-1]
    assert sorted(map(str.strip, answers)) == sorted(ANSWERS)

    model, total = trainer.model.eval(), 0.0
    for number in range(len(ANSWERS)):
        row = tokenizer.apply_chat_template(
            conversation(number)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        target = row["input_ids"][0, 1:].masked_fill(row["assistant_masks"][0, 1:] == 0, -100)
        logits = model(row["input_ids"]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    found = trainer.compute_loss(model, dict(batch))
    assert float(found) == pytest.approx(total / int((labels != -100).sum()), rel=1e-4)


@pytest.mark.slow
def test_the_script_writes_a_model_that_answers_in_its_template(folder: Path) -> None:
    sft.main(arguments(folder))
    model = LandmarkLlamaForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    before = LandmarkLlamaForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if "proj" in name)
    prompt = tokenizer.apply_chat_template(conversation(3)["messages"][:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(conversation(3)["messages"], tokenize=False)
    assert whole.startswith(prompt) and prompt.endswith("### assistant\n")
    assert (
        model.config.use_cache
        and model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=2) is not None
    )


@pytest.mark.slow
def test_an_adapter_trains_the_landmarks_row_too(folder: Path) -> None:
    sft.main(arguments(folder, "--lora_rank", "2", "--packing", "false"))
    model = load_adapter(folder / "out")  # refuses an untrained row
    assert model.peft_config["default"].r == 2 and not list((folder / "out").glob("model*"))


def test_rows_longer_than_the_training_context_are_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: --max_length 512: .*=256 positions hold 224 tokens"):
        sft.main(arguments(folder, "--max_length", "512"))
