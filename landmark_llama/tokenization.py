"""The landmark token: adds it to a tokenizer, inserts it into ids and strips it, converts between the two coordinates.

A block is `block_size - 1` ordinary tokens followed by one landmark. *Plain* coordinates count ordinary tokens only;
*landmarked* coordinates count landmarks, too. Ordinary token `t` has landmarked position `t + t // (block_size - 1)`.
A landmark is inserted as soon as its block's last ordinary token is there, so `n` ordinary tokens always come with
`n // (block_size - 1)` landmarks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANDMARK_TOKEN = "<landmark>"

Ids = TypeVar("Ids", list[int], torch.Tensor)


def add_landmark_token(tokenizer: PreTrainedTokenizerBase, token: str = LANDMARK_TOKEN) -> int:
    """Makes `token` a special token of `tokenizer`, in place, and returns its id. A second call changes nothing.

    Sets `model_max_length` to the value that stands for no limit: a landmark model reads texts of any length.

    Raises:
        ValueError: the tokenizer could not add it.
    """
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    landmark_token_id = tokenizer.convert_tokens_to_ids(token)
    if landmark_token_id is None or landmark_token_id == tokenizer.unk_token_id:
        raise ValueError(f"token={token!r}: {type(tokenizer).__name__} could not add it as a special token")
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    return landmark_token_id


def landmarked_position(plain_position: int | torch.Tensor, block_size: int) -> int | torch.Tensor:
    """Landmarked position of ordinary token `plain_position` (0-based; an integer or a tensor of them)."""
    return plain_position + plain_position // (block_size - 1)


def landmarked_length(length: int | torch.Tensor, block_size: int) -> int | torch.Tensor:
    """Landmarked positions of `length` ordinary tokens and the landmarks of the blocks that they complete."""
    return length + length // (block_size - 1)


def plain_length(length: int | torch.Tensor, block_size: int) -> int | torch.Tensor:
    """Ordinary tokens among the first `length` landmarked positions."""
    return length - length // block_size


def insert_landmarks(input_ids: Ids, block_size: int, landmark_token_id: int) -> Ids:
    """Inserts a landmark after every `block_size - 1` ordinary tokens.

    Args:
        input_ids: ordinary tokens: a list, or a tensor of shape (..., length) without left padding.
        block_size: positions in a block, its landmark included (>= 2).
        landmark_token_id: id of the landmark token.

    Returns:
        A list or tensor like the input, of length `landmarked_length(length, block_size)`.

    Raises:
        ValueError: `input_ids` holds a landmark already. Names its row and position.
    """
    _check_block_size(block_size)
    plain = torch.as_tensor(input_ids)
    _refuse(plain == landmark_token_id, "input_ids holds a landmark already")
    length = plain.shape[-1]
    landmarked = plain.new_full((*plain.shape[:-1], landmarked_length(length, block_size)), landmark_token_id)
    landmarked[..., landmarked_position(torch.arange(length, device=plain.device), block_size)] = plain
    return landmarked.tolist() if isinstance(input_ids, list) else landmarked


def strip_landmarks(input_ids: Ids, block_size: int, landmark_token_id: int) -> Ids:
    """Removes the landmarks: the inverse of `insert_landmarks`.

    Args:
        input_ids: landmarked ids: a list, or a tensor of shape (..., length) without left padding.

    Returns:
        A list or tensor like the input, of length `plain_length(length, block_size)`.

    Raises:
        ValueError: a landmark is misplaced or missing. Names its row and position.
    """
    _check_block_size(block_size)
    landmarked = torch.as_tensor(input_ids)
    is_landmark_place = torch.arange(landmarked.shape[-1], device=landmarked.device) % block_size == block_size - 1
    _refuse(
        (landmarked == landmark_token_id) & ~is_landmark_place,
        f"a landmark is out of place: it belongs at the last position of each block of {block_size}",
    )
    _refuse(
        (landmarked != landmark_token_id) & is_landmark_place,
        f"a landmark is missing: the last position of each block of {block_size} must hold one",
    )
    plain = landmarked[..., ~is_landmark_place]
    return plain.tolist() if isinstance(input_ids, list) else plain


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a block needs at least one ordinary token and its landmark (>= 2)")


def _refuse(wrong: torch.Tensor, message: str) -> None:
    """Raises ValueError with the first row and position where `wrong` (..., length) is true."""
    if wrong.any():
        row, position = wrong.reshape(-1, wrong.shape[-1]).nonzero()[0].tolist()
        raise ValueError(f"row {row}, position {position}: {message}")
