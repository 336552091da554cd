"""Perplexity of a causal language model over the length of its context, on any texts.

    python eval_perplexity/run.py --model DIR --data FILES_OR_FOLDERS --lengths 512 2048 8192 --output DIR
    python eval_perplexity/run.py --model DIR --data book.txt --baseline DENSE_DIR \
        --baseline_methods dense window interpolation yarn --output DIR
    python eval_perplexity/run.py --model DIR --data FILES --protocol last --score_tokens 256 --output DIR

Writes `results.jsonl` (a row a window), `summary.json` and `perplexity.png` into the output folder, rows and summary
of the baseline's methods into `baseline/METHOD/` inside it. An interrupted run goes on where it stopped; lengths,
documents and methods can be added to a finished one. `docs/perplexity.md` says what is measured.
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from any folder
from eval_passkey.arguments import ReadingArguments
from eval_passkey.models import Subject, device_in_words, find_subject, versions
from eval_passkey.prompts import InputError
from eval_passkey.results import ResultsFolder
from eval_passkey.run import is_out_of_memory
from eval_perplexity.documents import Document, Protocol, Window, beginning_of_text, encode, read_documents
from eval_perplexity.methods import DENSE_METHODS, SCALED, WINDOWS, Method, Scorer
from eval_perplexity.report import Measured, compare_lengths, compare_methods, plot_perplexity, summarise, table
from landmark_llama.configuration import RETRIEVAL_SETTINGS
from landmark_llama.reading.tiers import TierError

ROW = ("method", "document", "digest", "length", "end", "tokens", "bytes", "nll", "seconds")


@dataclass(kw_only=True)
class Arguments(ReadingArguments):
    """What is measured, and how."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model with its tokenizer."})
    data: list[str] = field(metadata={"help": "Text: .txt, .jsonl (rows with `text`), .parquet; files or folders."})
    output: str = field(metadata={"help": "Folder of the results; made if it is not there."})
    baseline: str | None = field(default=None, metadata={"help": "A second model, shown beside the first."})
    baseline_methods: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"How a dense baseline reads: {', '.join(DENSE_METHODS)}; default dense. window:N and "
            "window_sinks:N have a window of their own."
        },
    )
    baseline_window: int | None = field(
        default=None, metadata={"help": "Tokens that a window sees; default: as many as the baseline's positions."}
    )
    baseline_sinks: int = field(
        default=4, metadata={"help": "Tokens at the beginning that `window_sinks` sees beside its window."}
    )
    baseline_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Lengths above this are not read by the baseline, but by windows, which are no slower there."
        },
    )
    rope_factor: float | None = field(
        default=None,
        metadata={"help": f"Of {', '.join(SCALED)}; default: length over the baseline's positions, for each length."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [512, 2048, 8192], metadata={"help": "Tokens of context, of the model's own tokenizer."}
    )
    protocol: Literal["segments", "last"] = field(
        default="segments", metadata={"help": "Equal segments, or the same last tokens after growing contexts."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "segments: tokens from a window to the next; default: its length."}
    )
    score_tokens: int | None = field(
        default=None, metadata={"help": "last: how many are scored; default: half of the shortest length."}
    )
    gains_over: int | None = field(
        default=None, metadata={"help": "last: the length that others are compared with; default: the shortest."}
    )
    documents: int = field(default=20, metadata={"help": "The first so many that are long enough."})
    tokens_per_document: int | None = field(default=None, metadata={"help": "At most; default: the whole document."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap that intervals come from."})
    retrieval_granularity: str | None = field(
        default=None, metadata={"help": "Landmark model: token_and_head; the others look ahead and are refused."}
    )
    always_stream: bool = field(
        default=False, metadata={"help": "Landmark model: read through its memory what fits its window, too."}
    )

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError("--lengths: at least one length is needed")
        self.lengths = sorted(set(self.lengths))
        positive = {"documents": self.documents, "tokens_per_document": self.tokens_per_document}
        positive |= {"baseline_max_length": self.baseline_max_length}
        positive |= {"stride": self.stride, "score_tokens": self.score_tokens, "lengths": self.lengths[0]}
        for name, value in positive.items():
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        self._check_protocol()
        self._check_baseline()
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _check_protocol(self) -> None:
        shortest, longest = self.lengths[0], self.lengths[-1]
        if self.stride is not None and self.protocol != "segments":
            raise InputError(f"--stride {self.stride}: belongs to --protocol segments")
        if self.score_tokens is not None and self.protocol != "last":
            raise InputError(f"--score_tokens {self.score_tokens}: belongs to --protocol last")
        if self.gains_over is not None and (self.protocol != "last" or self.gains_over not in self.lengths):
            raise InputError(f"--gains_over {self.gains_over}: must be one of --lengths, with --protocol last")
        if (self.stride or 0) > shortest:
            raise InputError(f"--stride {self.stride}: must not exceed the shortest of --lengths, {shortest}")
        most = max(shortest, longest // 2)
        if (self.score_tokens or 0) > most:
            raise InputError(
                f"--score_tokens {self.score_tokens}: must not exceed {most}, the shortest of --lengths or half of the "
                "longest"
            )
        if self.tokens_per_document is not None and self.tokens_per_document < longest:
            raise InputError(
                f"--tokens_per_document {self.tokens_per_document}: is less than the longest of --lengths, {longest}"
            )
        if self.protocol == "last" and self.score_tokens is None:
            self.score_tokens = max(1, shortest // 2)

    def _check_baseline(self) -> None:
        methods = [_named(method)[0] for method in self.baseline_methods]
        without = [method for method in self.baseline_methods if method in WINDOWS]
        for name in ("baseline_methods", "baseline_window", "baseline_max_length", "rope_factor"):
            if getattr(self, name) not in (None, []) and self.baseline is None:
                raise InputError(f"--{name}: needs a --baseline")
        if self.baseline_window is not None and not without:
            raise InputError(f"--baseline_window {self.baseline_window}: needs --baseline_methods window")
        if self.baseline_sinks < 1:
            raise InputError(f"--baseline_sinks {self.baseline_sinks}: must be at least 1")
        if self.baseline_window is not None and self.baseline_window < 2:
            raise InputError(f"--baseline_window {self.baseline_window}: must be at least 2")
        if self.rope_factor is not None and not set(methods) & set(SCALED):
            raise InputError(
                f"--rope_factor {self.rope_factor}: needs one of {', '.join(SCALED)} in --baseline_methods"
            )
        if self.rope_factor is not None and not 1 <= self.rope_factor < float("inf"):
            raise InputError(f"--rope_factor {self.rope_factor}: must be at least 1")

    def cut(self) -> Protocol:
        """How documents are cut into windows."""
        return Protocol(self.protocol, tuple(self.lengths), self.stride, self.score_tokens, self.tokens_per_document)


class MethodRun:
    """One model read in one way: its folder and its rows. Everything but the weights is checked at once."""

    def __init__(
        self, args: Arguments, role: Literal["model", "baseline"], subject: Subject, method: Method, label: str
    ):
        self.args, self.role, self.subject, self.label = args, role, subject, label
        storage = args.storage(subject) if role == "model" else None
        self.scorer = Scorer(f"--{role}", subject, method, args.dtype, args.device, storage)
        limited = role == "baseline" and method.name not in WINDOWS and args.baseline_max_length is not None
        self.longest = args.baseline_max_length if limited else math.inf
        self.skipped: list[dict] = []
        settings = {**method.settings, "dtype": args.dtype, "retrieval": subject.retrieval_settings}
        name = label.removeprefix("baseline ").replace(":", "_")
        folder = Path(args.output) if role == "model" else Path(args.output) / "baseline" / name
        self.results = ResultsFolder(folder, {"fingerprint": subject.fingerprint, "settings": settings}, fields=ROW)
        self.windows: list[Window] = []

    def run(self, documents: Sequence[Document]) -> None:
        """Scores the windows that have no row yet, shortest first, with a bar that counts the tokens read."""
        protocol = self.args.cut()
        lengths = [length for length in protocol.lengths if length <= self.longest]
        self.windows = [window for length in lengths for window in protocol.windows(documents, length)]
        done = {_key(row) for row in self.results.rows}
        missing = [window for window in self.windows if window.key not in done]
        total = sum(window.length for window in self.windows)
        with tqdm(
            desc=f"{self.label} {Path(self.subject.name).name}",
            total=total,
            initial=total - sum(window.length for window in missing),
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        ) as bar:
            for window in missing:
                if all(window.length != skip["length"] for skip in self.skipped):
                    self._score(window)
                    bar.set_postfix_str(f"{window.length} tokens", refresh=False)
                bar.update(window.length)
        self.scorer.free()

    def _score(self, window: Window) -> None:
        try:
            self.scorer.prepare(window.length)
            start = time.perf_counter()
            nll = self.scorer.nll(window.input_ids, window.scored)
            seconds = time.perf_counter() - start
            if not math.isfinite(nll):
                self._skip(window.length, f"the loss of {window.document.name} is {nll}")
                return
        except InputError:
            raise
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            # a baseline may also run past its positions; of the model, nothing but a lack of memory is put aside
            if self.role == "model" and not is_out_of_memory(error):
                raise
            message = (str(error).strip() or "no message").splitlines()[0]
            self._skip(window.length, f"{type(error).__name__}: {message}")
            return
        self.results.append(
            {
                "method": self.label,
                "document": window.document.name,
                "digest": window.document.digest,
                "length": window.length,
                "end": window.end,
                "tokens": window.scored,
                "bytes": window.bytes,
                "nll": nll,
                "seconds": round(seconds, 4),
            }
        )

    def _skip(self, length: int, reason: str) -> None:
        self.skipped.append({"method": self.label, "length": length, "reason": reason})
        tqdm.write(f"{self.label}: {length} tokens are skipped ({reason})", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measured(self) -> Measured:
        """The rows of this run's windows, without those of a length that was skipped."""
        wanted = {window.key for window in self.windows}
        skipped = {skip["length"] for skip in self.skipped}
        rows = [row for row in self.results.rows if _key(row) in wanted and row["length"] not in skipped]
        return Measured(self.label, rows, self.subject.training_context)

    def write_summary(self, **more) -> None:
        """Sums up this method; `more` replaces and adds entries."""
        summary = {
            "rows": summarise(self.measured(), self.args.seed),
            "skipped": self.skipped,
            "model": self.subject.name,
            "training_context": self.subject.training_context,
            "protocol": vars(self.args.cut()),
            "data": self.args.data,
            "bootstrap_seed": self.args.seed,
            "versions": versions(),
            "device": device_in_words(self.args.device, self.args.kernels),
        }
        self.results.write_summary(summary | more)


def plan(args: Arguments) -> list[MethodRun]:
    """The model's run, and one for each method of the baseline."""
    retrieval = {name: getattr(args, name) for name in RETRIEVAL_SETTINGS if getattr(args, name) is not None}
    model = find_subject("--model", args.model, retrieval, args.kernels)
    name = "landmark" if model.is_landmark else "dense"
    runs = [MethodRun(args, "model", model, Method(name, always_stream=args.always_stream), name)]
    if args.baseline is None:
        return runs
    baseline = find_subject("--baseline", args.baseline, {}, args.kernels)
    if baseline.is_landmark and args.baseline_methods:
        raise InputError(f"--baseline {args.baseline}: --baseline_methods needs a dense model, this one has landmarks")
    for chosen in dict.fromkeys(args.baseline_methods or ["landmark" if baseline.is_landmark else "dense"]):
        label = f"baseline {chosen}" if chosen == name else chosen  # which names its folder, too
        runs.append(MethodRun(args, "baseline", baseline, _baseline_method(args, baseline, chosen), label))
    return runs


def _baseline_method(args: Arguments, subject: Subject, chosen: str) -> Method:
    if chosen == "landmark":
        return Method(chosen, always_stream=args.always_stream)
    name, window = _named(chosen)
    if name not in WINDOWS:
        return Method(name, factor=args.rope_factor if name in SCALED else None)
    window = window or args.baseline_window or subject.training_context
    if not window:
        raise InputError(f"--baseline {subject.name}: says nothing of its positions; give --baseline_window")
    return Method(name, window, sinks=args.baseline_sinks if name == "window_sinks" else 0)


def _named(method: str) -> tuple[str, int | None]:
    """A method of the command line and its window: `window:512` is ("window", 512). InputError if there is none."""
    name, colon, number = method.partition(":")
    if name not in DENSE_METHODS:
        raise InputError(f"--baseline_methods {method}: must be one of {', '.join(DENSE_METHODS)}")
    if not colon:
        return name, None
    if name not in WINDOWS or not number.isdecimal() or int(number) < 2:
        raise InputError(f"--baseline_methods {method}: a whole number from 2 may stand behind {' and '.join(WINDOWS)}")
    return name, int(number)


def refuse_other_tokens(subject: Subject, documents: Sequence[Document]) -> None:
    """Perplexities can be compared if both models predict the same tokens; InputError if the baseline's differ."""
    same = beginning_of_text(subject.tokenizer) == documents[0].bos
    same = same and all(encode(subject.tokenizer, text.text)[0].equal(text.ids) for text in documents)
    if not same:
        raise InputError(
            f"--baseline {subject.name}: its tokenizer cuts the texts into other tokens than the model's; measure it "
            "by itself and compare bits per byte"
        )


def _key(row: dict) -> tuple[str, int, int, int]:
    """As `Window.key`."""
    return row["digest"], row["length"], row["end"], row["tokens"]


def main(argv: list[str] | None = None, on_row: Callable[[dict], None] | None = None) -> int:
    """Runs the command; 0, or 1 if the model had to skip a length. `on_row` is given each row as it is measured."""
    args = Arguments(**vars(HfArgumentParser(Arguments).parse_args(argv)))
    runs = plan(args)
    documents = read_documents(args.data, runs[0].subject.tokenizer, args.lengths[-1], args.documents)
    if args.baseline is not None:
        refuse_other_tokens(runs[1].subject, documents)
    logging.set_verbosity_error()  # no warning about texts beyond the training context: they are the point
    logging.disable_progress_bar()  # of loading weights, inside the run's own
    for run in runs:
        run.results.on_row = on_row
        run.run(documents)
        run.write_summary()
    measured = [one for one in (run.measured() for run in runs) if one.rows]
    summary = [entry for one in measured for entry in summarise(one, args.seed)]
    differences = compare_methods(measured, args.seed) if runs[0].measured().rows else []
    gains = compare_lengths(measured, args.seed, args.gains_over) if args.protocol == "last" else []
    skipped = [skip for run in runs for skip in run.skipped]
    runs[0].write_summary(rows=summary, differences=differences, context_gains=gains, skipped=skipped)
    paths = [path for run in runs for path in (run.results.rows_path, run.results.summary_path)]
    if measured:
        print(table(summary, differences, gains))
        paths.append(_draw(measured, args))
    print("\n".join(str(path) for path in paths))
    return 1 if runs[0].skipped else 0


def _draw(measured: list[Measured], args: Arguments) -> Path:
    path = Path(args.output) / "perplexity.png"
    try:
        plot_perplexity(measured, args.seed, path)
    except OSError as error:
        raise InputError(f"output {args.output}: the picture cannot be written ({error.strerror})") from error
    return path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, TierError) as error:
        sys.exit(f"eval_perplexity: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_perplexity: interrupted; the same command goes on from here")
