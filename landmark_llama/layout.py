"""How the rows of a batch, in plain coordinates and with padding anywhere, lie in landmarked columns.

Every row's own tokens are numbered from its first real one, so padding moves no landmark. In a forward call the rows
stand left-aligned: row `r` brings `length[r]` landmarked positions in columns 0 .. length[r] - 1, whatever follows is
padding that no real position can see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.tokenization import landmarked_length, landmarked_position


class Layout(NamedTuple):
    """One call's rows, plain columns to landmarked columns.

    source: (batch, columns): the plain column that a landmarked column shows; the number of plain columns for a
        landmark (and for padding, whose content does not matter).
    output: (batch, outputs): the landmarked column that speaks for each plain column of the result.
    start: (batch,): landmarked positions that each row had before. On the CPU, as `length` and `ordinary` are.
    length: (batch,): landmarked positions that each row brings.
    ordinary: (batch,): ordinary tokens that each row brings.
    """

    source: Tensor
    output: Tensor
    start: Tensor
    length: Tensor
    ordinary: Tensor


def lay_out(
    real: Tensor, keep: Tensor | None, before: Tensor, *, block_size: int, predict_from_landmark: bool
) -> Layout:
    """Layout of one call.

    Args:
        real: (batch, length), boolean: which columns of the input hold an ordinary token.
        keep: (batch, length), boolean, or None for all: which columns stand in the result. Rows that keep fewer than
            others are padded on the left.
        before: (batch,), on the CPU: ordinary tokens that each row has seen in earlier calls.
        block_size: positions of a block, its landmark included.
        predict_from_landmark: the landmark of a block speaks for the block's last ordinary token.
    """
    device = real.device
    ordinary = real.sum(1).cpu()
    start = landmarked_length(before, block_size)
    length = landmarked_length(before + ordinary, block_size) - start
    token = real.cumsum(1) - 1 + before.to(device).unsqueeze(1)  # number of each token in its row
    column = landmarked_position(token, block_size) - start.to(device).unsqueeze(1)
    columns = max(int(length.max()), 1)
    # padding writes into one column more, which is cut off
    source = torch.full((len(real), columns + 1), real.shape[1], device=device)
    source.scatter_(1, column.masked_fill(~real, columns), torch.arange(real.shape[1], device=device).expand_as(column))
    output = column
    if predict_from_landmark:
        output = output + (token % (block_size - 1) == block_size - 2)
    output = output.masked_fill(~real, 0)
    if keep is not None:
        output = compact(output, keep)
    return Layout(source[:, :columns], output, start, length, ordinary)


def compact(x: Tensor, keep: Tensor, fill: int = 0) -> Tensor:
    """The kept columns of `x` (batch, length), rows that keep fewer padded on the left with `fill`."""
    kept = keep.sum(1, keepdim=True)
    width = int(kept.max())
    # a stable sort moves what is dropped to the left and leaves the order of the rest alone
    order = keep.sort(dim=1, stable=True).indices[:, x.shape[1] - width :]
    dropped = torch.arange(width, device=x.device) < width - kept
    return x.gather(1, order).masked_fill(dropped, fill)


def find_landmarks(
    input_ids: Tensor, real: Tensor, before: Tensor, *, block_size: int, landmark_token_id: int
) -> Tensor | None:
    """Where `input_ids` (batch, length) already holds landmarks: boolean of the same shape, or None if nowhere.

    `real` is False at padding, `before` counts the ordinary tokens of each row in earlier calls. A landmark may
    stand right after the last ordinary token of a block, once; it need not, since the model sets each landmark itself.

    Raises:
        ValueError: naming the row and position of a landmark anywhere else.
    """
    landmark = (input_ids == landmark_token_id) & real
    if not landmark.any():
        return None
    seen = (real & ~landmark).cumsum(1) + before.to(real.device).unsqueeze(1)
    regular = (seen % (block_size - 1) == 0) & (seen > 0)
    latest = torch.where(landmark, seen, -1).cummax(1).values
    repeated = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1) == seen
    wrong = landmark & (~regular | repeated)
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids, row {row}, position {position}: a landmark token ({landmark_token_id}) stands where none "
            f"belongs; landmarks come after every {block_size - 1} ordinary tokens of a row, and the model sets them"
        )
    return landmark
