"""The rows of a call: from plain columns, with padding anywhere, to left-aligned landmarked columns.

The tokens of a row are numbered from its first real one, so padding moves no landmark. Row `r` takes the landmarked
columns 0 .. length[r] - 1. What follows is padding that no real position sees. If a row holds several documents
(`rows/documents.py`), they follow each other without a gap, each numbered from its own first token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.configuration import LandmarkConfig
from landmark_llama.rows.documents import find_documents
from landmark_llama.tokenization import landmarked_length


class Rows(NamedTuple):
    """What a call brings.

    content: ids (batch, length) or embeddings (batch, length, hidden_size), in plain columns.
    real: (batch, length), boolean: which columns hold an ordinary token.
    begins: (batch, length), boolean: where documents begin; None if no row holds more than one.
    layout: where the columns go.
    """

    content: Tensor
    real: Tensor
    begins: Tensor | None
    layout: Layout

    @classmethod
    def of(
        cls,
        config: LandmarkConfig,
        content: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        before: Tensor | None,
    ) -> Rows:
        """Finds the ordinary tokens of a call, its documents and landmarks, and lays out its rows.

        Args:
            content, attention_mask: checked by `check_inputs`.
            before: (batch,), on the CPU: ordinary tokens that a cache holds of each row; None without a cache.

        Raises:
            ValueError: naming the argument, the row and the column that cannot be used.
        """
        batch, length = content.shape[:2]
        if attention_mask is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=content.device)
        else:
            real = attention_mask[:, attention_mask.shape[1] - length :].to(content.device, torch.bool)
        cached = before is not None
        if before is None:
            before = torch.zeros(batch, dtype=torch.long)
        begins, landmark = None, None
        if position_ids is not None:
            begins = find_documents(position_ids, real, before, cached=cached)
        if not content.is_floating_point():
            landmark = find_landmarks(
                content,
                real,
                before,
                begins,
                block_size=config.block_size,
                landmark_token_id=config.landmark_token_id,
            )
        if landmark is not None:
            real = real & ~landmark
        layout = lay_out(
            real,
            None if landmark is None else ~landmark,
            before,
            begins,
            block_size=config.block_size,
            predict_from_landmark=config.predict_from_landmark,
        )
        return cls(content, real, begins, layout)


class Layout(NamedTuple):
    """One call's rows, plain columns to landmarked columns.

    source: (batch, columns): the plain column that a landmarked column shows; the number of plain columns for a
        landmark (and for padding, whose content does not matter).
    output: (batch, outputs): the landmarked column whose states are the result's, for each of its plain columns.
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
    real: Tensor,
    keep: Tensor | None,
    before: Tensor,
    begins: Tensor | None = None,
    *,
    block_size: int,
    predict_from_landmark: bool,
) -> Layout:
    """Layout of one call.

    Args:
        real: (batch, length), boolean: which columns of the input hold an ordinary token.
        keep: (batch, length), boolean, or None for all: which columns stand in the result. Rows that keep fewer than
            others are padded on the left.
        before: (batch,), on the CPU: ordinary tokens that each row has seen in earlier calls.
        begins: (batch, length), boolean, or None: where documents begin, which are numbered anew.
        block_size: positions of a block, its landmark included.
        predict_from_landmark: the states of a block's last ordinary token are replaced by those of its landmark.
    """
    device = real.device
    seen = real.cumsum(1)
    token = _in_document(seen + before.to(device).unsqueeze(1), real, begins) - 1  # its number in its document
    completes = real & (token % (block_size - 1) == block_size - 2)  # a block, so that a landmark follows
    column = seen - 1 + completes.cumsum(1) - completes.long()
    ordinary, landmarks = torch.stack([real.sum(1), completes.sum(1)]).cpu()
    start = landmarked_length(before, block_size) if before.any() else before
    length = ordinary + landmarks
    columns = max(int(length.max()), 1)
    # padding writes into one column more, which is cut off
    source = torch.full((len(real), columns + 1), real.shape[1], device=device)
    source.scatter_(1, column.masked_fill(~real, columns), torch.arange(real.shape[1], device=device).expand_as(column))
    output = column + completes.long() if predict_from_landmark else column
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
    input_ids: Tensor,
    real: Tensor,
    before: Tensor,
    begins: Tensor | None = None,
    *,
    block_size: int,
    landmark_token_id: int,
) -> Tensor | None:
    """Where `input_ids` (batch, length) already holds landmarks: boolean of the same shape, or None if nowhere.

    `real` is False at padding, `before` counts the ordinary tokens of each row in earlier calls, `begins` says where
    documents begin, as in `lay_out`. A landmark may stand right after the last ordinary token of a block, once; it need
    not, since the model sets each landmark itself.

    Raises:
        ValueError: naming the row and position of a landmark anywhere else.
    """
    landmark = (input_ids == landmark_token_id) & real
    if not landmark.any():
        return None
    ordinary = real & ~landmark
    seen = ordinary.cumsum(1) + before.to(real.device).unsqueeze(1)
    in_document = _in_document(seen, ordinary, begins)
    regular = (in_document % (block_size - 1) == 0) & (in_document > 0)
    latest = torch.where(landmark, seen, -1).cummax(1).values
    repeated = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1) == seen
    wrong = landmark & (~regular | repeated)
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids, row {row}, position {position}: a landmark token ({landmark_token_id}) stands where none "
            f"belongs; landmarks come after every {block_size - 1} ordinary tokens of a "
            f"{'row' if begins is None else 'document'}, and the model sets them"
        )
    return landmark


def _in_document(seen: Tensor, counted: Tensor, begins: Tensor | None) -> Tensor:
    """`seen` (batch, length), how many `counted` columns a row has up to each one, counted anew for each document."""
    if begins is None:
        return seen
    return seen - torch.where(begins, seen - counted.long(), 0).cummax(1).values
