"""The kernels that read through the cache: which blocks they choose, and what they make of them.

Without a GPU they run in Triton's interpreter (`conftest.py`).
"""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

from landmark_llama.attention.rotary import StillTable
from landmark_llama.reading import table
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.table import attend_through_table

pytest.importorskip("triton")
from reading_cases import DEVICE, SCALE, Case, choose, chosen_in_pytorch, make_case
from triton.runtime.errors import OutOfResources

from landmark_llama.attention import triton_tiles
from landmark_llama.attention.triton_tiles import Tile
from landmark_llama.reading import table_triton
from landmark_llama.reading.table_triton import attend_table, supported

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def worth(case: Case, granularity: str) -> Tensor:
    """What each block is worth to each query, in float64: (batch, kv_heads, group, groups, queries or 1, capacity)."""
    exact = case.to(torch.float64)
    groups, k, landmark = exact.groups, exact.k, exact.storage.landmark
    n = groups.first_block[:, None, None, :, None, None]
    block = torch.arange(landmark.shape[2], device=DEVICE)
    scoring = exact.query if exact.landmark_query is None else exact.landmark_query
    grouped = groups.gather(scoring).permute(0, 3, 4, 1, 2, 5) * SCALE
    distance = (n - block).clamp(1, k + 1)
    place = groups.position[:, None, None, ..., None] + distance * exact.block_size
    rotated = exact.rotary.rotate(grouped.unsqueeze(-2), place)
    scores = torch.linalg.vecdot(rotated, landmark[:, :, None, None, None])
    if exact.storage.bias is not None:
        scores += exact.storage.bias[:, :, None, None, None]
    scores = scores.masked_fill(block >= n, -torch.inf)
    if granularity == "head":
        scores = scores.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # without candidates
        scores = scores.masked_fill(~groups.valid[:, None, None, ..., None], -torch.inf)
        scores = scores.amax(4, keepdim=True)
    return scores


def assert_the_best_are_chosen(case: Case, choice: Tensor, granularity: str) -> None:
    """On near-ties the worth of what was chosen counts, not its number."""
    scores, k = worth(case, granularity), case.k
    shared = choice.shape[4] == 1
    wanted = case.groups.valid.any(-1, keepdim=True) if shared else case.groups.valid
    wanted = wanted[:, None, None].expand(choice.shape[:-1])
    n = case.groups.first_block[:, None, None, :, None].expand(choice.shape[:-1])[wanted]
    if scores.shape[4] != choice.shape[4]:
        scores = scores.expand(*choice.shape[:-1], -1)
    blocks, scores = choice.long()[wanted], scores[wanted]
    assert ((blocks >= 0).sum(-1) == n.clamp_max(k)).all() and (blocks < n.unsqueeze(-1)).all()
    assert ((blocks[:, 1:] > blocks[:, :-1]) | (blocks[:, 1:] == -1)).all()
    got = scores.gather(-1, blocks.clamp_min(0)).masked_fill(blocks < 0, -torch.inf).sort(-1).values
    best = torch.nn.functional.pad(scores, (k, 0), value=-torch.inf).sort(-1).values[:, -k:]
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 30 * torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(got.exp(), best.exp(), rtol=tolerance, atol=1e-7)


SELECTION: dict[str, dict[str, Any]] = {
    "ragged": {"start": [0, 37, 90], "length": [3, 21, 9], "k": 3},
    "blocks_of_two": {"start": [61, 9], "length": [5, 3], "block_size": 2, "direct": 0},
    "more_than_a_tile_of_landmarks": {"start": [800], "length": [4], "k": 5},
    "grouped_query": {"start": [70], "length": [7], "heads": 8, "head_dim": 80},
    "wide_multi_head": {"start": [160, 50], "length": [20, 9], "block_size": 16, "kv_heads": 2, "head_dim": 128},
    "published_block": {"start": [500], "length": [60], "block_size": 51, "k": 5, "heads": 1},
    "more_than_there_are": {"start": [9], "length": [14], "k": 9},
    "chunked": {"start": [66, 3], "length": [11, 4], "chunked": True},
    "decoding": {"start": [300, 11], "length": [1, 1], "k": 4, "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("shape", SELECTION.values(), ids=SELECTION.keys())
def test_the_best_blocks_are_chosen(shape: dict[str, Any], granularity: str) -> None:
    case = make_case(**shape, share=granularity == "head")
    assert_the_best_are_chosen(case, choose(case, granularity), granularity)


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("name", ["ragged", "more_than_there_are", "chunked", "decoding"])
def test_where_landmarks_tie_the_choice_is_that_of_the_definition(name: str, granularity: str) -> None:
    case = make_case(**SELECTION[name], share=granularity == "head", tie=True)
    noisy = case._replace(storage=DeviceStorage(case.block_size))
    noisy.storage.landmark = case.storage.landmark * (1 + 1e-6 * torch.randn_like(case.storage.landmark))
    noisy.storage.landmark[:, :, 0] = case.storage.landmark[:, :, 0]
    expected = chosen_in_pytorch(case, granularity, tie=True).block
    chosen = choose(noisy, granularity, tie=True).long().expand(expected.shape)
    valid = case.groups.valid if granularity != "head" else case.groups.valid.any(-1, keepdim=True)
    valid = valid[:, None, None, ..., None]
    assert torch.equal(chosen * valid, expected * valid)


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("tie", [False, True], ids=["scored", "tied"])
@pytest.mark.parametrize(
    ("name", "sinks"), [("ragged", 1), ("ragged", 3), ("more_than_there_are", 5), ("chunked", 2), ("decoding", 2)]
)
def test_the_first_blocks_are_always_among_those_chosen(name: str, sinks: int, granularity: str, tie: bool) -> None:
    case = make_case(**SELECTION[name], share=granularity == "head", tie=tie)
    expected = chosen_in_pytorch(case, granularity, tie, sinks).block.sort(-1).values
    chosen = choose(case, granularity, tie, sinks).long()
    real = case.groups.valid if chosen.shape[4] > 1 else case.groups.valid.any(-1, keepdim=True)
    real = real[:, None, None].expand(chosen.shape[:-1])
    assert torch.equal(chosen[real], expected.expand(chosen.shape)[real])


def test_of_equal_scores_the_later_blocks_are_chosen() -> None:
    case = make_case([130], [4], k=3, heads=1)
    landmark = case.storage.landmark
    landmark[:] = landmark[:, :, torch.randint(0, 4, landmark.shape[2:3])]  # older candidates in four sets of equals
    for granularity in ("token_and_head", "head"):
        expected = chosen_in_pytorch(case, granularity).block
        valid = case.groups.valid[:, None, None, ..., None][..., : expected.shape[4], :]
        assert torch.equal(choose(case, granularity).long() * valid, expected * valid)


def test_a_walk_shared_by_programs_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([2000], [1], k=4, heads=2)
    shared = choose(case, "token_and_head")
    monkeypatch.setattr("landmark_llama.reading.choice_triton.MOST_SPLITS", 1)
    assert torch.equal(choose(case, "token_and_head"), shared)
    assert_the_best_are_chosen(case, shared, "token_and_head")


def dense_table_attention(case: Case, choice: Tensor, exact: bool = False) -> Tensor:
    """Attention over the table by its definition, every query against every block, in the dtype of `case`.

    Returns:
        (batch, columns, kv_heads, group, head_dim); undefined for padding.
    """
    groups, size, k = case.groups, case.block_size, case.k
    key, value = case.storage.key, case.storage.value
    # (batch, kv_heads, group, groups, queries, head_dim)
    query, scoring = (
        None if x is None else groups.gather(x).permute(0, 3, 4, 1, 2, 5) for x in (case.query, case.landmark_query)
    )
    block = torch.arange(key.shape[2], device=DEVICE)
    n = groups.first_block[:, None, None, :, None, None]
    position = groups.position[:, None, None, ..., None]
    rank = (choice.unsqueeze(-2) < block.unsqueeze(-1)).sum(-1)
    chosen = (choice.unsqueeze(-2) == block.unsqueeze(-1)).any(-1)
    apart = torch.where(block < n, k + 1 - rank - (block >= n - k).long(), n - block)
    place = position + apart * size
    own = place // size == 0
    own, chosen = own & (block >= n), chosen & (block < n)
    earlier = chosen | ((block >= n) & (place >= size))
    query, scoring = (
        None if x is None else case.rotary.rotate(x.unsqueeze(-2), place.clamp(0, len(case.rotary.cos) - 1))
        for x in (query, scoring)
    )
    scores = (query.unsqueeze(-2) @ key[:, :, None, None, None].transpose(-1, -2) * SCALE).squeeze(-2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (..., queries, blocks, block_size)
    landmark, offset = scores[..., -1:], torch.arange(size, device=DEVICE)
    if scoring is not None:
        landmark = (torch.linalg.vecdot(scoring, key[:, :, None, None, None, :, -1]) * SCALE).to(scores).unsqueeze(-1)
    if case.storage.bias is not None:
        landmark = landmark + case.storage.bias[:, :, None, None, None, :, None]
    inside = scores.masked_fill(offset == size - 1, -torch.inf)
    earlier_logits = inside if exact else inside - inside.logsumexp(-1, keepdim=True) + landmark
    own_logits = inside.masked_fill(offset > place.unsqueeze(-1), -torch.inf)
    logits = torch.where(own.unsqueeze(-1), own_logits, earlier_logits)
    logits = logits.masked_fill(~(own | earlier).unsqueeze(-1), -torch.inf)
    weights = logits.flatten(-2).softmax(-1).to(value.dtype)
    output = weights.unsqueeze(-2) @ value[:, :, None, None, None].flatten(-3, -2)
    return groups.scatter(output.squeeze(-2).permute(0, 3, 4, 1, 2, 5))


def assert_attention_is_as_accurate_as_plain(case: Case, choice: Tensor, exact: bool = False) -> None:
    output = attend_table(
        case.query,
        case.storage.key,
        case.storage.value,
        case.groups,
        choice.int(),
        one_block=case.groups.one_block,
        block_size=case.block_size,
        rotary=case.rotary,
        scale=SCALE,
        landmark_query=case.landmark_query,
        bias=case.storage.bias,
        exact=exact,
    )
    assert output.dtype == case.query.dtype and output.isfinite().all()
    real = case.groups.scatter(case.groups.valid)
    reference, plain = (dense_table_attention(c, choice, exact)[real] for c in (case.to(torch.float64), case))
    assert_as_accurate(output[real], plain, reference)


ATTENTION = {
    "ragged": {"start": [0, 37, 53], "length": [3, 13, 6], "k": 3},
    "blocks_of_two": {"start": [31, 9], "length": [5, 3], "block_size": 2, "direct": 0},
    "blocks_of_three": {"start": [31, 9], "length": [5, 3], "block_size": 3, "kv_heads": 2, "direct": 3},
    "grouped_query": {"start": [70], "length": [3], "heads": 8, "head_dim": 80, "block_size": 16},
    "wide_multi_head": {"start": [100, 50], "length": [20, 9], "block_size": 16, "kv_heads": 2, "head_dim": 128},
    "published_block": {"start": [402], "length": [30], "block_size": 51, "k": 5, "heads": 1, "head_dim": 64},
    "blocks_of_64": {"start": [350], "length": [70], "block_size": 64, "k": 2, "heads": 1, "head_dim": 64},
    "more_than_there_are": {"start": [9], "length": [14], "k": 9},
    "chunked": {"start": [66, 3], "length": [11, 4], "chunked": True},
    "decoding": {"start": [70, 11], "length": [1, 1], "k": 4, "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, granularity) for name in ATTENTION for granularity in ("token_and_head", "head")]
    + [("ragged", "token"), ("decoding", "token")],
)
def test_attention_through_the_table_is_its_definition(name: str, granularity: str) -> None:
    case = make_case(**ATTENTION[name], share=granularity == "head")
    assert_attention_is_as_accurate_as_plain(case, chosen_in_pytorch(case, granularity).block)


# Triton's interpreter multiplies bfloat16 as if it held integers (triton 3.7)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("name", ["ragged", "wide_multi_head", "decoding"])
def test_low_precision_is_as_accurate_as_plain_attention(name: str, dtype: torch.dtype) -> None:
    case = make_case(**ATTENTION[name], dtype=dtype)
    chosen = choose(case, "token_and_head")
    assert_the_best_are_chosen(case, chosen, "token_and_head")
    assert_attention_is_as_accurate_as_plain(case, chosen.long())


@pytest.mark.parametrize("own", ["query", "bias", "query_and_bias"])
@pytest.mark.parametrize(
    ("name", "granularity", "dtype"),
    [
        ("ragged", "token_and_head", torch.float32),
        ("ragged", "head", torch.float16),
        ("decoding", "token_and_head", torch.float16),
        ("chunked", "head", torch.float32),
    ],
)
def test_landmarks_may_have_a_query_and_a_bias_of_their_own(
    name: str, granularity: str, dtype: torch.dtype, own: str
) -> None:
    case = make_case(**ATTENTION[name], share=granularity == "head", dtype=dtype, own=own)
    chosen = choose(case, granularity)
    assert_the_best_are_chosen(case, chosen, granularity)
    assert_attention_is_as_accurate_as_plain(case, chosen.long())


@pytest.mark.parametrize(
    ("name", "granularity"), [("ragged", "token_and_head"), ("ragged", "head"), ("chunked", "head")]
)
def test_blocks_may_weigh_what_their_tokens_do(name: str, granularity: str) -> None:
    case = make_case(**ATTENTION[name], share=granularity == "head", own="query_and_bias")
    assert_attention_is_as_accurate_as_plain(case, chosen_in_pytorch(case, granularity).block, exact=True)


@pytest.mark.parametrize("own", ["", "query_and_bias"])
@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
def test_the_model_attends_with_the_kernels_as_without(
    granularity: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([42, 0], [9, 3], share=granularity == "head", own=own)
    settings = {"num_retrieved_blocks": case.k, "granularity": granularity, "landmark_query": case.landmark_query}
    settings |= {"num_sink_blocks": 1, "exact_weights": True} if own else {}
    settings |= {"rotary": case.rotary, "scale": SCALE, "landmarks_tie": False}
    outputs = []
    for kernels in (False, True):
        monkeypatch.setattr(table, "kernels_take", lambda *_, kernels=kernels: kernels)
        outputs.append(attend_through_table(case.query, case.storage, case.groups, **settings))
    real = case.groups.scatter(case.groups.valid)
    torch.testing.assert_close(outputs[1][real], outputs[0][real])


@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
def test_layers_without_rope_attend_with_the_kernels_as_without(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([42, 0], [9, 3], share=granularity == "head")
    settings = {"num_retrieved_blocks": case.k, "granularity": granularity, "scale": SCALE, "landmarks_tie": False}
    outputs, still = [], StillTable.like(case.rotary)
    for kernels, rotary in ((False, still), (True, still), (True, case.rotary)):
        monkeypatch.setattr(table, "kernels_take", lambda *_, kernels=kernels: kernels)
        outputs.append(attend_through_table(case.query, case.storage, case.groups, rotary=rotary, **settings))
    pytorch, kernel, rotated = (output[case.groups.scatter(case.groups.valid)] for output in outputs)
    torch.testing.assert_close(kernel, pytorch)
    assert (kernel - rotated).abs().max() > 0.1


def test_what_the_kernels_do_not_take_is_left_to_pytorch() -> None:
    device = torch.device("cpu")  # stands for the smallest chip
    assert supported(torch.bfloat16, 128, 256, device) and supported(torch.bfloat16, 256, 64, device)
    assert supported(torch.float32, 8, 2, device)
    for dtype, head_dim, block_size in (
        (torch.float64, 64, 64),
        (torch.bfloat16, 512, 64),
        (torch.bfloat16, 65, 64),
        (torch.bfloat16, 64, 257),
        (torch.bfloat16, 256, 256),
        (torch.float32, 256, 256),
    ):
        assert not supported(dtype, head_dim, block_size, device)


@pytest.mark.parametrize("memory", [48, 99, 163, 227])
def test_tiles_shrink_until_they_fit(memory: int) -> None:
    tiles = [table_triton.tiles(64, True, 64, head_dim, 2, memory * 1024) for head_dim in (64, 128, 256)]
    sizes = [choices[0].queries * choices[0].stages for choices in tiles if choices]
    assert sizes == sorted(sizes, reverse=True) and all(tiles[:2])


def test_a_tile_that_the_chip_has_no_room_for_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([42, 0], [9, 3])
    choice = choose(case, "token_and_head")
    settings = {"one_block": True, "block_size": case.block_size, "rotary": case.rotary, "scale": SCALE}
    arguments = (case.query, case.storage.key, case.storage.value, case.groups, choice)
    expected = attend_table(*arguments, **settings)
    tried = []

    def scarce(tile: Tile, *args: Any, **kwargs: Any) -> Tensor:
        tried.append(tile)
        if tile.stages > 1:
            raise OutOfResources(300_000, 100_000, "shared memory")
        return attend_in_tiles(tile, *args, **kwargs)

    attend_in_tiles = table_triton._attend_in_tiles
    monkeypatch.setattr(table_triton, "_attend_in_tiles", scarce)
    monkeypatch.setattr(triton_tiles, "_too_large", set())
    for _ in range(2):  # what was too large is not tried again
        assert torch.equal(attend_table(*arguments, **settings), expected)
    assert [tile.stages for tile in tried] == [3, 2, 1, 1]


@needs_gpu
@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_prompt_on_a_gpu(dtype: torch.dtype, granularity: str) -> None:
    shape = {"block_size": 64, "heads": 8, "kv_heads": 2, "head_dim": 128, "k": 8, "direct": 4}
    case = make_case([20000, 3000], [500, 130], **shape, share=granularity == "head", dtype=dtype)
    chosen = choose(case, granularity)
    assert_the_best_are_chosen(case, chosen, granularity)
    few = make_case([1000, 200], [300, 130], **shape, share=granularity == "head", dtype=dtype)
    assert_attention_is_as_accurate_as_plain(few, choose(few, granularity).long())


@needs_gpu
@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
def test_a_decoding_step_is_captured_in_a_graph(granularity: str) -> None:
    case = make_case([640], [1], block_size=16, heads=8, kv_heads=2, head_dim=64, k=4, direct=2)
    settings = {"num_retrieved_blocks": 4, "granularity": granularity, "rotary": case.rotary}
    settings |= {"scale": SCALE, "landmarks_tie": False}

    def groups_at(start: int) -> QueryGroups:
        return QueryGroups.of(
            torch.tensor([start]),
            torch.tensor([1]),
            num_direct_blocks=2,
            tile_blocks=2,
            chunked=False,
            share=granularity == "head",
            block_size=16,
        ).to(DEVICE)

    static, query, key, value = (groups_at(640), case.query.clone(), *torch.randn(2, 1, 1, 2, 64, device=DEVICE))

    def step() -> Tensor:
        case.storage.write(key, value, static.start, static.stop)
        return attend_through_table(query, case.storage, static, **settings)

    torch.cuda.set_sync_debug_mode("error")  # nothing in a layer may wait for the device
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for position in (640, 641, 642, 650):
        for into, tensor in zip(static, groups_at(position), strict=True):
            if isinstance(into, Tensor):
                into.copy_(tensor)
        for x in (query, key, value):
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = output.clone()
        torch.testing.assert_close(replayed, step(), rtol=0, atol=0)
    assert case.storage.capacity * 16 > 650


@needs_gpu
@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
def test_a_model_on_a_gpu_is_as_accurate_as_on_a_cpu(granularity: str) -> None:
    from tiny import in_float64, logits_in_calls, random_ids, tiny_model

    model, ids = tiny_model(retrieval_granularity=granularity), random_ids(2, 90)
    exact = logits_in_calls(in_float64(model), ids, [60, 1, 1])
    plain = logits_in_calls(model, ids, [60, 1, 1])
    actual = logits_in_calls(model.to(DEVICE), ids.to(DEVICE), [60, 1, 1]).cpu()
    assert (actual.argmax(-1) == exact.argmax(-1)).all()
    assert torch.isclose(actual, plain, rtol=1e-3, atol=1e-3).all()
