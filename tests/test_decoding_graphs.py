"""Decoding steps that are recorded once and replayed: on a GPU as CUDA graphs, without one by a stand-in that repeats
the recorded work on the recorded tensors."""

import contextlib
import copy
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LANDMARKS, logits_in_calls, ragged, random_ids, tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from landmark_llama import LandmarkCache
from landmark_llama.reading import decoding_graphs, table
from landmark_llama.reading.decoding_graphs import DecodingGraphs
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.table import attend_through_table

pytest.importorskip("triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without a GPU")

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for a device, which a recorded step must not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST_READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands for `record_cuda_graph`; counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.context: Any = contextlib.nullcontext()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        with self.context:
            output = step()
        return partial(self._replay, step, output, threading.Lock()), output

    def _replay(self, step: Callable[[], Tensor], output: Tensor, graph: Any) -> None:
        """`graph` stands for a graph's part of the recording: like one, it cannot be copied."""
        self.replayed += 1
        output.copy_(step())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Has steps recorded without a GPU; their layers attend in PyTorch, which is faster than Triton's interpreter."""

    def attend(query: Tensor, storage: Any, groups: QueryGroups, **settings: Any) -> Tensor:
        # PyTorch counts candidates on the host, where a recorded step still has the number of its recording
        groups = groups._replace(candidates=int(groups.first_block.max()))
        return attend_through_table(query, storage, groups, **settings)

    monkeypatch.setattr(table, "attend_through_table", attend)
    monkeypatch.setattr(decoding_graphs, "kernels_take", lambda storage, *_: storage.capacity > 0)
    return Recorder()


def cache_with(recorder: Recorder, config: Any) -> LandmarkCache:
    cache = LandmarkCache(config, cuda_graphs=True)
    cache.graphs = DecodingGraphs(recorder)
    return cache


@without_gpu
@pytest.mark.parametrize(
    ("granularity", "landmark"), [("token_and_head", "token"), ("head", "token"), ("head", "pooled_and_calibrated")]
)
def test_a_step_with_kernels_waits_for_nothing(
    recorder: Recorder, granularity: str, landmark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_retrieved_blocks": 1, "num_local_blocks": 1, "retrieval_granularity": granularity}
    settings |= LANDMARKS[landmark]
    model, ids = tiny_model(num_hidden_layers=1, **settings), random_ids(1, 19)
    calls = [14, *[1] * 5]  # the first of them ends a block
    expected = logits_in_calls(model, ids, calls)
    cache = cache_with(recorder, model.config)
    logits_in_calls(model, ids[:, :14], [14], cache=cache)
    monkeypatch.setattr(table, "attend_through_table", attend_through_table)
    monkeypatch.setattr(table, "kernels_take", lambda *_: True)  # in Triton's interpreter
    recorder.context = NoHostReads()
    actual = logits_in_calls(model, ids[:, 14:], calls[1:], cache=cache)
    torch.testing.assert_close(actual, expected[:, 14:], rtol=1e-4, atol=1e-4)
    assert recorder.recorded and recorder.replayed


@without_gpu
def test_a_step_recorded_before_there_was_anything_to_retrieve_is_not_replayed_after(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(num_hidden_layers=1, num_retrieved_blocks=1, num_local_blocks=1), random_ids(1, 9)
    expected = logits_in_calls(model, ids, [1] * 9)
    monkeypatch.setattr(table, "attend_through_table", attend_through_table)
    monkeypatch.setattr(table, "kernels_take", lambda *_: True)
    # a block is three tokens and their landmark: from the seventh token on there is a candidate
    actual = logits_in_calls(model, ids, [1] * 9, cache=cache_with(recorder, model.config))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert recorder.replayed


@without_gpu
@pytest.mark.parametrize("settings", [{}, {"retrieval_granularity": "head"}, {"local_attention": "chunked"}], ids=str)
def test_replayed_steps_give_the_logits_of_a_call(recorder: Recorder, settings: dict) -> None:
    model, ids = tiny_model(**settings), random_ids(2, 60)
    cache = cache_with(recorder, model.config)
    expected = logits_in_calls(model, ids, [25, *[1] * 35])
    actual = logits_in_calls(model, ids, [25, *[1] * 35], cache=cache)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # room is made for 10 blocks, later for 20; each time, steps of one column and of two are run once, then recorded
    assert recorder.recorded == 4 and recorder.replayed >= 35 - 2 * recorder.recorded


def test_a_cache_of_another_size_in_the_same_memory_is_recorded_anew(recorder: Recorder) -> None:
    memory, settings = torch.zeros(1, 1, 16, 4, 8), tiny_config().retrieval()
    step = QueryGroups.of(
        torch.tensor([20]),
        torch.tensor([1]),
        num_direct_blocks=1,
        tile_blocks=1,
        chunked=False,
        share=False,
        block_size=4,
    )
    graphs = DecodingGraphs(recorder)
    for blocks, recorded in ((8, 0), (8, 1), (8, 1), (16, 1), (16, 2)):
        held = {"landmarks": lambda _: memory, "biases": lambda _: None, "device": memory.device}
        resident = memory[:, :, :blocks], memory
        storage = SimpleNamespace(resident=resident, **held, capacity=blocks, block_size=4)
        graphs.run(lambda x, _: x + 1, torch.zeros(1, 1, 8), table.Table(step, [storage], settings), rotary=None)
        assert recorder.recorded == recorded


@without_gpu
def test_rows_whose_blocks_end_apart_are_replayed_together(recorder: Recorder) -> None:
    model, rows = tiny_model(), [random_ids(31, seed=1), random_ids(24, seed=2)]
    answers = [
        model.generate(**ragged(rows), past_key_values=cache, max_new_tokens=12, do_sample=False)
        for cache in (None, cache_with(recorder, model.config))
    ]
    assert torch.equal(*answers) and recorder.replayed


@without_gpu
def test_beams_may_move_the_cache(recorder: Recorder) -> None:
    model, ids = tiny_model(), random_ids(1, 30)
    answers = [
        model.generate(ids, past_key_values=cache, max_new_tokens=12, num_beams=3, do_sample=False)
        for cache in (None, cache_with(recorder, model.config))
    ]
    assert torch.equal(*answers)


@without_gpu
def test_a_copy_of_a_cache_goes_on_by_itself(recorder: Recorder) -> None:
    model, ids = tiny_model(), random_ids(2, 48)
    ids[1, :39] = ids[0, :39]
    cache = cache_with(recorder, model.config)
    logits_in_calls(model, ids[:1, :39], [28, *[1] * 11], cache=cache)
    assert any(cache.graphs._steps.values())  # there is something that cannot be copied
    for row, own in zip(ids.split(1), (copy.deepcopy(cache), cache), strict=True):
        expected = logits_in_calls(model, row, [39, *[1] * 9])[:, 39:]
        actual = logits_in_calls(model, row[:, 39:], [1] * 9, cache=own)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@without_gpu
def test_what_waits_for_the_device_is_not_recorded(recorder: Recorder) -> None:
    model, ids = tiny_model(retrieval_granularity="token"), random_ids(1, 40)
    expected = logits_in_calls(model, ids, [30, *[1] * 10])
    actual = logits_in_calls(model, ids, [30, *[1] * 10], cache=cache_with(recorder, model.config))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not recorder.recorded


@without_gpu
def test_calls_of_several_tokens_are_not_recorded(recorder: Recorder) -> None:
    model, ids = tiny_model(), random_ids(1, 48)
    logits_in_calls(model, ids, [24, *[6] * 4], cache=cache_with(recorder, model.config))
    assert not recorder.recorded


@without_gpu
def test_a_cache_that_records_changes_nothing_without_a_gpu() -> None:
    model, ids = tiny_model(), random_ids(1, 40)
    cache = LandmarkCache(model.config, cuda_graphs=True)
    calls = [30, *[1] * 10]
    assert torch.equal(logits_in_calls(model, ids, calls, cache=cache), logits_in_calls(model, ids, calls))
    cache.reset()
    assert torch.equal(logits_in_calls(model, ids, calls, cache=cache), logits_in_calls(model, ids, calls))


def test_a_cache_records_only_if_asked_to() -> None:
    assert LandmarkCache(tiny_config()).graphs is None


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"retrieval_granularity": "head"}, {"local_attention": "chunked"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_gives_the_logits_of_a_launched_one(dtype: torch.dtype, settings: dict) -> None:
    model, ids = tiny_model(**settings).to("cuda", dtype), random_ids(2, 90).cuda()
    calls = [25, *[1] * 65]
    cache = LandmarkCache(model.config, cuda_graphs=True)
    actual = logits_in_calls(model, ids, calls, cache=cache)
    torch.testing.assert_close(actual, logits_in_calls(model, ids, calls), rtol=0, atol=0)
    assert any(cache.graphs._steps.values())
