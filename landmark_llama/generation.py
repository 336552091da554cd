"""What `generate` must be told about a landmark LLaMA: its cache, positions, lengths and landmark token."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, SuppressTokensLogitsProcessor

from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.storage import DeviceStorage
from landmark_llama.reading.tiered_storage import HostStorage
from landmark_llama.reading.trace import record_retrieved


class LandmarkGenerationMixin:
    """Goes in front of transformers' own generation, whose hooks it answers."""

    def generate(self, *args: Any, return_retrieved: bool = False, **kwargs: Any) -> Any:
        """As transformers'; with `return_retrieved` the output is a dictionary, with the blocks that were retrieved.

        return_retrieved: adds `retrieved` to the output, a `RetrievedStep` a call of the model, and implies
            `return_dict_in_generate`.
        """
        if not return_retrieved:
            return super().generate(*args, **kwargs)
        with record_retrieved(self) as retrieved:
            output = super().generate(*args, **{**kwargs, "return_dict_in_generate": True})
        output["retrieved"] = retrieved
        return output

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Refuses another cache before transformers looks at its name."""
        for settings in (generation_config or self.generation_config).to_dict(), kwargs:
            _refuse_other_cache(settings.get("cache_implementation"))
        return super()._prepare_generation_config(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            offloaded = generation_config.cache_implementation == "offloaded"
            storage = HostStorage() if offloaded else DeviceStorage
            model_kwargs["past_key_values"] = LandmarkCache(self.config, storage=storage)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as `generate_batch` is.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching: it needs a paged cache of keys and values, and a landmark LLaMA generates with its "
            "own LandmarkCache; call generate with a batch of prompts padded on the left"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `init_continuous_batching`."""
        self.init_continuous_batching()

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: positions follow from the attention mask and the cache."""

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, *, input_ids_length: int, **kwargs: Any
    ) -> GenerationConfig:
        """Without a length, generates the usual number of new tokens, also beyond the window's end."""
        new_tokens = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, input_ids_length=input_ids_length, **kwargs
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = new_tokens + input_ids_length
        return generation_config

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Keeps transformers from warning of long texts: none is too long here."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Suppresses the landmark token before any other processor sees the logits."""
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


def _refuse_other_cache(implementation: str | None) -> None:
    if implementation not in (None, "dynamic", "offloaded"):
        raise ValueError(
            f"cache_implementation={implementation!r}: a landmark LLaMA generates with its own LandmarkCache; leave it "
            "unset, or 'offloaded' to keep its blocks in host memory"
        )
