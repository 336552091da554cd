"""What the command measures, and how: its flags, checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from eval_passkey.models import Subject
from eval_passkey.prompts import InputError
from eval_passkey.tasks import TaskName
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.reading.tiered_storage import storage_named
from landmark_llama.reading.tiers import TierError


@dataclass(kw_only=True)
class ReadingArguments:
    """How models are loaded, and how a landmark model reads."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as in the checkpoint."}
    )
    device: str = field(default="", metadata={"help": "cpu, cuda, cuda:1, ...; default: cuda where there is one."})
    num_retrieved_blocks: int | None = field(default=None, metadata={"help": "Landmark model: blocks a query reads."})
    num_local_blocks: int | None = field(
        default=None, metadata={"help": "Landmark model: blocks before a query's own that it reads directly."}
    )
    retrieval_granularity: str | None = field(
        default=None, metadata={"help": "Landmark model: token_and_head, head or token."}
    )
    local_attention: str | None = field(default=None, metadata={"help": "Landmark model: sliding or chunked."})
    kernels: bool = field(
        default=True, metadata={"help": "Landmark model: false: PyTorch attends on a GPU too, not the Triton kernels."}
    )
    cache: str = field(
        default="device",
        metadata={"help": "Landmark model: where what it has read is kept: device, host, or file:FOLDER."},
    )

    def storage(self, subject: Subject) -> Callable[[int], BlockStorage] | None:
        """The storage that `cache` names, for a LandmarkCache of the model to be measured; None for the default.

        InputError if there is no such storage, or no such cache.
        """
        if self.cache == "device":
            return None
        if not subject.is_landmark:
            raise InputError(f"--cache {self.cache}: needs a landmark model, and {subject.name} is none")
        try:
            return storage_named(self.cache)
        except (ValueError, TierError) as error:
            raise InputError(f"--cache {self.cache}: {error}") from error


@dataclass
class Arguments(ReadingArguments):
    """What is measured, and how."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model with its tokenizer."})
    output: str = field(metadata={"help": "Folder of the results; made if it is not there."})
    baseline: str | None = field(default=None, metadata={"help": "A second model, shown beside the first."})
    task: list[str] = field(
        default_factory=lambda: ["passkey"],
        metadata={
            "help": "What is asked, one or several: passkey[:paper|twice|once|FILE.json], multi_key[:N], "
            "multi_value[:N], multi_query[:N], variable_tracking[:HOPS], key_value, line_retrieval; each with :text "
            "behind it to be hidden in the texts of --haystack."
        },
    )
    haystack: list[str] = field(
        default_factory=list, metadata={"help": "Text files that tasks with :text are hidden in, joined in this order."}
    )
    template: str | None = field(
        default=None, metadata={"help": "JSON file with the wording of passkey; default: the paper's."}
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Ask in the chat template of the tokenizer, as a user would."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [512, 4096, 32768],
        metadata={"help": "Prompt lengths in tokens of the model's own tokenizer, BOS included."},
    )
    length_spread: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of a length are up to this many tokens less one shorter, in turn; default: the ordinary "
            "tokens in a block of the landmark model, or 1 where there is none."
        },
    )
    exact_lengths: bool = field(default=False, metadata={"help": "Every prompt has exactly its length."})
    baseline_max_length: int | None = field(
        default=None, metadata={"help": "Lengths above this are not asked of the baseline."}
    )
    samples: int = field(default=20, metadata={"help": "Prompts a task and length."})
    depths: Literal["random", "grid"] = field(
        default="random", metadata={"help": "Where the needle stands: anywhere, or in turn at evenly spaced depths."}
    )
    num_depths: int = field(default=5, metadata={"help": "Depths of the grid; has to divide --samples."})
    seed: int = field(default=0, metadata={"help": "Seed of the first prompt of a length; the next has the next one."})
    reading_retrieved_blocks: int | None = field(
        default=None,
        metadata={
            "help": "Landmark model, with --cache: blocks that a query reads before the last window of the prompt, "
            "as long as training rows, where the question stands; default: as many as there."
        },
    )
    index: Literal["exact", "hnsw", "ivf"] = field(
        default="exact",
        metadata={"help": "Landmark model, on a CPU: blocks are chosen exactly, or by an index of the package faiss."},
    )
    needle_rank: bool = field(
        default=False,
        metadata={"help": "Also say at which rank each layer and head of the landmark model sees the needle's block."},
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        names = [TaskName.parse(name) for name in self.task]
        if not names:
            raise InputError("--task: at least one task is needed")
        if self.haystack and not any(name.text for name in names):
            raise InputError(f"--haystack {self.haystack[0]}: no task reads it; write --task {self.task[0]}:text")
        if self.template and all(name.kind != "passkey" or name.wording for name in names):
            raise InputError(f"--template {self.template}: no task has it; it is the wording of --task passkey")
        self.task = list(dict.fromkeys(map(str, names)))
        self.lengths = sorted(set(self.lengths))
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.needle_rank and self.device != "cpu":
            raise InputError(f"--needle_rank: is measured on a CPU, not on {self.device}; add --device cpu")

    def _check_numbers(self) -> None:
        for length in self.lengths:
            if length < 1:
                raise InputError(f"--lengths {length}: a prompt has at least one token")
        if not self.lengths:
            raise InputError("--lengths: at least one length is needed")
        if self.reading_retrieved_blocks is not None:
            if self.reading_retrieved_blocks < 0:
                raise InputError(f"--reading_retrieved_blocks {self.reading_retrieved_blocks}: must not be negative")
            if self.cache == "device":
                raise InputError(
                    f"--reading_retrieved_blocks {self.reading_retrieved_blocks}: a prompt is read in several calls "
                    "with --cache host or file:FOLDER alone; add it"
                )
        for name in ("samples", "num_depths", "length_spread", "baseline_max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.depths == "grid" and self.samples % self.num_depths:
            raise InputError(f"--samples {self.samples}: must be a multiple of --num_depths {self.num_depths}")
        if self.exact_lengths and self.length_spread is not None:
            raise InputError(f"--length_spread {self.length_spread}: contradicts --exact_lengths; give one of them")

    def depth(self, sample: int) -> float | None:
        """Depth of a length's n-th prompt; None where it is drawn from the seed."""
        if self.depths == "random":
            return None
        return (sample % self.num_depths) / max(self.num_depths - 1, 1)
