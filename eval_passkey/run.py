"""Finds a pass key in long texts: the accuracy of a causal language model over prompt length.

    python eval_passkey/run.py --model DIR --lengths 512 4096 32768 --samples 20 --output DIR
    python eval_passkey/run.py --model DIR --baseline DENSE_DIR --depths grid --num_depths 5 --output DIR
    python eval_passkey/run.py --model DIR --num_retrieved_blocks 8 --retrieval_granularity head --output OTHER_DIR

Writes `results.jsonl` (a row a prompt), `summary.json`, `accuracy.png` and `depth.png` into the output folder, the
baseline's rows and summary into `baseline/` inside it. An interrupted run goes on where it stopped; more lengths or
samples can be added to a finished one.
"""

import gc
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from any folder
from eval_passkey.models import (
    RETRIEVAL_SETTINGS,
    Subject,
    device_in_words,
    find_subject,
    load_model,
    versions,
)
from eval_passkey.report import Measured, plot_accuracy, plot_depth, summarise, table
from eval_passkey.results import ResultsFolder
from eval_passkey.task import DEFAULT_TEMPLATE, InputError, PasskeyTask, Prompt, judge, load_template


@dataclass
class Arguments:
    """What is measured, and how."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model with its tokenizer."})
    output: str = field(metadata={"help": "Folder of the results; made if it is not there."})
    baseline: str | None = field(default=None, metadata={"help": "A second model, shown beside the first."})
    lengths: list[int] = field(
        default_factory=lambda: [512, 4096, 32768],
        metadata={"help": "Prompt lengths in tokens of the model's own tokenizer, BOS included."},
    )
    samples: int = field(default=20, metadata={"help": "Prompts a length."})
    depths: Literal["random", "grid"] = field(
        default="random", metadata={"help": "Where the needle stands: anywhere, or in turn at evenly spaced depths."}
    )
    num_depths: int = field(default=5, metadata={"help": "Depths of the grid; has to divide --samples."})
    seed: int = field(default=0, metadata={"help": "Seed of the first prompt of a length; the next has the next one."})
    template: str = field(default=str(DEFAULT_TEMPLATE), metadata={"help": "JSON file with the wording."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as in the checkpoint."}
    )
    device: str = field(default="", metadata={"help": "cpu, cuda, cuda:1, ...; default: cuda where there is one."})
    num_retrieved_blocks: int | None = field(default=None, metadata={"help": "Landmark model: blocks a query reads."})
    num_local_blocks: int | None = field(
        default=None, metadata={"help": "Landmark model: blocks before a query's own that it reads directly."}
    )
    retrieval_granularity: str | None = field(
        default=None, metadata={"help": "Landmark model: token_and_head, head or token."}
    )
    local_attention: str | None = field(default=None, metadata={"help": "Landmark model: sliding or chunked."})

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < 1:
                raise InputError(f"--lengths {length}: a prompt has at least one token")
        if not self.lengths:
            raise InputError("--lengths: at least one length is needed")
        for name in ("samples", "num_depths"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.depths == "grid" and self.samples % self.num_depths:
            raise InputError(f"--samples {self.samples}: must be a multiple of --num_depths {self.num_depths}")
        self.lengths = sorted(set(self.lengths))
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def depth(self, sample: int) -> float | None:
        """Depth of a length's n-th prompt; None where it is drawn from the seed."""
        if self.depths == "random":
            return None
        return (sample % self.num_depths) / max(self.num_depths - 1, 1)


class PasskeyRun:
    """One model's part of the run: its prompts, its folder, its rows. Everything but the weights is checked at once."""

    def __init__(self, args: Arguments, role: Literal["model", "baseline"]):
        self.args, self.role = args, role
        retrieval = {name: getattr(args, name) for name in RETRIEVAL_SETTINGS if getattr(args, name) is not None}
        is_model = role == "model"
        self.subject: Subject = find_subject(f"--{role}", getattr(args, role), retrieval if is_model else {})
        template = load_template(args.template)
        self.task = PasskeyTask(self.subject.tokenizer, template)
        self.task.prompt(args.lengths[0], seed=args.seed)  # refuses a length that is too short
        self.skipped: list[dict] = []
        settings = {
            "seed": args.seed,
            "depths": args.depths,
            "num_depths": args.num_depths if args.depths == "grid" else None,
            "dtype": args.dtype,
            "retrieval": self.subject.retrieval_settings,
            "template": {
                name: list(value) if isinstance(value, tuple) else value for name, value in vars(template).items()
            },
        }
        folder = Path(args.output) if is_model else Path(args.output) / "baseline"
        self.results = ResultsFolder(folder, {"fingerprint": self.subject.fingerprint, "settings": settings})

    def run(self) -> None:
        """Answers the prompts that have no row yet, shortest first, with a bar that counts their tokens."""
        done = self.results.done
        wanted = [(length, i) for length in self.args.lengths for i in range(self.args.samples)]
        missing = [(length, i) for length, i in wanted if (length, self.args.seed + i) not in done]
        finished = sum(length for length, _ in wanted) - sum(length for length, _ in missing)
        model = load_model(f"--{self.role}", self.subject, self.args.dtype, self.args.device) if missing else None
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no warning about prompts beyond the training context: they are the point
        with tqdm(
            desc=f"{self.role} {Path(self.subject.name).name}",
            total=sum(length for length, _ in wanted),
            initial=finished,
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        ) as bar:
            for length, sample in missing:
                if all(length != skip["length"] for skip in self.skipped):
                    self._run_prompt(model, length, sample)
                    self._show_score(bar, length)
                bar.update(length)
        logging.set_verbosity(verbosity)
        self.write_summary()

    def _run_prompt(self, model: PreTrainedModel, length: int, sample: int) -> None:
        prompt = self.task.prompt(length, self.args.seed + sample, self.args.depth(sample))
        start = time.perf_counter()
        try:
            answer = generate_answer(model, self.task.tokenizer, prompt)
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            # a baseline may also run past its positions; of the model, nothing but a lack of memory is put aside
            if self.role == "model" and not is_out_of_memory(error):
                raise
            self._skip(length, error)
            return
        seconds = time.perf_counter() - start
        correct, prediction = judge(answer, prompt.key)
        self.results.append(
            {
                "length": length,
                "prompt_tokens": len(prompt.input_ids),
                "depth": round(prompt.depth, 6),
                "seed": prompt.seed,
                "key": str(prompt.key),
                "prediction": prediction,
                "correct": correct,
                "seconds": round(seconds, 4),
            }
        )

    def _skip(self, length: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        self.skipped.append({"length": length, "reason": reason})
        tqdm.write(f"{self.role}: {length} tokens are skipped, generation failed ({reason})", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _show_score(self, bar: tqdm, length: int) -> None:
        rows = [row for row in self.results.rows if row["length"] == length]
        bar.set_postfix_str(f"{length} tokens: {sum(row['correct'] for row in rows)}/{len(rows)} right", refresh=False)

    def write_summary(self) -> None:
        """Sums up all rows of the folder."""
        self.results.write_summary(
            {
                "rows": summarise(self.results.rows),
                "skipped": self.skipped,
                "model": self.subject.name,
                "training_context": self.subject.training_context,
                "versions": versions(),
                "device": device_in_words(self.args.device),
            }
        )

    def measured(self) -> Measured:
        """The rows as the report wants them."""
        num_depths = self.args.num_depths if self.args.depths == "grid" else None
        label = f"{self.role} ({Path(self.subject.name).name})"
        return Measured(label, self.results.rows, self.subject.training_context, num_depths)


@torch.inference_mode()
def generate_answer(model: PreTrainedModel, tokenizer, prompt: Prompt) -> str:
    """What the model says after a prompt, greedily, whatever its generation configuration prefers."""
    input_ids = torch.tensor([prompt.input_ids], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
    )
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a CPU or a GPU lacked memory; PyTorch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def draw(models: list[Measured], output: Path) -> list[Path]:
    """Makes the two pictures and returns their paths."""
    accuracy, depth = output / "accuracy.png", output / "depth.png"
    try:
        plot_accuracy(models, accuracy)
        plot_depth(models, depth)
    except OSError as error:
        raise InputError(f"output {output}: the pictures cannot be written ({error.strerror})") from error
    return [accuracy, depth]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0, or 1 if the model had to skip a length."""
    args = Arguments(**vars(HfArgumentParser(Arguments).parse_args(argv)))
    runs = [PasskeyRun(args, role) for role in ("model", "baseline") if getattr(args, role) is not None]
    for run in runs:
        run.run()
    output = Path(args.output)
    models = [run.measured() for run in runs]
    print(table(models))
    paths = [path for run in runs for path in (run.results.rows_path, run.results.summary_path)]
    models = [model for model in models if model.rows]
    if models:
        paths += draw(models, output)
    print("\n".join(str(path) for path in paths))
    return 1 if runs[0].skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"eval_passkey: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_passkey: interrupted; the same command goes on from here")
