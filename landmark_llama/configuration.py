"""The fields of landmark attention, validated, which a family's configuration gains; LLaMA's: LandmarkLlamaConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from transformers import LlamaConfig

from landmark_llama.hub import InstalledClass, auto_map, write_loader

LocalAttention = Literal["sliding", "chunked"]
RetrievalGranularity = Literal["token_and_head", "head", "token"]
LandmarkKey = Literal["token", "pooled"]
BlockWeight = Literal["landmark", "exact"]

RETRIEVAL_SETTINGS = ("num_retrieved_blocks", "num_local_blocks", "local_attention", "retrieval_granularity")


class Family(NamedTuple):
    """The dense models that landmark models of one kind are made of.

    dense_type: `model_type` of their configuration.
    name: for sentences.
    stem: what the names of the landmark classes begin with.
    from_dense: name of the method that converts one.
    """

    dense_type: str
    name: str
    stem: str
    from_dense: str = "from_dense"

    @property
    def conversion(self) -> str:
        """How to convert a dense model, for error messages."""
        return f"{self.stem}ForCausalLM.{self.from_dense}(path, tokenizer)"


class RetrievalSettings(NamedTuple):
    """How a model reads texts longer than its window. Made and checked by `LandmarkConfig.retrieval`.

    num_retrieved_blocks: blocks that a query retrieves.
    num_direct_blocks: blocks before its own that a query reads directly; in chunked attention, at most so many.
    num_sink_blocks: of those that it retrieves, the first ones of the text, whatever they score.
    exact_weights: whether blocks weigh what their tokens do (`block_weight="exact"`).
    num_question_blocks: at the end of a call, so many blocks whose queries share no choice.
    num_reranked_blocks: of queries that share no choice, so many blocks are compared by what they weigh.
    """

    num_retrieved_blocks: int
    num_direct_blocks: int
    local_attention: LocalAttention
    granularity: RetrievalGranularity
    num_sink_blocks: int = 0
    exact_weights: bool = False
    num_question_blocks: int = 0
    num_reranked_blocks: int = 0

    @property
    def chunked(self) -> bool:
        """Whether a call is cut into chunks, each of which reads its own blocks directly."""
        return self.local_attention == "chunked"

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk in chunked attention: the last one reads all others directly."""
        return self.num_direct_blocks + 1


@dataclass(init=False, repr=False, eq=False, kw_only=True)  # as transformers makes of each configuration
class LandmarkConfig(InstalledClass):
    """Goes in front of a dense model's configuration, which gains the following fields.

    landmark_token_id: id of the landmark token. None only until a tokenizer has one.
    block_size: positions in a block, its landmark included (the paper's `mem_freq` + 1).
    train_context_length: positions that the model was trained on, landmarks included. Rotary positions never leave this
        range, however long the text. By default `max_position_embeddings`, or what the dense model's layers with a
        sliding window see, if that is less.
    num_retrieved_blocks: k, the number of blocks that each query retrieves.
    num_local_blocks: blocks read directly before a query's own block (`"sliding"` only). By default as many as fit.
        With fewer, retrieved blocks stand at a shorter distance (`docs/positions.md`).
    local_attention: `"sliding"`, or `"chunked"` for the paper's protocol.
    retrieval_granularity: what each choice of blocks is made for: a token and head (`"token_and_head"`), a head, shared
        by the queries of a block (`"head"`), or a token, shared by its heads (`"token"`).
    train_retrieved_blocks: if set, a training query sees its local blocks and only the so many best of its earlier
        blocks (`"sliding"` only). None: it sees them all. When training through a cache, it replaces
        `num_retrieved_blocks`.
    num_padded_tokens: rows at the end of both embeddings that belong to no token: they round the vocabulary up to a
        multiple of 64, say. They are never predicted.
    landmark_key: what stands for a block where it is scored: the key of its landmark token (`"token"`, the paper's), or
        one `"pooled"` of the block's own keys (`docs/landmark_keys.md`).
    landmark_query_rank: rank of what each layer adds to its queries where they score landmarks; 0 for nothing.
    block_weight: what an earlier block weighs where it is read: what its landmark scores (`"landmark"`, the paper's),
        or what its tokens weigh in ordinary attention (`"exact"`), so that landmarks only choose which blocks are read
        (`docs/exact_weights.md`).
    num_sink_blocks: so many of the retrieved blocks are the first ones of the text, whatever they score.
    num_question_blocks: with `"head"` and `"sliding"`, the queries of the so many last blocks of each call choose for
        themselves, as with `"token_and_head"`: a question stands there, and shares no choice with the text before it.
    num_reranked_blocks: there, and in decoding steps with `"head"` and `"exact"`, landmarks propose so many blocks, and
        those of them are read that weigh most. 0: landmarks alone choose.
    predict_from_landmark: True: the landmark of a block predicts the token after it. False: the block's last ordinary
        token does.
    kernels: False: PyTorch computes attention on a GPU, too, not the Triton kernels. It may be changed on a loaded
        model, and is not saved: it concerns a machine, not a model.

    Raises:
        ValueError: the window cannot hold what the settings ask for. Names the field, its value and the remedy.
    """

    family: ClassVar[Family]
    # Tools that cut prompts, as lm-eval does, look for a limit here before they take `max_position_embeddings` for one.
    # There is none; a trillion is safe as a machine integer, and a batch as wide as that is refused at once.
    n_positions: ClassVar[int] = 2**40

    landmark_token_id: int | None = None
    block_size: int = 64
    train_context_length: int | None = None
    num_retrieved_blocks: int = 4
    num_local_blocks: int | None = None
    local_attention: str = "sliding"
    retrieval_granularity: str = "token_and_head"
    train_retrieved_blocks: int | None = None
    landmark_key: str = "token"
    landmark_query_rank: int = 0
    block_weight: str = "landmark"
    num_sink_blocks: int = 0
    num_question_blocks: int = 0
    num_reranked_blocks: int = 0
    predict_from_landmark: bool = False
    num_padded_tokens: int = 0
    kernels: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "head_dim", None) is None:  # which some families leave to their models
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.train_context_length is None:
            self.train_context_length = min(self.max_position_embeddings, self.dense_window or math.inf)
        self._check_tokens()
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all fields but `kernels`."""
        fields = super().to_dict()
        fields.pop("kernels", None)
        return fields

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers', with what lets the Auto classes load the folder where the package was not imported."""
        self.auto_map = auto_map(getattr(self, "auto_map", None), self.family.stem)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_loader(save_directory, self.family.stem)

    @property
    def dense_window(self) -> int | None:
        """Tokens that the dense model's layers with a sliding window see; None if it has no such layers."""
        layers = getattr(self, "layer_types", None)
        slides = getattr(self, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers)
        return getattr(self, "sliding_window", None) if slides else None

    def retrieval(
        self,
        num_retrieved_blocks: int | None = None,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention | None = None,
        retrieval_granularity: RetrievalGranularity | None = None,
    ) -> RetrievalSettings:
        """The retrieval settings, checked against the window. Arguments override the configuration's fields."""
        retrieved = self.num_retrieved_blocks if num_retrieved_blocks is None else num_retrieved_blocks
        local = self.num_local_blocks if num_local_blocks is None else num_local_blocks
        attention = _one_of("local_attention", local_attention or self.local_attention, LocalAttention)
        granularity = _one_of(
            "retrieval_granularity", retrieval_granularity or self.retrieval_granularity, RetrievalGranularity
        )
        if retrieved < 0:
            raise ValueError(f"num_retrieved_blocks={retrieved}: must not be negative")
        if local is not None and local < 0:
            raise ValueError(f"num_local_blocks={local}: must not be negative")
        room = self.room_for_local_blocks(retrieved)
        needed = 0 if local is None or attention == "chunked" else local
        if room < needed:
            raise ValueError(
                f"num_retrieved_blocks={retrieved}, num_local_blocks={local}: a window of {retrieved} + 1 prefix "
                f"blocks, {needed} direct ones and the own one takes {(retrieved + needed + 2) * self.block_size} "
                f"positions of train_context_length={self.train_context_length} (block_size={self.block_size}): "
                "retrieve fewer blocks, read fewer directly, or use smaller blocks"
            )
        direct = room if local is None or attention == "chunked" else local
        sinks = min(self.num_sink_blocks, retrieved)
        asked = (self.num_question_blocks, self.num_reranked_blocks)
        questions = asked if (attention, granularity) == ("sliding", "head") else (0, 0)
        exact = self.block_weight == "exact"
        return RetrievalSettings(retrieved, direct, attention, granularity, sinks, exact, *questions)

    def room_for_local_blocks(self, num_retrieved_blocks: int) -> int:
        """Blocks that a query can read directly before its own; negative if the window is too small for the rest."""
        # a window holds the prefix (one slot more than retrieved blocks), the direct blocks and the own block
        return self.train_context_length // self.block_size - (num_retrieved_blocks + 1) - 1

    def segment_retrieval(self, num_retrieved_blocks: int | None = None) -> RetrievalSettings:
        """The settings for training on one segment of a longer text: chunked, with a choice for each token and head.

        The number of retrieved blocks is the argument, else `train_retrieved_blocks`, else `num_retrieved_blocks`.
        """
        retrieved = self.train_retrieved_blocks if num_retrieved_blocks is None else num_retrieved_blocks
        return self.retrieval(retrieved, None, "chunked", "token_and_head")

    def check(self) -> None:
        """Raises ValueError if the settings do not fit each other. Call it again after changing a field."""
        self.retrieval()
        if self.dense_window is not None and self.train_context_length > self.dense_window:
            raise ValueError(
                f"train_context_length={self.train_context_length}: layers of the dense model see no more than "
                f"sliding_window={self.dense_window} tokens, and landmark attention reads a window whole: set at most "
                f"train_context_length={self.dense_window}"
            )
        _one_of("landmark_key", self.landmark_key, LandmarkKey)
        _one_of("block_weight", self.block_weight, BlockWeight)
        if not 0 <= self.num_sink_blocks <= self.num_retrieved_blocks:
            raise ValueError(
                f"num_sink_blocks={self.num_sink_blocks}: must be from 0 to "
                f"num_retrieved_blocks={self.num_retrieved_blocks}, of which they are a part"
            )
        if self.num_question_blocks < 0:
            raise ValueError(f"num_question_blocks={self.num_question_blocks}: must not be negative; 0 for none")
        if self.num_reranked_blocks < 0:
            raise ValueError(f"num_reranked_blocks={self.num_reranked_blocks}: must not be negative; 0 for none")
        if self.num_reranked_blocks and self.block_weight != "exact":
            raise ValueError(
                f"num_reranked_blocks={self.num_reranked_blocks}: what blocks weigh is known with "
                f"block_weight='exact' only, not with {self.block_weight!r}"
            )
        if self.landmark_query_rank < 0:
            raise ValueError(f"landmark_query_rank={self.landmark_query_rank}: must not be negative; 0 for none")
        if self.train_retrieved_blocks is None:
            return
        if self.train_retrieved_blocks < 1:
            raise ValueError(
                f"train_retrieved_blocks={self.train_retrieved_blocks}: must be at least 1, or None for all"
            )
        if self.local_attention != "sliding":
            raise ValueError(
                f"train_retrieved_blocks={self.train_retrieved_blocks}: needs local_attention='sliding', not "
                f"{self.local_attention!r}, which reads all blocks of a call that fits the window"
            )

    def check_model(self) -> None:
        """Raises ValueError if no model can be made of this configuration."""
        if self.landmark_token_id is None:
            raise ValueError(
                "landmark_token_id=None: this checkpoint has no landmark token; "
                f"make one of a {self.family.name} checkpoint with {self.family.conversion}"
            )
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout}: landmark attention has no dropout, set 0")

    def _check_tokens(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size={self.block_size}: a block needs at least one ordinary token and its landmark (>= 2)"
            )
        if not 0 <= self.num_padded_tokens < self.vocab_size:
            raise ValueError(
                f"num_padded_tokens={self.num_padded_tokens}: must be from 0 to less than vocab_size={self.vocab_size}"
            )
        tokens = self.vocab_size - self.num_padded_tokens
        if self.landmark_token_id is not None and not 0 <= self.landmark_token_id < tokens:
            raise ValueError(f"landmark_token_id={self.landmark_token_id}: outside the vocabulary of {tokens} tokens")


class LandmarkLlamaConfig(LandmarkConfig, LlamaConfig):
    """Configuration of a landmark LLaMA: LLaMA's fields and those of `LandmarkConfig`."""

    model_type = "landmark_llama"
    family = Family("llama", "LLaMA", "LandmarkLlama", "from_llama")


def _one_of(name: str, value: str, literal: Any) -> Any:
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, get_args(literal)))}")
    return value
