"""Exact weights on a CPU: the fast way of reading a table of blocks gives what the definition does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark_llama.reading.exact_table import attend_exact_table
from landmark_llama.reading.table import _add_retrieved, _attend_direct, _choose_in_pytorch
from tests.reading_cases import DEVICE, SCALE, Case, make_case
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="exact weights are read by PyTorch's fused kernel on a CPU only"
)


def by_definition(case: Case, scoring: Tensor | None, granularity: str, tie: bool) -> Tensor:
    """The attention as `table` computes it wherever there is no faster way."""
    groups, settings = case.groups, {"block_size": case.block_size, "rotary": case.rotary, "scale": SCALE}
    query, scoring = (None if x is None else groups.gather(x).permute(0, 3, 4, 1, 2, 5) for x in (case.query, scoring))
    output, lse = _attend_direct(query, scoring, case.storage, groups, exact_weights=True, **settings)
    if groups.candidates:
        how = {"k": case.k, "granularity": granularity, "landmarks_tie": tie, "num_sink_blocks": 1}
        rotated, rotated_scoring, choice = _choose_in_pytorch(query, scoring, case.storage, groups, **how, **settings)
        output = _add_retrieved(output, lse, rotated, rotated_scoring, choice, case.storage, True)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5))


@pytest.mark.parametrize("granularity", ["head", "token_and_head", "token"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("start", "length", "settings"),
    [
        ([0], [70], {}),
        ([37, 12], [30, 41], {}),
        ([60, 61], [1, 2], {}),
        ([5, 90], [33, 7], {"direct": 2, "k": 3}),
        ([40], [25], {"tie": True}),
        ([40], [24], {"chunked": True}),
        ([3], [9], {"direct": 3}),
    ],
)
def test_the_fused_kernel_reads_what_the_definition_does(
    start: list[int], length: list[int], settings: dict, granularity: str, calibrated: bool
) -> None:
    case = make_case(start, length, heads=6, kv_heads=2, share=granularity == "head", **settings)
    generator = torch.Generator().manual_seed(0)
    scoring = torch.randn(case.query.shape, generator=generator) if calibrated else None
    how = {"k": case.k, "granularity": granularity, "landmarks_tie": settings.get("tie", False), "num_sink_blocks": 1}
    actual = attend_exact_table(case.query, scoring, case.storage, case.groups, **how, rotary=case.rotary, scale=SCALE)
    plain = by_definition(case, scoring, granularity, how["landmarks_tie"])
    case, scoring = case.to(torch.float64), None if scoring is None else scoring.double()
    reference = by_definition(case, scoring, granularity, how["landmarks_tie"])
    for row, columns in enumerate(length):  # further columns are padding
        assert_as_accurate(actual[row, :columns], plain[row, :columns], reference[row, :columns])
    double = attend_exact_table(case.query, scoring, case.storage, case.groups, **how, rotary=case.rotary, scale=SCALE)
    for row, columns in enumerate(length):
        assert_as_accurate(double[row, :columns], plain[row, :columns], reference[row, :columns])


@pytest.mark.parametrize("queries", [1, 5, 32, 1000])
def test_how_many_queries_share_a_page_changes_nothing(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([20, 0], [60, 33], heads=6, kv_heads=2)
    plain = by_definition(case, None, "token_and_head", False)
    case = case.to(torch.float64)
    how = {"k": case.k, "granularity": "token_and_head", "landmarks_tie": False, "num_sink_blocks": 1}
    expected = by_definition(case, None, "token_and_head", False)
    monkeypatch.setattr("landmark_llama.reading.exact_table.PAGE_QUERIES", queries)
    monkeypatch.setattr("landmark_llama.reading.exact_table.LAID_OUT_ELEMENTS", 1 << (queries % 7 + 8))
    found = attend_exact_table(case.query, None, case.storage, case.groups, **how, rotary=case.rotary, scale=SCALE)
    for row, columns in enumerate([60, 33]):
        assert_as_accurate(found[row, :columns], plain[row, :columns], expected[row, :columns])
