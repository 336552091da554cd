"""Does a model find a number in a text longer than its window? One short prompt, and what came out.

    python -m landmark_llama.self_test MODEL

Importing and recovering run it on what they have written. One prompt proves little: it tells working weights from a
wrong base, a wrong tokenizer or a model that was never trained. `eval_passkey/run.py` measures.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from landmark_llama.checkpoints.files import Checkpoint
from landmark_llama.modeling import LandmarkLlamaForCausalLM
from landmark_llama.tokenization import plain_length

KEY = "48213"
OPENING = "Somewhere in this text stands the number of a door. Remember it.\n"
NEEDLE = f"The number of the silver door is {KEY}. Remember it: {KEY}.\n"
FILLER = (
    "The wind turned over the pages of an old almanac. Nobody had opened the window for years. "
    "A clock in the hall struck four. Far away a train went by.\n"
)
QUESTION = "What is the number of the silver door? The number of the silver door is"
MOST_TOKENS = 2000  # of a prompt: a 7B model reads them on a laptop's CPU in a few minutes
NEW_TOKENS = 10
GUESSING = 0.8  # share of ln(vocabulary) from which on a loss is no better than guessing


@dataclass(frozen=True)
class SelfTest:
    """What a model made of the prompt. Lengths in ordinary tokens; `loss` in nats a token, over the prompt's start."""

    prompt_tokens: int
    distance: int  # from the number to the end of the prompt
    needs_retrieval: bool
    readable: bool  # whether the tokenizer gives the number back
    answer: str
    loss: float
    vocab_size: int

    @property
    def found(self) -> bool:
        return self.answer.strip().startswith(KEY)

    def __str__(self) -> str:
        reach = "further back than is read directly" if self.needs_retrieval else "within what is read directly"
        lines = [
            f"the prompt: {self.prompt_tokens} tokens, the number {KEY} stands {self.distance} before the end, {reach}",
            f"the answer: {self.answer!r}, expected {KEY}",
            f"the verdict: {self.verdict()}",
        ]
        return "\n".join(f"self-test: {line}" for line in lines)

    def verdict(self) -> str:
        if self.found:
            return f"found; weights and tokenizer work{', retrieval too' if self.needs_retrieval else ''}"
        if not self.readable:
            return "NOT found: the tokenizer has no tokens for the number, so it is hardly the model's own"
        guessing = math.log(self.vocab_size)
        loss = f"its loss on plain English is {self.loss:.2f} nats a token, guessing has {guessing:.2f}"
        if not self.loss < GUESSING * guessing:  # NaN, too
            return f"NOT found, and {loss}: it is untrained, or weights, base or tokenizer do not belong together"
        return f"NOT found, though it reads ({loss}): its landmarks are untrained, or it is too small for this task"


def self_test(model: LandmarkLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> SelfTest:
    """Asks `model` for a number that stands further back than it reads directly, if that takes at most 2,000 tokens."""
    settings, block_size = model.config.retrieval(), model.config.block_size
    direct = plain_length((settings.num_direct_blocks + 1) * block_size, block_size)
    per_filler = len(tokenizer(FILLER, add_special_tokens=False).input_ids)
    rounds = min(direct, MOST_TOKENS) // per_filler + 1
    start = OPENING + FILLER + NEEDLE
    inputs = tokenizer(start + FILLER * rounds + QUESTION, return_tensors="pt").to(model.device)
    tokens = inputs.input_ids.shape[1]
    distance = tokens - len(tokenizer(start).input_ids)
    english = tokenizer(OPENING + FILLER, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        loss = model(english, labels=english).loss.item()
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
        )
    answer = tokenizer.decode(output[0, tokens:], skip_special_tokens=True)
    return SelfTest(
        prompt_tokens=tokens,
        distance=distance,
        needs_retrieval=distance > direct and settings.num_retrieved_blocks > 0,
        readable=KEY in tokenizer.decode(inputs.input_ids[0]),
        answer=answer,
        loss=loss,
        vocab_size=model.config.vocab_size,
    )


def report(folder: Path) -> str:
    """The self-test of a saved model in words, or why there is none; never an error, since the model is written."""
    size, free = sum(tensor.nbytes for tensor in Checkpoint.open(folder).shapes.values()), _free_memory()
    if size > free:
        return (
            f"self-test: skipped, the weights take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; run "
            f"python -m landmark_llama.self_test {folder} where there is more"
        )
    try:
        model = LandmarkLlamaForCausalLM.from_pretrained(folder).eval()
        return str(self_test(model, AutoTokenizer.from_pretrained(folder)))
    except Exception as error:  # whatever it is, it is a finding about the model
        return f"self-test: could not be run ({type(error).__name__}: {str(error).strip().splitlines()[0]})"


def _free_memory() -> float:
    """Bytes that can be had without swapping; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.self_test", description="One pass key prompt, answered.")
    parser.add_argument("model", type=Path, help="the folder of a landmark LLaMA with its tokenizer")
    args = parser.parse_args(argv)
    try:
        print(report(args.model))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
