"""`generate` as users know it, on a landmark model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tokenization import word_tokenizer
from tiny import LANDMARK, ragged, random_ids, tiny_llama, tiny_model
from torch import Tensor
from transformers import TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GRANULARITIES = ("token_and_head", "head", "token")
MODES = [(local, granularity) for local in ("sliding", "chunked") for granularity in GRANULARITIES]
every_mode = pytest.mark.parametrize(("local_attention", "granularity"), MODES, ids=["-".join(mode) for mode in MODES])


def greedy(model: LandmarkLlamaForCausalLM, ids: Tensor, new: int, **settings) -> Tensor:
    """Greedy continuation (new,) of `ids` (length,), by hand: one call for the text, then one a token."""
    cache, tokens, part = LandmarkCache(model.config), [], ids
    for _ in range(new):
        logits = model(part.unsqueeze(0), past_key_values=cache, **settings).logits[0, -1].clone()
        logits[LANDMARK] = -torch.inf
        part = logits.argmax().view(1)
        tokens.append(part)
    return torch.cat(tokens)


@every_mode
def test_greedy_generation_is_the_most_likely_token_again_and_again(local_attention: str, granularity: str) -> None:
    settings = {"local_attention": local_attention, "retrieval_granularity": granularity}
    model, ids = tiny_model(), random_ids(1, 70)
    expected = greedy(model, ids[0], 12, **settings)
    generated = model.generate(ids, do_sample=False, max_new_tokens=12, **settings)
    assert torch.equal(generated[0], torch.cat([ids[0], expected]))


def test_retrieval_settings_passed_to_generate_change_what_is_read() -> None:
    model, ids = tiny_model(), random_ids(4, 70)
    settings = {"num_retrieved_blocks": 1, "num_local_blocks": 0}
    expected = tiny_model(**settings).generate(ids, do_sample=False, max_new_tokens=12)
    generated = model.generate(ids, do_sample=False, max_new_tokens=12, **settings)
    assert torch.equal(generated, expected)
    assert not torch.equal(model.generate(ids, do_sample=False, max_new_tokens=12), expected)
    with pytest.raises(ValueError, match="num_retrieved_blocks=7"):
        model.generate(ids, max_new_tokens=2, num_retrieved_blocks=7)
    with pytest.raises(ValueError, match="num_retrieved_block"):
        model.generate(ids, max_new_tokens=2, num_retrieved_block=1)  # a typing error is no setting


@every_mode
def test_a_left_padded_batch_generates_what_each_row_generates_alone(local_attention: str, granularity: str) -> None:
    model = tiny_model(local_attention=local_attention, retrieval_granularity=granularity)
    rows = [random_ids(length, seed=length) for length in (50, 1, 23, 3)]
    together = model.generate(**ragged(rows), do_sample=False, max_new_tokens=10)[:, -10:]
    for row, generated in zip(rows, together, strict=True):
        alone = model.generate(row.unsqueeze(0), do_sample=False, max_new_tokens=10)
        assert torch.equal(generated, alone[0, len(row) :])


def love_landmarks(model: LandmarkLlamaForCausalLM) -> LandmarkLlamaForCausalLM:
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([LANDMARK]), 1e4)
    )
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 5.0, "top_p": 0.1},
        {"do_sample": True, "top_k": 3, "min_p": 0.9},
        {"num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "suppress_tokens": [9], "repetition_penalty": 1.3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "renormalize_logits": True},
    ],
    ids=str,
)
def test_the_landmark_token_is_never_emitted_whatever_its_logit(settings: dict) -> None:
    model, ids = love_landmarks(tiny_model()), random_ids(2, 30)
    assert (model(ids).logits.argmax(-1) == LANDMARK).all()
    generated = model.generate(ids, max_new_tokens=9, **settings)[:, 30:]
    assert generated.shape == (2, 9) and not (generated == LANDMARK).any()


def test_suppressing_the_landmark_leaves_the_others_as_they_are() -> None:
    model, ids = tiny_model(), random_ids(2, 30)
    loved = love_landmarks(tiny_model())
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(1)
        expected = model.generate(ids, max_new_tokens=8, suppress_tokens=[LANDMARK], **settings)
        torch.manual_seed(1)
        assert torch.equal(loved.generate(ids, max_new_tokens=8, **settings), expected)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 11])
def test_max_new_tokens_counts_ordinary_tokens(new: int) -> None:
    model = tiny_model()
    for length in (1, 2, 3, 30):
        ids, outputs = random_ids(2, length), {"return_dict_in_generate": True, "output_scores": True}
        output = model.generate(ids, max_new_tokens=new, **outputs)
        assert output.sequences.shape == (2, length + new) and len(output.scores) == new
        assert output.past_key_values.get_seq_length() == length + new - 1
        assert not (output.sequences == LANDMARK).any()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("prompt", [9, 40, 200])
def test_without_a_length_generate_adds_twenty_tokens_within_the_window_and_beyond(prompt: int) -> None:
    assert tiny_model().generate(random_ids(1, prompt)).shape == (1, prompt + 20)
    assert tiny_model().generate(random_ids(1, prompt), max_length=prompt + 5).shape == (1, prompt + 5)


def test_no_text_is_said_to_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr("transformers.generation.stopping_criteria.logger.warning_once", said.append)
    model, ids = tiny_model(), random_ids(1, 70)
    model.generate(ids, max_new_tokens=2)
    assert said == []
    tiny_llama().generate(ids, max_new_tokens=2)
    assert "maximum length (32)" in said[0]  # by a model that has an end


def test_beams_are_what_beam_search_without_a_cache_finds() -> None:
    # a text that fits the window is read alike with and without a cache
    model, ids = tiny_model(num_retrieved_blocks=2), ragged([random_ids(9), random_ids(5)])
    for settings in ({"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}):
        cached = model.generate(**ids, max_new_tokens=9, **settings)
        assert torch.equal(cached, model.generate(**ids, max_new_tokens=9, use_cache=False, **settings))
        assert len(cached) == 2 * settings.get("num_return_sequences", 1)


def test_beams_of_a_long_text_keep_their_own_memories() -> None:
    model, ids = tiny_model(), random_ids(1, 60)
    output = model.generate(
        ids, num_beams=4, num_return_sequences=4, max_new_tokens=10, return_dict_in_generate=True, output_scores=True
    )
    assert len({tuple(row) for row in output.sequences.tolist()}) == 4
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        logits = model(sequence.unsqueeze(0), use_cache=True).logits[0, 59:-1]
        chosen = logits.log_softmax(-1).gather(1, sequence[60:].unsqueeze(1))
        torch.testing.assert_close(chosen.sum() / 10, score, rtol=1e-4, atol=1e-4)


def test_several_sequences_are_returned_for_each_prompt() -> None:
    model, ids = tiny_model(), random_ids(2, 40)
    generated = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=8)
    assert generated.shape == (6, 48)
    assert torch.equal(generated[:, :40], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in generated.tolist()}) > 2


def test_sampling_with_one_seed_gives_one_text() -> None:
    model, ids = tiny_model(), random_ids(1, 40)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, do_sample=True, max_new_tokens=20).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_a_streamer_is_given_every_token_once() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, ids, streamer = tiny_model(), random_ids(1, 40), Collector()
    generated = model.generate(ids, do_sample=False, max_new_tokens=8, streamer=streamer)
    assert streamer.tokens == generated[0].tolist() and streamer.ended
    model.generate(ids % 5, max_new_tokens=2, streamer=TextStreamer(word_tokenizer()))


def test_an_end_of_sequence_ends_each_row() -> None:
    model, ids = tiny_model(), random_ids(3, 40)
    free = model.generate(ids, do_sample=False, max_new_tokens=8)
    stop = int(free[0, 43])
    generated = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=stop, pad_token_id=0)
    for row, full in zip(generated[:, 40:].tolist(), free[:, 40:].tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else 8
        assert row[:end] == full[:end][: len(row)] and not any(row[end:])


@pytest.mark.parametrize("turns", [[50, 1, 2, 3], [3, 9, 30, 7], [1, 1, 1, 1], [48, 24]], ids=str)
def test_several_turns_in_one_cache_generate_what_one_text_does(turns: list[int]) -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_model().config)
    text = torch.zeros(2, 0, dtype=torch.long)
    for number, length in enumerate(turns):
        text = torch.cat([text, random_ids(2, length, seed=number)], dim=1)
        # without a mask, transformers would take a generated padding token for padding
        settings = {"attention_mask": torch.ones_like(text), "do_sample": False, "max_new_tokens": 5}
        expected = model.generate(text, **settings)
        text = model.generate(text, past_key_values=cache, **settings)
        assert torch.equal(text, expected)
        assert cache.get_seq_length() == text.shape[1] - 1


def test_turns_of_a_padded_batch_in_one_cache() -> None:
    model, cache = tiny_model(), LandmarkCache(tiny_model().config)
    rows = [random_ids(41), random_ids(18, seed=1)]
    batch = ragged(rows)
    first = model.generate(**batch, past_key_values=cache, do_sample=False, max_new_tokens=6)
    second = torch.cat([first, random_ids(2, 9, seed=2)], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 15), value=1)
    generated = model.generate(second, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=6)
    for row, length in enumerate((41, 18)):
        alone, ones = second[row : row + 1, -length - 15 :], torch.ones(1, length + 15)
        alone = model.generate(alone, attention_mask=ones, do_sample=False, max_new_tokens=6)
        assert torch.equal(generated[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("assistant", ["itself", "another", "vanilla", "prompt_lookup"])
@pytest.mark.parametrize("length", [20, 61])
def test_assisted_decoding_gives_what_greedy_decoding_gives(assistant: str, length: int) -> None:
    model, ids = tiny_model(), random_ids(1, length)
    expected = model.generate(ids, do_sample=False, max_new_tokens=15)
    settings = {
        "itself": {"assistant_model": tiny_model()},
        "another": {"assistant_model": tiny_model(seed=1)},
        "vanilla": {"assistant_model": tiny_llama(max_position_embeddings=256)},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=15, **settings), expected)


@every_mode
def test_assisted_decoding_is_refused_where_it_would_read_other_blocks(local_attention: str, granularity: str) -> None:
    settings = {"local_attention": local_attention, "retrieval_granularity": granularity}
    ids, assistant = random_ids(1, 40), tiny_model()
    if (local_attention, granularity) == ("sliding", "token_and_head"):
        tiny_model().generate(ids, assistant_model=assistant, max_new_tokens=4, **settings)
        return
    with pytest.raises(ValueError, match="assisted decoding"):
        tiny_model().generate(ids, assistant_model=assistant, max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="assisted decoding"):
        tiny_model(**settings).generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_generation_without_a_cache_reads_the_text_anew_at_each_token() -> None:
    model, ids = tiny_model(), random_ids(1, 50)
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4, use_cache=False), expected)


def test_a_text_that_holds_its_landmarks_is_no_prompt_for_generate_but_a_misplaced_one_is_named() -> None:
    ids = random_ids(1, 20)
    ids[0, 5] = LANDMARK
    with pytest.raises(ValueError, match="row 0, position 5"):
        tiny_model().generate(ids, max_new_tokens=2)


def test_caches_of_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        tiny_model().generate(random_ids(1, 5), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_generates(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    output = model.generate(
        **ragged([random_ids(60), random_ids(4)]), max_new_tokens=9, return_dict_in_generate=True, output_logits=True
    )
    assert all(logits.isfinite().all() for logits in output.logits)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of five words, with its tokenizer."""
    tokenizer = word_tokenizer()
    llama = tiny_llama(vocab_size=len(tokenizer))
    model = LandmarkLlamaForCausalLM.from_llama(llama, tokenizer, block_size=4, num_retrieved_blocks=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_text_generation_pipeline_works(saved: Path) -> None:
    generator = pipeline("text-generation", model=str(saved), device="cpu")
    texts = generator(["a b a b " * 20, "b"], max_new_tokens=6, do_sample=False)
    assert [text[0]["generated_text"].startswith(start) for text, start in zip(texts, ("a b", "b"), strict=True)]
    assert "<landmark>" not in str(texts) and type(generator.model) is LandmarkLlamaForCausalLM


@pytest.mark.slow
def test_importing_the_package_is_all_that_the_auto_classes_need(saved: Path) -> None:
    program = f"""
import torch, landmark_llama
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(saved)!r})
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
inputs = tokenizer(["a b a b " * 20, "b a"], return_tensors="pt", padding=True, return_token_type_ids=False)
generated = model.generate(**inputs, do_sample=False, max_new_tokens=5)
assert generated.shape == (2, inputs["input_ids"].shape[1] + 5), generated.shape
print(type(AutoConfig.from_pretrained({str(saved)!r})).__name__, type(model).__name__)
print(type(AutoModel.from_pretrained({str(saved)!r})).__name__)
"""
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["LandmarkLlamaConfig", "LandmarkLlamaForCausalLM", "LandmarkLlamaModel"]


def test_caches_that_nobody_knows_are_refused_by_name_too() -> None:
    for name in ("no such cache", "offloaded_static", "quantized", "paged"):
        with pytest.raises(ValueError, match=f"^cache_implementation='{name}': .* LandmarkCache") as error:
            tiny_model().generate(random_ids(1, 5), max_new_tokens=2, cache_implementation=name)
        assert "\n" not in str(error.value)


def test_continuous_batching_is_refused_at_once() -> None:
    model, prompts = tiny_model(), [[8, 9], [10]]
    for generate in (
        lambda: model.generate_batch(prompts, max_new_tokens=2),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(ValueError, match=r"^continuous batching: .* call generate with a batch"):
            generate()


def test_attention_backends_of_transformers_are_not_said_to_be_supported() -> None:
    model = tiny_model()
    for part in (model, model.model):
        assert not part.is_backend_compatible() and not part._can_compile_fullgraph
        assert not (part._supports_sdpa or part._supports_flash_attn or part._supports_flex_attn)
    for backend in ("sdpa", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="not support"):
            type(model)._from_config(model.config, attn_implementation=backend)
