"""Rebuilds the tokenizer of a model made with the released code as a fast tokenizer that gives the same ids.

The released code saves SentencePiece's `tokenizer.model`. The tokens that its training added, `[PAD]` and then
`<landmark>`, go to `added_tokens.json`. transformers loads such a folder as a `LlamaTokenizer`, which splits some texts
differently from what the model was trained on. So the tokenizer is saved anew, as one `tokenizer.json`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from landmark_llama.checkpoints.files import read_json
from landmark_llama.checkpoints.sentencepiece_model import read_tokenizer_model
from landmark_llama.tokenization import LANDMARK_TOKEN, add_landmark_token

PAD_TOKEN = "[PAD]"
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def released_tokenizer(folder: Path, mem_id: int | None, vocab_size: int) -> PreTrainedTokenizerFast:
    """Reads the tokenizer in `folder` and makes sure that its landmark token has the id `mem_id`.

    Args:
        mem_id: the model's landmark id; None accepts the tokenizer's.
        vocab_size: the model's vocabulary size.

    Raises:
        OSError: the tokenizer is missing or damaged.
        ValueError: its landmark has another id, or it has more tokens than the model.
    """
    tokenizer = _with_added_tokens(_backend(folder), folder)
    if LANDMARK_TOKEN not in tokenizer.get_vocab() and mem_id is not None:
        _add_training_tokens(tokenizer, mem_id)
    if LANDMARK_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: its tokenizer of {len(tokenizer)} tokens has no {LANDMARK_TOKEN}"
            + (f", and mem_id={mem_id} is not the next free id" if mem_id is not None else "")
            + "; give the one that the model was trained with by --tokenizer FOLDER"
        )
    landmark_id = add_landmark_token(tokenizer)
    if mem_id is not None and landmark_id != mem_id:
        raise ValueError(
            f"{folder}: mem_id={mem_id} in config.json is {tokenizer.convert_ids_to_tokens(mem_id)!r} in the "
            f"tokenizer, whose {LANDMARK_TOKEN} is token {landmark_id}; give the tokenizer that the model was trained "
            "with by --tokenizer FOLDER"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model {vocab_size}; give the tokenizer that the "
            "model was trained with by --tokenizer FOLDER"
        )
    return tokenizer


def _backend(folder: Path) -> Tokenizer:
    """The tokenizer in `tokenizer.json`, else in `tokenizer.model`, without the added tokens."""
    if (path := folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise OSError(f"{path}: damaged; fetch it again") from error
    if (path := folder / "tokenizer.model").is_file():
        return read_tokenizer_model(path)
    raise OSError(
        f"{folder}: holds no tokenizer (tokenizer.model or tokenizer.json); give the model's tokenizer, or that of the "
        "LLaMA that it was trained from, by --tokenizer FOLDER"
    )


def _with_added_tokens(backend: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with LLaMA's special tokens, and with those of `added_tokens.json` at the ids given there."""
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    vocabulary = backend.get_vocab(with_added_tokens=True) | added
    special_tokens = {name: token for name, token in LLAMA_TOKENS.items() if token in vocabulary}
    if PAD_TOKEN in vocabulary:
        special_tokens["pad_token"] = PAD_TOKEN
    backend.add_special_tokens([token for token, _ in sorted(added.items(), key=lambda item: item[1])])
    for token, expected in added.items():
        if (found := backend.token_to_id(token)) != expected:
            raise ValueError(
                f"{folder}: added_tokens.json has {token!r} at {expected}, but this tokenizer would put it at "
                f"{found}; give the tokenizer that the model was trained with by --tokenizer FOLDER"
            )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)


def _add_training_tokens(tokenizer: PreTrainedTokenizerFast, mem_id: int) -> None:
    """Adds `[PAD]` and the landmark to a base tokenizer as the released training did, if the landmark gets `mem_id`."""
    if tokenizer.pad_token is None and mem_id == len(tokenizer) + 1:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if mem_id == len(tokenizer):
        add_landmark_token(tokenizer)
