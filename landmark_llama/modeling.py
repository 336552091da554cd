"""The landmark LLaMA: what differs from transformers' LLaMA.

A call is attended to through one *view*, chosen in `LandmarkLlamaModel.forward`. A view has one method, `attend`, which
takes a layer's queries, keys and values, not rotated, and returns its attention output:

    WholeRows      no cache, rows that fit the window: each row attends to all of itself, as in training
    Documents      the same for rows that hold several documents
    Segment        training with a cache: the call is one segment of a longer text
    Table          reading through a cache: one chunk of a call, whose queries read a table of blocks
    DecodingStep   the same for one new token a row, on a CPU

Callers see plain coordinates: landmarks enter and leave the text in here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils.generic import can_return_tuple

from landmark_llama.attention import WholeRows
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.view import View
from landmark_llama.calibration import CalibratedAttention
from landmark_llama.checkpoints.conversion import FromLlamaMixin
from landmark_llama.configuration import LandmarkLlamaConfig, LocalAttention, RetrievalGranularity
from landmark_llama.generation import LandmarkGenerationMixin
from landmark_llama.pretrained import LandmarkPreTrained, SavedWithCard
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.decoding import DecodingStep
from landmark_llama.reading.segments import Segment, check_segment
from landmark_llama.reading.streaming import StreamingMixin
from landmark_llama.rows.checks import check_inputs, check_streaming, warn_of_frozen_landmark
from landmark_llama.rows.documents import Documents, packed_positions
from landmark_llama.rows.layout import Rows, compact


class LandmarkLlamaAttention(CalibratedAttention):
    """LLaMA's projections around the attention of a view."""

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

        With `fill_cache_only` keys and values go to the cache, and there is no output. LLaMA's own mask, positions and
        cache stay None: the view knows them.
        """
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        key, value = (project(hidden_states).view(shape) for project in (self.k_proj, self.v_proj))
        pooled = self.config.landmark_key == "pooled"
        query = None if fill_cache_only and not pooled else self.q_proj(hidden_states).view(shape)
        settings = {"layer_idx": self.layer_idx, "rotary": rotary, "scale": self.scaling * rotary.scaling**2}
        if fill_cache_only:
            view.fill_cache_only(query, key, value, **settings)
            return None, None
        if self.landmark_calibration is not None:
            settings["landmark_query"] = (query + self.landmark_calibration(hidden_states).view(shape)).to(query.dtype)
        output = view.attend(query, key, value, **settings)
        return self.o_proj(output.flatten(2)), None


class LandmarkLlamaDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with landmark attention."""

    def __init__(self, config: LandmarkLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = LandmarkLlamaAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, *, fill_cache_only: bool = False, **attention: Any) -> Tensor | None:
        """As LLaMA's; with `fill_cache_only` it returns None, for a last layer whose output nobody reads."""
        if not fill_cache_only:
            return super().forward(hidden_states, **attention)
        self.self_attn(self.input_layernorm(hidden_states), fill_cache_only=True, **attention)
        return None


class LandmarkLlamaModel(LandmarkPreTrained, StreamingMixin, LlamaModel):
    """LLaMA's layers over landmarked rows, plain coordinates outside."""

    def __init__(self, config: LandmarkLlamaConfig) -> None:
        config.check_model()
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.layers[layer_idx] = LandmarkLlamaDecoderLayer(config, layer_idx)
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
    ) -> BaseModelOutputWithPast:
        """Hidden states of the columns to keep; arguments as `LandmarkLlamaForCausalLM.forward` documents them."""
        if output_attentions:
            raise ValueError("output_attentions=True: attention weights are never formed whole and cannot be returned")
        cache = LandmarkCache(self.config) if past_key_values is None and use_cache else past_key_values
        if cache is not None and not isinstance(cache, LandmarkCache):
            problem = f"past_key_values: a {type(cache).__name__} cannot hold landmark blocks"
            raise ValueError(f"{problem}; pass LandmarkCache(model.config)")
        content = check_inputs(self.config, input_ids, inputs_embeds, attention_mask)
        if cu_seq_lens_q is not None or seq_idx is not None:
            position_ids = packed_positions(content.shape[:2], position_ids, cu_seq_lens_q, seq_idx)
        if self.training and not self._landmark_row_checked:
            self._landmark_row_checked = True
            warn_of_frozen_landmark(self)
        retrieval = (num_retrieved_blocks, num_local_blocks, local_attention, retrieval_granularity)
        if not (self.training or output_hidden_states or self._records_steps(cache)):
            where = attention_mask, position_ids, cache, retrieval, self._rotary_table(content.device)
            step = DecodingStep.of(self.config, content, *where)
            if step is not None:
                last = self._decode(content, step, logits_to_keep)
                return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache)

        before = None if cache is None else cache.ordinary_tokens(len(content))
        rows = Rows.of(self.config, content, attention_mask, position_ids, before)
        output, hidden_states = _keep(rows.layout.output, logits_to_keep), None
        view = self._view_of_all(rows, cache, retrieval)
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

    def _view_of_all(self, rows: Rows, cache: LandmarkCache | None, retrieval: tuple) -> View | None:
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
        longest = config.train_context_length
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

    @torch.no_grad()
    def _decode(self, content: Tensor, step: DecodingStep, logits_to_keep: int | Tensor) -> Tensor:
        """States (batch, outputs, hidden_size) of a decoding step's tokens, or of the landmarks in their place."""
        states = self._through_layers(self._embed(content, step.source), step, self._rotary_table(content.device))
        step.cache.advance(torch.ones(content.shape, dtype=torch.bool))
        step.cache.read_by(self, step.settings)
        return self.norm(_take(states, _keep(step.output, logits_to_keep)))

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


class LandmarkLlamaForCausalLM(
    LandmarkPreTrained, SavedWithCard, FromLlamaMixin, LandmarkGenerationMixin, LlamaForCausalLM
):
    """A LLaMA language model that reads texts far longer than it was trained on."""

    accepts_loss_kwargs = True

    def __init__(self, config: LandmarkLlamaConfig) -> None:
        super().__init__(config)
        self.model = LandmarkLlamaModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LandmarkCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_retrieved_blocks: int | None = None,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention | None = None,
        retrieval_granularity: RetrievalGranularity | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if `labels` are given, in plain coordinates.

        Without a cache, rows that fit `train_context_length` attend to all of their blocks; longer ones are streamed
        through a temporary cache, in evaluation only. In training, a call with a cache is a segment of a longer text
        (`docs/training_through_memory.md`): gradients end where it begins.

        Args:
            input_ids: (batch, length) ordinary tokens. Landmarks in their regular places are accepted and dropped: the
                result has the columns of the other tokens (rows that hold fewer of those padded on the left).
            attention_mask: (batch, length), or with the columns of earlier calls in front; 0 hides a column, anywhere.
                Positions follow from it: each row's tokens are numbered from its first real one.
            position_ids: (batch, length), or (1, length) for all rows. They may restart at 0 inside a row, in calls
                without a cache: there another document begins, which is read as if it stood in a row of its own. Where
                they only count on, they change nothing.
            past_key_values: what earlier calls read; this call is added to it.
            inputs_embeds: (batch, length, hidden_size), instead of `input_ids`.
            labels: (batch, length), as for LLaMA: -100 (and landmarks) are ignored, the shift happens here. One column
                more, (batch, length + 1), names the token that the last column predicts.
            use_cache: True returns a new `LandmarkCache` if none is given.
            logits_to_keep: the last so many columns (0: all), or a 1-dimensional tensor of columns. The loss is over
                all columns, whatever is kept.
            output_hidden_states: for calls without a cache that fit `train_context_length`.
            num_items_in_batch: divides the loss instead of the number of labels (gradient accumulation).
            num_retrieved_blocks, num_local_blocks, local_attention, retrieval_granularity: in place of the
                configuration's, for this call.
            cu_seq_lens_q: (documents + 1,), where the documents of a single row begin, and its length; instead of
                `position_ids`.
            seq_idx: (batch, length), the number of each column's document; instead of both.
            cu_seq_lens_k, max_length_q, max_length_k, cache_position, token_type_ids: accepted, as other libraries pass
                them to any model, and not needed.

        Raises:
            ValueError: naming the argument and the place in it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if labels is None else 0,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            num_retrieved_blocks=num_retrieved_blocks,
            num_local_blocks=num_local_blocks,
            local_attention=local_attention,
            retrieval_granularity=retrieval_granularity,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        states, loss = outputs.last_hidden_state, None
        if labels is None:
            logits = self._logits(states)
        else:
            targets = self._targets(labels, input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
            everything = isinstance(logits_to_keep, int) and not logits_to_keep
            logits = self._logits(states if everything else _keep(states, logits_to_keep))
            loss = self._loss(states, targets, num_items_in_batch, logits if everything else None)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _logits(self, states: Tensor) -> Tensor:
        """The output embedding of `states`; padding of the vocabulary is never predicted."""
        logits = self.lm_head(states)
        if self.config.num_padded_tokens:
            logits[..., -self.config.num_padded_tokens :] = torch.finfo(logits.dtype).min
        return logits

    def _targets(self, labels: Tensor, content: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What the result's columns predict, (batch, columns); -100 for landmarks and for what follows on padding."""
        batch, length = content.shape[:2]
        if labels.shape not in ((batch, length), (batch, length + 1)):
            raise ValueError(
                f"labels: shape {tuple(labels.shape)} differs from the input's {(batch, length)}; only a column more, "
                "for the token after the last one, may be given"
            )
        real = torch.ones(batch, length, dtype=torch.bool, device=labels.device)
        if attention_mask is not None:
            real = attention_mask[:, -length:].to(real)
        labels = labels.masked_fill(labels == self.config.landmark_token_id, -100)
        labels = nn.functional.pad(labels, (0, length + 1 - labels.shape[1]), value=-100)
        if not content.is_floating_point():
            given = (content.to(labels.device) == self.config.landmark_token_id) & real
            if given.any():
                labels = compact(labels, nn.functional.pad(~given, (0, 1), value=True), fill=-100)
                real = compact(real, ~given)
        # a row's first token is predicted from nothing, whether or not padding stands before it
        return labels[:, 1:].masked_fill(~real, -100)

    def _loss(
        self, states: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, logits: Tensor | None
    ) -> Tensor:
        """Mean cross-entropy; without all `logits` given, it holds those of one training context a row at once."""
        targets = targets.to(states.device)
        total = states.new_zeros((), dtype=torch.float32)
        if logits is not None and logits.requires_grad:
            parts = [(logits, targets)]  # whole: a part's gradient would be copied, and rows in training are short
        else:
            length = self.config.train_context_length
            pieces = map(self._logits, states.split(length, dim=1)) if logits is None else logits.split(length, dim=1)
            parts = zip(pieces, targets.split(length, dim=1), strict=True)
        for part, target in parts:
            scores = part.float().flatten(0, 1)
            total = total + nn.functional.cross_entropy(scores, target.flatten(), ignore_index=-100, reduction="sum")
        items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _take(states: Tensor, column: Tensor) -> Tensor:
    """`states` (batch, columns, size) at `column` (batch, outputs)."""
    return states.gather(1, column.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _keep(columns: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those of (batch, columns, ...) that `logits_to_keep` names."""
    if isinstance(logits_to_keep, int):
        return columns[:, -logits_to_keep:] if logits_to_keep else columns
    if logits_to_keep.dim() != 1 or logits_to_keep.dtype == torch.bool:
        raise ValueError(
            f"logits_to_keep: a number of columns or a 1-dimensional tensor of them, got {logits_to_keep.dtype} "
            f"of shape {tuple(logits_to_keep.shape)}"
        )
    return columns[:, logits_to_keep.to(columns.device)]
