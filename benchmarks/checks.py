"""A speed is reported only where the result is right: what the benchmarks verify before they measure.

One criterion for rounding: a result may be off by twice as much as a plain computation in the same dtype, plus the
rounding of the exact result itself, in the root of the mean square. A check returns None, or a sentence that says what
is wrong. That the best blocks are chosen is compared with brute force in `tests/`, not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import LANDMARK, ModelArguments, load_model, random_text
from landmark_llama import LandmarkCache, LandmarkLlamaConfig, landmark_attention
from landmark_llama.attention import landmark_attention_reference

UNEVEN = (37, 1, 64, 5)  # tokens of the calls that a text is cut into, in turn
TEXTS = (
    3  # where two blocks score nearly the same, rounding may choose either: one of so many texts must come out right
)


def check_attention(
    args: ModelArguments, config: LandmarkLlamaConfig, attention: Callable[..., Tensor] | None = None
) -> str | None:
    """Compares an attention, by default the library's, with the definition: outputs and gradients over one window."""
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
def check_reading(args: ModelArguments, config: LandmarkLlamaConfig) -> str | None:
    """Compares a text read through a cache with the same text read in another way.

    A text that fits the table of blocks must give what one forward over all of it gives. One of four windows, with a
    real choice of blocks, must give the same however it is cut into calls: anywhere and down to single tokens where no
    choice is shared between tokens; between blocks for `"head"`, where a decoding step must choose as a single token
    does. The longer text is read in float64, whose rounding is that of the rotations: their table is fp32.
    """
    model = load_model(args, config, LANDMARK)
    precise, single = copy.deepcopy(model).double(), copy.deepcopy(model).float()
    settings = config.retrieval()
    ordinary = config.block_size - 1
    fitting = (settings.num_direct_blocks + settings.num_retrieved_blocks + 1) * ordinary - ordinary // 2
    texts = random_text(args, config, 4 * config.train_context_length, batch=TEXTS)

    window = texts[:1, :fitting]
    exact = precise(window).logits
    what = "a text that fits the table, read through a cache, against one forward"
    problem = _verdict(what, _read(model, window, UNEVEN), exact, _allowed(model(window).logits, exact))
    if problem:
        return problem
    allowed = _allowed(single(window).logits, exact)
    problems = [_check_cuts(precise, text.unsqueeze(0), settings.granularity == "head", allowed) for text in texts]
    return None if None in problems else problems[0]


def _check_cuts(model: PreTrainedModel, text: Tensor, shared: bool, allowed: float) -> str | None:
    """Reads `text` (1, tokens) in several ways; `shared`: the tokens of a block share a choice while they are read."""
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
    """Logits (1, tokens, vocab_size) of a text read through a cache, in calls of `lengths` tokens in turn."""
    cache, logits, first = LandmarkCache(model.config), [], 0
    while first < text.shape[1]:
        call = text[:, first : first + lengths[len(logits) % len(lengths)]]
        first += call.shape[1]
        granularity = last_granularity if first == text.shape[1] else None
        logits.append(model(call, past_key_values=cache, retrieval_granularity=granularity).logits)
    return torch.cat(logits, dim=1)


def _allowed(plain: Tensor, exact: Tensor) -> float:
    """The error that rounding may make: twice that of a plain computation, and the rounding of the exact result."""
    return 2 * _mean(plain.double() - exact) + torch.finfo(plain.dtype).eps * _mean(exact)


def _verdict(what: str, result: Tensor, exact: Tensor, allowed: float) -> str | None:
    error = _mean(result.double() - exact)
    # written so that a NaN fails
    return None if error <= allowed else f"{what}: off by {error:.3g}, rounding allows {allowed:.3g}"


def _mean(x: Tensor) -> float:
    """Root of the mean square: a single wrong row lifts it far above rounding, and no unlucky maximum does."""
    return float(x.double().square().mean().sqrt())
