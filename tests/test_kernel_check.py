"""The check of the kernels before training, and the switch that turns them off. Triton's interpreter runs them here."""

from pathlib import Path

import pytest
import torch
from test_finetune_run import base, data, flags  # noqa: F401
from tiny import LANDMARKS, random_ids, tiny_model
from torch import Tensor

from finetune import kernel_check
from finetune.arguments import UserError, parse_arguments
from finetune.checkpoints.output import checkpoints
from finetune.checkpoints.resume import run_settings
from finetune.run import main
from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM, landmark_attention
from landmark_llama.attention import availability, whole_rows
from landmark_llama.kernel_check import KernelsDifferError, check_kernels
from landmark_llama.reading import decoding_graphs, table

pytest.importorskip("triton")
from landmark_llama.attention import fused

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
IDS = random_ids(1, 21)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes the kernels wherever it would on a GPU."""
    monkeypatch.setattr(availability, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(whole_rows, "_on_gpu", lambda query: True)


def refuse(*_, **__) -> None:
    raise AssertionError("the kernels were asked")


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_right_kernels_pass_in_every_layer(
    dtype: torch.dtype, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, asked = fused.fused_landmark_attention, []
    monkeypatch.setattr(fused, "fused_landmark_attention", lambda *rows: asked.append(rows) or kernels(*rows))
    model = tiny_model(num_hidden_layers=3).to(dtype).train()
    assert check_kernels(model, IDS) == len(asked) == 3
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@without_gpu
@pytest.mark.parametrize("landmark", [landmark for landmark in LANDMARKS.values() if landmark], ids=str)
def test_landmarks_of_every_kind_are_compared(landmark: dict, as_on_a_gpu: None, monkeypatch) -> None:
    model = tiny_model(num_hidden_layers=1, **landmark)
    assert check_kernels(model, IDS) == 1
    kernels = fused.fused_landmark_attention

    def without_what_is_the_landmarks_own(*rows: Tensor) -> Tensor:
        return kernels(*rows[:5])

    monkeypatch.setattr(fused, "fused_landmark_attention", without_what_is_the_landmarks_own)
    with pytest.raises(KernelsDifferError, match="layer 0: the kernels' output is off by"):
        check_kernels(model, IDS)


@without_gpu
def test_a_text_longer_than_the_window_is_cut_to_it(as_on_a_gpu: None) -> None:
    assert check_kernels(tiny_model(), random_ids(2, 90)) == 2


def slightly_stronger(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float, *_: None) -> Tensor:
    return landmark_attention(query, key, value, block_size=block_size, scale=1.001 * scale, kernels=False)


def twice_the_gradient_of_keys(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float, *_: None
) -> Tensor:
    key = key + (key - key.detach())
    return landmark_attention(query, key, value, block_size=block_size, scale=scale, kernels=False)


def without_a_number(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float, *_: None) -> Tensor:
    return landmark_attention(query, key, value, block_size=block_size, scale=scale, kernels=False) * torch.nan


@without_gpu
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (slightly_stronger, "layer 0: the kernels' output is off by .*, rounding to torch.float32 explains"),
        (twice_the_gradient_of_keys, "layer 0: the kernels' gradient of the key is off by"),
        (without_a_number, "layer 0: the kernels' output is off by nan"),
    ],
)
def test_wrong_kernels_are_named(wrong, named: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "fused_landmark_attention", wrong)
    with pytest.raises(KernelsDifferError, match=named):
        check_kernels(tiny_model(), IDS)


def test_nothing_is_compared_where_pytorch_computes_all(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "fused_landmark_attention", refuse)
    assert check_kernels(tiny_model(kernels=False), IDS) == 0
    assert check_kernels(tiny_model().double(), IDS) == 0
    assert check_kernels(tiny_model(train_retrieved_blocks=1), IDS) == 0
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert check_kernels(tiny_model(), IDS) == 0


def test_switched_off_kernels_are_asked_nowhere(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "fused_landmark_attention", refuse)
    for module in (table, decoding_graphs):
        monkeypatch.setattr(module, "kernels_take", refuse)
    model = tiny_model()
    cache = LandmarkCache(model.config, cuda_graphs=True)
    texts = (IDS, random_ids(1, 90))
    for ids in texts:
        with pytest.raises(AssertionError, match="the kernels were asked"):
            model(ids)
    model.config.kernels = False
    for ids in texts:
        model(ids)
    for token in IDS.split(1, dim=1)[:4]:
        model(token, past_key_values=cache)


def test_the_switch_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model(kernels=False)
    model.save_pretrained(tmp_path)
    assert '"kernels"' not in (tmp_path / "config.json").read_text()
    assert LandmarkLlamaForCausalLM.from_pretrained(tmp_path).config.kernels
    assert not LandmarkLlamaForCausalLM.from_pretrained(tmp_path, kernels=False).config.kernels


def test_a_run_with_wrong_kernels_ends_before_its_first_step(
    base: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = []

    def check(model: LandmarkLlamaForCausalLM, input_ids: Tensor) -> int:
        checked.append((model.config.kernels, tuple(input_ids.shape)))
        if model.config.kernels:
            raise KernelsDifferError("layer 0: the kernels' output is off by 1")
        return 0

    monkeypatch.setattr(kernel_check, "check_kernels", check)
    with pytest.raises(UserError, match="wrongly on cpu: layer 0: .* is off by 1; --kernels false trains") as error:
        main(flags(base, data, tmp_path))
    assert "\n" not in str(error.value) and not checkpoints(tmp_path, complete=False)
    main(flags(base, data, tmp_path, "--kernels", "false", "--max_steps", "6"))  # the same run goes on
    assert checked == [(True, (1, 56)), (False, (1, 56))]


def test_kernels_are_no_setting_that_a_run_has_to_go_on_with() -> None:
    given = ["--model_name_or_path", "m", "--data", "a.jsonl", "--output_dir", "out", "--kernels"]
    first, second = (run_settings(*parse_arguments([*given, value])) for value in ("true", "false"))
    assert first == second
