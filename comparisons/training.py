"""Makes a method's reader and trains it by transformers' Trainer: same rows, optimiser and steps for every method."""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from comparisons import methods
from comparisons.bench import Bench, Method, Training
from comparisons.corpus import Corpus
from comparisons.reader import Reader


class Progress(TrainerCallback):
    """Tells the reader how much of its training is over."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.progress = state.global_step / state.max_steps


def make_reader(bench: Bench, corpus: Corpus, label: str, seed: int) -> Reader:
    """A method's reader before its training: weights are the base's, or drawn from the seed, alike for all methods."""
    set_seed(seed)
    if bench.base is not None:
        base = LlamaForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    else:
        special = {name: getattr(corpus.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        base = LlamaForCausalLM(LlamaConfig(**bench.model, **special, vocab_size=len(corpus.tokenizer)))
    method = bench.methods[label]
    return methods.build(method.module, base, **method.options)


def load_weights(reader: Reader, path: Path) -> None:
    """Weights of another reader, or of this one: those that it has beside the base's keep their values."""
    loaded = reader.load_state_dict(reader.fitting(load_file(path)), strict=False)
    missing = [name for name in loaded.missing_keys if name.startswith("base.")]
    if missing or loaded.unexpected_keys:
        names = ", ".join([*missing, *loaded.unexpected_keys][:3])
        raise ValueError(f"{path}: holds the weights of another model (they differ in {names})")


def save_weights(reader: Reader, path: Path) -> None:
    """All weights, under their name only when they are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file({name: tensor.contiguous().clone() for name, tensor in reader.state_dict().items()}, unfinished)
    unfinished.replace(path)


def train(reader: Reader, bench: Bench, method: Method, corpus: Corpus, seed: int, device: str, folder: Path) -> dict:
    """Trains a reader; what it took: seconds, tokens, last loss, parameters."""
    rows, set_up = corpus.rows(seed, method.steps), arguments(bench.training, method.steps, seed, device, folder)
    trainer = Trainer(model=reader, args=set_up, train_dataset=rows, callbacks=[Progress()])
    start = clock(device)
    trainer.train()
    seconds = clock(device) - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": round(seconds, 2),
        "steps": method.steps,
        "tokens": len(rows) * bench.training.row_tokens,
        "loss": round(losses[-1], 4) if losses else None,
        "parameters": sum(weight.numel() for weight in reader.parameters()),
    }


def clock(device: str) -> float:
    """Seconds, of which differences count: of the wall on a GPU, of this process on a CPU, whatever else runs there."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def arguments(training: Training, steps: int, seed: int, device: str, folder: Path) -> TrainingArguments:
    """What the Trainer is told."""
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=training.rows,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_lr_rate},
        warmup_steps=round(training.warmup_share * steps),
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        use_cpu=device == "cpu",
        seed=seed,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
