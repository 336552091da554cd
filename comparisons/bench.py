"""What a configuration says: the data, the base model, its training, the methods, and what is measured.

Every field has its meaning here and its value in `configs/*.yaml`. Unknown names are refused.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from eval_passkey.prompts import InputError

Section = TypeVar("Section")


@dataclass(kw_only=True)
class Domain:
    """One kind of text.

    train, evaluate: files and folders (.jsonl, .jsonl.zst, .txt, .parquet), relative to --data; `python` is the
        documentation and the sources of the Python that runs this, `retrieval` the retrieval documents of
        `finetune/demo`, neither of which needs a file.
    heldout: every so-manieth document of `train` is for evaluation instead; None: `evaluate` has the texts for that.
    share: of the training tokens.
    excerpt: characters taken from one document at most, from a place drawn for it; the whole document in evaluation.
    retrieval: settings of `finetune.demo.corpus.make_corpus`, for `retrieval`.
    """

    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    heldout: int | None = None
    share: float = 1.0
    excerpt: int = 100_000
    retrieval: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Training:
    """How every method is trained: AdamW, cosine, one row a stretch of consecutive tokens of a text.

    steps, rows: optimiser steps, and rows of each.
    row_tokens: of a row. Methods that carry a memory read it in segments; others cut it into rows of their own.
    """

    steps: int
    rows: int = 4
    row_tokens: int = 2048
    learning_rate: float = 2e-3
    min_lr_rate: float = 0.1
    warmup_share: float = 0.02
    weight_decay: float = 0.001
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    bf16: bool = False

    @property
    def tokens(self) -> int:
        """That a method is trained on."""
        return self.steps * self.rows * self.row_tokens


@dataclass(kw_only=True)
class Perplexity:
    """Table 1. `lengths` of context, and `tokens` of each domain that every length reads."""

    lengths: list[int] = field(default_factory=list)
    tokens: int = 65536


@dataclass(kw_only=True)
class Retrieval:
    """Table 2. Tasks by the names of `eval_passkey`, `samples` prompts a task and length."""

    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    samples: int = 10


@dataclass(kw_only=True)
class Cost:
    """Table 3. Texts of these `lengths` are read, and `new_tokens` decoded after each."""

    lengths: list[int] = field(default_factory=list)
    new_tokens: int = 16


@dataclass(kw_only=True)
class Method:
    """One row of the tables.

    module: file of `comparisons/methods`; default: the row's label.
    options: of its `build`.
    weights: label of the method whose trained weights it starts from.
    steps: of its own training; default: the bench's, or 0 with `weights`.
    max_length: texts longer than this are not read, and `reason` says why in the tables.
    seeds: the first so many of the bench's; None: all.
    measures: kinds of rows it takes part in; default: all.
    """

    module: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    steps: int | None = None
    max_length: int | None = None
    reason: str = ""
    seeds: int | None = None
    measures: list[str] = field(default_factory=lambda: ["perplexity", "retrieval", "cost"])


@dataclass(kw_only=True)
class Bench:
    """A whole configuration.

    base: folder of a dense LLaMA with its tokenizer to start from; None: `model` from random weights.
    model: fields of LlamaConfig.
    vocabulary: pieces of the tokenizer that is trained on the training texts, where `base` brings none.
    """

    data: dict[str, Domain]
    training: Training
    methods: dict[str, Method]
    base: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 2048
    seeds: list[int] = field(default_factory=lambda: [0])
    perplexity: Perplexity = field(default_factory=Perplexity)
    retrieval: Retrieval = field(default_factory=Retrieval)
    cost: Cost = field(default_factory=Cost)

    @property
    def read(self) -> list[str]:
        """The domains whose perplexity is measured: all but the retrieval documents, which are too short."""
        return [name for name, domain in self.data.items() if "retrieval" not in domain.train]

    @property
    def longest(self) -> int:
        """Tokens of the longest text whose perplexity is measured."""
        return max(self.perplexity.lengths, default=0)


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Bench:
    """The bench of a YAML file; InputError, naming the field, if it cannot be used.

    overrides: values of top-level fields, or of `section.field`.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read ({error})") from error
    for name, value in (overrides or {}).items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    sections = {"training": Training, "perplexity": Perplexity, "retrieval": Retrieval, "cost": Cost}
    tables = {"data": Domain, "methods": Method}
    for name in tables.keys() & values.keys():
        values[name] = {key: _section(tables[name], entry, f"{name}.{key}") for key, entry in values[name].items()}
    for name in sections.keys() & values.keys():
        values[name] = _section(sections[name], values[name], name)
    bench = _section(Bench, values, "")
    _check(bench)
    return bench


def _section(kind: type[Section], values: dict | None, where: str) -> Section:
    values, known = values or {}, {entry.name for entry in fields(kind)}
    for name in values.keys() - known:
        raise InputError(f"{where}.{name}".lstrip(".") + f": no such field; there are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where or 'the configuration'}: {error}") from error


def _check(bench: Bench) -> None:
    if bench.base is None and not bench.model:
        raise InputError("base: give a folder with a dense LLaMA, or `model` with the fields of one")
    for label, method in bench.methods.items():
        method.module = method.module or label
        if method.weights is not None and method.weights not in bench.methods:
            raise InputError(f"methods.{label}.weights={method.weights}: no such method")
        if method.steps is None:
            method.steps = bench.training.steps if method.weights is None else 0
