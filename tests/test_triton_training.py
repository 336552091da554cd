"""The Triton kernels of landmark attention for training: results, gradients, operators.

Without a GPU they run in Triton's interpreter (`conftest.py`), which multiplies bfloat16 as if it held integers (triton
3.7): that dtype is for GPUs only.
"""

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from landmark_llama import landmark_attention
from landmark_llama.attention import fused, landmark_attention_reference, triton_tiles, triton_training
from landmark_llama.attention.availability import DTYPES
from landmark_llama.attention.fused import fused_landmark_attention
from landmark_llama.attention.triton_tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# name: (heads, kv_heads, query_length, key_length, block_size, head_dim), tile
CASES = {
    "one_ordinary_token_a_block": ((2, 2, 37, 37, 2, 8), Tile(16, 16, 4, 1)),
    "two_ordinary_tokens_a_block": ((2, 1, 41, 50, 3, 8), Tile(16, 32, 4, 1)),
    "blocks_of_16_in_tiles_of_32": ((2, 1, 75, 75, 16, 64), Tile(32, 32, 4, 1)),
    "eight_heads_share_keys": ((8, 1, 40, 56, 16, 16), Tile(16, 16, 4, 1)),
    "the_papers_block": ((1, 1, 130, 130, 51, 80), Tile(32, 64, 4, 1)),
    "the_papers_block_twice_in_a_tile": ((1, 1, 110, 215, 51, 8), Tile(64, 128, 4, 1)),
    "a_block_wider_than_its_tile": ((2, 1, 70, 106, 51, 8), Tile(64, 32, 4, 1)),
    "blocks_of_64": ((1, 1, 140, 140, 64, 128), Tile(64, 64, 4, 1)),
    "blocks_of_100": ((1, 1, 210, 210, 100, 8), Tile(64, 128, 4, 1)),
    "a_block_of_100_in_two_tiles": ((1, 1, 64, 205, 100, 8), Tile(64, 64, 4, 1)),
    "less_than_a_block": ((2, 1, 5, 5, 16, 8), Tile(16, 16, 4, 1)),
    "one_query": ((4, 2, 1, 47, 16, 8), Tile(16, 32, 4, 1)),
    "one_landmark_query": ((4, 2, 1, 48, 16, 8), Tile(16, 16, 4, 1)),
    "no_query": ((2, 1, 0, 9, 4, 8), Tile(16, 16, 4, 1)),
}
every_case = pytest.mark.parametrize(("shape", "tile"), CASES.values(), ids=CASES.keys())


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Makes all kernels take one small tile, so that short sequences fill several."""
    return lambda tile: monkeypatch.setattr(fused, "tiles", lambda *_: (tile,))


def random_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, batch: int = 1, gain: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output."""
    heads, kv_heads, query_length, key_length, _, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (
        (heads, query_length, gain),
        (kv_heads, key_length, gain),
        (kv_heads, key_length, 1),
        (heads, query_length, 1),
    )
    return tuple((g * torch.randn(batch, h, n, head_dim, generator=generator)).to(DEVICE, dtype) for h, n, g in sizes)


def outcome(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output and the three gradients, computed in `dtype`."""
    *inputs, grad = (x.detach().to(dtype or x.dtype) for x in inputs)
    inputs = [x.requires_grad_() for x in inputs]
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def fused_with(block_size: int, scale: float | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: fused_landmark_attention(
        q, k, v, block_size, q.shape[-1] ** -0.5 if scale is None else scale
    )


def defined_with(block_size: int, scale: float | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: landmark_attention_reference(q, k, v, block_size=block_size, scale=scale)


def assert_right(inputs: tuple[Tensor, ...], block_size: int, precise: torch.dtype = torch.float64) -> None:
    actual = outcome(fused_with(block_size), inputs)
    plain = outcome(defined_with(block_size), inputs)
    reference = outcome(defined_with(block_size), inputs, precise)
    for a, p, r in zip(actual, plain, reference, strict=True):
        assert a.dtype == inputs[0].dtype
        assert_as_accurate(a, p, r)


@pytest.mark.usefixtures("poisoned_memory")
@every_case
def test_fp32_results_and_gradients_are_as_accurate_as_the_definitions(shape, tile, use_tile) -> None:
    use_tile(tile)
    assert_right(random_inputs(shape, torch.float32), shape[4])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ["two_ordinary_tokens_a_block", "the_papers_block", "a_block_of_100_in_two_tiles"])
def test_fp16_results_and_gradients_are_as_accurate_as_the_definitions(case, use_tile) -> None:
    shape, tile = CASES[case]
    use_tile(tile)
    assert_right(random_inputs(shape, torch.float16, gain=2.0), shape[4])


FORMS = {"query": (True, False), "bias": (False, True), "query_and_bias": (True, True)}


def with_landmarks(attend: Callable[..., Tensor], block_size: int) -> Callable[..., Tensor]:
    """`attend` of query, key, value and, where they are not None, a query and a bias of the landmarks' own."""

    def attend_all(query: Tensor, key: Tensor, value: Tensor, *landmarks: Tensor) -> Tensor:
        scoring = next((x for x in landmarks if x.dim() == 4), None)
        bias = next((x for x in landmarks if x.dim() == 3), None)
        return attend(query, key, value, block_size, query.shape[-1] ** -0.5, scoring, bias)

    return attend_all


def landmarks_of(inputs: tuple[Tensor, ...], block_size: int, form: tuple[bool, bool]) -> list[Tensor]:
    """A query and a bias (fp32) of the landmarks' own, as far as `form` wants them."""
    query, key, generator = inputs[0], inputs[1], torch.Generator().manual_seed(1)
    scoring = torch.randn(query.shape, generator=generator).to(query)
    bias = torch.randn(*key.shape[:2], key.shape[2] // block_size, generator=generator).to(DEVICE)
    return [x for x, wanted in ((scoring, form[0]), (bias, form[1])) if wanted]


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    scoring: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    landmarks = {"landmark_query": scoring, "landmark_bias": bias}
    output = landmark_attention_reference(query, key, value, block_size=block_size, scale=scale, **landmarks)
    # without an earlier block, the definition never touches what scores landmarks
    return output + sum(0 * x.sum() for x in (scoring, bias) if x is not None).to(output)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("case", "form", "dtype"),
    [
        ("less_than_a_block", "query_and_bias", torch.float32),
        ("eight_heads_share_keys", "query", torch.float32),
        ("a_block_wider_than_its_tile", "query", torch.float32),
        ("a_block_wider_than_its_tile", "bias", torch.float16),
        ("two_ordinary_tokens_a_block", "query_and_bias", torch.float16),
        ("the_papers_block_twice_in_a_tile", "query_and_bias", torch.float16),
    ],
)
def test_landmarks_may_have_a_query_and_a_bias_of_their_own(case, form, dtype, use_tile) -> None:
    shape, tile = CASES[case]
    use_tile(tile)
    *rows, grad = random_inputs(shape, dtype, batch=2)
    inputs = (*rows, *landmarks_of(rows, shape[4], FORMS[form]), grad)
    actual = outcome(with_landmarks(fused_landmark_attention, shape[4]), inputs)
    plain = outcome(with_landmarks(defined, shape[4]), inputs)
    reference = outcome(with_landmarks(defined, shape[4]), inputs, torch.float64)
    for a, p, r, x in zip(actual, plain, reference, (rows[0], *inputs[:-1]), strict=True):
        assert a.dtype == x.dtype
        assert_as_accurate(a.to(dtype), p.to(dtype), r)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("less_than_a_block", torch.float32),
        ("eight_heads_share_keys", torch.float32),
        ("a_block_wider_than_its_tile", torch.float16),
        ("two_ordinary_tokens_a_block", torch.float16),
    ],
)
def test_blocks_may_weigh_what_their_tokens_do(case, dtype, use_tile) -> None:
    shape, tile = CASES[case]
    use_tile(tile)
    inputs, scale = random_inputs(shape, dtype, batch=2), shape[5] ** -0.5

    def exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return landmark_attention_reference(query, key, value, block_size=shape[4], exact_weights=True)

    actual = outcome(lambda q, k, v: fused_landmark_attention(q, k, v, shape[4], scale, exact_weights=True), inputs)
    plain, reference = outcome(exactly, inputs), outcome(exactly, inputs, torch.float64)
    for a, p, r in zip(actual, plain, reference, strict=True):
        assert_as_accurate(a, p, r)


def test_strides_are_taken_as_they_come_and_kept(use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    inputs = random_inputs((2, 1, 20, 26, 8, 8), torch.float32, batch=2)
    expected = outcome(fused_with(8), inputs)
    as_a_model_has_them = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    dimension_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    for strided in (as_a_model_has_them, dimension_first):
        for actual, right in zip(outcome(fused_with(8), strided), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=0, atol=0)
        assert fused_with(8)(*strided[:3]).stride() == strided[0].stride()
    *inputs, _ = inputs
    inputs = [x.requires_grad_() for x in inputs]
    fused_with(8)(*inputs).sum().backward()  # a gradient of stride 0
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_may_be_negative_or_zero(scale: float, use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    inputs = random_inputs((2, 1, 20, 20, 8, 8), torch.float32)
    actual, expected = (outcome(f(8, scale), inputs) for f in (fused_with, defined_with))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("size", [0.0, 60.0, 3000.0])
def test_everything_is_finite_however_large_the_scores(size: float, use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    query, key, value, grad = random_inputs((2, 1, 19, 19, 8, 8), torch.float16, gain=2.0)
    for result in outcome(fused_with(8), (query * size, key * size, value, grad)):
        assert result.isfinite().all()


def test_two_runs_agree_to_the_last_bit(use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    inputs = random_inputs((4, 2, 30, 30, 8, 8), torch.float16)
    for first, second in zip(outcome(fused_with(8), inputs), outcome(fused_with(8), inputs), strict=True):
        assert torch.equal(first, second)


def test_later_tokens_change_no_earlier_output_so_right_padding_is_harmless(use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    query, key, value, _ = random_inputs((2, 1, 36, 36, 8, 8), torch.float32)
    before = fused_with(8)(query, key, value)
    for x in (query, key, value):
        x[:, :, 21:] = 100.0
    torch.testing.assert_close(fused_with(8)(query, key, value)[:, :, :21], before[:, :, :21], rtol=0, atol=0)


def test_the_operator_passes_opcheck(use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    *inputs, _ = random_inputs((2, 1, 9, 11, 4, 8), torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    landmark = torch.randn(1, 2, 9, 2, device=DEVICE, requires_grad=True)
    for given in ((), (landmark,)):
        torch.library.opcheck(torch.ops.landmark_llama.attention_forward.default, (*inputs, 4, 0.5, *given))


def test_torch_compile_and_activation_checkpointing_give_the_same(use_tile) -> None:
    use_tile(Tile(16, 16, 4, 1))
    inputs = random_inputs((2, 1, 20, 20, 8, 8), torch.float32)
    expected = outcome(fused_with(8), inputs)
    compiled = torch.compile(fused_with(8), backend="aot_eager", fullgraph=True)

    def checkpointed(*x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(fused_with(8), *x, use_reentrant=False)

    for attend in (compiled, checkpointed):
        for actual, right in zip(outcome(attend, inputs), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=0, atol=0)


def test_a_tile_that_the_device_has_no_room_for_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    small, too_large = Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    monkeypatch.setattr(fused, "tiles", lambda *_: (too_large, small))
    monkeypatch.setattr(triton_tiles, "_too_large", set())
    kernels = {name: getattr(triton_training, f"{name}_kernel") for name in fused.TILES}

    class Scarce:
        """A kernel on a device with room for small tiles only."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args, **constants) -> None:
                if constants["N"] == too_large.keys:
                    raise OutOfResources(300_000, 232_448, "shared memory")
                kernels[self.name][grid](*args, **constants)

            return launch

    for name in kernels:
        monkeypatch.setattr(triton_training, f"{name}_kernel", Scarce(name))
    assert_right(random_inputs((1, 1, 20, 20, 8, 8), torch.float32), 8)
    monkeypatch.setattr(fused, "tiles", lambda *_: (too_large,))
    with pytest.raises(ValueError, match="head_dim 8 in torch.float32: .* lacks the shared memory"):
        assert_right(random_inputs((1, 1, 20, 20, 8, 8), torch.float32), 8)


def test_every_dtype_and_head_dim_has_a_tile_for_every_kernel() -> None:
    for kernel in fused.TILES:
        for dtype in DTYPES:
            for head_dim in (1, 8, 64, 65, 128, 200, 256):
                assert fused.tiles(kernel, head_dim, dtype)


def test_a_device_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton.knobs.runtime, "interpret", False)
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="query is on cpu: the Triton kernels run on CUDA devices"):
        fused_landmark_attention(x, x, x, 4, 1.0)


def test_dtypes_and_head_dims_beyond_the_kernels_are_refused_by_name() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="query is torch.float64: .*float16, bfloat16 and float32"):
        fused_landmark_attention(x.double(), x.double(), x.double(), 4, 1.0)
    x = torch.zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match="head_dim 257: .* at most 256"):
        fused_landmark_attention(x, x, x, 4, 1.0)


# (heads, kv_heads, query_length, key_length, block_size, head_dim)
LARGE_SHAPES = {
    "long": (4, 4, 2048, 2048, 64, 128),
    "the_papers_block": (4, 2, 1530, 1530, 51, 128),
    "ragged": (8, 1, 1001, 1337, 16, 64),
    "small_blocks": (4, 2, 777, 777, 2, 80),
    "wide_blocks": (2, 2, 1100, 1100, 256, 128),
    "wide_heads": (2, 1, 600, 600, 64, 256),
}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES.keys())
def test_on_a_gpu_large_shapes_are_as_accurate_as_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(random_inputs(shape, dtype, batch=2), shape[4], torch.float64)


@needs_gpu
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES.keys())
def test_on_a_gpu_two_runs_agree_to_the_last_bit(shape: tuple[int, ...]) -> None:
    inputs = random_inputs(shape, torch.bfloat16, batch=2)
    for first, second in zip(outcome(fused_with(shape[4]), inputs), outcome(fused_with(shape[4]), inputs), strict=True):
        assert torch.equal(first, second)


@needs_gpu
def test_on_a_gpu_landmark_attention_takes_the_kernels_and_pytorch_for_the_rest() -> None:
    *inputs, _ = random_inputs((2, 1, 100, 100, 16, 64), torch.bfloat16)
    torch.testing.assert_close(landmark_attention(*inputs, block_size=16), fused_with(16)(*inputs), rtol=0, atol=0)
    doubles = [x.double() for x in inputs]
    expected = landmark_attention_reference(*doubles, block_size=16)
    torch.testing.assert_close(landmark_attention(*doubles, block_size=16), expected)


@needs_gpu
def test_on_a_gpu_memory_grows_with_the_length_alone() -> None:
    inputs = random_inputs((4, 4, 16384, 16384, 64, 128), torch.bfloat16)
    outcome(fused_with(64), inputs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome(fused_with(64), inputs)
    # output and three gradients, two numbers a row, and slack for the allocator
    assert torch.cuda.max_memory_allocated() - before < 5.2 * inputs[0].numel() * 2
