"""The two models of a comparison: a landmark LLaMA, and transformers' dense LLaMA of the same shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from landmark_llama import LandmarkLlamaConfig
from landmark_llama.configuration import LandmarkConfig

DENSE = "dense"
DENSE_STATIC = "dense static"  # the same model, generating with a preallocated cache
LANDMARK = "landmark"
AGAINST = "against"  # another implementation, named by `--against`


@dataclass
class ModelArguments:
    """Shape of both models. The default is the demo's, with random weights."""

    model: str | None = field(
        default=None, metadata={"help": "Folder of a landmark checkpoint, instead of random weights."}
    )
    vocab_size: int = field(default=1537, metadata={"help": "Vocabulary size, the landmark included."})
    hidden_size: int = field(default=128, metadata={"help": "Width."})
    intermediate_size: int = field(default=344, metadata={"help": "Width inside the feed-forward layer."})
    layers: int = field(default=3, metadata={"help": "Layers."})
    heads: int = field(default=4, metadata={"help": "Query heads."})
    kv_heads: int = field(default=0, metadata={"help": "Key and value heads; 0: as many as query heads."})
    head_dim: int = field(default=32, metadata={"help": "Width of a head."})
    block_size: int = field(default=16, metadata={"help": "Positions of a block, its landmark included."})
    train_context_length: int = field(default=256, metadata={"help": "Landmarked positions of a window."})
    num_retrieved_blocks: int = field(default=4, metadata={"help": "Blocks that a query retrieves."})
    num_local_blocks: int = field(default=2, metadata={"help": "Blocks before its own that a query reads directly."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    device: str = field(default="", metadata={"help": "cpu, cuda, cuda:1, ...; default: cuda if there is one."})
    threads: int = field(default=0, metadata={"help": "Threads on a CPU; 0: PyTorch's default."})
    seed: int = field(default=0, metadata={"help": "Of the weights and of the text."})

    def __post_init__(self) -> None:
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.model is not None:
            for flag in dataclasses.fields(self):
                if flag.name in SHAPE and getattr(self, flag.name) != flag.default:
                    raise ValueError(f"--{flag.name}: --model {self.model} has its own; give one of the two")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        return getattr(torch, self.dtype)


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "block_size",
    "train_context_length",
    "num_retrieved_blocks",
    "num_local_blocks",
)


def landmark_config(args: ModelArguments, granularity: str) -> LandmarkConfig:
    """Configuration of the landmark model, with `granularity` as its `retrieval_granularity`.

    Raises:
        ValueError: the settings do not fit each other, or `--model` is not a landmark checkpoint.
    """
    if args.model is None:
        config = LandmarkLlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads or args.heads,
            head_dim=args.head_dim,
            landmark_token_id=args.vocab_size - 1,
            block_size=args.block_size,
            train_context_length=args.train_context_length,
            num_retrieved_blocks=args.num_retrieved_blocks,
            num_local_blocks=args.num_local_blocks,
        )
    else:
        config = AutoConfig.from_pretrained(args.model)
        if not isinstance(config, LandmarkConfig):
            raise ValueError(f"--model {args.model}: not a landmark checkpoint but {config.model_type!r}")
        if config.local_attention != "sliding":
            raise ValueError(f"--model {args.model}: reads {config.local_attention!r}; only 'sliding' is measured")
    config.retrieval(retrieval_granularity=granularity)  # refuses an unknown one
    config.retrieval_granularity = granularity
    return config


def dense_config(config: LandmarkConfig) -> PreTrainedConfig:
    """Configuration of the dense model of the same shape."""
    own = ("model_type", "architectures", "transformers_version", "dtype")
    dense = AutoConfig.for_model(config.family.dense_type)
    return type(dense)(**{name: getattr(config, name) for name in dense.to_dict() if name not in own})


def load_model(args: ModelArguments, config: LandmarkConfig, implementation: str) -> PreTrainedModel:
    """The model to measure, on its device and in eval mode. `implementation`: `DENSE`, or begins with `LANDMARK`."""
    logging.disable_progress_bar()
    dense = implementation == DENSE
    attention = {"attn_implementation": "sdpa"} if dense else {}
    config = dense_config(config) if dense else config
    if args.model is None:
        torch.manual_seed(args.seed)
        with torch.device(args.device):  # drawing billions of weights on a CPU takes minutes
            model = AutoModelForCausalLM.from_config(config, dtype=args.torch_dtype, **attention)
    else:
        # the dense model can load a landmark checkpoint: its weights have the same names and shapes
        model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=args.torch_dtype, **attention)
    return model.to(args.device).eval()


def random_text(args: ModelArguments, config: LandmarkConfig, length: int, batch: int = 1) -> Tensor:
    """Random ids (batch, length) of any token but the landmark, determined by the seed."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(config.vocab_size - 1, (batch, length), generator=generator)
    return (ids + (ids >= config.landmark_token_id)).to(args.device)


def shape_of(config: LandmarkConfig) -> dict[str, int | str | None]:
    """The fields of a result row that describe the shape."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "block_size",
        "train_context_length",
        "num_retrieved_blocks",
    )
    shape = {name: getattr(config, name) for name in names}
    return {**shape, "num_local_blocks": config.retrieval().num_direct_blocks}
