"""Landmark attention on tensors: the definition, and the fast forms against it."""

import itertools
import math

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

from landmark_llama import landmark_attention
from landmark_llama.attention import blockwise, landmark_attention_reference
from landmark_llama.attention.reference import landmark_attention_weights
from landmark_llama.reading.segments import attend_chosen

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (heads, kv_heads, query_length, key_length, block_size, head_dim)
SHAPES = {
    "two_tokens": (2, 2, 2, 2, 4, 8),
    "one_landmark_a_token": (2, 1, 9, 9, 2, 4),
    "less_than_a_block": (4, 2, 5, 5, 16, 8),
    "whole_blocks": (4, 4, 96, 96, 16, 16),
    "the_papers_block": (4, 1, 153, 153, 51, 16),
    "ragged_end": (6, 2, 203, 203, 16, 8),
    "odd_block": (2, 2, 130, 130, 7, 8),
    "block_longer_than_a_tile": (2, 1, 201, 201, 100, 8),
    "fewer_queries_inside_a_block": (4, 2, 7, 77, 16, 8),
    "fewer_queries_over_blocks": (4, 2, 70, 150, 16, 8),
    "one_query": (4, 2, 1, 47, 16, 8),
    "one_landmark_query": (4, 2, 1, 48, 16, 8),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def random_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: int = 2, gain: float = 2.0
) -> tuple[Tensor, ...]:
    """Query, key and value; scores are spread by `gain ** 2`: attention that hardly chooses would hide mistakes."""
    heads, kv_heads, query_length, key_length, _, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = ((heads, query_length), (kv_heads, key_length), (kv_heads, key_length))
    return tuple(
        (g * torch.randn(batch, *s, head_dim, generator=generator, dtype=torch.float64)).to(dtype)
        for s, g in zip(shapes, (gain, gain, 1.0), strict=True)
    )


def weights_by_definition(
    query: Tensor, key: Tensor, block_size: int, retrieved: int | None = None, direct: int = 0
) -> list[list[float]]:
    """The definition for one head, in loops: (query_length, head_dim), (key_length, head_dim)."""
    scale = query.shape[1] ** -0.5
    table = []
    for row, q in enumerate(query):
        i = len(key) - len(query) + row
        score = [scale * sum(a * b for a, b in zip(q.tolist(), k.tolist(), strict=True)) for k in key]
        own = i // block_size
        begin = own * block_size
        landmarks = [c * block_size + block_size - 1 for c in range(own)]
        if retrieved is not None:
            candidates = landmarks[: max(0, own - direct)]
            landmarks = sorted(candidates, key=lambda j: -score[j])[:retrieved] + landmarks[len(candidates) :]
        group = [j for j in range(begin, i + 1) if j % block_size != block_size - 1] + landmarks
        total = sum(math.exp(score[j]) for j in group)
        share = {j: math.exp(score[j]) / total for j in group}
        weights = [0.0] * len(key)
        for j in group:
            if j in landmarks:
                inside = range(j - block_size + 1, j)
                inside_total = sum(math.exp(score[m]) for m in inside)
                for m in inside:
                    weights[m] = share[j] * math.exp(score[m]) / inside_total
            else:
                weights[j] = share[j]
        table.append(weights)
    return table


def test_a_hand_worked_example() -> None:
    # blocks of two tokens and a landmark; with q = 1 and scale = 1 the scores are the keys
    key = torch.tensor([1.0, 3.0, 2.0, 2.0, 6.0, 4.0, 2.0], dtype=torch.float64).log()
    value = torch.tensor([8.0, 16.0, 1000.0, 32.0, 64.0, 1000.0, 80.0], dtype=torch.float64)
    query = torch.ones(1, 1, 7, 1, dtype=torch.float64)
    key, value = key.view(1, 1, 7, 1), value.view(1, 1, 7, 1)
    expected = [
        [1, 0, 0, 0, 0, 0, 0],  # the first token sees itself
        [1 / 4, 3 / 4, 0, 0, 0, 0, 0],  # 1 : 3
        [1 / 4, 3 / 4, 0, 0, 0, 0, 0],  # a landmark reads its block, without itself
        [1 / 8, 3 / 8, 0, 1 / 2, 0, 0, 0],  # own 2 : landmark 2; inside the earlier block 1 : 3
        [1 / 20, 3 / 20, 0, 2 / 10, 6 / 10, 0, 0],  # own 2 + 6 : landmark 2
        [1 / 20, 3 / 20, 0, 2 / 10, 6 / 10, 0, 0],  # the same for the landmark of that block
        [1 / 16, 3 / 16, 0, 1 / 8, 3 / 8, 0, 1 / 4],  # own 2 : landmarks 2 and 4; inside 1 : 3 and 2 : 6
    ]
    expected = torch.tensor(expected, dtype=torch.float64).view(1, 1, 7, 7)
    weights = landmark_attention_weights(query, key, block_size=3, scale=1.0)
    torch.testing.assert_close(weights, expected)
    for attention in (landmark_attention_reference, landmark_attention):
        output = attention(query, key, value, block_size=3, scale=1.0)
        torch.testing.assert_close(output.flatten(), torch.tensor([8, 14, 14, 23, 47.6, 47.6, 51.5]).double())


@every_shape
def test_weights_of_a_row_sum_to_one_and_landmarks_weigh_nothing(shape: tuple[int, ...]) -> None:
    query, key, _ = random_inputs(shape)
    weights = landmark_attention_weights(query, key, block_size=shape[4])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights >= 0).all()
    assert (weights[..., shape[4] - 1 :: shape[4]] == 0).all()


@every_shape
def test_the_reference_is_the_definition_in_float64_loops(shape: tuple[int, ...]) -> None:
    heads, kv_heads, _, _, block_size, _ = shape
    query, key, _ = random_inputs(shape, batch=1)
    weights = landmark_attention_weights(query, key, block_size=block_size)
    for head in {0, heads - 1}:
        loops = weights_by_definition(query[0, head], key[0, head // (heads // kv_heads)], block_size)
        torch.testing.assert_close(weights[0, head], torch.tensor(loops, dtype=torch.float64))


def brought_together(
    query: Tensor, key: Tensor, value: Tensor, block: Tensor, direct: int, block_size: int, scale: float
) -> Tensor:
    """The last blocks of one row read as a sequence, and chosen ones of those before them added."""
    start = direct * block_size
    output, lse = blockwise.attend_sequence(query, key[:, :, start:], value[:, :, start:], block_size, scale)
    kv_heads = key.shape[1]
    grouped, window = (x.unflatten(1, (kv_heads, -1)) for x in (query * scale, output))
    repeated = grouped.unsqueeze(-2).expand(*grouped.shape[:-1], block.shape[-1], -1)
    blocks = (x[:, :, :start].unflatten(2, (-1, block_size)) for x in (key, value))
    return attend_chosen(repeated, *blocks, block, (window, lse.unflatten(1, (kv_heads, -1)))).flatten(1, 2)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_sequence_and_the_blocks_chosen_before_it_are_attention_over_all_of_them(missing: int) -> None:
    query, key, value = random_inputs((4, 2, 11, 31, 5, 8))  # eleven queries in the last blocks of seven, four before
    rank = torch.rand(2, 2, 2, 11, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)
    block = torch.where(torch.arange(4) < missing, -1, rank)
    grad = torch.randn(query.shape, dtype=torch.float64)

    def by_definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # each query's own copy of the keys, those of the blocks that it did not choose taken out
        heads = []
        for row, head, i in itertools.product(range(2), range(4), range(11)):
            chosen = sorted(b for b in block[row, head // 2, head % 2, i].tolist() if b >= 0)
            places = [b * 5 + offset for b in chosen for offset in range(5)] + list(range(20, 20 + i + 1))
            k, v = (x[row, head // 2, places][None, None] for x in (key, value))
            heads.append(landmark_attention_reference(query[row, head, i][None, None, None], k, v, block_size=5))
        return torch.cat(heads).view(query.shape)

    inputs = [x.requires_grad_() for x in (query, key, value)]
    actual = brought_together(*inputs, block, 4, 5, 8**-0.5)
    expected = by_definition(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_the_backward_of_what_is_brought_together_is_that_of_the_forward() -> None:
    query, key, value = (x.requires_grad_() for x in random_inputs((2, 1, 7, 19, 3, 4), batch=1, gain=1.0))
    block = torch.randint(-1, 4, (1, 1, 2, 7, 3), generator=torch.Generator().manual_seed(0))

    def sequence(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return blockwise.attend_sequence(*inputs, 3, 0.5)

    assert torch.autograd.gradcheck(sequence, (query, key, value))
    assert torch.autograd.gradcheck(lambda *inputs: sequence(*inputs)[1], (query, key, value))
    assert torch.autograd.gradcheck(lambda *inputs: brought_together(*inputs, block, 4, 3, 0.5), (query, key, value))


RETRIEVALS = [(1, 0), (2, 1), (3, 2), (0, 1), (100, 0)]


@every_shape
@pytest.mark.parametrize(("retrieved", "direct"), RETRIEVALS)
def test_a_query_that_retrieves_sees_its_best_earlier_blocks_and_its_direct_ones(
    shape: tuple[int, ...], retrieved: int, direct: int
) -> None:
    heads, kv_heads, _, _, block_size, _ = shape
    query, key, value = random_inputs(shape, batch=1)
    blocks = {"num_retrieved_blocks": retrieved, "num_direct_blocks": direct}
    weights = landmark_attention_weights(query, key, block_size=block_size, **blocks)
    loops = weights_by_definition(query[0, -1], key[0, -1], block_size, retrieved, direct)
    torch.testing.assert_close(weights[0, -1], torch.tensor(loops, dtype=torch.float64))
    grad = torch.randn(query.shape, dtype=torch.float64)
    expected = forward_and_gradients(landmark_attention_reference, (query, key, value), grad, block_size, **blocks)
    actual = forward_and_gradients(landmark_attention, (query, key, value), grad, block_size, **blocks)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_negative_number_of_blocks_is_refused_by_name() -> None:
    query, key, value = random_inputs((1, 1, 5, 5, 4, 8))
    for name in ("num_retrieved_blocks", "num_direct_blocks"):
        with pytest.raises(ValueError, match=f"{name}=-1: must not be negative"):
            landmark_attention(query, key, value, block_size=4, **{name: -1})


def forward_and_gradients(
    attention, inputs: tuple[Tensor, ...], grad: Tensor, block_size: int, **blocks: int
) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = attention(*inputs, block_size=block_size, **blocks)
    output.backward(grad.to(output.dtype))
    return [output.detach(), *(x.grad for x in inputs)]


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fast_form_is_as_accurate_as_the_definition_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # weights are made in the log domain, from scores and their logsumexp: where nothing else is lost, in fp32, that
    # costs more than the factor of two once scores are large
    inputs = random_inputs(shape, dtype, gain=1.0 if dtype == torch.float32 else 2.0)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64).to(dtype)
    actual = forward_and_gradients(landmark_attention, inputs, grad, shape[4])
    plain = forward_and_gradients(landmark_attention_reference, inputs, grad, shape[4])
    in_float64 = tuple(x.double() for x in inputs)
    reference = forward_and_gradients(landmark_attention_reference, in_float64, grad.double(), shape[4])
    for a, p, r in zip(actual, plain, reference, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, p, r)


@every_shape
def test_the_fast_form_is_the_definition_forward_and_backward(shape: tuple[int, ...]) -> None:
    inputs = random_inputs(shape)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    actual = forward_and_gradients(landmark_attention, inputs, grad, shape[4])
    expected = forward_and_gradients(landmark_attention_reference, inputs, grad, shape[4])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@every_shape
def test_large_scores_are_taken_over_the_peak_of_their_block(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(shape)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    small = forward_and_gradients(landmark_attention, inputs, grad, shape[4])
    monkeypatch.setattr(blockwise, "LARGEST_PLAIN_SCORE", 0.0)
    for a, e in zip(forward_and_gradients(landmark_attention, inputs, grad, shape[4]), small, strict=True):
        torch.testing.assert_close(a, e)


def test_one_token_reads_itself() -> None:
    query, key, value = random_inputs((4, 2, 1, 1, 4, 8), torch.float32)
    grad = torch.randn(query.shape)
    output, grad_query, grad_key, grad_value = forward_and_gradients(landmark_attention, (query, key, value), grad, 4)
    itself = value.repeat_interleave(2, dim=1)
    assert_as_accurate(output, itself, itself)
    torch.testing.assert_close(grad_value, grad.unflatten(1, (2, 2)).sum(2))
    for gradient in (grad_query, grad_key):  # two equal terms cancel, each of them rounded
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_the_backward_is_the_derivative_of_the_forward() -> None:
    inputs = tuple(x.requires_grad_() for x in random_inputs((4, 2, 9, 13, 4, 3), batch=1))
    assert torch.autograd.gradcheck(lambda q, k, v: landmark_attention(q, k, v, block_size=4), inputs)


def test_only_inputs_that_need_a_gradient_get_one() -> None:
    query, key, value = random_inputs((4, 2, 9, 13, 4, 8))
    key.requires_grad_()
    landmark_attention(query, key, value, block_size=4).sum().backward()
    assert key.grad is not None and query.grad is None and value.grad is None


@every_shape
def test_changing_a_later_key_or_value_changes_no_earlier_output(shape: tuple[int, ...]) -> None:
    query, key, value = random_inputs(shape)
    before = landmark_attention(query, key, value, block_size=shape[4])
    for changed in range(shape[3] // 3, shape[3], max(1, shape[3] // 5)):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, changed:] += 3
        other_value[:, :, changed:] -= 5
        after = landmark_attention(query, other_key, other_value, block_size=shape[4])
        seen = max(0, changed - (shape[3] - shape[2]))
        torch.testing.assert_close(after[:, :, :seen], before[:, :, :seen], rtol=0, atol=0)


def test_landmarks_carry_no_value() -> None:
    query, key, value = random_inputs((4, 2, 50, 50, 8, 8))
    value.requires_grad_()
    output = landmark_attention(query, key, value, block_size=8)
    output.square().sum().backward()
    assert (value.grad[:, :, 7::8] == 0).all()
    other = value.detach().clone()
    other[:, :, 7::8] = 1e30
    torch.testing.assert_close(landmark_attention(query, key, other, block_size=8), output.detach(), rtol=0, atol=0)


def test_no_query_sees_its_own_blocks_landmark_and_every_later_one_does() -> None:
    query, key, value = random_inputs((2, 2, 24, 24, 8, 8), batch=1)
    before = landmark_attention(query, key, value, block_size=8)
    key[:, :, 7] += 1  # the landmark of block 0
    changed = (landmark_attention(query, key, value, block_size=8) != before).any(-1).all(dim=1)[0]
    assert changed.tolist() == [False] * 8 + [True] * 16


@every_shape
def test_grouped_query_equals_multi_head_with_copied_kv_heads(shape: tuple[int, ...]) -> None:
    heads, kv_heads = shape[:2]
    query, key, value = random_inputs(shape)
    copied = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    expected = landmark_attention(query, *copied, block_size=shape[4])
    torch.testing.assert_close(landmark_attention(query, key, value, block_size=shape[4]), expected)


def test_the_last_queries_alone_get_what_they_get_among_all() -> None:
    query, key, value = random_inputs((4, 2, 90, 90, 8, 8))
    expected = landmark_attention(query, key, value, block_size=8)
    for last in (1, 2, 7, 8, 9, 65, 89):
        output = landmark_attention(query[:, :, -last:], key, value, block_size=8)
        torch.testing.assert_close(output, expected[:, :, -last:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1.0, 60.0, 3000.0])
def test_outputs_and_gradients_are_finite_however_large_the_scores(dtype: torch.dtype, size: float) -> None:
    inputs = tuple(x.to(dtype) for x in random_inputs((2, 1, 37, 37, 8, 8)))
    inputs = (inputs[0] * size, inputs[1] * size, inputs[2])
    for result in forward_and_gradients(landmark_attention, inputs, torch.ones_like(inputs[0]), 8):
        assert result.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17])
def test_the_first_rows_and_the_landmark_rows_are_finite(length: int) -> None:
    query, key, value = random_inputs((2, 2, length, length, 8, 8), torch.float16)
    for attention in (landmark_attention, landmark_attention_reference):
        for result in forward_and_gradients(attention, (query, key, value), torch.ones_like(query), 8):
            assert result.isfinite().all()


def test_inputs_need_not_be_contiguous() -> None:
    query, key, value = random_inputs((4, 2, 40, 40, 8, 8))
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    expected = landmark_attention(query, key, value, block_size=8)
    torch.testing.assert_close(landmark_attention(*strided, block_size=8), expected)


def test_the_scale_is_the_inverse_root_of_head_dim_unless_given() -> None:
    query, key, value = random_inputs((2, 2, 20, 20, 4, 16))
    default = landmark_attention(query, key, value, block_size=4)
    torch.testing.assert_close(landmark_attention(query, key, value, block_size=4, scale=0.25), default)
    torch.testing.assert_close(landmark_attention(query / 2, key, value, block_size=4, scale=0.5), default)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q, k, v: (q, k, v, 1), "block_size=1"),
        (lambda q, k, v: (q[0], k, v, 4), "query"),
        (lambda q, k, v: (q, k, v.long(), 4), "value"),
        (lambda q, k, v: (q, k.half(), v.half(), 4), "key is torch.float16"),
        (lambda q, k, v: (q, k, v[:, :, :-1], 4), "value"),
        (lambda q, k, v: (q, k[..., :-1], v[..., :-1], 4), "head_dim"),
        (lambda q, k, v: (q[:1], k, v, 4), "batch"),
        (lambda q, k, v: (q[:, :3], k, v, 4), "3 heads"),
        (lambda q, k, v: (q, k[:, :, :-1], v[:, :, :-1], 4), "query has 8 positions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(change, named: str) -> None:
    query, key, value, block_size = change(*random_inputs((4, 2, 8, 8, 4, 8)))
    with pytest.raises(ValueError, match=named):
        landmark_attention(query, key, value, block_size=block_size)
