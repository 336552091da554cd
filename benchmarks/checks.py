"""Correctness checks that run before any timing: a speed is reported only if the result is right.

A check returns None, or a sentence that says what is wrong. All errors are root mean squares. A result may have twice
the error of a plain computation in the same dtype, plus the rounding of the exact result itself. The choice of blocks
is compared with brute force in `tests/`, not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import LANDMARK, ModelArguments, landmark_config, load_model, random_text
from landmark_llama import LandmarkCache, landmark_attention
from landmark_llama.attention import landmark_attention_reference
from landmark_llama.configuration import LandmarkConfig

UNEVEN = (37, 1, 64, 5)  # lengths of the calls that a text is cut into, in turn
# Rounding may choose either of two blocks whose scores are nearly equal. So one of several texts must come out right.
TEXTS = 3
# What the definition in float64 has room for: its memory grows with heads and with the square of the window.
CHECKED_HEADS, CHECKED_LAYERS, CHECKED_WIDTH, CHECKED_WINDOW = 4, 2, 1024, 1024


def checked_shape(args: ModelArguments, config: LandmarkConfig) -> tuple[ModelArguments, LandmarkConfig]:
    """What is checked in place of a model: the same kind of heads, blocks and retrieval, few of them.

    A checkpoint (`--model`) no wider than `CHECKED_WIDTH`, with a window of at most `CHECKED_WINDOW`, is checked as it
    is. For a larger one, and for random weights, which are all alike, a small model with random weights stands.
    """
    if args.model and config.hidden_size <= CHECKED_WIDTH and config.train_context_length <= CHECKED_WINDOW:
        return args, config
    settings = config.retrieval()
    heads = min(config.num_attention_heads, CHECKED_HEADS)
    table = (settings.num_retrieved_blocks + settings.num_direct_blocks + 2) * config.block_size
    shape = {
        "vocab_size": min(config.vocab_size, 1024),
        "hidden_size": heads * config.head_dim,
        "intermediate_size": 2 * heads * config.head_dim,
        "layers": min(config.num_hidden_layers, CHECKED_LAYERS),
        "heads": heads,
        "kv_heads": max(1, heads * config.num_key_value_heads // config.num_attention_heads),
        "head_dim": config.head_dim,
        "block_size": config.block_size,
        "train_context_length": min(config.train_context_length, max(CHECKED_WINDOW, table)),
        "num_retrieved_blocks": settings.num_retrieved_blocks,
        "num_local_blocks": settings.num_direct_blocks,
    }
    small = replace(args, model=None, **shape)
    checked = landmark_config(small, settings.granularity)
    checked.landmark_key, checked.landmark_query_rank = config.landmark_key, config.landmark_query_rank
    return small, checked


def check_attention(
    args: ModelArguments, config: LandmarkConfig, attention: Callable[..., Tensor] | None = None
) -> str | None:
    """Compares `attention` (default: the library's) with the definition: outputs and gradients over one window."""
    generator = torch.Generator().manual_seed(args.seed)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query, key, value, grad = (
        torch.randn(1, n, config.train_context_length, config.head_dim, generator=generator)
        .to(args.torch_dtype)
        .to(args.device)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def outcome(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        output = attend(*inputs, block_size=config.block_size)
        return output.detach(), *torch.autograd.grad(output, inputs, grad.to(dtype))

    exact = outcome(landmark_attention_reference, torch.float64)
    plain = outcome(landmark_attention_reference, args.torch_dtype)
    fast = outcome(attention or landmark_attention, args.torch_dtype)
    for name, x, low, right in zip(("output", "grad_query", "grad_key", "grad_value"), fast, plain, exact, strict=True):
        problem = _verdict(f"landmark_attention, {name}, against its definition", x, right, _allowed(low, right))
        if problem:
            return problem
    return None


@torch.inference_mode()
def check_reading(args: ModelArguments, config: LandmarkConfig) -> str | None:
    """Compares texts read through a cache with the same texts read in another way.

    1. A text that fits the block table must give the logits of one forward over all of it.
    2. A text of four windows, where blocks are really chosen, must give the same logits however it is cut into calls.
       If no choice is shared between tokens, it is cut anywhere, down to single tokens. With `"head"` it is cut between
       blocks, and a decoding step must also equal one with `"token_and_head"`.

    The longer text is read in float64. Its rounding is that of the rotary table, which is fp32.
    """
    model = load_model(args, config, LANDMARK)
    precise, single = copy.deepcopy(model).double(), copy.deepcopy(model).float()
    settings = config.retrieval()
    ordinary = config.block_size - 1
    fitting_tokens = (settings.num_direct_blocks + settings.num_retrieved_blocks + 1) * ordinary - ordinary // 2
    texts = random_text(args, config, 4 * config.train_context_length, batch=TEXTS)

    window = texts[:1, :fitting_tokens]
    exact = precise(window).logits
    what = "a text that fits the table, read through a cache, against one forward"
    problem = _verdict(what, _read(model, window, UNEVEN), exact, _allowed(model(window).logits, exact))
    if problem:
        return problem
    allowed = _allowed(single(window).logits, exact)
    problems = [_check_cuts(precise, text.unsqueeze(0), settings.granularity == "head", allowed) for text in texts]
    return None if None in problems else problems[0]


def _check_cuts(model: PreTrainedModel, text: Tensor, shared: bool, allowed: float) -> str | None:
    """Reads `text` (1, tokens) cut into different calls. `shared`: whether the tokens of a block share a choice."""
    ordinary = model.config.block_size - 1
    cuts = tuple(ordinary * n for n in (1, 3, 2)) if shared else UNEVEN
    what = f"a text of {text.shape[1]} tokens in calls of {cuts} tokens, against one call"
    problem = _verdict(what, _read(model, text, cuts), _read(model, text, (text.shape[1],)), allowed)
    if problem or not shared:
        return problem
    last = text.shape[1] - text.shape[1] % ordinary - ordinary // 2
    head, alone = (_read(model, text[:, :last], (last - 1, 1), name)[:, -1] for name in ("head", "token_and_head"))
    return _verdict("a decoding step with 'head', against 'token_and_head'", head, alone, allowed)


def _read(
    model: PreTrainedModel, text: Tensor, lengths: tuple[int, ...], last_granularity: str | None = None
) -> Tensor:
    """Logits (1, tokens, vocab_size) of a text read through a cache. The calls have `lengths` tokens, in turn."""
    cache, logits, first = LandmarkCache(model.config), [], 0
    while first < text.shape[1]:
        call = text[:, first : first + lengths[len(logits) % len(lengths)]]
        first += call.shape[1]
        granularity = last_granularity if first == text.shape[1] else None
        logits.append(model(call, past_key_values=cache, retrieval_granularity=granularity).logits)
    return torch.cat(logits, dim=1)


def _allowed(plain: Tensor, exact: Tensor) -> float:
    """The error that rounding explains: twice that of a plain computation, plus the rounding of the exact result."""
    return 2 * _mean(plain.double() - exact) + torch.finfo(plain.dtype).eps * _mean(exact)


def _verdict(what: str, result: Tensor, exact: Tensor, allowed: float) -> str | None:
    """None if the error is at most `allowed`, otherwise a sentence about it."""
    error = _mean(result.double() - exact)
    # not `error > allowed`, which is false for NaN
    return None if error <= allowed else f"{what}: off by {error:.3g}, rounding allows {allowed:.3g}"


def _mean(x: Tensor) -> float:
    """Root mean square. A single wrong row raises it far above rounding; a single large rounding error does not."""
    return float(x.double().square().mean().sqrt())
