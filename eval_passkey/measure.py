"""One prompt asked, and the accuracy of a loaded model: for the command, and for a trainer between two steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from eval_passkey.prompts import Prompt, Task, drawn_length
from eval_passkey.ranks import ranks_of_needle
from eval_passkey.tasks import make_task
from landmark_llama import LandmarkCache
from landmark_llama.configuration import LandmarkConfig

CALL_BLOCKS = 4096


def accuracy(
    model: PreTrainedModel, tokenizer, task: str | Task, lengths: Sequence[int], samples: int, seed: int = 0
) -> dict[int, float]:
    """Share of right answers by length, greedily generated, of a model that is loaded already.

        accuracy(model, tokenizer, "passkey", lengths=[512, 4096], samples=10)     # {512: 1.0, 4096: 0.9}

    task: a name as on the command line, or a task made before with the same tokenizer.
    lengths: tokens; a landmark model's prompts are up to a block shorter, each by another number of tokens.
    seed: of the first prompt of a length; the next has the next one.
    The model is in evaluation mode meanwhile, without gradients, and then as it was. Where it is sharded over
    processes, each of them has to call. InputError if a length is too short for the task.
    """
    task = make_task(task, tokenizer) if isinstance(task, str) else task
    spread = block_tokens(model.config) or 1
    right = {}
    with _evaluating(model):
        for length in lengths:
            rows = [
                ask(model, task, length, seed + i, prompt_tokens=drawn_length(length, seed + i, spread))
                for i in range(samples)
            ]
            right[length] = sum(row["correct"] for row in rows) / samples
    return right


def ask(
    model: PreTrainedModel,
    task: Task,
    length: int,
    seed: int,
    prompt_tokens: int | None = None,
    depth: float | None = None,
    period: int | None = None,
    cache: LandmarkCache | None = None,
    progress: Callable[[int], object] | None = None,
    needle_rank: bool = False,
    reading_retrieved_blocks: int | None = None,
) -> dict:
    """Asks one prompt and returns its row of results.

    length, prompt_tokens: the named length, and the exact one if it is another.
    period: ordinary tokens of a block. The row's `phase` says how many the prompt leaves in its last block; None if
        there are no blocks.
    cache: empty, what the model keeps its memory in; None: its own.
    progress: is told how many tokens of the prompt each call has read, where there are several.
    needle_rank: the row says, too, at which rank each layer and head of a landmark model saw the needle's block; the
        prompt's last token is then read by a call of its own.
    reading_retrieved_blocks: as of `read_prompt`.
    """
    prompt = task.prompt(prompt_tokens or length, seed, depth)
    start = time.perf_counter()
    if needle_rank and cache is None:
        cache = LandmarkCache(model.config)
    kept = (cache,) if cache is None else (cache, progress, reading_retrieved_blocks)
    if needle_rank:
        read_prompt(model, torch.tensor([prompt.input_ids], device=model.device), prompt.max_new_tokens, *kept)
        ranks = ranks_of_needle(model, cache, prompt)
    answer = generate_answer(model, task.encoder.tokenizer, prompt, *kept)
    seconds = time.perf_counter() - start
    verdict = task.judge(answer, prompt)
    return {
        "task": task.name,
        "length": length,
        "prompt_tokens": len(prompt.input_ids),
        "phase": len(prompt.input_ids) % period if period else None,
        "depth": round(prompt.depth, 6),
        "seed": prompt.seed,
        "key": prompt.key,
        "prediction": verdict.prediction,
        "correct": verdict.correct,
        "recall": round(verdict.recall, 6),
        "seconds": round(seconds, 4),
        **(ranks if needle_rank else {}),
    }


@torch.no_grad()  # no inference mode: what a model keeps from here must still serve training
def generate_answer(
    model: PreTrainedModel,
    tokenizer,
    prompt: Prompt,
    cache: LandmarkCache | None = None,
    progress: Callable[[int], object] | None = None,
    reading_retrieved_blocks: int | None = None,
) -> str:
    """What the model says after a prompt, greedily, whatever its generation configuration prefers.

    cache, progress, reading_retrieved_blocks: as for `ask`. The cache is filled in several calls, because a call holds
        much beside what is remembered.
    """
    input_ids = torch.tensor([prompt.input_ids], device=model.device)
    if cache is not None and model.config.local_attention == "sliding":  # in which calls of whole blocks change nothing
        read_prompt(model, input_ids, prompt.max_new_tokens, cache, progress, reading_retrieved_blocks)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        past_key_values=cache,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
    )
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    cache: LandmarkCache,
    progress: Callable[[int], object] | None = None,
    reading_retrieved_blocks: int | None = None,
) -> None:
    """Reads what `cache` does not hold yet of a prompt (1, length) without its last token, in several calls.

    reading_retrieved_blocks: blocks that a query retrieves before the last `train_context_length` positions of the
        prompt; None: as many as there.
    """
    block = block_tokens(model.config)
    ordinary = input_ids.shape[1] + max_new_tokens
    cache.expect(ordinary + ordinary // block)  # so that what a tier holds is never moved
    rest = input_ids[:, cache.get_seq_length() : -1]
    calls = [(piece, None) for piece in rest.split(CALL_BLOCKS * block, dim=1)]
    if reading_retrieved_blocks is not None:
        before = max(0, rest.shape[1] - model.config.train_context_length // model.config.block_size * block)
        calls = [(piece, reading_retrieved_blocks) for piece in rest[:, :before].split(CALL_BLOCKS * block, dim=1)]
        calls.append((rest[:, before:], None))
    for piece, retrieved in calls:
        if piece.shape[1]:
            model(piece, past_key_values=cache, logits_to_keep=1, num_retrieved_blocks=retrieved)
            if progress is not None:
                progress(piece.shape[1])


def block_tokens(config) -> int | None:
    """Ordinary tokens in a block of a landmark model; None for others."""
    return config.block_size - 1 if isinstance(config, LandmarkConfig) else None


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
