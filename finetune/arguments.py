"""What can be set for a fine-tuning run: four dataclasses, filled from a YAML file and from flags that override it."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, PretrainedConfig, TrainingArguments

from finetune.demo.arguments import DemoArguments

DEFAULT_BLOCK_SIZE = 64
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UserError(Exception):
    """A mistake in what the user gave; the message says in one sentence what to do. `run.py` prints no traceback."""


@dataclass
class ModelArguments:
    """Where the model starts, and how it attends."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a LLaMA checkpoint, with or without landmarks: a folder or a hub name"}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "a LLaMA configuration (JSON file or folder) to start from random weights instead"},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "tokenizer folder or hub name if not the checkpoint's; `embedded` trains one on the corpus"},
    )
    attention: str = field(
        default="landmark",
        metadata={"help": "landmark, or dense: the same data for a plain LLaMA", "choices": ["landmark", "dense"]},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "positions of a block, its landmark included (the checkpoint's, else 64)"}
    )
    num_retrieved_blocks: int | None = field(default=None, metadata={"help": "blocks retrieved at inference"})
    num_local_blocks: int | None = field(default=None, metadata={"help": "blocks before a token's own seen directly"})
    local_attention: str | None = field(default=None, metadata={"help": "sliding or chunked"})
    retrieval_granularity: str | None = field(default=None, metadata={"help": "token_and_head, head or token"})
    train_retrieved_blocks: int | None = field(
        default=None,
        metadata={
            "help": "in training, too, a token sees only so many of its best earlier blocks (default: all; of earlier "
            "segments num_retrieved_blocks)"
        },
    )
    landmark_key: str | None = field(
        default=None, metadata={"help": "token, or pooled: what stands for a block is made of the block's own keys"}
    )
    landmark_query_rank: int | None = field(
        default=None, metadata={"help": "rank of the calibration of the queries that score landmarks (0: none)"}
    )
    block_weight: str | None = field(
        default=None,
        metadata={"help": "landmark, or exact: a block weighs what its tokens do, and landmarks only choose blocks"},
    )
    num_sink_blocks: int | None = field(
        default=None, metadata={"help": "so many of the retrieved blocks are always the first ones of the text"}
    )
    num_question_blocks: int | None = field(
        default=None, metadata={"help": "the last so many blocks of a call choose per token, whatever the granularity"}
    )
    num_reranked_blocks: int | None = field(
        default=None, metadata={"help": "there and in decoding steps, so many blocks are compared by what they weigh"}
    )
    landmarks_only: bool = field(
        default=False,
        metadata={"help": "train the calibration of landmarks alone; needs exact block_weight and landmark_query_rank"},
    )
    predict_from_landmark: bool | None = field(
        default=None, metadata={"help": "a block's landmark, not its last token, predicts the next block's first token"}
    )
    pad_vocabulary_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "rows of no token behind the embeddings, up to a multiple of this: 64 suits GPUs"},
    )
    kernels: bool = field(
        default=True, metadata={"help": "false: PyTorch computes attention on a GPU, too, not the Triton kernels"}
    )
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": ["float32", "bfloat16"]})

    def block_size_of(self, config: PretrainedConfig) -> tuple[int, int | None]:
        """The block size that rows are packed with, and the landmark's id (None for a dense model)."""
        if self.attention == "landmark":
            return config.block_size, config.landmark_token_id
        return self.block_size or DEFAULT_BLOCK_SIZE, None


@dataclass
class DataArguments:
    """What is read, and how it becomes rows."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSONL (.zst, .gz), parquet and text files or folders of them, one hub data set name, or "
            "`embedded`: the demo's corpus (finetune/demo/arguments.py lists its flags)"
        },
    )
    mixture: list[str] = field(
        default_factory=list,
        metadata={"help": "subsets and their shares of the rows, such as `arxiv=0.1 book=0.2` (docs/data.md)"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read, tokenise and pack while training: for data larger than the disk"}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "streaming: rows that are held to be drawn from"})
    pack_documents: str = field(
        default="join",
        metadata={
            "help": "join: documents follow each other in a row; whole: so, but none is cut that a row can hold; "
            "apart: those of a row do not see each other either",
            "choices": ["join", "whole", "apart"],
        },
    )
    context_length: int = field(default=512, metadata={"help": "landmarked positions of a row"})
    segments: int = field(
        default=1,
        metadata={
            "help": "train through memory: a row is so many segments, one read after the other; each fits "
            "context_length beside the blocks that it retrieves from earlier ones (docs/training_through_memory.md)"
        },
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "count rows that cannot be read instead of stopping"})
    heldout_share: float = field(default=0.02, metadata={"help": "share of the documents kept for evaluation"})
    max_heldout_rows: int = field(default=500, metadata={"help": "evaluate on at most this many rows"})
    preprocessing_workers: int = field(default=2, metadata={"help": "processes that read and tokenise"})
    demo: DemoArguments = field(default_factory=DemoArguments, init=False)  # flags of their own, see `parse_arguments`


@dataclass
class AdapterArguments:
    """Training a LoRA adapter and the landmark's embedding row in place of all weights (`docs/adapters.md`)."""

    lora_rank: int | None = field(default=None, metadata={"help": "train an adapter of this rank, not all weights"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapter's change is scaled by alpha / rank (default: twice the rank)"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapter"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={"help": "linear layers that get an adapter (all of a decoder layer)"},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: hold the base's weights in 4 bits (NF4; needs bitsandbytes)"}
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' own training arguments with this project's defaults."""

    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "cosine down to a floor"})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1},
        metadata={"help": "min_lr_rate: the floor, as a share of the peak"},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "throw away the run that output_dir holds"})
    max_nan_steps: int = field(
        default=0,
        metadata={"help": "leave out so many steps of a run whose loss or gradient is not finite; stop at one more"},
    )
    eval_passkey_steps: int = field(
        default=0, metadata={"help": "ask a few pass keys after every so many steps, and log the share found; 0: never"}
    )
    eval_passkey_lengths: list[int] = field(
        default_factory=list,
        metadata={"help": "tokens of their prompts (default: context_length, and four times that)"},
    )
    eval_passkey_samples: int = field(default=5, metadata={"help": "prompts of each length"})
    context_parallel_size: int = field(
        default=1,
        metadata={
            "help": "so many processes hold each row together, for rows longer than one device holds "
            "(docs/distributed.md); it divides their number and the model's attention heads"
        },
    )
    cpu_threads: int = field(
        default=0, metadata={"help": "threads of one process on a CPU; 0: all cores, shared evenly"}
    )
    # A loss that is not a number must show: the Trainer would otherwise log the average of the steps before.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide losses that are not finite"})

    def __post_init__(self) -> None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if not self.bf16 and not self.fp16:  # what `accelerate launch` was told is recorded and counted with, too
            self.bf16, self.fp16 = launched == "bf16", launched == "fp16"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if not torch.cuda.is_available():
                self.use_cpu, self.ddp_backend = True, self.ddp_backend or "gloo"
            if self.ddp_find_unused_parameters is None:
                self.ddp_find_unused_parameters = False  # there are none, and looking for them takes time
        super().__post_init__()
        if self.disable_tqdm is None or not sys.stderr.isatty():
            self.disable_tqdm = not sys.stderr.isatty()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False


ARGUMENTS = (ModelArguments, DataArguments, RunArguments, AdapterArguments)


class _Parser(HfArgumentParser):
    """Says what is wrong in one sentence, where argparse would print hundreds of lines of usage first."""

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments, AdapterArguments]:
    """Reads `--config FILE` first and then the flags, which win.

    Raises:
        UserError: the file cannot be read, a key or flag is unknown, or a value is not of its type.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, flags = finder.parse_known_args(argv)
    from_file = _flags_from_yaml(Path(found.config), _field_names()) if found.config else []
    model, data, run, adapter, rest = _parse(ARGUMENTS, [*from_file, *flags])
    data.demo, unknown = _parse(DemoArguments, rest)
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}{_suggestion(unknown[0].lstrip('-'), _field_names())}")
    _check(model, data, run, adapter)
    return model, data, run, adapter


def _parse(classes: type | tuple[type, ...], flags: list[str]) -> tuple:
    """An instance of each of `classes`, and the flags that belong to none of them."""
    try:
        return _Parser(classes, allow_abbrev=False).parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error


def _field_names() -> list[str]:
    return [f.name for cls in (*ARGUMENTS, DemoArguments) for f in dataclasses.fields(cls) if f.init]


def _flags_from_yaml(path: Path, known: list[str]) -> list[str]:
    """The file's keys and values as flags, so that both are read and checked in one way."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected `key: value` lines, found {type(settings).__name__}")
    flags = []
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_suggestion(str(key), known)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check(model: ModelArguments, data: DataArguments, run: RunArguments, adapter: AdapterArguments) -> None:
    """Refuses what cannot work before anything is read or downloaded."""
    _check_adapter(model, adapter)
    _check_landmarks_only(model, data, run, adapter)
    if (model.model_name_or_path is None) == (model.config_name is None):
        raise UserError("give one of --model_name_or_path (a checkpoint) and --config_name (random weights)")
    if model.config_name and not model.tokenizer_name:
        raise UserError("--config_name starts from random weights and needs --tokenizer_name")
    if model.tokenizer_name == "embedded" and data.data != ["embedded"]:
        raise UserError("--tokenizer_name embedded needs --data embedded")
    if not run.output_dir:
        raise UserError("--output_dir is missing: the folder for the trained model")
    if model.block_size is not None and model.block_size < 2:
        raise UserError(f"--block_size {model.block_size}: a block needs at least one token and its landmark (>= 2)")
    if model.pad_vocabulary_to_multiple_of is not None:
        _check_padding(model.pad_vocabulary_to_multiple_of, model, adapter)
    if run.max_nan_steps < 0:
        raise UserError(f"--max_nan_steps {run.max_nan_steps}: must be 0 or more")
    if run.eval_passkey_steps < 0:
        raise UserError(f"--eval_passkey_steps {run.eval_passkey_steps}: must be 0 (never) or more")
    if run.eval_passkey_samples < 1:
        raise UserError(f"--eval_passkey_samples {run.eval_passkey_samples}: at least one prompt is needed (>= 1)")
    _check_data(data, run)
    _check_rows(data, model)
    if run.context_parallel_size != 1:
        _check_context_parallel(run, model, data)


def _check_landmarks_only(
    model: ModelArguments, data: DataArguments, run: RunArguments, adapter: AdapterArguments
) -> None:
    if not model.landmarks_only:
        return
    clashes = {
        "--attention dense": model.attention == "dense",
        f"--lora_rank {adapter.lora_rank}": adapter.lora_rank is not None,
        f"--segments {data.segments}": data.segments > 1,
        f"--context_parallel_size {run.context_parallel_size}": run.context_parallel_size > 1,
        "--pack_documents apart": data.pack_documents == "apart",
        "--gradient_checkpointing true": run.gradient_checkpointing,
    }
    for flag, clashes_with_it in clashes.items():
        if clashes_with_it:
            raise UserError(f"--landmarks_only true: cannot be combined with {flag}: leave one of them out")


def _check_padding(multiple: int, model: ModelArguments, adapter: AdapterArguments) -> None:
    flag = f"--pad_vocabulary_to_multiple_of {multiple}"
    if multiple < 1:
        raise UserError(f"{flag}: must be 1 or more")
    if model.attention == "dense":
        raise UserError(f"{flag} needs --attention landmark: a dense LLaMA would predict the padding")
    if adapter.lora_rank is not None:
        raise UserError(f"{flag}: an adapter is loaded onto its base as that is; leave it out with --lora_rank")


def _check_data(data: DataArguments, run: RunArguments) -> None:
    """Refuses what cannot be read."""
    if not data.data:
        raise UserError("--data is missing: JSONL, parquet or text files or folders, a hub data set, or `embedded`")
    if data.streaming and run.max_steps <= 0:
        raise UserError("--streaming true needs --max_steps: a stream has no end that an epoch could be counted by")
    if data.shuffle_buffer < 1:
        raise UserError(f"--shuffle_buffer {data.shuffle_buffer}: at least one row must be held (>= 1)")
    if data.mixture and data.data == ["embedded"]:
        raise UserError("--mixture is for files and hub data sets; the embedded corpus has --corpus_retrieval_share")
    if not 0 < data.heldout_share < 1:
        raise UserError(f"--heldout_share {data.heldout_share}: must lie between 0 and 1")
    characters = data.demo.corpus_retrieval_characters
    if len(characters) != 2 or not 0 < characters[0] <= characters[1]:
        raise UserError(f"--corpus_retrieval_characters {characters}: give the shortest and the longest document")


def _check_rows(data: DataArguments, model: ModelArguments) -> None:
    """Refuses rows that the model cannot be trained on."""
    if data.context_length < 2 * (model.block_size or 2):
        raise UserError(f"--context_length {data.context_length}: a row must hold two blocks or more")
    if data.pack_documents == "apart" and model.attention == "dense":
        raise UserError("--pack_documents apart needs --attention landmark: a dense LLaMA would see across documents")
    if data.segments < 1:
        raise UserError(f"--segments {data.segments}: a row has at least one (>= 1)")
    if data.segments > 1 and model.attention == "dense":
        raise UserError(f"--segments {data.segments} needs --attention landmark: a dense LLaMA retrieves nothing")
    if data.segments > 1 and data.pack_documents == "apart":
        raise UserError(
            f"--segments {data.segments} needs --pack_documents join or whole: a cache holds one document a row"
        )


def _check_context_parallel(run: RunArguments, model: ModelArguments, data: DataArguments) -> None:
    size = run.context_parallel_size
    flag = f"--context_parallel_size {size}"
    if size < 1 or run.world_size % size:
        raise UserError(f"{flag}: must divide the number of processes, {run.world_size}; start more or give a divisor")
    if model.attention == "dense":
        raise UserError(f"{flag} needs --attention landmark")
    if data.segments > 1:
        raise UserError(f"{flag}: not with --segments {data.segments}, which is another way to long rows")
    if data.pack_documents == "apart":
        raise UserError(f"{flag} needs --pack_documents join or whole: processes share rows of one document")
    if not run.average_tokens_across_devices:
        raise UserError(f"{flag} needs --average_tokens_across_devices true: the loss is that of all processes' tokens")


def _check_adapter(model: ModelArguments, adapter: AdapterArguments) -> None:
    if adapter.lora_rank is None:
        if adapter != AdapterArguments():
            raise UserError("--lora_rank is missing: --load_in_4bit and the other --lora_ flags need it")
        return
    if adapter.lora_rank < 1:
        raise UserError(f"--lora_rank {adapter.lora_rank}: must be at least 1")
    if adapter.lora_alpha is not None and adapter.lora_alpha <= 0:
        raise UserError(f"--lora_alpha {adapter.lora_alpha}: must be larger than 0")
    if not 0 <= adapter.lora_dropout < 1:
        raise UserError(f"--lora_dropout {adapter.lora_dropout}: must lie between 0 and 1")
    for name in adapter.lora_target_modules:
        if name not in LORA_TARGETS:
            raise UserError(f"--lora_target_modules {name}: must be some of {', '.join(LORA_TARGETS)}")
    if not adapter.lora_target_modules:
        raise UserError(f"--lora_target_modules is empty: give some of {', '.join(LORA_TARGETS)}")
    if model.attention != "landmark":
        raise UserError(f"--lora_rank {adapter.lora_rank}: only for --attention landmark")
    if model.config_name:
        raise UserError(
            f"--lora_rank {adapter.lora_rank}: needs --model_name_or_path, the checkpoint it is loaded onto"
        )
