"""Finds pass keys, and what else is hidden, in long texts: the accuracy of a causal language model over prompt length.

    python eval_passkey/run.py --model DIR --lengths 512 4096 32768 --samples 20 --output DIR
    python eval_passkey/run.py --model DIR --baseline DENSE_DIR --depths grid --num_depths 5 --output DIR
    python eval_passkey/run.py --model DIR --task passkey passkey:once multi_key:16 variable_tracking:2 --output DIR
    python eval_passkey/run.py --model DIR --task passkey:text --haystack BOOK.txt --output DIR
    python eval_passkey/run.py --model DIR --lengths 1000000 --cache file:FOLDER --output DIR
    python eval_passkey/run.py --model DIR --num_retrieved_blocks 8 --retrieval_granularity head --output OTHER_DIR

Writes `results.jsonl` (a row a prompt), `summary.json`, `accuracy.png`, `depth.png` and `phase.png` into the output
folder, the baseline's rows and summary into `baseline/` inside it. An interrupted run goes on where it stopped; more
tasks, lengths or samples can be added to a finished one. `docs/pass_key.md` says what is asked, and how it is judged.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from any folder
from eval_passkey.arguments import Arguments
from eval_passkey.haystack import TextHaystack, read_texts
from eval_passkey.measure import ask, block_tokens
from eval_passkey.models import Subject, device_in_words, find_subject, load_model, versions
from eval_passkey.pictures import draw
from eval_passkey.prompts import Encoder, InputError, Task, drawn_length
from eval_passkey.ranks import rank_table
from eval_passkey.report import Measured, phase_table, summarise, summarise_phases, table
from eval_passkey.results import ResultsFolder
from eval_passkey.tasks import TaskName, make_task
from landmark_llama import LandmarkCache
from landmark_llama.configuration import RETRIEVAL_SETTINGS
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.tiers import TierError

PROTOCOL = 2  # raised whenever the same settings come to other prompts or another judgement

Role = Literal["model", "baseline"]


class PasskeyRun:
    """One model's part of the run: its prompts, its folder, its rows. Everything but the weights is checked at once.

    period: ordinary tokens of a block, by which phases are told; `find_period` of the two models.
    """

    def __init__(self, args: Arguments, role: Role, subject: Subject, period: int | None):
        self.args, self.role, self.subject, self.period = args, role, subject, period
        self.spread = 1 if args.exact_lengths else args.length_spread or period or 1
        longest = args.baseline_max_length if role == "baseline" else None
        self.lengths = [length for length in args.lengths if longest is None or length <= longest]
        self.tasks = make_tasks(args, subject)
        self._refuse_short_lengths()
        self.storage = args.storage(subject) if role == "model" else None
        self.reading = args.reading_retrieved_blocks if role == "model" else None
        self.index = args.index if role == "model" and args.index != "exact" else None
        if self.index is not None:
            self._refuse_index()
        self.needle_rank = args.needle_rank and role == "model"
        if self.needle_rank and not subject.is_landmark:
            raise InputError(f"--needle_rank: needs a landmark model, and {subject.name} is none")
        self.skipped: list[dict] = []
        settings = {
            "protocol": PROTOCOL,
            "seed": args.seed,
            "depths": args.depths,
            "num_depths": args.num_depths if args.depths == "grid" else None,
            "length_spread": self.spread,
            "phases": period,
            "chat_template": args.chat_template,
            "dtype": args.dtype,
            "retrieval": subject.retrieval_settings,
            "needle_rank": self.needle_rank or None,
            "reading_retrieved_blocks": self.reading,
            "index": self.index,
        }
        folder = Path(args.output) / ("baseline" if role == "baseline" else "")
        identity = {"fingerprint": subject.fingerprint, "settings": settings}
        self.results = ResultsFolder(folder, identity, {task.name: task.describe() for task in self.tasks})

    def _refuse_index(self) -> None:
        if not self.subject.is_landmark:
            raise InputError(f"--index {self.index}: needs a landmark model, and {self.subject.name} is none")
        if self.args.device != "cpu":
            raise InputError(f"--index {self.index}: chooses on a CPU, not on {self.args.device}; add --device cpu")
        try:
            LandmarkCache(self.subject.config, index=self.index)  # none of the storage's files
        except ValueError as error:
            raise InputError(f"--{error}") from error

    def _refuse_short_lengths(self) -> None:
        """Every prompt of the shortest length has to have room; where there is little, each of them is made."""
        for length in self.lengths[:1]:
            try:
                for task in self.tasks:
                    tight = length - self.spread < 2 * task.minimum_length()
                    for i in range(self.args.samples if tight else 0):
                        task.prompt(self._tokens(length, i), self.args.seed + i)
            except InputError as error:
                if self.spread == 1:
                    raise
                less = f"up to {self.spread - 1} tokens less"
                raise InputError(f"--lengths {length}: prompts have {less}; {error}") from error

    def _tokens(self, length: int, sample: int) -> int:
        """Of the n-th prompt of a length."""
        return drawn_length(length, self.args.seed + sample, self.spread)

    def run(self) -> None:
        """Answers the prompts that have no row yet, shortest first, with a bar that counts their tokens."""
        done, seed = self.results.done, self.args.seed
        samples = range(self.args.samples)
        wanted = [(length, task, i) for length in self.lengths for task in self.tasks for i in samples]
        missing = [(length, task, i) for length, task, i in wanted if (task.name, length, seed + i) not in done]
        finished = sum(length for length, _, _ in wanted) - sum(length for length, _, _ in missing)
        model = load_model(f"--{self.role}", self.subject, self.args.dtype, self.args.device) if missing else None
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no warning about prompts beyond the training context: they are the point
        with tqdm(
            desc=f"{self.role} {Path(self.subject.name).name}",
            total=sum(length for length, _, _ in wanted),
            initial=finished,
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        ) as bar:
            for length, task, sample in missing:
                end = bar.n + length
                if all(length != skip["length"] for skip in self.skipped):
                    self._ask(model, task, length, sample, bar.update)
                    self._show_score(bar, task, length)
                bar.update(end - bar.n)
        logging.set_verbosity(verbosity)
        self.write_summary()

    def _ask(
        self, model: PreTrainedModel, task: Task, length: int, sample: int, progress: Callable[[int], object]
    ) -> None:
        seed, tokens, depth = self.args.seed + sample, self._tokens(length, sample), self.args.depth(sample)
        try:
            how = {"prompt_tokens": tokens, "depth": depth, "period": self.period, "progress": progress}
            how |= {"needle_rank": self.needle_rank, "reading_retrieved_blocks": self.reading}
            row = ask(model, task, length, seed, cache=self._new_cache(), **how)
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            # a baseline may also run past its positions; of the model, nothing but a lack of memory is put aside
            if self.role == "model" and not is_out_of_memory(error):
                raise
            self._skip(length, error)
        else:
            self.results.append(row)

    def _new_cache(self) -> LandmarkCache | None:
        if self.storage is None and self.index is None:
            return None
        return LandmarkCache(self.subject.config, storage=self.storage or DeviceStorage, index=self.index)

    def _skip(self, length: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        self.skipped.append({"length": length, "reason": reason})
        tqdm.write(f"{self.role}: {length} tokens are skipped, generation failed ({reason})", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _show_score(self, bar: tqdm, task: Task, length: int) -> None:
        rows = [row for row in self.results.rows if (row["task"], row["length"]) == (task.name, length)]
        right = sum(row["correct"] for row in rows)
        bar.set_postfix_str(f"{task.name}, {length} tokens: {right}/{len(rows)} right", refresh=False)

    def write_summary(self) -> None:
        """Sums up all rows of the folder."""
        self.results.write_summary(
            {
                "rows": summarise(self.results.rows),
                "by_phase": summarise_phases(self.results.rows),
                "skipped": self.skipped,
                "model": self.subject.name,
                "haystack": self.args.haystack,
                "training_context": self.subject.training_context,
                "versions": versions(),
                "device": device_in_words(self.args.device, self.args.kernels),
            }
        )

    def measured(self) -> Measured:
        """The rows as the report wants them."""
        num_depths = self.args.num_depths if self.args.depths == "grid" else None
        label = f"{self.role} ({Path(self.subject.name).name})"
        return Measured(label, self.results.rows, self.subject.training_context, num_depths, self.period)


def make_tasks(args: Arguments, subject: Subject) -> list[Task]:
    """The tasks of the command line with a model's tokenizer."""
    encoder = Encoder(subject.tokenizer, args.chat_template)
    text = TextHaystack(encoder, read_texts(args.haystack), " ".join(args.haystack)) if args.haystack else None
    return [make_task(TaskName.parse(name), encoder, text, args.template) for name in args.task]


def find_subjects(args: Arguments) -> dict[Role, Subject]:
    """The model and, if there is one, the baseline; retrieval settings are the model's."""
    retrieval = {name: getattr(args, name) for name in RETRIEVAL_SETTINGS if getattr(args, name) is not None}
    subjects: dict[Role, Subject] = {"model": find_subject("--model", args.model, retrieval, args.kernels)}
    if args.baseline is not None:
        subjects["baseline"] = find_subject("--baseline", args.baseline, {}, args.kernels)
    return subjects


def find_period(subjects: dict[Role, Subject]) -> int | None:
    """Ordinary tokens in a block of the first landmark model: both are asked the same prompts."""
    return next(filter(None, (block_tokens(subject.config) for subject in subjects.values())), None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a CPU or a GPU lacked memory; PyTorch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def main(argv: list[str] | None = None, on_row: Callable[[Role, dict], None] | None = None) -> int:
    """Runs the command; 0, or 1 if the model had to skip a length. `on_row` is given each row as it is measured."""
    args = Arguments(**vars(HfArgumentParser(Arguments).parse_args(argv)))
    subjects = find_subjects(args)
    period = find_period(subjects)
    runs = [PasskeyRun(args, role, subject, period) for role, subject in subjects.items()]
    for run in runs:
        run.results.on_row = partial(on_row, run.role) if on_row else None
        run.run()
    models = [run.measured() for run in runs]
    print(table(models))
    if period:
        print("\n" + phase_table(models))
    if args.needle_rank:
        print("\n" + rank_table(models[0].rows))
    paths = [path for run in runs for path in (run.results.rows_path, run.results.summary_path)]
    models = [model for model in models if model.rows]
    if models:
        try:
            paths += draw(models, Path(args.output))
        except OSError as error:
            raise InputError(f"output {args.output}: the pictures cannot be written ({error.strerror})") from error
    print("\n".join(str(path) for path in paths))
    return 1 if runs[0].skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, TierError) as error:
        sys.exit(f"eval_passkey: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_passkey: interrupted; the same command goes on from here")
