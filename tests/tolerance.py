"""The only error criterion of all numerical tests: at most twice the error of plain PyTorch in the same precision.

Three computations of the same result are compared:

- `reference`: the definition, in float64 (or float32 if the tested code exists only in bf16 or fp16);
- `plain`: the same definition in plain PyTorch, in the precision under test;
- `actual`: the tested code, in that precision or a higher one.

Because of rounding, `plain` differs from `reference` by some largest error. The same operations in another order make
another error of that size, hence the factor of two. A mistake in the mathematics is larger by orders of magnitude. The
rounding of the reference itself to the tested precision is added as a floor; it matters where `plain` happens to be
exact. No test picks a tolerance by hand.

In a whole model many roundings add up, and the largest error varies much with the order of operations. So whole models
compute `actual` in float64, and it must be as close to the float64 reference as `plain` is in float32. Float64 can hide
overflow and choices that depend on rounding; these have tests of their own.
"""

import torch
from torch import Tensor

FACTOR = 2.0


def largest_error(x: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite if `x` is not finite somewhere."""
    assert x.shape == reference.shape, f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
    error = (x.double() - reference.double()).abs()
    return error.nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0


def rounding_floor(reference: Tensor, dtype: torch.dtype) -> float:
    """Two units in the last place of the largest number in `reference`, in `dtype`."""
    return 2 * torch.finfo(dtype).eps * reference.double().abs().max().item() if reference.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, reference: Tensor) -> None:
    """Fails if the error of `actual` is larger than `FACTOR` times that of `plain`, plus the floor."""
    assert torch.finfo(actual.dtype).eps <= torch.finfo(plain.dtype).eps, f"{plain.dtype} measures no {actual.dtype}"
    error = largest_error(actual, reference)
    allowed = FACTOR * largest_error(plain, reference) + rounding_floor(reference, plain.dtype)
    assert error <= allowed, f"largest error {error:.3g}; plain PyTorch in {plain.dtype} allows {allowed:.3g}"
