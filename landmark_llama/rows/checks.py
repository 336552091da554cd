"""What the model is given, checked before anything is computed: errors name the argument and the place in it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from landmark_llama.configuration import LandmarkLlamaConfig, RetrievalSettings
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.rows.layout import Layout

if TYPE_CHECKING:
    from transformers import LlamaModel


def check_inputs(
    config: LandmarkLlamaConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: LandmarkCache | None,
    output_attentions: bool | None,
) -> None:
    """Raises a ValueError if arguments of the model's forward call exclude each other or do not fit the model."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    content = input_ids if input_ids is not None else inputs_embeds
    if input_ids is not None and input_ids.numel():
        lowest, highest = input_ids.aminmax()
        if lowest < 0 or highest >= config.vocab_size:
            wrong = (input_ids < 0) | (input_ids >= config.vocab_size)
            row, position = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"input_ids, row {row}, position {position}: token id {int(input_ids[row, position])} is outside "
                f"the vocabulary of {config.vocab_size} tokens: was it encoded with this model's tokenizer?"
            )
    if attention_mask is not None and (
        attention_mask.dim() != 2 or len(attention_mask) != len(content) or attention_mask.shape[1] < content.shape[1]
    ):
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)}; expected (batch, columns), "
            f"the last {content.shape[1]} columns those of the input of shape {tuple(content.shape[:2])}"
        )
    if past_key_values is not None and not isinstance(past_key_values, LandmarkCache):
        raise ValueError(
            f"past_key_values: a {type(past_key_values).__name__} cannot hold landmark blocks; "
            "pass LandmarkCache(model.config)"
        )
    if output_attentions:
        raise ValueError("output_attentions=True: attention weights are never formed as a whole and cannot be returned")


def check_segment(
    config: LandmarkLlamaConfig,
    layout: Layout,
    num_retrieved_blocks: int | None,
    num_local_blocks: int | None,
    local_attention: str | None,
    retrieval_granularity: str | None,
) -> RetrievalSettings:
    """How a call with a cache is trained on, given what the call asks for; raises a ValueError if it cannot be."""
    settings = config.segment_retrieval(num_retrieved_blocks)
    for name, value, only in (
        ("num_local_blocks", num_local_blocks, None),
        ("local_attention", local_attention, settings.local_attention),
        ("retrieval_granularity", retrieval_granularity, settings.granularity),
    ):
        if value not in (None, only):
            raise ValueError(
                f"{name}={value!r} in training with a cache: a query reads the blocks of its own call directly and "
                "chooses its own among those of earlier calls; leave it unset, or call model.eval() to read"
            )
    inside = (layout.start % config.block_size > 0) & (layout.ordinary > 0)
    if inside.any():
        row = int(inside.nonzero()[0])
        raise ValueError(
            f"row {row} goes on inside a block, at landmarked position {int(layout.start[row])}: in training, each "
            f"call that a cache is given to begins with a block, after a multiple of {config.block_size - 1} tokens "
            f"(block_size={config.block_size}); to read or generate, call model.eval()"
        )
    goes_on = bool(layout.start.any())
    room = settings.num_direct_blocks * config.block_size if goes_on else config.train_context_length
    if layout.length.max() > room:
        raise ValueError(
            f"a row takes {int(layout.length.max())} landmarked positions in training with a cache; at most {room} fit "
            f"train_context_length={config.train_context_length}"
            + (f" beside {settings.num_retrieved_blocks} retrieved blocks" if goes_on else "")
            + ": cut the text into more segments"
        )
    return settings


def check_streaming(
    config: LandmarkLlamaConfig, length: int, *, training: bool, output_hidden_states: bool | None
) -> None:
    """Raises a ValueError if a call whose longest row takes `length` landmarked positions cannot be streamed."""
    if training:
        raise ValueError(
            f"a row takes {length} landmarked positions, which is streamed and has no backward; train on rows of at "
            f"most train_context_length={config.train_context_length} landmarked positions, or on one segment after "
            "the other with past_key_values=LandmarkCache(config), or call model.eval() to read"
        )
    if output_hidden_states:
        raise ValueError(
            "output_hidden_states=True: only for calls without a cache that fit "
            f"train_context_length={config.train_context_length}"
        )


def warn_of_frozen_landmark(model: LlamaModel) -> None:
    """Warns if `model` trains something, but not its landmark's embedding row, as with LoRA on linear layers alone."""
    embedding, landmark = model.embed_tokens, model.config.landmark_token_id
    frozen = not any(weight.requires_grad for weight in embedding.parameters())
    adapter = getattr(embedding, "token_adapter", None)  # of peft: trains some rows alone
    if adapter is not None:
        frozen = all(landmark not in rows for rows in adapter.token_indices.values())
    if frozen and any(weight.requires_grad for weight in model.parameters()):
        warnings.warn(
            f"the embedding row of the landmark token, {landmark}, is not trained, and a landmark that was never "
            "trained finds nothing: for an adapter take landmark_llama.landmark_lora_config(model.config) as peft's "
            "configuration; never mind if this model's landmark has been trained before",
            stacklevel=2,
        )
