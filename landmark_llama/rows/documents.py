"""Documents packed into rows: where they stand, and landmark attention that keeps them apart.

A row may hold several documents one after the other. `position_ids` say where, as in transformers' packed sequences:
they restart at 0 where a document begins. Each one is attended as if it stood alone in its own row: its blocks and
landmarks are numbered from its start, nothing is seen across its ends. All but attention works on the packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention import landmark_attention
from landmark_llama.attention.pooling import pool_rows
from landmark_llama.tokenization import landmarked_length

# what one more call of attention costs, in scores of a head that could be computed meanwhile
CALL_SCORES = 1 << 16


def find_documents(position_ids: Tensor, real: Tensor, before: Tensor, *, cached: bool) -> Tensor | None:
    """Where documents begin: boolean (batch, columns), or None if no row holds more than one.

    Positions only say where documents begin, so they may start anywhere in a row, and may or may not count the
    columns in between that hold no token.

    Args:
        position_ids: (batch or 1, columns), counting on by one inside a document, 0 where the next one begins.
        real: (batch, columns), boolean, False at padding.
        before: (batch,): ordinary tokens of each row in earlier calls.
        cached: whether the call reads through a cache.

    Raises:
        ValueError: if they do anything else, or restart in a call with a cache, naming row and column.
    """
    integers = not position_ids.is_floating_point() and position_ids.dtype != torch.bool
    if not integers or position_ids.shape not in (real.shape, (1, real.shape[1])):
        raise ValueError(
            f"position_ids: {position_ids.dtype} of shape {tuple(position_ids.shape)}; expected integers of the "
            f"input's shape (batch, columns), {tuple(real.shape)}"
        )
    position = position_ids.to(real.device, torch.long).expand_as(real)
    column = torch.arange(real.shape[1], device=real.device)
    latest = torch.where(real, column, -1).cummax(1).values
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)  # the real column before each one
    follows = real & (previous >= 0)
    step = position - position.gather(1, previous.clamp_min(0))
    goes_on = (step == 1) | (step == column - previous)
    wrong = real & (position < 0) | follows & (position != 0) & ~goes_on
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        where = f"position_ids, row {row}, column {place}: {int(position[row, place])}"
        if follows[row, place]:
            where += f" after {int(position[row, previous[row, place]])}"
        raise ValueError(f"{where}; positions count on by one inside a document and restart at 0 where the next begins")
    restarts = follows & (position == 0)
    if cached:
        restarts |= real & (position == 0) & (before.to(real.device) > 0).unsqueeze(1)
    if not restarts.any():
        return None
    if cached:
        row, place = restarts.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids, row {row}, column {place}: a document begins after another one in a call with a cache, "
            "which holds one document a row; read packed documents without a cache (neither past_key_values nor "
            "use_cache), or each in a row of its own"
        )
    return restarts | real & (previous < 0)


class Documents(NamedTuple):
    """The documents of a call's rows, sorted into batches of similar lengths, in landmarked columns.

    position: (batch, columns): of each column in its document.
    index: (slots,): which of all the `batch * columns` columns stands in each slot of the batches, one batch after the
        other. Documents shorter than their batch's longest repeat their last column.
    slot: (batch * columns,): where in there each column stands; 0 for padding.
    shapes: (documents, positions) of each batch.
    """

    position: Tensor
    index: Tensor
    slot: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, begins: Tensor, real: Tensor, columns: int, *, block_size: int, longest: int) -> Documents:
        """Documents of rows whose landmarked columns, `columns` of them, follow each other without a gap.

        Args:
            begins: (batch, length), boolean: where documents begin, in plain columns, on ordinary tokens.
            real: (batch, length), boolean: which plain columns hold an ordinary token.
            longest: landmarked positions that a document may take.

        Raises:
            ValueError: if one takes more, naming its row and column.
        """
        device, begins, real = real.device, begins.cpu(), real.cpu()
        row, place = begins.nonzero(as_tuple=True)
        number = begins.flatten().cumsum(0) - 1
        length = landmarked_length(number[real.flatten()].bincount(minlength=len(row)), block_size)
        if (length > longest).any():
            first = int((length > longest).nonzero()[0])
            raise ValueError(
                f"position_ids, row {int(row[first])}, column {int(place[first])}: the document that begins here takes "
                f"{int(length[first])} landmarked positions, more than train_context_length={longest}, and packed "
                "documents are attended to as a whole: cut it, or read it in a row of its own"
            )
        end = length.cumsum(0)
        start = end - length
        start = start - start[torch.searchsorted(row, row)] + row * columns
        position, slot = (torch.zeros(len(begins) * columns, dtype=torch.long) for _ in range(2))
        order = length.argsort(descending=True, stable=True)
        indices, shapes, slots = [], [], 0
        for batch in order.split(_batch_sizes(length[order].tolist())):
            width = int(length[batch[0]])
            offset = torch.arange(width).minimum(length[batch].unsqueeze(1) - 1)
            index = start[batch].unsqueeze(1) + offset
            # where a column is repeated, any of its slots would hold the same
            slot[index] = slots + torch.arange(len(batch)).unsqueeze(1) * width + offset
            position[index] = offset
            indices.append(index.flatten())
            shapes.append((len(batch), width))
            slots += index.numel()
        position = position.view(len(begins), columns)
        return cls(*(x.to(device) for x in (position, torch.cat(indices), slot)), tuple(shapes))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, landmark_query: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """`attend_rows` of each document by itself; arguments and result as there."""
        scoring = query if landmark_query is None else landmark_query
        batches = zip(*(self._unpack(x) for x in (query, key, value, scoring)), strict=True)
        outputs = [
            attend_rows(*batch, landmark_query=None if landmark_query is None else scoring, **settings)
            for *batch, scoring in batches
        ]
        packed = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in outputs]).index_select(0, self.slot)
        return packed.unflatten(0, self.position.shape).transpose(1, 2)

    def _unpack(self, x: Tensor) -> list[Tensor]:
        """(batch, heads, columns, head_dim) to (documents, heads, positions, head_dim) for each batch."""
        slots = x.transpose(1, 2).flatten(0, 1).index_select(0, self.index)
        parts = slots.split([documents * positions for documents, positions in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pooled: bool,
    block_size: int,
    scale: float,
    **settings: Any,
) -> Tensor:
    """`landmark_attention` of whole rows, with pooled landmark keys if wanted; other arguments and result as there."""
    bias = None
    if pooled:
        key, bias = pool_rows(key, query, block_size, scale)
    return landmark_attention(query, key, value, block_size=block_size, scale=scale, landmark_bias=bias, **settings)


def _batch_sizes(lengths: Sequence[int]) -> list[int]:
    """Documents of each batch, given their lengths from the longest down.

    A batch is as wide as its first document. It ends where the scores wasted on padding cost as much as another call.
    """
    sizes, widest, wasted = [], 0, 0
    for length in lengths:
        wasted += widest * widest - length * length
        if not sizes or wasted > CALL_SCORES:
            sizes.append(0)
            widest, wasted = length, 0
        sizes[-1] += 1
    return sizes
