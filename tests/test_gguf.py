"""A LLaMA in a GGUF file becomes a landmark LLaMA. Skips where gguf is not installed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from landmark_llama import LandmarkLlamaForCausalLM
from tests.test_tokenization import word_tokenizer
from tests.tiny import random_ids, tiny_llama

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
}  # fmt: skip


def write_gguf(
    model: LlamaForCausalLM, path: Path, architecture: str = "llama", write_tokenizer: Callable | None = None
) -> None:
    """Writes the weights in 8 bits where rows are long enough (Q8_0, blocks of 32), the rest in fp32.

    write_tokenizer: called with the writer; default: a list of words, which makes no tokenizer.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    for write, value in (
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_file_type, gguf.LlamaFileType.MOSTLY_Q8_0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        write(value)
    if write_tokenizer is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"word{i}" for i in range(config.vocab_size)])
    else:
        write_tokenizer(writer)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:  # GGUF holds the two halves of a rotary pair next to each other
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gguf_file_is_converted_saved_and_loaded(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = tiny_llama(intermediate_size=64)
    write_gguf(base, tmp_path / "tiny.gguf")
    model = LandmarkLlamaForCausalLM.from_llama(
        tmp_path, tokenizer, 4, num_retrieved_blocks=2, gguf_file="tiny.gguf", dtype=dtype
    )
    assert model.dtype == dtype and not hasattr(model.config, "quantization_config")
    for name, weight in base.state_dict().items():
        found, tolerance = model.state_dict()[name], 0.02 if "up_proj" in name else 0
        landmark = model.config.landmark_token_id
        keep = torch.arange(len(weight)) != landmark if "embed" in name or "lm_head" in name else slice(None)
        torch.testing.assert_close(found[: len(weight)][keep], weight[keep].to(dtype), atol=tolerance, rtol=0)
    model.save_pretrained(tmp_path / "landmark")
    again = LandmarkLlamaForCausalLM.from_pretrained(tmp_path / "landmark")
    ids = random_ids(1, 50)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_gguf_file_of_another_architecture_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_gguf(tiny_llama(intermediate_size=64), tmp_path / "tiny.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"tiny.gguf: model_type is 'qwen2', from_llama takes a 'llama'"):
        LandmarkLlamaForCausalLM.from_llama(tmp_path, tokenizer, 4, gguf_file="tiny.gguf")
