"""What a run with `--lora_rank` trains: LoRA and the landmark's embedding row, the base in 4 bits if asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from finetune.arguments import AdapterArguments, UserError
from landmark_llama.adapters.folder import tokenizer_fingerprint
from landmark_llama.language_model import LandmarkForCausalLM

if TYPE_CHECKING:
    from landmark_llama.adapters.peft_model import LandmarkPeftModel


def add_adapter(
    model: LandmarkForCausalLM, tokenizer: PreTrainedTokenizerBase, args: AdapterArguments, base: str
) -> LandmarkPeftModel:
    """`model` with a new adapter, all else frozen. `base`: the checkpoint, which the adapter remembers."""
    try:
        from peft import LoraConfig

        from landmark_llama.adapters.peft_model import LandmarkPeftModel
    except ModuleNotFoundError as error:
        raise UserError(
            f"--lora_rank {args.lora_rank}: needs peft, which is not installed: pip install peft"
        ) from error
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
    )
    return LandmarkPeftModel(model, config, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How QLoRA holds the base: NF4 with quantised scales, computing in `compute_dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--load_in_4bit: needs bitsandbytes, which is not installed: pip install 'landmark-llama[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
