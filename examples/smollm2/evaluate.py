"""Measures a landmark model against what it must reach, beside its dense self: hours on two cores, in small steps.

    python examples/smollm2/evaluate.py --output runs/smollm2 --data BOOKS                    # the published model
    python examples/smollm2/evaluate.py --output runs/mine --model DIR --dense DENSE_DIR --data BOOKS
    python examples/smollm2/evaluate.py --output runs/mine --model DIR --dense DENSE_DIR --data BOOKS \
        --passkey 2048:2 8192:1 --ruler 4096:1 --documents 1 --perplexity_lengths 512 2048

Pass keys, perplexity and RULER's tasks come in three rounds: a fifth of the samples of each first, then half of them,
then all. Short tasks and chat answers belong to the first round, reading to the last. Each sample is a line as soon as
it is measured, and after each step `evaluation/results.md` is written anew, with its pictures. Interrupted, the same
command goes on where it stopped; with more samples it adds to what is there. `docs/smollm2_evaluation.md`
"""

import contextlib
import io
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script, from any folder
import eval_passkey.run
import eval_perplexity.run
from eval_passkey.models import Subject, find_subject
from eval_passkey.prompts import InputError
from eval_perplexity.documents import read_documents
from examples.smollm2 import answers, cloze, reading
from examples.smollm2.models import make_models
from examples.smollm2.package import GGUF_SHA256, file_digest, find_gguf
from examples.smollm2.results import write_results
from examples.smollm2.run import CALIBRATION, python_documentation

ROUNDS = (0.2, 0.5, 1.0)
RULER_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "ruler_vt:2")
_SHORTEST = 10_000  # tokens of a text that passages are taken from
_BOOK = 100_000  # bytes of a text file in a folder that is no note about the others


@dataclass
class Arguments:
    """What is measured, and how much of it. A 0 leaves a part out."""

    output: str = field(metadata={"help": "Folder of the results; made if it is not there."})
    model: str | None = field(
        default=None, metadata={"help": "Folder of a landmark model; default: made of the package, into --output."}
    )
    dense: str | None = field(default=None, metadata={"help": "Its dense self; default: made of the package, too."})
    package: str | None = field(default=None, metadata={"help": "As for run.py."})
    sha256: str = field(default=GGUF_SHA256, metadata={"help": "As for run.py."})
    calibration: str | None = field(default=None, metadata={"help": "As for run.py."})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts that the model was not trained on; default: the documentation that comes with Python."
        },
    )
    haystack: list[str] = field(
        default_factory=list, metadata={"help": "Text files of RULER's tasks; default: the .txt files of --data."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    passkey: list[str] = field(
        default_factory=lambda: ["2048:20", "8192:20", "16384:10", "32768:10", "131072:2"],
        metadata={"help": "Pass keys, LENGTH:SAMPLES."},
    )
    ruler: list[str] = field(
        default_factory=lambda: ["4096:20", "32768:5"], metadata={"help": "Each of RULER's tasks, LENGTH:SAMPLES."}
    )
    chat_template: bool = field(default=False, metadata={"help": "Ask pass keys and RULER's tasks in the template."})
    seed: int = field(default=0, metadata={"help": "Of the first prompt."})
    dense_max_length: int = field(default=8192, metadata={"help": "Longest prompts that the dense model is asked."})
    perplexity_lengths: list[int] = field(
        default_factory=lambda: [512, 2048, 8192, 16384, 32768], metadata={"help": "Tokens of context."}
    )
    documents: int = field(default=5, metadata={"help": "Texts whose perplexity is measured; fewer give no interval."})
    score_tokens: int = field(default=1024, metadata={"help": "At the end of each text's longest context."})
    dense_longest: int = field(
        default=32768, metadata={"help": "Longest context whose perplexity the dense model and YaRN give."}
    )
    cloze: int = field(default=300, metadata={"help": "Passages whose last word is asked."})
    answers: int = field(default=10, metadata={"help": "Chat answers."})
    reading: list[int] = field(default_factory=lambda: [8192, 32768], metadata={"help": "Tokens that are read."})
    repeats: int = field(default=1, metadata={"help": "Of each reading."})

    def __post_init__(self) -> None:
        for name in ("passkey", "ruler"):
            setattr(self, name, _counts(name, getattr(self, name)))
        for name in ("documents", "cloze", "answers", "repeats", "score_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0")
        self.perplexity_lengths = sorted(set(self.perplexity_lengths))
        self.reading = [length for length in self.reading if length]


def _counts(name: str, given: list[str]) -> dict[int, int]:
    """`["2048:20"]` as {2048: 20}; InputError for anything else."""
    counts = {}
    for text in given:
        length, _, samples = text.partition(":")
        if not length.isdecimal() or not samples.isdecimal():
            raise InputError(f"--{name} {text}: must be LENGTH:SAMPLES, as 2048:20")
        counts[int(length)] = int(samples)
    return dict(sorted((length, samples) for length, samples in counts.items() if length and samples))


def due(counts: dict[int, int], share: float) -> dict[int, list[int]]:
    """Lengths by the number of their samples that are due in a round; long ones that have few come in a later one."""
    lengths: dict[int, list[int]] = {}
    for length, samples in counts.items():
        lengths.setdefault(int(share * samples), []).append(length)
    return {samples: some for samples, some in sorted(lengths.items()) if samples}


def books(data: list[str]) -> list[str]:
    """The text files of `data`; of its folders, those that are no notes beside the others."""
    found = []
    for path in map(Path, data):
        found += [path] if path.suffix == ".txt" else []
        found += [file for file in sorted(path.rglob("*.txt")) if file.stat().st_size >= _BOOK]
    return list(map(str, found))


class Evaluation:
    """The parts, each of which goes on where it was."""

    def __init__(self, args: Arguments, say: Callable[[str], None]):
        self.args, self.say = args, say
        self.output = Path(args.output) / "evaluation"
        landmark, dense = self._models()
        self.landmark, self.dense = (find_subject("--model", landmark, {}), find_subject("--dense", dense, {}))
        if not self.landmark.is_landmark or self.dense.is_landmark:
            raise InputError("--model must be a landmark model and --dense none")
        self.data = args.data or [str(python_documentation(Path(args.output)))]
        self.haystack = args.haystack or books(self.data)
        if args.ruler and not self.haystack:
            raise InputError("--data: holds no .txt file for RULER's tasks; give --haystack FILES")

    def _models(self) -> tuple[str, str]:
        """Folders of both models; those that are not given are made of the package."""
        args = self.args
        if args.model and args.dense:
            return args.model, args.dense
        output = Path(args.output)
        gguf = find_gguf(args.package, output / "package", args.sha256)
        given = args.calibration or (str(CALIBRATION) if CALIBRATION.is_dir() else "none")
        dense, landmark = make_models(gguf, file_digest(gguf), None if given == "none" else Path(given), output)
        return args.model or str(landmark), args.dense or str(dense)

    def run(self) -> None:
        """All rounds."""
        for number, share in enumerate(ROUNDS, start=1):
            steps = [self.pass_keys, self.perplexity, self.ruler]
            if number == 1:
                steps = [self.short_tasks, *steps, self.chat]
            if number == len(ROUNDS):
                steps.append(self.read)
            for step in steps:
                begin = time.perf_counter()
                step(share)
                self.say(f"[round {number} of {len(ROUNDS)}] {step.__doc__} {time.perf_counter() - begin:.0f} s")
                write_results(self.output, self.landmark, self.dense)

    def short_tasks(self, share: float) -> None:
        """Last words of short passages."""
        if not self.args.cloze:
            return
        books = read_documents(self.data, self.landmark.tokenizer, _SHORTEST, 40)
        some = cloze.passages(books, self.args.cloze)
        for name, subject in self._subjects():
            tally: Counter = Counter()

            def told(row: dict, name: str = name, tally: Counter = tally) -> None:
                tally.update(total=1, right=int(row["correct"]))
                if tally["total"] % 50 == 0:
                    self.say(f"last words, {name}: {tally['right']} of {tally['total']} right")

            cloze.measure(subject, some, self.output / "cloze" / name, self.args.dtype, told)

    def pass_keys(self, share: float) -> None:
        """Pass keys."""
        self._prompts("passkey", ["passkey"], due(self.args.passkey, share), [])

    def ruler(self, share: float) -> None:
        """RULER's tasks."""
        self._prompts("ruler", RULER_TASKS, due(self.args.ruler, share), ["--haystack", *self.haystack])

    def _prompts(self, folder: str, tasks, counts: dict[int, list[int]], more: list[str]) -> None:
        tally: Counter = Counter()

        def told(role: str, row: dict) -> None:
            name = "dense" if role == "baseline" else "landmark"
            key = f"{row['task']}, {row['length']:,} tokens, {name}"
            tally.update({(key, "all"): 1, (key, "right"): int(row["correct"])})
            wrong = f"{row['recall']:.0%} right" if row["recall"] else "wrong"
            verdict = "right" if row["correct"] else f"{wrong}: {row['prediction'][:40]!r} for {row['key']!r}"
            score = f"{tally[key, 'right']} of {tally[key, 'all']}"
            self.say(f"{key}, seed {row['seed']}: {verdict} ({row['seconds']:.1f} s); {score} in this step")

        for samples, lengths in counts.items():
            self._quietly(
                eval_passkey.run.main,
                *("--model", self.landmark.name, "--baseline", self.dense.name, "--dtype", self.args.dtype),
                *("--baseline_max_length", self.args.dense_max_length, "--device", "cpu"),
                *("--task", *tasks, "--lengths", *lengths, "--samples", samples, "--seed", self.args.seed, *more),
                *(("--chat_template", "true") if self.args.chat_template else ()),
                *("--output", self.output / folder),
                on_row=told,
            )

    def perplexity(self, share: float) -> None:
        """Perplexity."""
        documents, lengths = int(share * self.args.documents), self.args.perplexity_lengths
        if not documents or not lengths:
            return
        config = self.landmark.config
        block = config.block_size - 1
        direct = (config.retrieval().num_direct_blocks + 1) * block  # what a query reads without choosing
        chosen = direct + config.num_retrieved_blocks * block
        sinks = max(config.num_sink_blocks * block, 4)
        windows = (f"window:{direct}", f"window_sinks:{direct}", f"window_sinks:{chosen - sinks}")

        def told(row: dict) -> None:
            perplexity = math.exp(row["nll"] / row["tokens"])
            place = f"{row['length']:,} tokens, {row['document']}, {row['method']}"
            self.say(f"perplexity, {place}: {perplexity:.2f} of {row['tokens']} ({row['seconds']:.1f} s)")

        base = 2048 if 2048 in lengths else lengths[0]
        self._quietly(
            eval_perplexity.run.main,
            *("--model", self.landmark.name, "--retrieval_granularity", "token_and_head", "--dtype", self.args.dtype),
            *("--baseline", self.dense.name, "--baseline_max_length", self.args.dense_longest, "--device", "cpu"),
            *("--baseline_methods", "dense", "yarn", *windows),
            *("--baseline_sinks", sinks, "--data", *self.data, "--documents", documents, "--protocol", "last"),
            *("--lengths", *lengths, "--gains_over", base, "--score_tokens", self.args.score_tokens),
            *("--tokens_per_document", max(lengths), "--output", self.output / "perplexity"),
            on_row=told,
        )

    def chat(self, share: float) -> None:
        """Chat answers."""
        if self.args.answers:

            def told(row: dict) -> None:
                self.say(f"answer on {row['document']}\n  landmark: {row['landmark']}\n  dense: {row['dense']}")

            folder = self.output / "answers"
            answers.answer(self.landmark, self.dense, self.args.answers, folder, self.args.dtype, on_row=told)

    def read(self, share: float) -> None:
        """Reading, each in a process of its own."""
        if not self.args.reading:
            return

        def told(row: dict) -> None:
            peak = row["resident_mib"] / 1024
            self.say(f"reading {row['length']:,} tokens, {row['model']}: {row['read_seconds']:.1f} s, {peak:.1f} GiB")

        lengths, repeats, text = self.args.reading, self.args.repeats, (self.haystack or self.data)[0]
        folder = self.output / "reading"
        reading.measure(self.landmark, lengths, repeats, text, folder, self.args.dtype, on_row=told)

    def _subjects(self) -> list[tuple[str, Subject]]:
        return [("landmark", self.landmark), ("dense", self.dense)]

    @staticmethod
    def _quietly(command, *argv: object, **more) -> None:
        """One of the commands, without what it prints at its end."""
        with contextlib.redirect_stdout(io.StringIO()):
            command([str(argument) for argument in argv], **more)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = Arguments(**vars(HfArgumentParser(Arguments).parse_args(argv)))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = sys.stdout
    evaluation = Evaluation(args, lambda text: tqdm.write(text, file=out))
    evaluation.run()
    print(evaluation.output / "results.md")


if __name__ == "__main__":
    try:
        main()
    except (InputError, ValueError) as error:
        sys.exit(f"smollm2: {error}")
    except KeyboardInterrupt:
        sys.exit("smollm2: interrupted; the same command goes on from here")
