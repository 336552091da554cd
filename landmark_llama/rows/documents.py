"""Documents packed into rows: where they stand, and landmark attention that keeps them apart.

A row may hold several documents one after the other. `position_ids` say where, as in transformers' packed sequences:
they restart at 0 where a document begins. Each one is attended as if it stood alone in its own row: its blocks and
landmarks are numbered from its start, nothing is seen across its ends. All but attention works on the packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.attention.whole_rows import WholeRows
from landmark_llama.tokenization import landmarked_length

# the cost of one more call of attention, in scores of a head that take as long
CALL_SCORES = 1 << 16


def packed_positions(
    shape: tuple[int, int], position_ids: Tensor | None, cu_seq_lens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Position ids, taken from the first of three ways to say where documents begin that is given; None if none is.

    Args:
        shape: (batch, columns) of the input.
        position_ids: as `find_documents` takes them; returned as they are.
        cu_seq_lens: (documents + 1,): where each document of the only row begins, then its number of columns.
        seq_idx: (batch, columns): number of each column's document.

    Raises:
        ValueError: if `cu_seq_lens` or `seq_idx` do not fit the input.
    """
    if position_ids is not None or (cu_seq_lens is None and seq_idx is None):
        return position_ids
    batch, columns = shape
    if cu_seq_lens is not None:
        ends = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
        if batch != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != columns or sorted(ends) != ends:
            raise ValueError(
                f"cu_seq_lens_q: {cu_seq_lens.tolist()} for an input of shape {tuple(shape)}; expected the rising "
                f"places, from 0 to {columns}, at which the documents of one flattened row begin and the last one ends"
            )
        column = torch.arange(columns, device=cu_seq_lens.device)
        document = torch.searchsorted(cu_seq_lens, column.to(cu_seq_lens), right=True) - 1
        return (column - cu_seq_lens[document]).unsqueeze(0)
    if seq_idx.shape != torch.Size(shape):
        raise ValueError(f"seq_idx: shape {tuple(seq_idx.shape)}; expected that of the input, {tuple(shape)}")
    column = torch.arange(columns, device=seq_idx.device).expand(batch, -1)
    begins = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    return column - torch.where(begins, column, 0).cummax(1).values


def find_documents(position_ids: Tensor, real: Tensor, before: Tensor, *, cached: bool) -> Tensor | None:
    """Where documents begin: boolean (batch, columns), or None if no row holds more than one.

    Positions only say where documents begin. They may start anywhere in a row. They may count columns without a token
    or skip them.

    Args:
        position_ids: (batch or 1, columns), counting on by one inside a document, 0 where the next one begins.
        real: (batch, columns), boolean, False at padding.
        before: (batch,): ordinary tokens of each row in earlier calls.
        cached: whether the call reads through a cache.

    Raises:
        ValueError: naming row and column, if positions neither count on nor restart at 0, or restart in a call with a
            cache.
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


@dataclass(frozen=True)
class Documents:
    """The view of a call whose rows hold several documents: each is attended to as a whole, and by itself.

    Documents of similar lengths form a batch of their own; all in landmarked columns.

    position: (batch, columns): of each column in its document.
    unpacked: (places,): the column, among all `batch * columns`, that stands in each place of the batches, one batch
        after the other. A document shorter than its batch's longest repeats its last column.
    place: (batch * columns,): where in there each column stands; 0 for padding.
    shapes: (documents, positions) of each batch.
    whole: how each document is attended to.
    """

    position: Tensor
    unpacked: Tensor
    place: Tensor
    shapes: tuple[tuple[int, int], ...]
    whole: WholeRows

    @classmethod
    def of(cls, begins: Tensor, real: Tensor, columns: int, *, whole: WholeRows, longest: int) -> Documents:
        """Documents of rows whose landmarked columns, `columns` of them, follow each other without a gap.

        Args:
            begins: (batch, length), boolean: where documents begin, in plain columns, on ordinary tokens.
            real: (batch, length), boolean: which plain columns hold an ordinary token.
            whole: how each document is attended to.
            longest: landmarked positions that a document may take.

        Raises:
            ValueError: if one takes more, naming its row and column.
        """
        device, begins, real, block_size = real.device, begins.cpu(), real.cpu(), whole.block_size
        row, column = begins.nonzero(as_tuple=True)
        number = begins.flatten().cumsum(0) - 1
        length = landmarked_length(number[real.flatten()].bincount(minlength=len(row)), block_size)
        if (length > longest).any():
            first = int((length > longest).nonzero()[0])
            raise ValueError(
                f"position_ids, row {int(row[first])}, column {int(column[first])}: the document that begins here "
                f"takes {int(length[first])} landmarked positions, more than train_context_length={longest}, and "
                "packed documents are attended to as a whole: cut it, or read it in a row of its own"
            )
        end = length.cumsum(0)
        start = end - length
        # starts count through all documents: make them relative to the row, then to the batch's flat columns
        start = start - start[torch.searchsorted(row, row)] + row * columns
        position, place = (torch.zeros(len(begins) * columns, dtype=torch.long) for _ in range(2))
        order = length.argsort(descending=True, stable=True)
        unpacked, shapes, places = [], [], 0
        for batch in order.split(_batch_sizes(length[order].tolist())):
            width = int(length[batch[0]])
            offset = torch.arange(width).minimum(length[batch].unsqueeze(1) - 1)
            index = start[batch].unsqueeze(1) + offset
            # where a column is repeated, any of its places would hold the same
            place[index] = places + torch.arange(len(batch)).unsqueeze(1) * width + offset
            position[index] = offset
            unpacked.append(index.flatten())
            shapes.append((len(batch), width))
            places += index.numel()
        position = position.view(len(begins), columns)
        return cls(position, torch.cat(unpacked), place, tuple(shapes), whole).to(device)

    def to(self, device: torch.device, non_blocking: bool = False) -> Documents:
        """The same documents on `device` (the signature that accelerate's device hooks call)."""
        moved = (x.to(device, non_blocking=non_blocking) for x in (self.position, self.unpacked, self.place))
        return Documents(*moved, self.shapes, self.whole)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer_idx: int,
        rotary: RotaryTable,
        scale: float,
        landmark_query: Tensor | None = None,
        landmark_prior: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer; arguments and result as those of `WholeRows.attend`."""
        position = self.position.unsqueeze(-1)
        query, key = rotary.rotate_all(position, query, key)
        batches = zip(*(self._unpack(x) for x in (query, key, value)), strict=True)
        of_landmarks = zip(
            *(
                [None] * len(self.shapes) if x is None else self._unpack(rotary.rotate(x, position))
                for x in (landmark_query, landmark_prior)
            ),
            strict=True,
        )
        outputs = [
            self.whole.attend_rotated(*batch, scale=scale, landmark_query=scoring, landmark_prior=prior)
            for batch, (scoring, prior) in zip(batches, of_landmarks, strict=True)
        ]
        packed = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in outputs]).index_select(0, self.place)
        return packed.unflatten(0, self.position.shape)

    def _unpack(self, x: Tensor) -> list[Tensor]:
        """(batch, columns, heads, head_dim) to (documents, heads, positions, head_dim) for each batch."""
        places = x.flatten(0, 1).index_select(0, self.unpacked)
        parts = places.split([documents * positions for documents, positions in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]


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
