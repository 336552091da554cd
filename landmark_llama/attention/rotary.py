"""Rotary position embedding from one fixed table, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of the angles of positions 0 .. length - 1.

    A plain class: FSDP looks into tuples and dataclasses for what it casts to the dtype of a layer's weights.

    `cos`, `sin`: (length, head_dim / 2), fp32, of unit length.
    `scaling`: factor that the RoPE type puts on queries and on keys. It is left to the scale of the scores, so that a
        key may be rotated twice: by its offset inside its block, then by its block's slot.
    """

    def __init__(self, cos: Tensor, sin: Tensor, scaling: float = 1.0) -> None:
        self.cos, self.sin, self.scaling = cos, sin, scaling

    def rotate(self, x: Tensor, position: Tensor | slice) -> Tensor:
        """Rotates `x` (..., head_dim) to `position`, which indexes the table and broadcasts against (...).

        Pairs dimension `i` with `i + head_dim / 2`, as LLaMA does. Computes at least in fp32, returns the dtype of `x`.
        """
        return _Rotation.apply(x, self.cos[position], self.sin[position])

    def to(self, device: torch.device, non_blocking: bool = False) -> RotaryTable:
        """The same table on `device` (the signature that accelerate's device hooks call)."""
        cos, sin = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        return RotaryTable(cos, sin, self.scaling)


class _Rotation(torch.autograd.Function):
    """Rotation by angles (..., head_dim / 2) that broadcast; written in place, and back by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.shape = x.shape
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        rotated = first.new_empty(*torch.broadcast_shapes(first.shape, cos.shape)[:-1], x.shape[-1])
        halves = rotated.chunk(2, dim=-1)
        # in place, not as `out=`, which torch.compile would write beside the views
        halves[0].copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
        halves[1].copy_(second).mul_(cos).addcmul_(first, sin)
        return rotated.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin).sum_to_size(ctx.shape), None, None
