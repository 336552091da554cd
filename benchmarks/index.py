"""Blocks chosen by an index of faiss beside the exact choice: time to read a text, and how much of it is found.

    python benchmarks/index.py --model DIR --text BOOK.txt --lengths 131072 524288
    python benchmarks/index.py --lengths 131072      # random weights and tokens

Each measurement runs in a process of its own. Recall is of the blocks that are not among the last ones: what the index
proposed and the exact comparison would have chosen, by layer, over all queries of the text. A row each to `--output`.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# the repository root replaces this folder on the path, as in generation.py
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
from torch import Tensor
from transformers import HfArgumentParser

from benchmarks.measure import MeasurementFailed, ResultsFile, Stopwatch, exit_with, isolated
from benchmarks.memory import check_text, text_of, what_is_read
from benchmarks.models import ModelArguments, landmark_config, load_model
from landmark_llama import LandmarkCache, LandmarkLlamaConfig
from landmark_llama.reading.approximate import ApproximateLandmarks
from landmark_llama.reading.highest import Highest, Sharing


@dataclass
class Arguments:
    """What is measured."""

    lengths: list[int] = field(default_factory=lambda: [131072], metadata={"help": "Tokens that are read."})
    kinds: list[str] = field(default_factory=lambda: ["exact", "hnsw", "ivf"], metadata={"help": "exact, hnsw, ivf."})
    granularity: str = field(default="head", metadata={"help": "Setting of retrieval_granularity."})
    text: str | None = field(default=None, metadata={"help": "File to read, over and over; default: random tokens."})
    piece: int = field(default=65536, metadata={"help": "Tokens of a call."})
    output: str = field(
        default=str(Path(__file__).parent / "results" / "index.jsonl"),
        metadata={"help": "File that rows are added to."},
    )


class ObservedLandmarks(ApproximateLandmarks):
    """Counts how many of the k highest are among those found."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self.wanted = self.there = 0

    def _highest(self, query: Tensor, sharing: Sharing | None, *, key: Tensor, bias: Tensor | None, k: int) -> Highest:
        found = super()._highest(query, sharing, key=key, bias=bias, k=k)
        for head in range(len(query)):
            scores = query[head] @ key[head, self.skipped :].to(query.dtype).T
            scores = scores if bias is None else scores + bias[head, self.skipped :]
            if sharing is not None:  # by the highest share of the valid queries
                total = (scores.double().exp().sum(-1, keepdim=True) + sharing.total[head]).log()
                scores = (scores - total).masked_fill(~sharing.valid[head].unsqueeze(-1), -torch.inf).amax(-2)
            exact = scores.topk(k, dim=-1).indices + self.skipped
            self.there += int((exact.unsqueeze(-1) == found.index[head].unsqueeze(-2)).any(-1).sum())
            self.wanted += exact.numel()
        return found


@torch.inference_mode()
def measure(
    model_args: ModelArguments, config: LandmarkLlamaConfig, args: Arguments, kind: str, length: int, observed: bool
) -> dict[str, Any]:
    """Seconds to read `length` tokens, or, where it is observed, the recall of each layer that searches."""
    model = load_model(model_args, config, "landmark")
    text = text_of(model_args, config, args.text, length)
    cache = LandmarkCache(config, index=None if kind == "exact" else kind)
    if observed:
        for storage in cache.storages:
            storage.repeated = ObservedLandmarks(kind)
    cache.expect(length + length // (config.block_size - 1))
    watch = Stopwatch(model_args.device)
    for piece in text.split(args.piece, dim=1):
        model(piece.long(), past_key_values=cache, logits_to_keep=1)
    if not observed:
        return {"read_seconds": round(watch.lap(), 3)}
    layers = [storage.repeated for storage in cache.storages]
    return {"recall": [round(x.there / x.wanted, 4) for x in layers if x.wanted]}


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if something could not be measured."""
    model, args = HfArgumentParser((ModelArguments, Arguments)).parse_args_into_dataclasses(argv)
    check_text(model, args.text)
    config = landmark_config(model, args.granularity)
    common = {
        "benchmark": "index",
        **what_is_read(model, config, args.text),
        "granularity": args.granularity,
        "piece": args.piece,
    }
    results, run = ResultsFile(Path(args.output), common), functools.partial(isolated, threads=model.threads)
    for length in args.lengths:
        for kind in args.kinds:
            row: dict[str, Any] = {"length": length, "choice": kind}
            try:
                for observed in (False, True) if kind != "exact" else (False,):
                    row |= run(measure, model, config, args, kind, length, observed)
                results.add(row)
                print(row)
            except MeasurementFailed as error:
                results.add_failure(row, str(error))
    return results.report()


if __name__ == "__main__":
    exit_with(main, kept="the rows of finished measurements")
