"""The paper's released implementation, on random weights: numbers measured from it, reproduced in chunked mode."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM, strip_landmarks

PROMPTS, BLOCKS, MODES = (56, 140, 203), (1, 2, 4), ("per_token_and_head", "max_over_tokens")
NEW_TOKENS = 17


@pytest.fixture(scope="module")
def released(landmark_data: Path) -> dict[str, np.ndarray]:
    path = landmark_data / "upstream" / "parity.npz"
    if not path.is_file():
        pytest.skip(f"no numbers of the released implementation at {path}")
    return dict(np.load(path))


@pytest.fixture(scope="module")
def model(released: dict[str, np.ndarray]) -> LandmarkLlamaForCausalLM:
    theirs = json.loads(str(released["config"]))
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "train_context_length", "bos_token_id", "eos_token_id", "pad_token_id",
        "rms_norm_eps",
    )  # fmt: skip
    config = LandmarkLlamaConfig(
        **{name: theirs[name] for name in same},
        block_size=theirs["mem_freq"] + 1,
        landmark_token_id=theirs["mem_id"],
        num_retrieved_blocks=1,
        local_attention="chunked",
    )
    model = LandmarkLlamaForCausalLM(config).eval()
    weights = {name.removeprefix("weights/"): x for name, x in released.items() if name.startswith("weights/")}
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return model


def test_one_forward_over_everything_gives_the_released_logits(
    model: LandmarkLlamaForCausalLM, released: dict[str, np.ndarray]
) -> None:
    landmarked, block = torch.from_numpy(released["full/landmarked_ids"]), model.config.block_size
    place = torch.arange(landmarked.shape[1])
    ids = strip_landmarks(landmarked, block, model.config.landmark_token_id)
    for predict_from_landmark in (False, True):
        model.config.predict_from_landmark = predict_from_landmark
        with torch.no_grad():
            logits = model(ids).logits
        # the last ordinary token of a block speaks for itself, or its landmark for it
        speaks = place[place % block != block - 1]
        speaks = speaks + ((speaks % block == block - 2) if predict_from_landmark else 0)
        expected = torch.from_numpy(released["full/logits"])[:, speaks]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", BLOCKS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_step_of_generation_gives_the_released_logits_and_tokens(
    prompt: int, k: int, mode: str, model: LandmarkLlamaForCausalLM, released: dict[str, np.ndarray]
) -> None:
    name = f"generate/prompt{prompt}_k{k}_{mode}"
    config = model.config
    config.predict_from_landmark = False  # it sets a landmark only when the next token comes, so none has the last word
    settings = {
        "num_retrieved_blocks": k,
        "retrieval_granularity": "head" if mode == "max_over_tokens" else "token_and_head",
    }
    chunk = config.retrieval(**settings).chunk_blocks * config.block_size
    assert chunk == int(released[f"{name}/chunk_tokens"])
    output = model.generate(
        torch.from_numpy(released["input_ids"][:, :prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    assert output.sequences[0, prompt:].tolist() == released[f"{name}/tokens"].tolist()
    logits, scores = torch.cat(output.logits), torch.from_numpy(released[f"{name}/scores"])
    ordinary = torch.arange(config.vocab_size) != config.landmark_token_id
    torch.testing.assert_close(logits[:, ordinary], scores[:, ordinary], rtol=0, atol=1e-3)
