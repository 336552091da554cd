"""What is measured of a trained reader, a row of results each: perplexity, retrieval, and cost."""

import math
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.measure import PeakMemory, isolated
from comparisons.bench import Bench
from comparisons.corpus import Corpus
from comparisons.reader import Reader
from comparisons.training import clock, load_weights, make_reader
from eval_passkey.tasks import make_task

BATCH_TOKENS = 8192  # of windows that are read together


def perplexity(reader: Reader, corpus: Corpus, domain: str, length: int, device: str) -> dict:
    """Loss of all windows of a length: `nll` in nats over `tokens` tokens, which stand for `bytes` bytes."""
    windows = corpus.windows(domain, length)
    batch, nll, start = max(1, BATCH_TOKENS // length), 0.0, clock(device)
    for i in range(0, len(windows), batch):
        ids = torch.cat([window.input_ids for window in windows[i : i + batch]]).to(device)
        nll += reader.losses(ids).double().sum().item()
    tokens, size = sum(window.scored for window in windows), sum(window.bytes for window in windows)
    if not math.isfinite(nll):
        raise FloatingPointError(f"{domain}, {length} tokens: the loss is {nll}")
    seconds = round(clock(device) - start, 3)
    return {"nll": nll, "tokens": tokens, "bytes": size, "windows": len(windows), "seconds": seconds}


def retrieval(reader: Reader, corpus: Corpus, task: str, length: int, samples: int, device: str) -> dict:
    """How many prompts of a task and length are answered: the prompts and the judgement are eval_passkey's."""
    made, right, start = make_task(task, corpus.tokenizer), 0, clock(device)
    for seed in range(samples):
        prompt = made.prompt(length, seed)
        answer = reader.generate(torch.tensor([prompt.input_ids], device=device), prompt.max_new_tokens)[0]
        right += made.judge(corpus.tokenizer.decode(answer, skip_special_tokens=True), prompt).correct
    return {"samples": samples, "correct": right, "seconds": round(clock(device) - start, 3)}


def cost(
    bench: Bench, root: Path, folder: Path, label: str, seed: int, weights: Path, length: int, device: str
) -> dict:
    """Seconds to read `length` tokens and for a token decoded after them, and the most memory that took.

    In a process of its own, so that nothing else is in that memory.
    """
    where = bench, root, folder, label, seed, weights, length, device
    return isolated(_cost, *where, threads=torch.get_num_threads())


def _cost(bench, root, folder, label, seed, weights, length, device) -> dict:
    corpus = Corpus(bench, root, folder)
    reader = make_reader(bench, corpus, label, seed)
    load_weights(reader, weights)
    reader = reader.to(device).eval()
    ids = torch.tensor([list(islice(cycle(corpus.some_tokens()), length))], device=device)
    reader.generate(ids[:, :1024], 2)  # what is done once is done
    peak = PeakMemory(device)
    start = clock(device)
    scores, state = reader.prefill(ids)
    read = clock(device)
    for _ in range(bench.cost.new_tokens):
        scores, state = reader.decode(scores.argmax(-1, keepdim=True), state)
    end = clock(device)
    return {
        "read_seconds": round(read - start, 4),
        "decode_seconds": round((end - read) / bench.cost.new_tokens, 5),
        "memory": round(peak.mib() * 2**20),
    }
