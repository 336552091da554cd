"""Shows what an answer was read from: a page to move over its tokens, and a heat map of the memory.

    python -m landmark_llama.inspect MODEL novel "Who wrote the letter?" --output letter
    python -m landmark_llama.inspect MODEL novel --prompt "The letter was written by" --output letter

Writes `index.html`, which holds all that it needs, and `heat_map.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from landmark_llama.ask import open_memory
from landmark_llama.memories.asking import Answer, Memory
from landmark_llama.memories.command import add_model_flags, ending_in_one_sentence
from landmark_llama.memories.page import page, token_texts
from landmark_llama.memories.passages import block_weights, first_layer_that_chooses, text_blocks
from landmark_llama.memories.picture import heat_map


def write_page(memory: Memory, answer: Answer, output: Path) -> None:
    """Writes page and heat map of an answer (`Memory.ask(..., show=True)`) to the folder `output`.

    Raises:
        OSError: it cannot be written to.
        ValueError: matplotlib is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    first = first_layer_that_chooses(memory.model)
    weights = block_weights(answer.retrieved, text_blocks(memory), first_layer=first)
    picture = heat_map(weights, token_texts(memory.tokenizer, answer.ids))
    (output / "heat_map.png").write_bytes(picture)
    (output / "index.html").write_text(page(memory, answer, picture), "utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="landmark_llama.inspect", description="Shows what an answer was read from.")
    add_model_flags(parser)
    parser.add_argument("memory", help="the folder that landmark_llama.read wrote")
    parser.add_argument("question", nargs="?", help="a question")
    parser.add_argument("--prompt", metavar="TEXT", help="a text to be gone on with, as it is, without a template")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder for the page and the heat map")
    args = parser.parse_args(argv)
    with ending_in_one_sentence():
        if (args.question is None) == (args.prompt is None):
            raise ValueError("give one question, or --prompt TEXT")
        memory = open_memory(args.model, args.memory, args.device)
        question = args.prompt if args.question is None else args.question
        as_it_is = args.prompt is not None
        answer = memory.ask(question, as_it_is=as_it_is, show=True, max_new_tokens=args.max_new_tokens)
        write_page(memory, answer, Path(args.output))
        print(f"{answer.text.strip()}\n\nthe page is {Path(args.output) / 'index.html'}")


if __name__ == "__main__":
    main()
