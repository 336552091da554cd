"""The language head of a landmark model: logits and the loss, in plain coordinates."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from landmark_llama.attention.context_parallel import ContextShard
from landmark_llama.checkpoints.conversion import FromDenseMixin
from landmark_llama.configuration import LandmarkConfig, LocalAttention, RetrievalGranularity
from landmark_llama.generation import LandmarkGenerationMixin
from landmark_llama.pretrained import LandmarkPreTrained, SavedWithCard
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.rows.layout import compact


class LandmarkForCausalLM(LandmarkPreTrained, SavedWithCard, FromDenseMixin, LandmarkGenerationMixin):
    """Goes in front of a dense class with a language head: its decoder becomes one with landmarks.

    model_class: of the decoder.
    """

    model_class: ClassVar[type[nn.Module]]
    accepts_loss_kwargs = True

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
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
        context_shard: ContextShard | None = None,
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
            labels: (batch, length), as for dense models: -100 (and landmarks) are ignored, the shift happens here. One
                column more, (batch, length + 1), names the token that the last column predicts.
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
            context_shard: the call brings this process's part of rows that several processes hold together; all of
                them must call. The result is that of the part: for the mean loss of whole rows, give the number of
                their labels as `num_items_in_batch` and add up the losses of the processes (`docs/distributed.md`).

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
            context_shard=context_shard,
        )
        states, loss = outputs.last_hidden_state, None
        if labels is None:
            logits = self._logits(states)
        else:
            targets = self._targets(labels, input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
            everything = isinstance(logits_to_keep, int) and not logits_to_keep
            logits = self._logits(states if everything else keep(states, logits_to_keep))
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


def keep(columns: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those of (batch, columns, ...) that `logits_to_keep` names."""
    if isinstance(logits_to_keep, int):
        return columns[:, -logits_to_keep:] if logits_to_keep else columns
    if logits_to_keep.dim() != 1 or logits_to_keep.dtype == torch.bool:
        raise ValueError(
            f"logits_to_keep: a number of columns or a 1-dimensional tensor of them, got {logits_to_keep.dtype} "
            f"of shape {tuple(logits_to_keep.shape)}"
        )
    return columns[:, logits_to_keep.to(columns.device)]
