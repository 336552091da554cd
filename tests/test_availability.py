"""Whether Triton is there."""

import pytest

from landmark_llama.attention import availability


def test_a_gpu_without_triton_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    availability._find_triton.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="pip install triton") as warned:
            assert not availability.triton_is_installed() and not availability.triton_is_installed()
        assert len(warned) == 1
    finally:
        availability._find_triton.cache_clear()
