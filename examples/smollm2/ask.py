"""Asks a chat model about a document that it reads once; a landmark model, whatever its length.

    python examples/smollm2/ask.py --model runs/smollm2/models/landmark --document BOOK.txt \
        --question "Who is the narrator?" "Where does he live?"

The document and the first question are the first turn of a chat; each further question is a turn of its own, for which
only what is new is read.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import DynamicCache, HfArgumentParser, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script, from any folder
from eval_passkey.models import find_subject, load_model
from eval_passkey.prompts import InputError
from landmark_llama import LandmarkCache, LandmarkLlamaConfig


@dataclass
class Arguments:
    """What is asked of what."""

    model: str = field(metadata={"help": "Folder or hub id of a chat model with its tokenizer."})
    document: str = field(metadata={"help": "Text file, UTF-8."})
    question: list[str] = field(metadata={"help": "One or several, asked one after the other."})
    max_new_tokens: int = field(default=60, metadata={"help": "Of an answer."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights; auto: as in the checkpoint."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


@dataclass(frozen=True)
class Answer:
    """What was answered; `tokens` of the whole chat were known before, `new_tokens` of them read for this question."""

    question: str
    text: str
    tokens: int
    new_tokens: int
    seconds: float


def ask(
    model: PreTrainedModel, tokenizer, document: str, questions: list[str], max_new_tokens: int = 60
) -> list[Answer]:
    """Answers, greedily, in the chat template of the tokenizer.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: take a chat model")
    landmark = isinstance(model.config, LandmarkLlamaConfig)
    cache = LandmarkCache(model.config) if landmark else DynamicCache(config=model.config)
    answers, chat = [], []
    ids = torch.empty(1, 0, dtype=torch.long)
    for question in questions:
        chat.append({"role": "user", "content": question if chat else f"{document}\n\n{question}"})
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        turn = torch.tensor([encoded["input_ids"]])
        # what was said stays as it was said: only what the template puts behind it is new
        known, read = ids.shape[1], cache.get_seq_length()
        common = int((turn[0, :known] == ids[0, : turn.shape[1]]).long().cumprod(0).sum())
        if read:
            cache.crop(min(common, read))
        begin = time.perf_counter()
        output = model.generate(
            input_ids=turn.to(model.device),
            attention_mask=torch.ones_like(turn).to(model.device),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        ).cpu()
        seconds = time.perf_counter() - begin
        text = tokenizer.decode(output[0, turn.shape[1] :], skip_special_tokens=True).strip()
        answers.append(Answer(question, text, turn.shape[1], turn.shape[1] - min(common, read), round(seconds, 2)))
        chat.append({"role": "assistant", "content": text})
        ids = output
    return answers


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    subject = find_subject("--model", args.model, {})
    try:
        document = Path(args.document).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--document {args.document}: cannot be read ({error})") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model("--model", subject, args.dtype, args.device)
    for answer in ask(model, subject.tokenizer, document, args.question, args.max_new_tokens):
        print(f"{answer.question}\n  {answer.text}\n  ({answer.tokens:,} tokens, {answer.seconds} s)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"ask: {error}")
