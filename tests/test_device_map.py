"""A model whose layers lie on several devices: what a layer has read stays with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from tiny import random_ids, tiny_model

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.reading.tiered_storage import FileStorage, HostStorage
from landmark_llama.rows.layout import Rows


@pytest.mark.parametrize("tier", ["device", "host", "file"])
@torch.no_grad()
def test_a_model_with_a_layer_on_disk_reads_and_generates_as_without(tier: str, tmp_path: Path) -> None:
    """Accelerate's hooks go around each layer, as they do between two GPUs."""
    storages = {"device": None, "host": HostStorage(budget=0), "file": FileStorage(tmp_path / "tier", budget=0)}
    model, ids = tiny_model(), random_ids(1, 150)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    apart = LandmarkLlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert next(apart.model.layers[1].parameters()).device.type == "meta"  # the weights come and go
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=LandmarkCache(model.config), **how)
    kind = {} if storages[tier] is None else {"storage": storages[tier]}
    assert torch.equal(apart.generate(ids, past_key_values=LandmarkCache(apart.config, **kind), **how), expected)


@torch.no_grad()
def test_the_blocks_of_a_layer_lie_on_the_device_of_the_layer() -> None:
    """The last layer computes on `meta`, the one device beside the CPU that every machine has, and only stores."""
    model, ids = tiny_model(), random_ids(1, 150)
    model.model.layers[1].to("meta")
    names = [name for name, _ in model.model.named_children() if name != "layers"]
    places = {**dict.fromkeys(names, "cpu"), "layers.0": "cpu", "layers.1": "meta"}
    dispatch_model(model.model, places, main_device="cpu", force_hooks=True)
    cache, nothing = LandmarkCache(model.config), torch.zeros(1, 0, dtype=torch.long)
    rows = Rows.of(model.config, ids, None, None, None)
    model.model._stream(rows, nothing, cache, model.config.retrieval())
    assert [storage.device.type for storage in cache.storages] == ["cpu", "meta"]
