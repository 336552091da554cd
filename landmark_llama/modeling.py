"""Landmark models: what differs from transformers' own, for any family of decoders, and LLaMA's classes.

`LandmarkAttention`, `LandmarkDecoderLayer` and `LandmarkModel` go in front of a family's own classes
(`landmark_llama/families` has the others).

A call is attended to through one *view*, chosen in `LandmarkModel.forward`. A view has one method, `attend`, which
takes a layer's queries, keys and values, not rotated, and returns its attention output:

    WholeRows      no cache, rows that fit the window: each row attends to all of itself, as in training
    TaughtRows     the same in training with exact weights, where landmarks learn to choose
    Documents      the same for rows that hold several documents
    HeadParallelRows   whole rows that several processes hold together (`docs/distributed.md`)
    Segment        training with a cache: the call is one segment of a longer text
    Table          reading through a cache: one chunk of a call, whose queries read a table of blocks
    DecodingStep   the same for one new token a row, on a CPU
    AlignedStep    the same where all rows stand at one position

Callers see plain coordinates: landmarks enter and leave the text in here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from landmark_llama.attention import WholeRows
from landmark_llama.attention.context_parallel import ContextShard, HeadParallelRows
from landmark_llama.attention.pooling import prior_of_heads
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.teaching import TaughtRows, are_collected
from landmark_llama.attention.view import View
from landmark_llama.calibration import CalibratedAttention
from landmark_llama.checkpoints.conversion import FromLlamaMixin
from landmark_llama.configuration import LandmarkConfig, LandmarkLlamaConfig, LocalAttention, RetrievalGranularity
from landmark_llama.language_model import LandmarkForCausalLM, keep
from landmark_llama.plain import gated_mlp, is_untouched, linear, rms_norm
from landmark_llama.pretrained import LandmarkPreTrained
from landmark_llama.reading.aligned import AlignedStep, step_of
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.decoding import DecodingStep
from landmark_llama.reading.segments import Segment, check_segment
from landmark_llama.reading.streaming import StreamingMixin
from landmark_llama.rows.checks import check_inputs, check_shard, check_streaming, warn_of_frozen_landmark
from landmark_llama.rows.documents import Documents, packed_positions
from landmark_llama.rows.layout import Rows


class LandmarkAttention(CalibratedAttention):
    """The projections of a dense model around the attention of a view."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        view: View,
        rotary: RotaryTable,
        fill_cache_only: bool = False,
        **unused: None,
    ) -> tuple[Tensor | None, None]:
        """`hidden_states` (batch, columns, hidden_size) to the same.

        With `fill_cache_only` keys and values go to the cache, and there is no output. The dense layer's own mask,
        positions and cache stay None: the view knows them.
        """
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        key, value = self._key(hidden_states, shape), linear(self.v_proj, hidden_states).view(shape)
        pooled = self.config.landmark_key == "pooled"
        query = None if fill_cache_only and not pooled else self._query(hidden_states, shape)
        rotary = self._rotary(rotary)
        settings = {"layer_idx": self.layer_idx, "rotary": rotary, "scale": self.scaling * rotary.scaling**2}
        to_query = to_prior = None
        if self.landmark_calibration is not None:
            to_query, to_prior = self.landmark_calibration(hidden_states)
        if pooled:
            prior = prior_of_heads(query, key.shape[2])
            settings["landmark_prior"] = prior if to_prior is None else prior + to_prior.view(prior.shape)
        if fill_cache_only:
            view.fill_cache_only(key, value, **settings)
            return None, None
        if to_query is not None:
            settings["landmark_query"] = (query + to_query.view(shape)).to(query.dtype)
        output = view.attend(query, key, value, **settings)
        return linear(self.o_proj, output.flatten(2)), None

    def _query(self, hidden_states: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Queries (batch, columns, heads, head_dim), not rotated; `shape` with -1 for the heads."""
        return linear(self.q_proj, hidden_states).view(shape)

    def _key(self, hidden_states: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Keys (batch, columns, kv_heads, head_dim), not rotated."""
        return linear(self.k_proj, hidden_states).view(shape)

    def _rotary(self, rotary: RotaryTable) -> RotaryTable:
        """The table that this layer rotates by."""
        return rotary


class LandmarkDecoderLayer:
    """Goes in front of a dense decoder layer: landmark attention in place of its own.

    attention_class: of the attention.
    mlp_class, norm_class: of the dense layer's other parts, which do what LLaMA's do.
    """

    attention_class: ClassVar[type[LandmarkAttention]]
    mlp_class: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]

    def __init__(self, config: LandmarkConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = self.attention_class(config, layer_idx)

    def forward(self, hidden_states: Tensor, *, fill_cache_only: bool = False, **attention: Any) -> Tensor | None:
        """As the dense one; with `fill_cache_only` it returns None, for a last layer whose output nobody reads."""
        if not fill_cache_only:
            return super().forward(hidden_states, **attention)
        self.self_attn(self.input_layernorm(hidden_states), fill_cache_only=True, **attention)
        return None

    def decode(self, states: Tensor, **attention: Any) -> Tensor:
        """As `forward`, in a decoding step: with less around it, where nothing hangs on it."""
        if not (is_untouched(self) and is_untouched(self.self_attn)):
            return self(states, **attention)
        normed = rms_norm(self.input_layernorm, states, self.norm_class)
        states = states + self.self_attn.forward(normed, **attention)[0]
        normed = rms_norm(self.post_attention_layernorm, states, self.norm_class)
        return states + gated_mlp(self.mlp, normed, self.mlp_class)


class LandmarkModel(LandmarkPreTrained, StreamingMixin):
    """Goes in front of a dense decoder: its layers over landmarked rows, plain coordinates outside.

    layer_class: of the layers.
    """

    layer_class: ClassVar[type[LandmarkDecoderLayer]]

    def __init__(self, config: LandmarkConfig) -> None:
        config.check_model()
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.layers[layer_idx] = self.layer_class(config, layer_idx)
        self.post_init()
        self._rotary: RotaryTable | None = None
        self._landmark_row_checked = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LandmarkCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_retrieved_blocks: int | None = None,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention | None = None,
        retrieval_granularity: RetrievalGranularity | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        # not needed; trl calls this model, not the one with the language head, with all that a collator made
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        context_shard: ContextShard | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the columns to keep; arguments as `LandmarkForCausalLM.forward` documents them."""
        if output_attentions:
            raise ValueError("output_attentions=True: attention weights are never formed whole and cannot be returned")
        cache = LandmarkCache(self.config) if past_key_values is None and use_cache else past_key_values
        if cache is not None and not isinstance(cache, LandmarkCache):
            problem = f"past_key_values: a {type(cache).__name__} cannot hold landmark blocks"
            raise ValueError(f"{problem}; pass LandmarkCache(model.config)")
        retrieval = (num_retrieved_blocks, num_local_blocks, local_attention, retrieval_granularity)
        only_ids = input_ids is not None and input_ids.dim() == 2 and inputs_embeds is None and cu_seq_lens_q is None
        if cache is not None and only_ids and seq_idx is None and not (self.training or output_hidden_states):
            step = self._step_of(input_ids, attention_mask, position_ids, cache, retrieval)
            if step is not None:
                last = self._decode(input_ids, step, logits_to_keep)
                return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache)

        content = check_inputs(self.config, input_ids, inputs_embeds, attention_mask)
        if cu_seq_lens_q is not None or seq_idx is not None:
            position_ids = packed_positions(content.shape[:2], position_ids, cu_seq_lens_q, seq_idx)
        if self.training and not self._landmark_row_checked:
            self._landmark_row_checked = True
            warn_of_frozen_landmark(self)
        before = None if cache is None else cache.ordinary_tokens(len(content))
        if context_shard is not None:
            before = torch.full((len(content),), context_shard.start)
        rows = Rows.of(self.config, content, attention_mask, position_ids, before)
        output, hidden_states = keep(rows.layout.output, logits_to_keep), None
        view = self._view_of_all(rows, cache, retrieval, context_shard)
        if view is not None:
            last, hidden_states = self._attend_to_all(rows, view, output, bool(output_hidden_states))
        else:
            longest = int(rows.layout.length.max())
            check_streaming(self.config, longest, training=self.training, output_hidden_states=output_hidden_states)
            through = LandmarkCache(self.config) if cache is None else cache
            last = self._stream(rows, output, through, self.config.retrieval(*retrieval))
        if cache is not None:
            cache.advance(rows.real)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache, hidden_states=hidden_states)

    def _view_of_all(
        self, rows: Rows, cache: LandmarkCache | None, retrieval: tuple, shard: ContextShard | None
    ) -> View | None:
        """The view of a call that goes through the layers as a whole; None for one that is streamed."""
        config, layout, pooled = self.config, rows.layout, self.config.landmark_key == "pooled"
        if self.training and cache is not None:
            settings = check_segment(config, layout, *retrieval)
            return Segment.of(layout, cache, settings, pooled)
        direct, sinks = 0, config.num_sink_blocks
        if config.train_retrieved_blocks is not None or any(x is not None for x in retrieval):
            direct = config.retrieval(*retrieval).num_direct_blocks
        how = {"kernels": config.kernels, "pooled": pooled, "exact_weights": config.block_weight == "exact"}
        whole = WholeRows(config.block_size, config.train_retrieved_blocks, direct, num_sink_blocks=sinks, **how)
        if whole.exact_weights and cache is None and (self.training or are_collected()):
            reading = config.retrieval(*retrieval)
            far = {"retrieved": reading.num_retrieved_blocks, "direct": reading.num_direct_blocks}
            whole = TaughtRows(**vars(whole), **far)
        longest = config.train_context_length
        if shard is not None:
            check_shard(config, rows, shard, cached=cache is not None, training=self.training)
            return HeadParallelRows(whole, shard)
        if rows.begins is not None:
            return Documents.of(rows.begins, rows.real, layout.source.shape[1], whole=whole, longest=longest)
        return whole if cache is None and int(layout.length.max()) <= longest else None

    def _attend_to_all(
        self, rows: Rows, view: View, output: Tensor, keep_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """States of the landmarked columns `output` (batch, outputs), and of all layers if asked for."""
        states, rotary = self._embed(rows.content, rows.layout.source), self._rotary_table(rows.content.device)
        hidden_states = [states]
        for layer in self.layers:
            states = layer(states, view=view, rotary=rotary)
            if keep_hidden_states:
                hidden_states.append(states)
        last = _take(self.norm(states), output)
        if not keep_hidden_states:
            return last, None
        # as in transformers, the last of the hidden states is the normalised one
        return last, (*(_take(x, output) for x in hidden_states[:-1]), last)

    def _records_steps(self, cache: LandmarkCache | None) -> bool:
        """Whether decoding steps are recorded as CUDA graphs: as chunks of a stream."""
        if cache is None or cache.graphs is None or not self.config.kernels:
            return False
        weight = self.embed_tokens.weight
        return cache.graphs.can_record(cache.storages, weight.dtype, self._rotary_table(weight.device))

    def _step_of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LandmarkCache,
        retrieval: tuple,
    ) -> AlignedStep | DecodingStep | None:
        """The decoding step that a call is, on a CPU; None if it is anything else."""
        if input_ids.device.type != "cpu" or self._records_steps(cache):
            return None
        rotary = self._rotary_table(input_ids.device)
        return step_of(self.config, input_ids, attention_mask, position_ids, cache, retrieval, rotary)

    @torch.no_grad()
    def _decode(self, content: Tensor, step: DecodingStep | AlignedStep, logits_to_keep: int | Tensor) -> Tensor:
        """States (batch, outputs, hidden_size) of a decoding step's tokens, or of the landmarks in their place."""
        alone = isinstance(step, AlignedStep)  # without landmarks
        states = self.embed_tokens(content) if alone else self._embed(content, step.source)
        rotary = self._rotary_table(content.device)
        for layer in self.layers:
            states = layer.decode(states, view=step, rotary=rotary)
        step.cache.advance(torch.ones(content.shape, dtype=torch.bool))
        step.cache.read_by(self, step.settings)
        return self.norm(keep(states, logits_to_keep) if alone else _take(states, keep(step.output, logits_to_keep)))

    def _through_layers(
        self, states: Tensor, view: View, rotary: RotaryTable, *, fill_cache_only: bool = False
    ) -> Tensor | None:
        """States (batch, columns, hidden_size) after all layers; None if the last layer only fills the cache."""
        *layers, last = self.layers
        for layer in layers:
            states = layer(states, view=view, rotary=rotary)
        return last(states, view=view, rotary=rotary, fill_cache_only=fill_cache_only)

    def _embed(self, content: Tensor, source: Tensor) -> Tensor:
        """Embeddings (batch, columns, hidden_size) of ids or embeddings `content`, laid out by `source`."""
        if content.is_floating_point():
            landmark = self.embed_tokens.weight[self.config.landmark_token_id]
            extended = torch.cat([content, landmark.to(content).expand(len(content), 1, -1)], dim=1)
            return _take(extended, source)
        extended = torch.nn.functional.pad(content, (0, 1), value=self.config.landmark_token_id)
        return self.embed_tokens(extended.gather(1, source))

    def _rotary_table(self, device: torch.device) -> RotaryTable:
        """The one table of positions 0 .. train_context_length - 1, computed in fp32 whatever the model's dtype."""
        length = self.config.train_context_length
        if self._rotary is None or self._rotary.cos.device != device or len(self._rotary.cos) != length:
            # made anew from the configuration: the module's own frequencies follow the model into bf16
            with torch.device("cpu"):
                embedding = type(self.rotary_emb)(self.config)
                cos, sin = embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
            half, scaling = cos.shape[-1] // 2, float(embedding.attention_scaling)
            self._rotary = RotaryTable(cos[0, :, :half] / scaling, sin[0, :, :half] / scaling, scaling).to(device)
        return self._rotary


class LandmarkLlamaAttention(LandmarkAttention, LlamaAttention):
    """LLaMA's attention with landmarks."""


class LandmarkLlamaDecoderLayer(LandmarkDecoderLayer, LlamaDecoderLayer):
    """LLaMA's layer with landmark attention."""

    attention_class, mlp_class, norm_class = LandmarkLlamaAttention, LlamaMLP, LlamaRMSNorm


class LandmarkLlamaModel(LandmarkModel, LlamaModel):
    """LLaMA's layers over landmarked rows, plain coordinates outside."""

    config_class, layer_class = LandmarkLlamaConfig, LandmarkLlamaDecoderLayer
    _no_split_modules = ["LandmarkLlamaDecoderLayer"]


class LandmarkLlamaForCausalLM(FromLlamaMixin, LandmarkForCausalLM, LlamaForCausalLM):
    """A LLaMA language model that reads texts far longer than it was trained on."""

    config_class, model_class = LandmarkLlamaConfig, LandmarkLlamaModel
    _no_split_modules = ["LandmarkLlamaDecoderLayer"]


def _take(states: Tensor, column: Tensor) -> Tensor:
    """`states` (batch, columns, size) at `column` (batch, outputs)."""
    return states.gather(1, column.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
