"""Compares the GPU kernels with PyTorch where a model uses them: in every layer, on a text, forward and backward.

A new GPU, driver or Triton can compute wrongly without a word. A run that checks its kernels first does not train on
that. `landmark_llama.attention.reference` computes the same in float64, and in the kernels' own precision: the kernels
may have twice the error of that, plus the rounding of the result itself. Errors are root mean squares.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from landmark_llama.attention import WholeRows, availability, landmark_attention, landmark_attention_reference
from landmark_llama.attention.pooling import pool_rows
from landmark_llama.modeling import LandmarkAttention
from landmark_llama.tokenization import plain_length

FACTOR = 2.0
QUERIES = ("query", "landmark_query")
LAST_QUERIES = 128  # that the definition, whose memory is quadratic, is computed for; they read the whole row


class KernelsDifferError(RuntimeError):
    """The kernels compute something else than PyTorch does."""


@torch.no_grad()
def check_kernels(model: nn.Module, input_ids: Tensor) -> int:
    """Compares the attention kernels with PyTorch in all layers of one forward over a text.

    Outputs and gradients are compared, for the text's own queries, keys and values. The model stays as it is.

    Args:
        model: a landmark LLaMA, also inside peft's or FSDP's wrappers.
        input_ids: (1, length) ordinary tokens on the model's device; what exceeds its window is left out.

    Returns:
        The number of layers compared; 0 where PyTorch does all: without a GPU or Triton, with `kernels=False`, in
        float64.

    Raises:
        KernelsDifferError: naming the first layer and tensor that differ, and by how much.
    """
    config = model.config
    if not (config.kernels and availability.kernels_run_on(input_ids.device)):
        return 0
    found: list[list[str]] = []
    attentions = [module for module in model.modules() if isinstance(module, LandmarkAttention)]
    handles = [module.register_forward_pre_hook(partial(_compare_in, found), with_kwargs=True) for module in attentions]
    training = model.training
    model.eval()
    try:
        window = plain_length(config.train_context_length, config.block_size)
        model(input_ids=input_ids[:1, :window], use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for layer, problems in enumerate(found):
        if problems:
            raise KernelsDifferError(f"layer {layer}: {problems[0]}")
    return len(found)


def _compare_in(found: list[list[str]], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Gives a layer a view that compares what it computes."""
    view = kwargs["view"]
    if type(view) is not WholeRows:
        return None
    settings = {setting.name: getattr(view, setting.name) for setting in fields(view)}
    compared = _ComparedRows(**settings, found=found)
    return args, kwargs | {"view": compared}


@dataclass(frozen=True)
class _ComparedRows(WholeRows):
    """Adds to `found`, for each layer, sentences about what differs."""

    found: list[list[str]] = field(default_factory=list)

    def attend_rotated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        landmark_query: Tensor | None = None,
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        if self.num_retrieved_blocks is not None or not availability.kernels_take_rows(query):
            landmarks = {"landmark_query": landmark_query, "landmark_prior": landmark_prior}
            return super().attend_rotated(query, key, value, scale=scale, **landmarks)
        landmark_bias = None
        if self.pooled:
            key, landmark_bias = pool_rows(key, landmark_prior, self.block_size, scale)
        inputs = {"query": query, "key": key, "value": value}
        inputs |= {"landmark_query": landmark_query, "landmark_bias": landmark_bias}
        last = min(LAST_QUERIES, query.shape[2])
        few = inputs | {name: x[:, :, -last:] for name, x in inputs.items() if name in QUERIES and x is not None}
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(few["query"].shape, generator=generator).to(query)
        settings = {"block_size": self.block_size, "scale": scale, "exact_weights": self.exact_weights}
        definition = partial(landmark_attention_reference, **settings)
        with torch.autocast(query.device.type, enabled=False), torch.enable_grad():
            output, actual = _outcome(partial(landmark_attention, **settings), inputs, grad)
            _, plain = _outcome(definition, few, grad)
            doubles = {name: None if x is None else x.double() for name, x in few.items()}
            _, exact = _outcome(definition, doubles, grad.double())
        self.found.append([])
        for name in exact:
            error = _size(actual[name].double() - exact[name])
            rounding = torch.finfo(query.dtype).eps * _size(exact[name])
            allowed = FACTOR * _size(plain[name].double() - exact[name]) + rounding
            if not error <= allowed:  # NaN, too
                self.found[-1].append(
                    f"the kernels' {name} is off by {error:.3g}, rounding to {query.dtype} explains {allowed:.3g}"
                )
        return output


def _outcome(attend: Any, inputs: dict[str, Tensor | None], grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and by name what is compared: of the last queries, as many as `grad` has, output and gradients."""
    inputs = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    output = attend(**inputs)
    last = output[:, :, -grad.shape[2] :]
    given = {name: x for name, x in inputs.items() if x is not None}
    found = {"output": last.detach()}
    # a row that is one block has no landmark that anyone scores
    gradients = torch.autograd.grad(last, list(given.values()), grad, allow_unused=True, materialize_grads=True)
    for name, gradient in zip(given, gradients, strict=True):
        of = name.replace("_", " ")
        found[f"gradient of the {of}"] = gradient[:, :, -grad.shape[2] :] if name in QUERIES else gradient
    return output.detach(), found


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
