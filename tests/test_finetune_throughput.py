"""Tokens a second and model FLOPs utilisation: what is counted, and what is made of it."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny import LANDMARK, random_ids, tiny_llama, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from finetune.data.packing import Packing
from finetune.throughput import Counts, ModelFlops, Throughput, count, peak_flops
from landmark_llama.tokenization import insert_landmarks

BLOCK = 4


def counted(**row: torch.Tensor) -> Counts:
    columns = {"attention_mask": None, "position_ids": None, "landmark_token_id": LANDMARK, **row}
    return Counts(*count(block_size=BLOCK, **columns).tolist())


@pytest.mark.parametrize("length", [1, 3, 4, 17])
def test_a_row_counts_the_same_with_and_without_its_landmarks(length: int) -> None:
    ids = random_ids(2, length)
    positions = length + length // 3
    # position p of a row sees p + 1 positions, a landmark all before it
    pairs = sum(p if p % BLOCK == BLOCK - 1 else p + 1 for p in range(positions))
    expected = Counts(2 * length, 2 * positions, 2 * pairs)
    assert counted(input_ids=ids) == counted(input_ids=insert_landmarks(ids, BLOCK, LANDMARK)) == expected


def test_padding_is_not_counted_and_documents_are_counted_by_themselves() -> None:
    documents = [random_ids(length).numpy() for length in (7, 1, 3)]
    packing = Packing(20, BLOCK, "apart")
    row = {name: column.unsqueeze(0) for name, column in packing.row(documents).items() if name != "labels"}
    alone = [counted(input_ids=torch.from_numpy(document).unsqueeze(0)) for document in documents]
    together = counted(**row)
    assert together == Counts(*(sum(getattr(c, name) for c in alone) for name in ("tokens", "positions", "pairs")))
    assert together.tokens == 11 and together.positions == 11 + 2 + 0 + 1


def test_a_dense_row_is_a_triangle() -> None:
    assert counted(input_ids=random_ids(3, 10), landmark_token_id=None) == Counts(30, 30, 3 * 55)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert counted(input_ids=random_ids(1, 4), attention_mask=mask, landmark_token_id=None) == Counts(3, 3, 6)


def test_the_flops_of_the_matrices_are_what_torch_counts() -> None:
    model = tiny_llama(num_hidden_layers=3, attn_implementation="eager").train()
    ids = random_ids(2, 10)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    full = Counts(20, 20, 2 * 100)  # eager attention computes what the causal mask throws away
    assert ModelFlops.of(model)(full) == pytest.approx(counter.get_total_flops(), rel=0.06)
    angles = 2 * 4 * 10  # of half a head, at each position: older transformers make them by a matrix product
    # torch counts no gradient of the first layer's input
    assert ModelFlops.of(model)(full) + angles >= counter.get_total_flops()


def test_six_flops_a_weight_and_token_without_attention() -> None:
    model = tiny_model()
    layers, head = (2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48), 61 * 32)
    flops = ModelFlops.of(model)
    assert flops(Counts(10, 10, 0)) == 6 * (layers + head) * 10
    assert flops(Counts(0, 0, 1)) == 12 * 2 * 4 * 8
    model.requires_grad_(False)
    assert ModelFlops.of(model)(Counts(10, 10, 0)) == 4 * (layers + head) * 10  # no gradient of frozen weights


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)  # fmt: skip
def test_common_gpus_are_known_by_name(name: str, tera: float) -> None:
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4", "AMD Instinct MI300X", ""])
def test_no_peak_is_made_up(name: str) -> None:
    assert peak_flops(name) is None


def run_steps(throughput: Throughput, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Two steps of 2 s with 18 tokens each and an evaluation of 100 s; what the second step's log says."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    args = SimpleNamespace(device=torch.device("cpu"), world_size=2, n_gpu=1)
    state = SimpleNamespace(log_history=[])
    throughput.on_train_begin(args, state, None, model=model)
    for _ in range(2):
        model.train()(input_ids=random_ids(2, 9))
        now[0] += 2
        throughput.on_step_end(args, state, None)
        logs = {"loss": 1.0}
        state.log_history.append(dict(logs))
        throughput.on_log(args, state, None, logs=logs)
        with torch.no_grad():
            model.eval()(input_ids=random_ids(2, 9))
        now[0] += 100
        throughput.on_evaluate(args, state, None)
    throughput.on_train_end(args, state, None)
    assert state.log_history[-1] == logs
    return logs


def test_only_training_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert run_steps(Throughput(BLOCK, LANDMARK, None), model, monkeypatch) == {"loss": 1.0, "tokens_per_second": 9.0}
    assert not model._forward_pre_hooks


def test_utilisation_is_the_share_of_all_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    flops = ModelFlops.of(model)(counted(input_ids=random_ids(2, 9)))
    logs = run_steps(Throughput(BLOCK, LANDMARK, peak=flops / 2), model, monkeypatch)
    assert logs["mfu"] == 0.5  # in 2 s two devices could have done twice that
