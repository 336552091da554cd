"""Dense modules without the machinery around them: a token costs small operations, and calling a module costs as much.

Whatever hangs on a module (hooks, another `forward`, an adapter, quantised weights) is called as it stands. Nothing is
kept from one call to the next, so that weights may be trained, merged or replaced at any time. Results are the same to
the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` is calling the `forward` of its class, and nothing else."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`."""
    if type(module) is not nn.Linear or torch.is_grad_enabled() or not is_untouched(module):
        return module(x)
    own = module._parameters
    return nn.functional.linear(x, own["weight"], own["bias"])


def rms_norm(module: nn.Module, x: Tensor, dense_class: type[nn.Module]) -> Tensor:
    """`module(x)`. `dense_class`: of norms like LLaMA's."""
    if (
        type(module) is not dense_class
        or not x.dtype == module.weight.dtype == torch.float32
        or not is_untouched(module)
    ):
        return module(x)
    return nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def gated_mlp(module: nn.Module, x: Tensor, dense_class: type[nn.Module]) -> Tensor:
    """`module(x)`. `dense_class`: of feed-forward layers like LLaMA's."""
    if type(module) is not dense_class or not is_untouched(module):
        return module(x)
    return linear(module.down_proj, module.act_fn(linear(module.gate_proj, x)) * linear(module.up_proj, x))
