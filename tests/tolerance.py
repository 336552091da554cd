"""The one error criterion of all numerical tests: at most twice the error of plain PyTorch in the same precision.

Three computations of one thing are compared:

- `reference`: the definition, in float64 (or in float32 where the thing itself exists in bf16 or fp16 only);
- `plain`: the same definition written plainly in PyTorch, in the precision under test;
- `actual`: what is tested, in that precision or a higher one.

Rounding makes `plain` differ from `reference` by some largest error. Another order of the same operations makes
another error of that size, hence the factor of two; a mistake in the mathematics is larger by orders of magnitude. Even
the reference can be written down in the precision under test only to within its rounding: that floor is added, and
matters where `plain` happens to be exact. No test picks a tolerance by hand.

Whole models are a long chain of roundings, whose largest error is no steady number from one order of operations to the
next. There `actual` is computed in float64 and has to come as near to the float64 reference as `plain` does in float32:
what float64 alone would hide, choices that depend on rounding and overflow, has tests of its own.
"""

import torch
from torch import Tensor

FACTOR = 2.0


def largest_error(x: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, infinite where `x` is not finite."""
    assert x.shape == reference.shape, f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
    error = (x.double() - reference.double()).abs()
    return error.nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0


def rounding_floor(reference: Tensor, dtype: torch.dtype) -> float:
    """Two units in the last place of the largest number of `reference`, written in `dtype`."""
    return 2 * torch.finfo(dtype).eps * reference.double().abs().max().item() if reference.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, reference: Tensor) -> None:
    """Fails unless `actual` is at most `FACTOR` times as far from `reference` as `plain`, plus the floor."""
    assert torch.finfo(actual.dtype).eps <= torch.finfo(plain.dtype).eps, f"{plain.dtype} measures no {actual.dtype}"
    error = largest_error(actual, reference)
    allowed = FACTOR * largest_error(plain, reference) + rounding_floor(reference, plain.dtype)
    assert error <= allowed, f"largest error {error:.3g}; plain PyTorch in {plain.dtype} allows {allowed:.3g}"
