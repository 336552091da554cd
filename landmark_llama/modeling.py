"""The landmark LLaMA: what differs from transformers' LLaMA.

Two ways through the model. A call without a cache whose rows fit `train_context_length` attends to all of its
blocks, as in training; in training, one with a cache does so, too, and retrieves from what earlier calls read
(`reading/segments.py`). Everything else is streamed: in chunks of whole blocks through a `LandmarkCache`, each
query reading a table of blocks (`reading/table.py`). Users see plain coordinates in both: landmarks go in
and out of the text in here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, LlamaModel, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils.generic import can_return_tuple

from landmark_llama.attention.pooling import prior_of_heads
from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.calibration import LandmarkCalibration
from landmark_llama.checkpoints.conversion import checked_load, convert_llama
from landmark_llama.configuration import (
    LandmarkKey,
    LandmarkLlamaConfig,
    LocalAttention,
    RetrievalGranularity,
    RetrievalSettings,
)
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.groups import QueryGroups, cut_into_chunks
from landmark_llama.reading.segments import Segment
from landmark_llama.reading.storage import Prior
from landmark_llama.reading.table import attend_through_table, keep_freed_memory
from landmark_llama.rows.checks import check_inputs, check_segment, check_streaming
from landmark_llama.rows.documents import Documents, attend_rows, find_documents
from landmark_llama.rows.layout import Layout, compact, find_landmarks, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LandmarkLlamaAttention(LlamaAttention):
    """LLaMA's projections around landmark attention."""

    def __init__(self, config: LandmarkLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.landmark_calibration: LandmarkCalibration | None = None
        if config.landmark_query_rank:
            self.calibrate(config.landmark_query_rank)

    def calibrate(self, rank: int) -> None:
        """Gives the layer a new calibration, which changes nothing until it is trained."""
        sizes = self.config.hidden_size, rank, self.config.num_attention_heads * self.head_dim
        self.landmark_calibration = LandmarkCalibration(*sizes).to(self.q_proj.weight.device, self.q_proj.weight.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: None = None,
        attention_mask: None = None,
        past_key_values: LandmarkCache | None = None,
        *,
        rotary: RotaryTable,
        settings: RetrievalSettings,
        documents: Documents | None = None,
        segment: Segment | None = None,
        groups: QueryGroups | None = None,
        remember_only: bool = False,
        position_ids: None = None,
        use_cache: None = None,
    ) -> tuple[Tensor | None, None]:
        """`hidden_states` (batch, columns, hidden_size) to the same; streamed through `past_key_values` if given.

        LLaMA's own mask and position arguments stay None: `rotary` holds all positions, rows are left-aligned, or hold
        `documents`, or are a `segment` of their texts. With `remember_only`, keys and values go to the cache and there
        is no output.
        """
        batch, columns = hidden_states.shape[:2]
        shape = (batch, columns, -1, self.head_dim)
        pooled = self.config.landmark_key == "pooled"
        key, value = (project(hidden_states).view(shape) for project in (self.k_proj, self.v_proj))
        query = None if remember_only and not pooled else self.q_proj(hidden_states).view(shape)
        landmark_query = None
        if self.landmark_calibration is not None and not remember_only:
            landmark_query = query + self.landmark_calibration(hidden_states).view(shape)
        block_size, scale = self.config.block_size, self.scaling * rotary.scaling**2
        landmarks_tie = self.layer_idx == 0 and not pooled
        if segment is not None:
            settings = {"layer_idx": self.layer_idx, "rotary": rotary, "scale": scale, "pooled": pooled}
            output = segment.attend(query, key, value, landmark_query=landmark_query, **settings)
        elif past_key_values is None:
            if documents is None:
                attend, position = attend_rows, torch.arange(columns, device=query.device)
            else:
                attend, position = documents.attend, documents.position
            position = position.unsqueeze(-1)
            if landmark_query is not None:
                landmark_query = rotary.rotate(landmark_query, position).transpose(1, 2)
            output = attend(
                rotary.rotate(query, position).transpose(1, 2),
                rotary.rotate(key, position).transpose(1, 2),
                value.transpose(1, 2),
                landmark_query=landmark_query,
                pooled=pooled,
                block_size=block_size,
                scale=scale,
                num_retrieved_blocks=self.config.train_retrieved_blocks,
                num_direct_blocks=settings.num_direct_blocks,
            ).transpose(1, 2)
        else:
            offset = ((groups.start.unsqueeze(1) + torch.arange(columns, device=key.device)) % block_size).unsqueeze(-1)
            prior = None
            if pooled:
                own = prior_of_heads(query.transpose(1, 2), key.shape[2]).transpose(1, 2)
                prior = Prior(rotary.rotate(own, offset), scale)
            key = rotary.rotate(key, offset)
            layer = past_key_values.layers[self.layer_idx]
            storage = layer.update(key, value, groups.start, groups.stop, prior)
            if remember_only:
                return None, None
            grouped = (key.shape[2], -1)
            output = attend_through_table(
                query.unflatten(2, grouped),
                storage,
                groups,
                num_retrieved_blocks=settings.num_retrieved_blocks,
                granularity=settings.granularity,
                block_size=block_size,
                rotary=rotary,
                scale=scale,
                landmarks_tie=landmarks_tie,
                landmark_query=None if landmark_query is None else landmark_query.unflatten(2, grouped),
            )
        return self.o_proj(output.reshape(batch, columns, -1)), None


class LandmarkLlamaDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with landmark attention."""

    def __init__(self, config: LandmarkLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = LandmarkLlamaAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, *, remember_only: bool = False, **attention: Any) -> Tensor | None:
        """As LLaMA's; with `remember_only` it fills the cache and returns None, where nobody reads its output."""
        if not remember_only:
            return super().forward(hidden_states, **attention)
        self.self_attn(self.input_layernorm(hidden_states), remember_only=True, **attention)
        return None


class LandmarkLlamaModel(LlamaModel):
    """LLaMA's layers over landmarked rows, plain coordinates outside."""

    config_class = LandmarkLlamaConfig
    _no_split_modules = ["LandmarkLlamaDecoderLayer"]

    def __init__(self, config: LandmarkLlamaConfig) -> None:
        if config.landmark_token_id is None:
            raise ValueError(
                "landmark_token_id=None: this checkpoint has no landmark token; "
                "make one of a LLaMA checkpoint with LandmarkLlamaForCausalLM.from_llama(path, tokenizer)"
            )
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: landmark attention has no dropout, set 0")
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.layers[layer_idx] = LandmarkLlamaDecoderLayer(config, layer_idx)
        self.post_init()
        self._rotary: RotaryTable | None = None

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super()._init_weights, module)

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
    ) -> BaseModelOutputWithPast:
        """Hidden states of the columns to keep; arguments as `LandmarkLlamaForCausalLM.forward` documents them."""
        given = (num_retrieved_blocks, num_local_blocks, local_attention, retrieval_granularity)
        settings = self.config.retrieval(*given)
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, past_key_values, output_attentions)
        content = input_ids if input_ids is not None else inputs_embeds
        batch, length = content.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = LandmarkCache(self.config)
        before = (
            torch.zeros(batch, dtype=torch.long) if past_key_values is None else past_key_values.ordinary_tokens(batch)
        )

        if attention_mask is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=content.device)
        else:
            real = attention_mask[:, attention_mask.shape[1] - length :].to(content.device, torch.bool)
        begins = None
        if position_ids is not None:
            begins = find_documents(position_ids, real, before, cached=past_key_values is not None)
        block_size, landmark = self.config.block_size, None
        if input_ids is not None:
            special = self.config.landmark_token_id
            landmark = find_landmarks(input_ids, real, before, begins, block_size=block_size, landmark_token_id=special)
        if landmark is not None:
            real = real & ~landmark
        layout = lay_out(
            real,
            None if landmark is None else ~landmark,
            before,
            begins,
            block_size=block_size,
            predict_from_landmark=self.config.predict_from_landmark,
        )
        output = _keep(layout.output, logits_to_keep)
        rotary = self._rotary_table(content.device)
        hidden_states, documents = None, None
        if begins is not None:
            columns, longest = layout.source.shape[1], self.config.train_context_length
            documents = Documents.of(begins, real, columns, block_size=block_size, longest=longest)
        segment = None
        if self.training and past_key_values is not None:
            settings = check_segment(self.config, layout, *given)
            segment = Segment.of(layout, past_key_values, settings.num_retrieved_blocks)
        fits = past_key_values is None and int(layout.length.max()) <= self.config.train_context_length
        if fits or documents is not None or segment is not None:
            how = {"rotary": rotary, "documents": documents, "segment": segment, "settings": settings}
            states, hidden_states = self._attend_to_all(content, layout, bool(output_hidden_states), **how)
            if segment is not None:
                past_key_values.advance(real)
            last = _take(states, output)
            if hidden_states is not None:
                hidden_states = tuple(_take(x, output) for x in hidden_states)
        else:
            check_streaming(
                self.config,
                int(layout.length.max()),
                training=self.training,
                output_hidden_states=output_hidden_states,
            )
            cache = LandmarkCache(self.config) if past_key_values is None else past_key_values
            last = self._stream(content, layout, output, rotary, cache, settings)
            cache.advance(real)
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=past_key_values, hidden_states=hidden_states
        )

    def _attend_to_all(
        self, content: Tensor, layout: Layout, keep_hidden_states: bool, **attention: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """States (batch, columns, hidden_size) of a call that is attended to as a whole."""
        states = self._embed(content, layout.source)
        hidden_states = [states]
        for layer in self.layers:
            states = layer(states, **attention)
            if keep_hidden_states:
                hidden_states.append(states)
        states = self.norm(states)
        # as in transformers, the last of the hidden states is the normalised one
        return states, (*hidden_states[:-1], states) if keep_hidden_states else None

    @torch.no_grad()
    def _stream(
        self,
        content: Tensor,
        layout: Layout,
        output: Tensor,
        rotary: RotaryTable,
        cache: LandmarkCache,
        settings: RetrievalSettings,
    ) -> Tensor:
        """States (batch, outputs, hidden_size) of the landmarked columns `output` (batch, outputs), through `cache`."""
        kept = torch.zeros(*output.shape, self.config.hidden_size, dtype=self.norm.weight.dtype, device=content.device)
        cache.expect(int((layout.start + layout.length).max()))
        if content.device.type == "cpu":
            keep_freed_memory()
        for chunk in cut_into_chunks(layout, settings, self.config):
            groups = chunk.groups.to(content.device)
            begin = chunk.begin.to(content.device).unsqueeze(1)
            column = begin + torch.arange(groups.slot.shape[1], device=content.device)
            states = self._embed(content, layout.source.gather(1, column.clamp_max(layout.source.shape[1] - 1)))
            local = output - begin
            row, place = ((local >= 0) & (local < chunk.length.to(content.device).unsqueeze(1))).nonzero(as_tuple=True)
            through = {"past_key_values": cache, "rotary": rotary, "settings": settings}
            if cache.graphs is None or not len(row):
                # the last layer's output is read where it is kept, its keys and values in all later calls
                states = self._through_layers(states, groups, remember_only=not len(row), **through)
            else:
                storages = [layer.storage for layer in cache.layers]
                layers = partial(self._through_layers, **through)
                states = cache.graphs.run(layers, states, groups, storages=storages, settings=settings, rotary=rotary)
            if len(row):
                kept[row, place] = self.norm(states[row, local[row, place]])
        return kept

    def _through_layers(
        self, states: Tensor, groups: QueryGroups, *, remember_only: bool = False, **through: Any
    ) -> Tensor | None:
        """States (batch, columns, hidden_size) of a chunk, streamed; None, and no last output, with `remember_only`."""
        *layers, last = self.layers
        for layer in layers:
            states = layer(states, groups=groups, **through)
        return last(states, groups=groups, remember_only=remember_only, **through)

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


class LandmarkLlamaForCausalLM(LlamaForCausalLM):
    """A LLaMA language model that reads texts far longer than it was trained on."""

    config_class = LandmarkLlamaConfig
    _no_split_modules = ["LandmarkLlamaDecoderLayer"]
    accepts_loss_kwargs = True

    def __init__(self, config: LandmarkLlamaConfig) -> None:
        super().__init__(config)
        self.model = LandmarkLlamaModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super()._init_weights, module)

    @classmethod
    def from_llama(
        cls,
        source: str | PathLike[str] | LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 64,
        *,
        train_context_length: int | None = None,
        num_retrieved_blocks: int = 4,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention = "sliding",
        retrieval_granularity: RetrievalGranularity = "token_and_head",
        train_retrieved_blocks: int | None = None,
        landmark_key: LandmarkKey = "token",
        landmark_query_rank: int = 0,
        predict_from_landmark: bool = False,
        **from_pretrained: Any,
    ) -> LandmarkLlamaForCausalLM:
        """Makes a landmark LLaMA of a vanilla LLaMA checkpoint; fine-tune it before expecting it to find anything.

        The landmark token is added to `tokenizer` in place, its embedding row (and output row) is the mean of the
        others, every other weight stays bitwise as it was.

        Args:
            source: folder or hub id of a LLaMA checkpoint, or a loaded `LlamaForCausalLM` (left alone).
            tokenizer: the checkpoint's tokenizer; save it beside the model.
            block_size, ...: fields of `LandmarkLlamaConfig`.
            from_pretrained: for `LlamaForCausalLM.from_pretrained`: `dtype`, `device_map`, `revision`, ...

        Raises:
            ValueError: if the checkpoint is not a LLaMA, or its window cannot hold the settings.
            OSError: if the checkpoint is missing, truncated or incomplete.
        """
        return convert_llama(
            cls,
            source,
            tokenizer,
            {
                "block_size": block_size,
                "train_context_length": train_context_length,
                "num_retrieved_blocks": num_retrieved_blocks,
                "num_local_blocks": num_local_blocks,
                "local_attention": local_attention,
                "retrieval_granularity": retrieval_granularity,
                "train_retrieved_blocks": train_retrieved_blocks,
                "landmark_key": landmark_key,
                "landmark_query_rank": landmark_query_rank,
                "predict_from_landmark": predict_from_landmark,
            },
            from_pretrained,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a landmark checkpoint, as transformers does; a damaged or incomplete one raises an `OSError`."""
        return checked_load(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

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
        )
        states, loss = outputs.last_hidden_state, None
        if labels is None:
            logits = self.lm_head(states)
        else:
            targets = self._targets(labels, input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
            everything = isinstance(logits_to_keep, int) and not logits_to_keep
            logits = self.lm_head(states if everything else _keep_columns(states, logits_to_keep))
            loss = self._loss(states, targets, num_items_in_batch, logits if everything else None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

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
        """Mean cross-entropy of the next tokens.

        Without the `logits` of all `states` it never holds those of more than one training context a row.
        """
        targets = targets.to(states.device)
        total = states.new_zeros((), dtype=torch.float32)
        if logits is not None and logits.requires_grad:
            parts = [(logits, targets)]  # whole: a part's gradient would be copied, and rows in training are short
        else:
            length = self.config.train_context_length
            pieces = map(self.lm_head, states.split(length, dim=1)) if logits is None else logits.split(length, dim=1)
            parts = zip(pieces, targets.split(length, dim=1), strict=True)
        for part, target in parts:
            scores = part.float().flatten(0, 1)
            total = total + nn.functional.cross_entropy(scores, target.flatten(), ignore_index=-100, reduction="sum")
        items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r}: "
                    "a landmark LLaMA generates with its own LandmarkCache; leave it unset"
                )
            model_kwargs["past_key_values"] = LandmarkCache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: positions follow from the attention mask and the cache."""

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, *, input_ids_length: int, **kwargs: Any
    ) -> GenerationConfig:
        """Where the caller names no length, as many new tokens as in any model, but not only up to the window's end."""
        new_tokens = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, input_ids_length=input_ids_length, **kwargs
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = new_tokens + input_ids_length
        return generation_config

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """No text is too long, so that none is warned of."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """The landmark token is never emitted: its logit goes before anything else looks at the logits."""
        processors = super()._get_logits_processor(*args, **kwargs)
        device = str(self.device)
        return LogitsProcessorList(
            [SuppressTokensLogitsProcessor([self.config.landmark_token_id], device), *processors]
        )

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        settings = self.config.retrieval(
            *(kwargs.get(name) for name in ("num_retrieved_blocks", "num_local_blocks")),
            kwargs.get("local_attention"),
            kwargs.get("retrieval_granularity"),
        )
        if (settings.local_attention, settings.granularity) != ("sliding", "token_and_head"):
            raise ValueError(
                f"assisted decoding with local_attention={settings.local_attention!r}, "
                f"retrieval_granularity={settings.granularity!r}: checking several tokens at once would read other "
                "blocks than generating them one by one; use 'sliding' and 'token_and_head'"
            )
        return super()._assisted_decoding(*args, **kwargs)


def _init_weights(others: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Initial weights of a new module; `others`: transformers' for all modules but the calibrations."""
    if isinstance(module, LandmarkCalibration):
        module.reset_parameters()
    else:
        others(module)


def _take(states: Tensor, column: Tensor) -> Tensor:
    """`states` (batch, columns, size) at `column` (batch, outputs)."""
    return states.gather(1, column.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _keep(output: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The columns of (batch, columns) that `logits_to_keep` names."""
    if isinstance(logits_to_keep, int):
        return output[:, -logits_to_keep:] if logits_to_keep else output
    if logits_to_keep.dim() != 1 or logits_to_keep.dtype == torch.bool:
        raise ValueError(
            f"logits_to_keep: a number of columns or a 1-dimensional tensor of them, got {logits_to_keep.dtype} "
            f"of shape {tuple(logits_to_keep.shape)}"
        )
    return output[:, logits_to_keep.to(output.device)]


def _keep_columns(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    column = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
    return _take(states, _keep(column, logits_to_keep))
