"""The landmark token: adding it to a tokenizer, inserting and stripping it, plain and landmarked coordinates.

A block is `block_size - 1` ordinary tokens and then one landmark. *Plain* coordinates count ordinary tokens,
*landmarked* coordinates count landmarks too: ordinary token `t` sits at landmarked position `t + t // (block_size -
1)`. A block's landmark belongs to its last ordinary token, so `n` ordinary tokens always mean `n // (block_size - 1)`
landmarks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANDMARK_TOKEN = "<landmark>"

Ids = TypeVar("Ids", list[int], torch.Tensor)


def add_landmark_token(tokenizer: PreTrainedTokenizerBase, token: str = LANDMARK_TOKEN) -> int:
    """Makes `token` a special token of `tokenizer` (in place) and returns its id. Adding it again changes nothing.

    Its `model_max_length` becomes what stands for none: a landmark model reads texts of any length.
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
    """Landmarked positions that `length` ordinary tokens take, the landmarks they complete included."""
    return length + length // (block_size - 1)


def plain_length(length: int | torch.Tensor, block_size: int) -> int | torch.Tensor:
    """Ordinary tokens among the first `length` landmarked positions."""
    return length - length // block_size


def insert_landmarks(input_ids: Ids, block_size: int, landmark_token_id: int) -> Ids:
    """Plain ids to landmarked ids: a landmark after every `block_size - 1` ordinary tokens.

    Args:
        input_ids: ordinary tokens, a list or a tensor of shape (..., length), every row starting at its first token.
        block_size: positions of a block, its landmark included (>= 2).
        landmark_token_id: id of the landmark token.

    Returns:
        The same kind, of length `landmarked_length(length, block_size)`.

    Raises:
        ValueError: if `input_ids` already holds a landmark, naming its row and position.
    """
    _check_block_size(block_size)
    plain = torch.as_tensor(input_ids)
    _refuse(plain == landmark_token_id, "input_ids holds a landmark already")
    length = plain.shape[-1]
    landmarked = plain.new_full((*plain.shape[:-1], landmarked_length(length, block_size)), landmark_token_id)
    landmarked[..., landmarked_position(torch.arange(length, device=plain.device), block_size)] = plain
    return landmarked.tolist() if isinstance(input_ids, list) else landmarked


def strip_landmarks(input_ids: Ids, block_size: int, landmark_token_id: int) -> Ids:
    """Landmarked ids to plain ids, the inverse of `insert_landmarks`.

    Args:
        input_ids: landmarked ids, a list or a tensor of shape (..., length), every row starting at its first token.

    Returns:
        The same kind, of length `plain_length(length, block_size)`.

    Raises:
        ValueError: if a landmark stands where none belongs or is missing where one does, naming row and position.
    """
    _check_block_size(block_size)
    landmarked = torch.as_tensor(input_ids)
    is_landmark_place = torch.arange(landmarked.shape[-1], device=landmarked.device) % block_size == block_size - 1
    _refuse(
        (landmarked == landmark_token_id) & ~is_landmark_place,
        f"a landmark stands where none belongs (the last position of each block of {block_size} is its place)",
    )
    _refuse(
        (landmarked != landmark_token_id) & is_landmark_place,
        f"an ordinary token stands in the place of a landmark (the last position of each block of {block_size})",
    )
    plain = landmarked[..., ~is_landmark_place]
    return plain.tolist() if isinstance(input_ids, list) else plain


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a block needs at least one ordinary token and its landmark (>= 2)")


def _refuse(wrong: torch.Tensor, message: str) -> None:
    """Raises a ValueError that names the first place where `wrong`, of shape (..., length), is true."""
    if wrong.any():
        row, position = wrong.reshape(-1, wrong.shape[-1]).nonzero()[0].tolist()
        raise ValueError(f"row {row}, position {position}: {message}")
