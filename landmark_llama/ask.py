"""Asks a memory that `landmark_llama.read` made. A second question costs the question alone.

    python -m landmark_llama.ask MODEL novel "Who wrote the letter?" --show
    python -m landmark_llama.ask MODEL novel --questions questions.txt --json     # a line each, in and out
    python -m landmark_llama.ask MODEL novel --prompt "The letter was written by"

Questions go into the tokenizer's chat template if it has one, else after "Question:". Answers stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from landmark_llama.memories.asking import Answer, Memory
from landmark_llama.memories.command import add_model_flags, add_retrieval_flags, ending_in_one_sentence, retrieval_of
from landmark_llama.memories.models import load_model, settings_of
from landmark_llama.memories.passages import Passage, heaviest
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.reading.tiered_storage import BUDGET, storage_named
from landmark_llama.saved.folder import read_manifest


def open_memory(
    model: str,
    folder: str,
    device: str | None = None,
    storage: Callable[[int], BlockStorage] | None = None,
    retrieval: dict[str, Any] | None = None,
) -> Memory:
    """The memory in `folder` and its model, in the dtype and with the retrieval settings that it was read with.

    storage: as of `LandmarkCache.load`.
    retrieval: settings in place of those. With more retrieved blocks than the text was read with, so many local ones as
        then fit, unless they are given.

    Raises:
        OSError, ValueError: see `LandmarkCache.load` and `load_model`.
    """
    state = read_manifest(folder)
    settings = settings_of(state)
    loaded = load_model(model, dtype=state.model["dtype"], device=device, settings=settings)
    memory, config = Memory(folder, *loaded, storage), loaded[0].config
    for name, value in (retrieval or {}).items():
        setattr(config, name, value)
    if retrieval and "num_local_blocks" not in retrieval and config.num_local_blocks is not None:
        room = config.room_for_local_blocks(config.num_retrieved_blocks)
        config.num_local_blocks = max(0, min(room, config.num_local_blocks))
    config.check()
    return memory


def storage_of(args: argparse.Namespace) -> Callable[[int], BlockStorage] | None:
    """What `--cache` and `--budget` ask for; None where they are not given."""
    if args.cache is None:
        if args.budget is not None:
            raise ValueError(f"--budget {args.budget}: needs --cache host or --cache file:FOLDER")
        return None
    return storage_named(args.cache, BUDGET if args.budget is None else args.budget << 20)


def questions_of(args: argparse.Namespace) -> list[str]:
    """The questions that were given; ValueError unless in exactly one way."""
    ways = [args.question is not None, args.questions is not None, args.prompt is not None]
    if sum(ways) != 1:
        raise ValueError("give one question, or --questions FILE, or --prompt TEXT")
    if args.questions is None:
        return [args.prompt if args.question is None else args.question]
    text = sys.stdin.read() if args.questions == "-" else Path(args.questions).read_text("utf-8")
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise ValueError(f"--questions {args.questions}: holds no question")
    return questions


class _Shown(TextStreamer):
    """Prints an answer as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)


def show(passages: list[Passage]) -> str:
    """The passages as text, the heaviest first."""
    if not passages:
        return "nothing was retrieved: the memory is short enough to be read directly"
    lines = []
    for x in passages:
        before, text, after = (" ".join(part.split()) for part in (x.before, x.text, x.after))
        lines.append(f"{x.weight:7.1%}  {x.place}\n         {before} [{text}] {after}")
    return "\n".join(lines)


def as_json(answer: Answer, passages: list[Passage] | None) -> str:
    """One line."""
    row: dict[str, Any] = {
        "question": answer.question,
        "answer": answer.text,
        "prompt_tokens": len(answer.prompt),
        "tokens": len(answer.ids),
        "seconds": round(answer.seconds, 4),
    }
    if passages is not None:
        row["passages"] = [x.as_dict() for x in passages]
    return json.dumps(row, ensure_ascii=False)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.ask", description="Asks a memory.")
    add_model_flags(parser)
    parser.add_argument("memory", help="the folder that landmark_llama.read wrote")
    parser.add_argument("question", nargs="?", help="one question")
    parser.add_argument("--questions", metavar="FILE", help="a file with a question a line, or - for standard input")
    parser.add_argument("--prompt", metavar="TEXT", help="a text to be gone on with, as it is, without a template")
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample; 0 (default): the likeliest token")
    parser.add_argument("--show", type=int, nargs="?", const=5, default=0, metavar="N",
                        help="also print the N passages that weighed most, with their places (5)")  # fmt: skip
    parser.add_argument("--cache", metavar="WHERE",
                        help="copy the memory's blocks to the device (device), to host memory (host) or scratch files "
                        "(file:FOLDER), rather than read the memory's file")  # fmt: skip
    parser.add_argument("--budget", type=int, metavar="MIB",
                        help="of host or file: MiB of blocks that stay on the device (256)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a line of JSON an answer")
    add_retrieval_flags(parser, "how the memory is read, by default as the text was")
    args = parser.parse_args(argv)
    with ending_in_one_sentence():
        questions = questions_of(args)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
        memory = open_memory(args.model, args.memory, args.device, storage_of(args), retrieval_of(args))
        answer_all(memory, questions, args)


def answer_all(memory: Memory, questions: list[str], args: argparse.Namespace) -> None:
    """Prints the answers."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {}
    for question in questions:
        if len(questions) > 1 and not args.json:
            print(f"\n> {question}")
        answer = memory.ask(
            question,
            as_it_is=args.prompt is not None,
            streamer=None if args.json else _Shown(memory.tokenizer),
            show=args.show > 0,
            max_new_tokens=args.max_new_tokens,
            **sampling,
        )
        passages = heaviest(memory, answer.retrieved, args.show) if args.show else None
        if args.json:
            print(as_json(answer, passages), flush=True)
        elif passages is not None:
            print(f"\n{show(passages)}", flush=True)


if __name__ == "__main__":
    main()
