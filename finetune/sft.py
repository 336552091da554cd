"""Instruction tuning by trl: a landmark model learns from conversations, its loss over the assistant's turns alone.

    python finetune/sft.py --model runs/tiny --data chats.jsonl --output_dir runs/chat
    python finetune/sft.py --model runs/tiny --data chats.jsonl --output_dir runs/chat --lora_rank 16
    accelerate launch finetune/sft.py --model DIR --data chats.jsonl --output_dir OUT --bf16 true

A row is `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}`. Conversations
are packed into rows of the model's training context, each read as if it stood alone. All flags of trl's `SFTConfig` are
taken. The output folder gets the model, or the adapter that `landmark_llama.load_adapter` loads (`docs/sft.md`).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from any folder
from landmark_llama import landmark_lora_config
from landmark_llama.adapters.folder import tokenizer_fingerprint
from landmark_llama.families import landmark_class
from landmark_llama.tokenization import plain_length

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass
class SFTArguments:
    """What is trained on what."""

    model: str = field(metadata={"help": "a landmark model: folder or hub id"})
    data: list[str] = field(metadata={"help": "files of conversations, JSON lines or parquet"})
    lora_rank: int | None = field(default=None, metadata={"help": "train an adapter of this rank; default: everything"})


@dataclass
class LandmarkSFTConfig(SFTConfig):
    """trl's settings, with defaults for landmark models."""

    packing: bool = field(default=True, metadata={"help": "several conversations a row, kept apart"})
    assistant_only_loss: bool = field(default=True, metadata={"help": "no loss over what the others say"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a row; default and maximum: the training context without landmarks"}
    )


def main(argv: list[str]) -> None:
    arguments, config = HfArgumentParser((SFTArguments, LandmarkSFTConfig)).parse_args_into_dataclasses(argv)
    model_class = landmark_class(AutoConfig.from_pretrained(arguments.model), arguments.model)
    model = model_class.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    longest = plain_length(model.config.train_context_length, model.config.block_size)
    config.max_length = longest if config.max_length is None else config.max_length
    if config.max_length > longest:
        sys.exit(
            f"error: --max_length {config.max_length}: train_context_length={model.config.train_context_length} "
            f"positions hold {longest} tokens and their landmarks: give at most that"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if arguments.lora_rank:
        from landmark_llama.adapters.peft_model import LandmarkPeftModel

        lora = landmark_lora_config(
            model.config,
            r=arguments.lora_rank,
            lora_alpha=2 * arguments.lora_rank,
            base_model_name_or_path=str(arguments.model),
        )
        model = LandmarkPeftModel(model, lora, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    file_type = "parquet" if arguments.data[0].endswith(".parquet") else "json"
    data = load_dataset(file_type, data_files=arguments.data, split="train")
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    model.config.use_cache = True  # the Trainer turns it off, and whoever loads the model wants to generate with it
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
