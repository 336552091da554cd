"""Rotation by a table of angles: against complex numbers, with its gradients, whatever broadcasts."""

import dataclasses

import pytest
import torch

from landmark_llama.attention.rotary import RotaryTable

POSITIONS, HALF = 12, 3
ANGLE = torch.rand(POSITIONS, HALF, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
TABLE = RotaryTable(ANGLE.cos(), ANGLE.sin())


@pytest.mark.parametrize(
    ("shape", "position"),
    [
        ((2, 5, 4, 2 * HALF), torch.arange(5).unsqueeze(-1)),
        ((5, 1, 2 * HALF), torch.tensor([3, 0, 11, 2])),  # each to four positions
        ((2 * HALF,), torch.tensor([[1], [7]])),
    ],
)
def test_halves_turn_as_complex_numbers_do(shape: tuple[int, ...], position: torch.Tensor) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(ANGLE), ANGLE)[position]
    torch.testing.assert_close(TABLE.rotate(x, position), torch.cat([turned.real, turned.imag], dim=-1))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TABLE.rotate(x, position), (x,))
    assert torch.autograd.gradgradcheck(lambda x: TABLE.rotate(x, position), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_turned_in_full_precision_and_come_back(dtype: torch.dtype) -> None:
    table = RotaryTable(ANGLE.float().cos(), ANGLE.float().sin())
    x = torch.randn(POSITIONS, 2 * HALF).to(dtype).requires_grad_()
    turned = table.rotate(x, slice(None))
    assert turned.dtype == dtype and torch.equal(turned, table.rotate(x.float(), slice(None)).to(dtype))
    turned.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_it_turns_the_same(requires_grad: bool) -> None:
    x = torch.randn(2, 5, 4, 2 * HALF, dtype=torch.float64, requires_grad=requires_grad)
    position = torch.arange(5).unsqueeze(-1)
    compiled = torch.compile(TABLE.rotate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, position), TABLE.rotate(x, position))


def test_nothing_that_walks_through_containers_casts_the_table() -> None:
    # FSDP casts the tensors in the tuples and dataclasses of a call; modules take this table, which stays in fp32
    assert torch.utils._pytree.tree_leaves({"rotary": (TABLE,)}) == [TABLE]
    assert not dataclasses.is_dataclass(TABLE)
