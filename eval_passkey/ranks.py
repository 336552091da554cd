"""At which rank the needle's block stood among all that the last token of a prompt could retrieve.

Finer than right and wrong: it says how far a head was from finding the needle, and how that grows with the text.
"""

from collections.abc import Sequence
from math import log
from statistics import fmean, median, quantiles
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from eval_passkey.prompts import Prompt
from landmark_llama import LandmarkCache
from landmark_llama.reading.trace import record_retrieved


class RankSummary(NamedTuple):
    """A task and length.

    candidates: median number of blocks that could be retrieved.
    layer, head: of all heads the one that sees the needle's block first, in all prompts of the task.
    median, ninth: median and 90th percentile of its rank; 0 is the best.
    found: share of prompts in which any head of any layer retrieved the needle's block.
    """

    task: str
    length: int
    samples: int
    candidates: int
    layer: int
    head: int
    median: float
    ninth: float
    found: float


@torch.no_grad()
def ranks_of_needle(model: PreTrainedModel, cache: LandmarkCache, prompt: Prompt) -> dict:
    """What a row says of it, in JSON values. `cache` holds the prompt without its last token, before and after.

    candidates: how many blocks the last token could retrieve, sinks aside, which are always read.
    retrieved: how many of them it did retrieve.
    needle_rank: for each layer a list over its heads, how many candidates scored higher than the needle's block (the
        best one, if it lies in several); None where it was no candidate, or all landmarks of the layer are alike.
    """
    config = model.config
    with record_retrieved(model, scores=True) as steps:
        model(torch.tensor([prompt.input_ids[-1:]], device=model.device), past_key_values=cache)
    cache.crop(-1)
    sinks, tokens = config.num_sink_blocks, config.block_size - 1
    first, last = (0, -1) if prompt.needle is None else (prompt.needle[0] // tokens, (prompt.needle[1] - 1) // tokens)
    ranks: list[list[int] | None] = []
    candidates = 0
    for score in steps[-1].score:
        if score is None:
            ranks.append(None)
            continue
        candidates = score.shape[-1] - sinks
        needle = score[0, :, max(first, sinks) : last + 1]
        higher = None if not needle.shape[-1] else score[0, :, sinks:] > needle.amax(-1, keepdim=True)
        ranks.append(None if higher is None else higher.sum(-1).tolist())
    retrieved = config.retrieval().num_retrieved_blocks - sinks
    return {"candidates": max(candidates, 0), "retrieved": retrieved, "needle_rank": ranks}


def summarise_ranks(rows: Sequence[dict]) -> list[RankSummary]:
    """One a task and length of the rows whose needle could be retrieved, shortest first."""
    rows = [row for row in rows if any(row.get("needle_rank") or ())]
    summaries = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        layer, head = _best_head(own)
        for length in sorted({row["length"] for row in own}):
            group = [row for row in own if row["length"] == length]
            ranks = [row["needle_rank"][layer][head] for row in group]
            ninth = quantiles(ranks, n=10, method="inclusive")[-1] if len(ranks) > 1 else ranks[0]
            found = fmean(any(min(x) < row["retrieved"] for x in row["needle_rank"] if x) for row in group)
            candidates = round(median(row["candidates"] for row in group))
            summaries.append(
                RankSummary(task, length, len(group), candidates, layer, head, median(ranks), ninth, found)
            )
    return summaries


def growth(rows: Sequence[dict], layer: int, head: int) -> float | None:
    """The slope of log(1 + rank) over log(candidates): 0 if more text does no harm, 1 if the rank grows with it."""
    points = [(log(row["candidates"]), log(1 + row["needle_rank"][layer][head])) for row in rows]
    mean_x, mean_y = (fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread > 1e-6 else None


def rank_table(rows: Sequence[dict]) -> str:
    """The summaries, a line a task and length; empty if no needle could be retrieved."""
    summaries = summarise_ranks(rows)
    if not summaries:
        return ""
    width = max(len(summary.task) for summary in summaries)
    titles = f"{'length':>9} {'blocks':>8} {'best head':>12} {'median':>7} {'90 %':>7} {'found by any':>13}"
    lines = [
        "rank of the needle's block for a prompt's last token (0: first)",
        f"{'task':<{width}} {titles}",
    ]
    for x in summaries:
        where = f"{x.layer}.{x.head}"
        lines.append(
            f"{x.task:<{width}} {x.length:>9} {x.candidates:>8} {where:>12} {x.median:>7.0f} {x.ninth:>7.0f} "
            f"{x.found:>13.0%}"
        )
    for task in dict.fromkeys(x.task for x in summaries):
        own = [row for row in rows if row["task"] == task and any(row.get("needle_rank") or ())]
        slope = growth(own, *_best_head(own))
        if slope is not None:
            lines.append(f"{task}: the rank grows with the number of blocks to the power of {slope:.2f}")
    return "\n".join(lines)


def _best_head(rows: Sequence[dict]) -> tuple[int, int]:
    """Layer and head of the lowest mean of log(1 + rank)."""
    heads = [(layer, head) for layer, x in enumerate(rows[0]["needle_rank"]) if x for head in range(len(x))]
    return min(heads, key=lambda at: fmean(log(1 + row["needle_rank"][at[0]][at[1]]) for row in rows))
