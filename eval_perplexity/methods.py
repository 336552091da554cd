"""How a model reads a window, and the loss of the tokens scored there. One entry of `METHODS` is one row label.

landmark        a landmark model, with the choice of blocks made for each token by itself
dense           every token sees all tokens before it, at positions as they come
window          every token sees the last W tokens, itself included, in each layer (as in Mistral)
window_sinks    the first tokens of the text, too, which stay right before the window (as in StreamingLLM)
interpolation   dense, positions divided by a factor (linear RoPE scaling)
ntk             dense, RoPE's base raised so that its slowest frequency is divided by the factor (NTK-aware)
yarn            dense, transformers' YaRN
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from eval_passkey.models import Subject, load_model
from eval_passkey.prompts import InputError
from eval_perplexity.windows import SINK_PIECE, SinkWindowLayer, window_mask
from landmark_llama import LandmarkCache
from landmark_llama.reading.storage import BlockStorage, DeviceStorage

DENSE_METHODS = ("dense", "window", "window_sinks", "interpolation", "ntk", "yarn")
WINDOWS = ("window", "window_sinks")
SCALED = ("interpolation", "ntk", "yarn")
PIECE = 1024  # tokens whose logits are held at once, and that a dense model reads at once


@dataclass(frozen=True)
class Method:
    """One way of reading, with what it needs to know.

    Args:
        name: `landmark` or one of `DENSE_METHODS`.
        window: tokens seen, of `WINDOWS`.
        sinks: tokens at the beginning that are seen as well, of `window_sinks`.
        factor: of `SCALED`; None: length over trained positions, at least 1, for each length.
        always_stream: of `landmark`: read through the cache what fits the trained window, too.
    """

    name: str
    window: int | None = None
    factor: float | None = None
    always_stream: bool = False
    sinks: int = 0

    @property
    def settings(self) -> dict:
        """What distinguishes its rows from those of the same method with other settings."""
        settings = {"method": self.name, "window": self.window, "factor": self.factor}
        return settings | {"always_stream": self.always_stream} | ({"sinks": self.sinks} if self.sinks else {})

    def check(self, option: str, subject: Subject) -> None:
        """Raises InputError, naming `option`, if the subject cannot be read in this way."""
        where = f"{option} {subject.name}"
        if self.name == "landmark":
            granularity = subject.config.retrieval_granularity
            if granularity != "token_and_head":
                raise InputError(
                    f"{where}: retrieval_granularity={granularity!r} looks at later tokens when it chooses a token's "
                    "blocks, so that its perplexity would be too low; give token_and_head"
                )
            return
        if self.always_stream:
            raise InputError(f"{where}: --always_stream needs a landmark model")
        if self.name == "window_sinks" and 0 in (getattr(subject.config, "no_rope_layers", None) or ()):
            raise InputError(f"{where}: {self.name} moves sinks by rotary positions, which not all layers have")
        if self.name in (*SCALED, "window_sinks"):
            rope = getattr(subject.config, "rope_parameters", None) or {}
            if rope.get("rope_type") != "default" or not subject.training_context:
                does = "scales" if self.name in SCALED else "moves"
                raise InputError(
                    f"{where}: {self.name} {does} plain rotary positions, and this model has "
                    f"{rope.get('rope_type', 'none')!r}"
                )

    def scaling(self, subject: Subject, length: int) -> float:
        """By how much positions are stretched at a length; 1.0: not at all."""
        if self.name not in SCALED:
            return 1.0
        return float(self.factor or max(1.0, length / subject.training_context))

    def configuration(self, config: PretrainedConfig, factor: float) -> PretrainedConfig:
        """The model's configuration with its positions stretched by `factor`."""
        if factor == 1.0:
            return config
        config = copy.deepcopy(config)
        rope, trained = dict(config.rope_parameters), config.max_position_embeddings
        if self.name == "interpolation":
            rope |= {"rope_type": "linear", "factor": factor}
        elif self.name == "yarn":
            rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
        else:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            rope["rope_theta"] *= factor ** (rotated / (rotated - 2))
        config.rope_parameters = rope
        return config


class Scorer:
    """A model that scores windows in one way. Weights are read when first needed, and anew for another scaling.

    scorer.nll(input_ids, scored) is the loss, in nats, of the last `scored` tokens together.
    """

    def __init__(
        self,
        option: str,
        subject: Subject,
        method: Method,
        dtype: str,
        device: str,
        storage: Callable[[int], BlockStorage] | None = None,
    ):
        """storage: what a landmark model keeps long windows in; None: the device."""
        method.check(option, subject)
        self.option, self.subject, self.method, self.storage = option, subject, method, storage
        self.dtype, self.device = dtype, device
        self._factor: float | None = None
        self._model: PreTrainedModel | None = None

    @torch.no_grad()
    def nll(self, input_ids: Tensor, scored: int) -> float:
        """Sum of -log p over the last `scored` of `input_ids` (1, length + 1), in nats."""
        model = self.prepare(input_ids.shape[1] - 1)
        input_ids = input_ids.to(model.device)
        if self.method.name == "landmark":
            config, length, cache = self.subject.config, input_ids.shape[1] - 1, None
            longer = length + length // (config.block_size - 1) > config.train_context_length
            if self.method.always_stream or self.storage is not None and longer:
                cache = LandmarkCache(config, storage=self.storage or DeviceStorage)
            return nll_of_landmark_model(model, input_ids, scored, cache)
        return nll_of_dense_model(model, input_ids, scored, self.method.window, self.method.sinks)

    def prepare(self, length: int) -> PreTrainedModel:
        """The model as it reads windows of this length; InputError if it cannot be loaded."""
        factor = self.method.scaling(self.subject, length)
        if factor != self._factor:
            self.free()
            scaled = replace(self.subject, config=self.method.configuration(self.subject.config, factor))
            self._model, self._factor = load_model(self.option, scaled, self.dtype, self.device), factor
        return self._model

    def free(self) -> None:
        """Forgets the weights."""
        self._model = self._factor = None


def nll_of_landmark_model(
    model: PreTrainedModel, input_ids: Tensor, scored: int, cache: LandmarkCache | None = None
) -> float:
    """Loss of the last `scored` tokens of `input_ids` (1, length + 1), read in one call.

    The model streams a call that is longer than its window; only the states of the scored tokens are kept.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    tokens = model.config.vocab_size - model.config.num_padded_tokens  # padding of the vocabulary is never predicted
    states = decoder(input_ids=input_ids[:, :-1], past_key_values=cache, logits_to_keep=scored).last_hidden_state
    pieces = zip(states.split(PIECE, dim=1), input_ids[:, -scored:].split(PIECE, dim=1), strict=True)
    return sum(_nll(head(piece)[..., :tokens], target) for piece, target in pieces)


def nll_of_dense_model(
    model: PreTrainedModel, input_ids: Tensor, scored: int, window: int | None = None, sinks: int = 0
) -> float:
    """Loss of the last `scored` tokens of `input_ids` (1, length + 1), read in pieces through a cache.

    window: tokens that a token sees in each layer, itself included; None: all before it.
    sinks: with a window, tokens at the beginning that it sees as well.
    """
    text, target = input_ids[:, :-1], input_ids[:, 1:]
    cache, size = _cache(model, window, sinks), min(PIECE, SINK_PIECE) if sinks else PIECE
    total, unscored = 0.0, text.shape[1] - scored
    for start in range(0, text.shape[1], size):
        piece = text[:, start : start + size]
        stop = start + piece.shape[1]
        kept = min(piece.shape[1], max(stop - unscored, 0))
        mask = None if window is None else window_mask(start, stop, window, model.dtype, text.device, sinks)
        output = model(
            input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=max(kept, 1)
        )
        if kept:
            total += _nll(output.logits, target[:, stop - kept : stop])
    return total


def _cache(model: PreTrainedModel, window: int | None, sinks: int) -> Cache:
    layers = range(model.config.num_hidden_layers)
    if window is None:
        return DynamicCache(config=model.config)
    if not sinks:
        return Cache(layers=[DynamicSlidingWindowLayer(window) for _ in layers])
    frequencies = model.get_decoder().rotary_emb.inv_freq
    return Cache(layers=[SinkWindowLayer(window, sinks, frequencies) for _ in layers])


def _nll(logits: Tensor, target: Tensor) -> float:
    """Sum of -log p of `target` (1, tokens) under `logits` (1, tokens, vocabulary): in fp32 at least, added in fp64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").double().sum().item()
