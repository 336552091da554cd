"""The configuration: what cannot work is refused when it is made, in a sentence that names the field."""

import pytest
from tiny import tiny_config
from transformers import AutoConfig

from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"landmark_token_id": 61}, "landmark_token_id=61"),
        ({"landmark_token_id": -1}, "landmark_token_id=-1"),
        ({"num_retrieved_blocks": -1}, "num_retrieved_blocks=-1"),
        ({"num_local_blocks": -1}, "num_local_blocks=-1"),
        ({"num_retrieved_blocks": 7}, "num_retrieved_blocks=7"),
        ({"num_local_blocks": 5}, "num_local_blocks=5"),
        ({"train_context_length": 15}, "train_context_length=15"),
        ({"block_size": 16}, "block_size=16"),
        ({"local_attention": "dense"}, "local_attention='dense'"),
        ({"retrieval_granularity": "block"}, "retrieval_granularity='block'"),
    ],
)
def test_a_window_that_cannot_hold_the_settings_is_refused_when_it_is_made(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**settings)


def test_the_largest_window_that_fits_is_accepted() -> None:
    assert tiny_config(num_retrieved_blocks=6).retrieval().num_direct_blocks == 0
    assert tiny_config(num_local_blocks=4).retrieval().num_direct_blocks == 4


def test_as_many_local_blocks_as_the_window_has_room_for_by_default() -> None:
    # 8 blocks: k + 1 slots of prefix, the direct blocks, the own one
    assert tiny_config().retrieval().num_direct_blocks == 8 - 3 - 1
    assert tiny_config(train_context_length=31).retrieval().num_direct_blocks == 7 - 3 - 1
    assert tiny_config(train_context_length=35, max_position_embeddings=40).retrieval().num_direct_blocks == 4


def test_a_chunk_of_chunked_attention_fills_the_window_but_for_the_retrieved_blocks() -> None:
    config = tiny_config(local_attention="chunked", num_local_blocks=1)
    assert config.retrieval().chunk_blocks == 8 - 2 - 1  # num_local_blocks plays no part


def test_the_training_context_is_the_models_own_by_default() -> None:
    assert tiny_config(max_position_embeddings=48).train_context_length == 48
    assert tiny_config(max_position_embeddings=48, train_context_length=40).train_context_length == 40


def test_settings_of_one_call_are_checked_like_the_configurations_own() -> None:
    config = tiny_config()
    assert config.retrieval(num_retrieved_blocks=0).num_direct_blocks == 6
    assert config.retrieval(local_attention="chunked", retrieval_granularity="head").granularity == "head"
    for settings in ({"num_retrieved_blocks": 7}, {"num_local_blocks": 5}, {"local_attention": "x"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            config.retrieval(**settings)


def test_every_field_survives_saving_and_loading(tmp_path) -> None:
    settings = {
        "block_size": 3,
        "train_context_length": 30,
        "num_retrieved_blocks": 1,
        "num_local_blocks": 2,
        "local_attention": "chunked",
        "retrieval_granularity": "head",
        "predict_from_landmark": True,
        "landmark_token_id": 9,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    }
    tiny_config(**settings).save_pretrained(tmp_path)
    for loaded in (LandmarkLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LandmarkLlamaConfig
        assert {name: getattr(loaded, name) for name in settings} == settings


def test_a_checkpoint_without_a_landmark_token_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="from_llama"):
        LandmarkLlamaForCausalLM(tiny_config(landmark_token_id=None))


def test_blocks_retrieved_in_training_need_sliding_attention_and_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="train_retrieved_blocks=0: must be at least 1, or None"):
        tiny_config(train_retrieved_blocks=0)
    with pytest.raises(ValueError, match="train_retrieved_blocks=2: needs local_attention='sliding', not 'chunked'"):
        tiny_config(train_retrieved_blocks=2, local_attention="chunked")


def test_dropout_in_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        LandmarkLlamaForCausalLM(tiny_config(attention_dropout=0.1))
