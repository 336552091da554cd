"""Trains the calibration that is published beside this file: SmolLM2-135M learns to choose blocks, and nothing else.

    make smollm2-train DATA="classics.jsonl.zst redpajama"
    python examples/smollm2/train.py --output runs/smollm2_train --data classics.jsonl.zst redpajama --shares 0.55 0.25

The recipe is `finetune/configs/smollm2.yaml`; flags of `finetune/run.py` that follow override it. Documents that ask
for what stands far back are written on this machine (`finetune/demo`). Interrupted, the same command goes on from the
last checkpoint. The calibration is put into `calibration/` in the output folder; `run.py --calibration` takes it.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script, from any folder
import finetune.run
from eval_passkey.prompts import InputError
from examples.smollm2.models import RANK, SETTINGS, make_models
from examples.smollm2.package import GGUF_SHA256, file_digest, find_gguf
from finetune.arguments import UserError
from finetune.checkpoints.output import METRICS
from finetune.demo.corpus import write_corpus
from landmark_llama import LandmarkLlamaForCausalLM
from landmark_llama.checkpoints.files import read_json
from landmark_llama.published_calibration import save_calibration

RECIPE = Path(finetune.run.__file__).parent / "configs" / "smollm2.yaml"
RETRIEVAL = "retrieval_documents"


@dataclass
class Arguments:
    """What it is trained on, and where."""

    output: str = field(metadata={"help": "Folder of models, checkpoints and calibration; made if it is not there."})
    data: list[str] = field(metadata={"help": "Real texts: files or folders, as of finetune/run.py."})
    shares: list[float] = field(
        default_factory=list, metadata={"help": "Of the rows, one for each of --data; default: equal ones."}
    )
    retrieval_share: float = field(
        default=0.2, metadata={"help": "Of the rows: documents that ask for what stands far back."}
    )
    retrieval_documents: int = field(default=4000, metadata={"help": "How many of them are written."})
    package: str | None = field(
        default=None, metadata={"help": "Wheel, GGUF file, or a folder with one; default: from the package index."}
    )
    sha256: str = field(default=GGUF_SHA256, metadata={"help": "Of the GGUF file; any: a model of your own."})

    def check(self) -> None:
        """Refuses what cannot work, before anything is written."""
        if self.shares and len(self.shares) != len(self.data):
            raise InputError(f"--shares {self.shares}: give one for each of the {len(self.data)} of --data")
        if not 0 <= self.retrieval_share < 1:
            raise InputError(f"--retrieval_share {self.retrieval_share}: must be at least 0 and below 1")
        for path in self.data:
            if not Path(path).exists():
                raise InputError(f"--data {path}: there is no such file or folder")
        if len(set(self.names())) < len(self.data):
            raise InputError(f"--data: two have one name, {', '.join(sorted(self.names()))}: give each its own")

    def names(self) -> list[str]:
        """What --mixture calls the data."""
        return [Path(path).name.partition(".")[0] for path in self.data]

    def mixture(self) -> list[str]:
        """The shares of all rows, as --mixture takes them."""
        shares = self.shares or [1.0] * len(self.data)
        real = {
            name: share / sum(shares) * (1 - self.retrieval_share)
            for name, share in zip(self.names(), shares, strict=True)
        }
        return [f"{name}={share}" for name, share in {**real, RETRIEVAL: self.retrieval_share}.items() if share]


def train(args: Arguments, flags: list[str]) -> Path:
    """The folder of the trained calibration. `flags`: of `finetune/run.py`."""
    args.check()
    output = Path(args.output)
    gguf = find_gguf(args.package, output / "package", args.sha256)
    _, model = make_models(gguf, file_digest(gguf), None, output)
    retrieval = output / f"{RETRIEVAL}.jsonl"
    if args.retrieval_share and not retrieval.is_file():
        written = output / RETRIEVAL
        write_corpus(written, args.retrieval_documents, retrieval_share=1.0, retrieval_characters=(500, 4000), seed=7)
        (written / "train.jsonl").replace(retrieval)
        shutil.rmtree(written)
    data = [*args.data, *([str(retrieval)] if args.retrieval_share else [])]
    finetune.run.main(
        [
            *("--config", str(RECIPE), "--model_name_or_path", str(model), "--landmark_query_rank", str(RANK)),
            *("--data", *data, "--mixture", *args.mixture(), "--output_dir", str(output / "model"), *flags),
        ]
    )
    calibration = output / "calibration"
    if not calibration.is_dir():
        metrics = read_json(output / "model" / METRICS)
        kept = ("steps", "ordinary_tokens_per_row", "train_loss", "landmark_divergence", "torch", "transformers")
        training = {"recipe": RECIPE.name, "mixture": args.mixture(), **{name: metrics[name] for name in kept}}
        # in its rows most blocks are candidates; a text is read with more of them read directly
        reading = {name: SETTINGS[name] for name in ("train_context_length", "num_local_blocks")}
        trained = LandmarkLlamaForCausalLM.from_pretrained(output / "model", **reading)
        save_calibration(trained, calibration, training=training)
    return calibration


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args, flags = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv, return_remaining_strings=True)
    logging.disable_progress_bar()
    print(f"the calibration is in {train(args, flags)}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, UserError) as error:
        sys.exit(f"smollm2: {error}")
    except KeyboardInterrupt:
        sys.exit("smollm2: interrupted; the same command goes on from the last checkpoint")
