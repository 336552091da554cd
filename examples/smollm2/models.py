"""The two models that are compared: the LLaMA of a GGUF file as it is, and made a landmark LLaMA."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from eval_passkey.prompts import InputError
from examples.smollm2.package import file_digest
from landmark_llama import LandmarkLlamaConfig, LandmarkLlamaForCausalLM
from landmark_llama.checkpoints.conversion import load_gguf
from landmark_llama.checkpoints.files import read_json, staged
from landmark_llama.published_calibration import RECORD, load_calibration, read_settings

# how texts are read; rows that train a calibration have fewer local blocks (finetune/configs/smollm2.yaml)
SETTINGS = {
    "block_size": 64, "train_context_length": 8192, "num_retrieved_blocks": 8, "num_local_blocks": 40,
    "retrieval_granularity": "head", "landmark_key": "pooled", "block_weight": "exact", "num_sink_blocks": 1,
    "num_question_blocks": 2, "num_reranked_blocks": 64,
}  # fmt: skip
RANK = 32  # of a calibration that is trained
MADE_OF = "made_of.json"


def make_models(gguf: Path, digest: str, calibration: Path | None, folder: Path) -> tuple[Path, Path]:
    """Folders of the dense and of the landmark model, in fp32; made unless they are there.

    Args:
        digest: of the GGUF file.
        calibration: a folder of `save_calibration`; None: untrained, with `SETTINGS`.

    Raises:
        InputError: the file is no LLaMA or the calibration is not of it, or the folder holds models of something else.
    """
    made_of = {"gguf_sha256": digest, "calibration": _identity(calibration)}
    models = folder / "models"
    if models.is_dir():
        _refuse_other_models(models, made_of)
        return models / "dense", models / "landmark"
    logging.disable_progress_bar()
    try:
        dense, landmark, tokenizers = _convert(gguf, calibration)
    except Exception as error:  # gguf and transformers raise many kinds
        raise InputError(f"{gguf}: cannot be made a landmark model: {_first_line(error)}") from error
    with staged(models) as staging:
        for name, model, tokenizer in zip(("dense", "landmark"), (dense, landmark), tokenizers, strict=True):
            model.save_pretrained(staging / name)
            tokenizer.save_pretrained(staging / name)
        (staging / MADE_OF).write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
    return models / "dense", models / "landmark"


def _convert(gguf: Path, calibration: Path | None) -> tuple[LlamaForCausalLM, LandmarkLlamaForCausalLM, list]:
    """Both models and their tokenizers, of which the second has the landmark token."""
    settings = SETTINGS if calibration is None else read_settings(calibration)
    dense = load_gguf(gguf.parent, LandmarkLlamaConfig.family, gguf.name, dtype=torch.float32)
    tokenizers = [AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name) for _ in range(2)]
    landmark = LandmarkLlamaForCausalLM.from_llama(dense, tokenizers[1], **settings)
    if calibration is not None:
        load_calibration(landmark, calibration)
    return dense, landmark, tokenizers


def _identity(calibration: Path | None) -> str | None:
    """What tells a calibration from others: the digest of its record, which has the digest of its weights."""
    if calibration is None:
        return None
    if not (calibration / RECORD).is_file():
        raise InputError(f"--calibration {calibration}: holds no {RECORD}, so it is no calibration")
    return file_digest(calibration / RECORD)


def _refuse_other_models(models: Path, made_of: dict) -> None:
    earlier = read_json(models / MADE_OF)
    different = [name for name, value in made_of.items() if earlier.get(name) != value]
    if different:
        raise InputError(
            f"--output {models.parent}: holds models made of another {', '.join(different)}; choose another --output, "
            "or delete this one"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
