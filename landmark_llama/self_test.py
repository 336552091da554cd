"""A quick check of a new model: one short prompt asks for a number that stands outside the model's direct view.

    python -m landmark_llama.self_test MODEL

`import_released` and `weight_difference recover` run it on the model that they have written. One prompt proves little,
but it reveals a wrong base, a wrong tokenizer or an untrained model. To measure a model, use `eval_passkey/run.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from landmark_llama.checkpoints.files import Checkpoint
from landmark_llama.families import landmark_class
from landmark_llama.language_model import LandmarkForCausalLM
from landmark_llama.tokenization import plain_length

KEY = "48213"
OPENING = "Somewhere in this text stands the number of a door. Remember it.\n"
NEEDLE = f"The number of the silver door is {KEY}. Remember it: {KEY}.\n"
FILLER = (
    "The wind turned over the pages of an old almanac. Nobody had opened the window for years. "
    "A clock in the hall struck four. Far away a train went by.\n"
)
QUESTION = "What is the number of the silver door? The number of the silver door is"
MAX_FILLER_TOKENS = 2000  # a 7B model reads these on a laptop's CPU in a few minutes
NEW_TOKENS = 10
GUESSING = 0.8  # a loss above this share of ln(vocab_size) counts as guessing


@dataclass(frozen=True)
class SelfTest:
    """The outcome of one prompt. Lengths are in ordinary tokens."""

    prompt_tokens: int
    distance: int  # from the number to the end of the prompt
    needs_retrieval: bool  # whether the number is out of direct view when the answer begins
    readable: bool  # whether decoding the prompt gives the number back
    answer: str
    loss: float  # nats per token, over the first sentences of the prompt
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


def self_test(model: LandmarkForCausalLM, tokenizer: PreTrainedTokenizerBase) -> SelfTest:
    """Asks `model` for a number that stands just outside its direct view.

    The filler has at most about 2,000 tokens. A model with a longer direct view is tested without retrieval.
    """
    settings, block_size = model.config.retrieval(), model.config.block_size
    direct_tokens = plain_length((settings.num_direct_blocks + 1) * block_size, block_size)
    filler_tokens = len(tokenizer(FILLER, add_special_tokens=False).input_ids)
    repeats = min(direct_tokens, MAX_FILLER_TOKENS) // filler_tokens + 1
    start = OPENING + FILLER + NEEDLE
    inputs = tokenizer(start + FILLER * repeats + QUESTION, return_tensors="pt").to(model.device)
    prompt_tokens = inputs.input_ids.shape[1]
    distance = prompt_tokens - len(tokenizer(start).input_ids)
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
    answer = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    return SelfTest(
        prompt_tokens=prompt_tokens,
        distance=distance,
        needs_retrieval=distance > direct_tokens and settings.num_retrieved_blocks > 0,
        readable=KEY in tokenizer.decode(inputs.input_ids[0]),
        answer=answer,
        loss=loss,
        vocab_size=model.config.vocab_size,
    )


def report(folder: Path) -> str:
    """Tests a saved model and describes the outcome, or says why it could not be tested.

    A model that cannot be loaded or run raises nothing: that is a finding, too. Raises OSError if there are no weights.
    """
    size, free = sum(tensor.nbytes for tensor in Checkpoint.open(folder).meta.values()), _free_memory()
    if size > free:
        return (
            f"self-test: skipped, the weights take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; run "
            f"python -m landmark_llama.self_test {folder} where there is more"
        )
    try:
        model = landmark_class(AutoConfig.from_pretrained(folder), folder).from_pretrained(folder).eval()
        return str(self_test(model, AutoTokenizer.from_pretrained(folder)))
    except Exception as error:
        return f"self-test: could not be run ({type(error).__name__}: {str(error).strip().splitlines()[0]})"


def _free_memory() -> float:
    """Bytes available without swapping; infinity if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.self_test", description="One pass key prompt, answered.")
    parser.add_argument("model", type=Path, help="the folder of a landmark model with its tokenizer")
    args = parser.parse_args(argv)
    try:
        print(report(args.model))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
