"""LandmarkLlamaConfig: LLaMA's configuration and what landmark attention adds, validated."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from transformers import LlamaConfig

LocalAttention = Literal["sliding", "chunked"]
RetrievalGranularity = Literal["token_and_head", "head", "token"]
LandmarkKey = Literal["token", "pooled"]

RETRIEVAL_SETTINGS = ("num_retrieved_blocks", "num_local_blocks", "local_attention", "retrieval_granularity")


class RetrievalSettings(NamedTuple):
    """How a model reads what lies outside its window; checked against the window by `LandmarkLlamaConfig.retrieval`.

    `num_direct_blocks`: blocks before the own one that are read directly (`sliding`), or blocks of a chunk (`chunked`).
    """

    num_retrieved_blocks: int
    num_direct_blocks: int
    local_attention: LocalAttention
    granularity: RetrievalGranularity


class LandmarkLlamaConfig(LlamaConfig):
    """Configuration of a landmark LLaMA.

    Beside LLaMA's own fields:

    landmark_token_id: id of the landmark token (None only until a tokenizer has been given one).
    block_size: positions of a block, its landmark included (the paper's `mem_freq` + 1).
    train_context_length: landmarked positions that the model was trained on; no position ever leaves this range.
        By default `max_position_embeddings`.
    num_retrieved_blocks: k, blocks that each query fetches from further back.
    num_local_blocks: blocks read directly before a query's own block (`"sliding"` only); by default as many as fit.
        Fewer bring what is retrieved nearer (`docs/positions.md`).
    local_attention: `"sliding"`, or `"chunked"` for the paper's protocol.
    retrieval_granularity: who shares a choice of blocks: nobody (`"token_and_head"`), the queries of a block
        (`"head"`), or the heads of a token (`"token"`).
    train_retrieved_blocks: if given, a query of a call that is attended to as a whole, as in training, sees no more
        than so many of its earlier blocks, those whose landmarks it scores highest, beside its local ones (`"sliding"`
        only): what it will have while reading long texts. By default it sees them all. In training through a cache,
        how many blocks of earlier calls it retrieves, in place of `num_retrieved_blocks`.
    landmark_key: what stands for a block where it is scored: the key of its landmark token (`"token"`, the paper's), or
        one `"pooled"` of the block's own keys (`docs/landmark_keys.md`).
    landmark_query_rank: rank of what each layer adds to its queries where they score landmarks; 0 for nothing.
    predict_from_landmark: whether the landmark of a block, rather than its last ordinary token, predicts what follows.

    Raises:
        ValueError: naming the field, its value and the remedy, if the window cannot hold what the settings ask for.
    """

    model_type = "landmark_llama"

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
    predict_from_landmark: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.train_context_length is None:
            self.train_context_length = self.max_position_embeddings
        super().__post_init__(**kwargs)
        self._check_tokens()
        self.check()

    def retrieval(
        self,
        num_retrieved_blocks: int | None = None,
        num_local_blocks: int | None = None,
        local_attention: LocalAttention | None = None,
        retrieval_granularity: RetrievalGranularity | None = None,
    ) -> RetrievalSettings:
        """The retrieval settings, those given here in place of the configuration's own, checked against the window."""
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
        # the prefix has one slot more than blocks are retrieved; then come the direct blocks and the own one
        room = self.train_context_length // self.block_size - (retrieved + 1) - 1
        needed = 0 if local is None or attention == "chunked" else local
        if room < needed:
            raise ValueError(
                f"num_retrieved_blocks={retrieved}, num_local_blocks={local}: a window of {retrieved} + 1 prefix "
                f"blocks, {needed} direct ones and the own one takes {(retrieved + needed + 2) * self.block_size} "
                f"positions of train_context_length={self.train_context_length} (block_size={self.block_size}): "
                "retrieve or keep fewer blocks, or use smaller ones"
            )
        if attention == "chunked":
            direct = room + 1
        else:
            direct = room if local is None else local
        return RetrievalSettings(retrieved, direct, attention, granularity)

    def segment_retrieval(self, num_retrieved_blocks: int | None = None) -> RetrievalSettings:
        """How a segment of a longer text is trained on: as in chunked reading, and no choice of blocks is shared.

        It retrieves as many blocks as are given here, else `train_retrieved_blocks`, else `num_retrieved_blocks`.
        """
        retrieved = self.train_retrieved_blocks if num_retrieved_blocks is None else num_retrieved_blocks
        return self.retrieval(retrieved, None, "chunked", "token_and_head")

    def check(self) -> None:
        """Raises ValueError if the settings, which may have been changed since, do not fit each other."""
        self.retrieval()
        _one_of("landmark_key", self.landmark_key, LandmarkKey)
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

    def _check_tokens(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size={self.block_size}: a block needs at least one ordinary token and its landmark (>= 2)"
            )
        if self.landmark_token_id is not None and not 0 <= self.landmark_token_id < self.vocab_size:
            raise ValueError(
                f"landmark_token_id={self.landmark_token_id}: outside the vocabulary of {self.vocab_size} tokens"
            )


def _one_of(name: str, value: str, literal: Any) -> Any:
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, get_args(literal)))}")
    return value
