"""Trains two steps of two batches in a process of its own; prints its peak memory and the estimate of it, in bytes."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_model

from benchmarks.measure import PeakMemory
from finetune.memory import Batch, Plan, Weights, estimate
from landmark_llama.tokenization import plain_length

ROWS, POSITIONS, BLOCK = 2, 512, 64


def main(checkpointing: bool) -> None:
    torch.set_num_threads(1)
    torch.ones(64, 64, requires_grad=True).matmul(
        torch.ones(64, 64)
    ).sum().backward()  # lets torch allocate what it needs for itself
    peak = PeakMemory("cpu")  # not `ru_maxrss`, which starts at the size of the parent process
    model = tiny_model(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, vocab_size=8192,
        block_size=BLOCK, max_position_embeddings=POSITIONS,
    ).train()  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = plain_length(POSITIONS, BLOCK)
    for _ in range(2):
        for _ in range(2):  # the second batch's activations are in memory together with gradients
            ids = torch.randint(8, 8192, (ROWS, tokens))
            model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    plan = Plan(compute_bytes=4, residual_bytes=4, checkpointing=checkpointing)
    size = estimate(model.config, Weights.of(model), Batch(ROWS, POSITIONS, tokens), plan)
    print(round(peak.mib() * 2**20), size.total)


if __name__ == "__main__":
    main(checkpointing=sys.argv[1] == "checkpointing")
