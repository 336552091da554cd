"""The tokenizer of a model made with the released code, as a fast one that gives the same ids.

The released code saves SentencePiece's `tokenizer.model` and, in `added_tokens.json`, the tokens that its training
added: `[PAD]`, then `<landmark>`. The tokenizer is written anew as one `tokenizer.json`, because transformers makes a
`LlamaTokenizer` of such a folder, which splits some texts otherwise than the model learnt.
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
    """Reads the tokenizer in `folder`, with the landmark token at `mem_id`.

    mem_id: where the model has its landmark; None takes the tokenizer's word for it.
    vocab_size: of the model.

    Raises:
        OSError: there is no tokenizer, or a file of it is damaged.
        ValueError: its landmark is not at `mem_id`, or it has more tokens than the model.
    """
    tokenizer = _with_added_tokens(_backend(folder), folder)
    if LANDMARK_TOKEN not in tokenizer.get_vocab() and mem_id is not None:
        _add_as_in_training(tokenizer, mem_id)
    if LANDMARK_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: its tokenizer of {len(tokenizer)} tokens has no {LANDMARK_TOKEN}"
            + (f", and mem_id={mem_id} is not the next free id" if mem_id is not None else "")
            + "; give the one that the model was trained with by --tokenizer FOLDER"
        )
    landmark = add_landmark_token(tokenizer)
    if mem_id is not None and landmark != mem_id:
        raise ValueError(
            f"{folder}: mem_id={mem_id} in config.json is {tokenizer.convert_ids_to_tokens(mem_id)!r} in the "
            f"tokenizer, whose {LANDMARK_TOKEN} is token {landmark}; give the tokenizer that the model was trained "
            "with by --tokenizer FOLDER"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model {vocab_size}; give the tokenizer that the "
            "model was trained with by --tokenizer FOLDER"
        )
    return tokenizer


def _backend(folder: Path) -> Tokenizer:
    if (path := folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises no other
            raise OSError(f"{path}: damaged; fetch it again") from error
    if (path := folder / "tokenizer.model").is_file():
        return read_tokenizer_model(path)
    raise OSError(
        f"{folder}: holds no tokenizer (tokenizer.model or tokenizer.json); give a folder with that of the model, or "
        "of the LLaMA that it was trained from, by --tokenizer FOLDER"
    )


def _with_added_tokens(backend: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens, and those of `added_tokens.json` at the ids given there."""
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    known = backend.get_vocab(with_added_tokens=True) | added
    special = {name: token for name, token in LLAMA_TOKENS.items() if token in known}
    if PAD_TOKEN in known:
        special["pad_token"] = PAD_TOKEN
    backend.add_special_tokens([token for token, _ in sorted(added.items(), key=lambda item: item[1])])
    for token, expected in added.items():
        if (found := backend.token_to_id(token)) != expected:
            raise ValueError(
                f"{folder}: added_tokens.json has {token!r} at {expected}, behind this tokenizer's other tokens it "
                f"stands at {found}; give the tokenizer that the model was trained with by --tokenizer FOLDER"
            )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _add_as_in_training(tokenizer: PreTrainedTokenizerFast, mem_id: int) -> None:
    """Gives a base model's tokenizer what the released training gave it, if that puts the landmark at `mem_id`."""
    if tokenizer.pad_token is None and mem_id == len(tokenizer) + 1:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if mem_id == len(tokenizer):
        add_landmark_token(tokenizer)
