"""The flags of the embedded corpus and its tokenizer. `finetune/run.py` reads them for `--data embedded` alone.

They may stand in the YAML file or on the command line; `--help` does not list them.
"""

from dataclasses import dataclass, field


@dataclass
class DemoArguments:
    """What the embedded corpus is made of, and the size of its tokenizer."""

    corpus_folder: str | None = field(default=None, metadata={"help": "where it is written (OUTPUT_DIR/corpus)"})
    corpus_documents: int = field(default=20_000, metadata={"help": "documents in all"})
    corpus_retrieval_share: float = field(default=0.9, metadata={"help": "share of retrieval documents"})
    corpus_retrieval_characters: list[int] = field(
        default_factory=lambda: [80, 1000], metadata={"help": "shortest and longest retrieval document"}
    )
    corpus_copy_share: float = field(
        default=0.1, metadata={"help": "share of the retrieval documents that only say something twice"}
    )
    corpus_register_share: float = field(
        default=0.3, metadata={"help": "share of registers among the others, which hide numbers in texts"}
    )
    corpus_refrain_share: float = field(
        default=0.35, metadata={"help": "share of those texts that say a few sentences over and over"}
    )
    corpus_seed: int = field(default=0, metadata={"help": "seed of the documents"})
    vocabulary_size: int = field(default=1536, metadata={"help": "pieces of the `embedded` tokenizer"})
