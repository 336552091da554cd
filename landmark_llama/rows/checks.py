"""Checks of a call's arguments before anything is computed. Errors name the argument and the place in it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from landmark_llama.configuration import LandmarkConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from landmark_llama.attention.context_parallel import ContextShard
    from landmark_llama.rows.layout import Rows


def check_inputs(
    config: LandmarkConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """Returns the ids or the embeddings, whichever is given.

    Raises:
        ValueError: if the arguments do not fit each other or the model.
    """
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
    return content


def check_streaming(config: LandmarkConfig, length: int, *, training: bool, output_hidden_states: bool | None) -> None:
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


def check_shard(config: LandmarkConfig, rows: Rows, shard: ContextShard, *, cached: bool, training: bool) -> None:
    """Raises a ValueError if `rows` are not this process's part of rows that several processes hold together."""
    tokens, total = shard.tokens[shard.part], sum(shard.tokens)
    if (rows.layout.ordinary != tokens).any() or rows.real.shape[1] != tokens:
        raise ValueError(
            f"context_shard: part {shard.part} has {tokens} tokens of each row, but the call brings "
            f"{rows.layout.ordinary.tolist()}; rows are cut by context_shard.cut, without padding and landmarks"
        )
    if rows.begins is not None or cached:
        raise ValueError("context_shard: one document a row and no cache; leave out position_ids and past_key_values")
    positions = total + total // (config.block_size - 1)
    if positions > config.train_context_length:
        raise ValueError(
            f"context_shard: rows of {positions} landmarked positions, more than "
            f"train_context_length={config.train_context_length}; shorten them"
        )
    if training and config.block_weight == "exact":
        raise ValueError(
            'context_shard: with block_weight="exact" landmarks are taught on whole rows; train it without'
        )


def warn_of_frozen_landmark(model: PreTrainedModel) -> None:
    """Warns if `model` trains something, but not its landmark's embedding row, as with LoRA on linear layers alone.

    Where landmark keys are pooled and landmarks weigh nothing, the row finds nothing in any case.
    """
    if model.config.landmark_key == "pooled" and model.config.block_weight == "exact":
        return
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
