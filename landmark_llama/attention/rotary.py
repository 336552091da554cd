"""Rotary position embedding from one fixed table, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of the angles of positions 0 .. length - 1.

    A plain class: FSDP casts every tensor that it finds in the tuples, lists, dicts and dataclasses of a call, and this
    table must stay in fp32.

    Args:
        cos, sin: (length, head_dim / 2), fp32, of unit length.
        scaling: factor that the RoPE type puts on queries and on keys. `rotate` leaves it out, so that a key can be
            rotated twice: by its offset inside its block, then by its block's slot. Put its square into the scale of
            the scores.
        still: what layers without RoPE rotate by; None where there are none.
    """

    def __init__(self, cos: Tensor, sin: Tensor, scaling: float = 1.0, still: StillTable | None = None) -> None:
        self.cos = cos
        self.sin = sin
        self.scaling = scaling
        self.still = still

    def rotate(self, x: Tensor, position: Tensor | slice) -> Tensor:
        """Rotates `x` (..., head_dim) to `position`, which indexes the table and broadcasts against (...).

        Pairs dimension `i` with `i + head_dim / 2`, as LLaMA does. Computes at least in fp32, returns the dtype of `x`.
        """
        return _Rotation.apply(x, self.cos[position], self.sin[position])

    def rotate_all(self, position: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`rotate` of several tensors by the same positions."""
        return tuple(self.rotate(x, position) for x in tensors)

    def to(self, device: torch.device, non_blocking: bool = False) -> RotaryTable:
        """The same table on `device` (the signature that accelerate's device hooks call)."""
        cos, sin = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        still = None if self.still is None else self.still.to(device, non_blocking)
        return type(self)(cos, sin, self.scaling, still)


class StillTable(RotaryTable):
    """The table of layers without RoPE: all angles are 0."""

    @classmethod
    def like(cls, table: RotaryTable) -> StillTable:
        """As long and wide as `table`."""
        return cls(torch.ones_like(table.cos), torch.zeros_like(table.sin))


class _Rotation(torch.autograd.Function):
    """Rotation by angles (..., head_dim / 2) that broadcast. Its backward rotates by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.shape = x.shape
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        rotated = first.new_empty(*torch.broadcast_shapes(first.shape, cos.shape)[:-1], x.shape[-1])
        halves = rotated.chunk(2, dim=-1)
        # in place: with `out=`, torch.compile would not write into these views
        halves[0].copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
        halves[1].copy_(second).mul_(cos).addcmul_(first, sin)
        return rotated.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin).sum_to_size(ctx.shape), None, None
