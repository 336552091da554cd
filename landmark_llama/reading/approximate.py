"""Landmarks found by an approximate search of the package faiss, in place of a comparison with all of them.

An index for each row and KV head holds the landmarks of older blocks, pooled keys with their bias as one more
dimension. It proposes some for each query. What is proposed is scored as ever, and so are sinks and the last blocks at
their own distances. Two things differ from the exact choice: a block that is not proposed cannot be chosen, and where
queries share a choice, the sums that their shares are of are estimated from `SAMPLED` landmarks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from landmark_llama.reading.highest import Highest, Sharing, top_latest
from landmark_llama.reading.repeated import RepeatedLandmarks

IndexKind = Literal["hnsw", "ivf"]

FROM_BLOCKS = 4096  # before, all are compared
ADDED_AT_ONCE = 512  # landmarks, those that are not in the index yet are compared
LINKS, BUILDING, SEARCHING = 16, 40, 64  # of HNSW: links of a landmark; candidates while building, and while searching
LISTS_LOOKED_AT = 8  # of IVF, which has about the square root of the landmarks' number of them
GROWTH = 4  # times more landmarks than an IVF was made for: it is made anew
PROPOSED = 2  # times as many as a query chooses
SAMPLED = 512  # landmarks at even distances, of which sums of exponentials are estimated


class ApproximateLandmarks:
    """Finds the highest scores of one layer's landmarks as they come, approximately. Used in place of
    `RepeatedLandmarks`.

    Args:
        kind: `"hnsw"`, a graph, or `"ivf"`, lists of landmarks near a centre.

    Raises:
        ValueError: faiss is not installed, or there is no such kind.
    """

    pay = True  # decoding, too, asks it

    def __init__(self, kind: IndexKind) -> None:
        if kind not in get_args(IndexKind):
            raise ValueError(f"index={kind!r}: must be one of {', '.join(map(repr, get_args(IndexKind)))}, or None")
        try:
            self._faiss: Any = importlib.import_module("faiss")
        except ImportError as error:
            raise ValueError(f"index={kind!r}: needs faiss; pip install 'landmark-llama[faiss]'") from error
        self.kind: IndexKind = kind
        self._repeated = RepeatedLandmarks()
        self._clear()

    def _clear(self) -> None:
        self.blocks = self.skipped = self._made_for = 0
        self._indices: list[Any] = []  # of each row and KV head
        self._largest = 0.0  # square of a norm that few landmarks exceed

    def forget(self, block: int) -> None:
        """Announces that blocks from `block` on are written anew: an index cannot forget some, it is made anew."""
        self._repeated.forget(block)
        if block < self.blocks:
            self._clear()

    def search(
        self, landmarks: Tensor, biases: Tensor | None, k: int, skipped: int = 0
    ) -> tuple[Callable[..., Highest], int] | None:
        """What finds the k highest among the first of `landmarks` (batch, kv_heads, blocks, head_dim), and how many
        blocks those are; None where all should be compared.

        biases: (batch, kv_heads, blocks), added to the scores.
        skipped: so many of the first blocks are not searched.
        """
        blocks = landmarks.shape[2]
        if blocks < FROM_BLOCKS:
            return None
        repeated = self._repeated.search(landmarks, biases, k, skipped)
        if repeated is not None or blocks < self.blocks:  # of many equal landmarks an index would propose any
            return repeated
        if skipped != self.skipped:
            self._clear()
            self.skipped = skipped
        self.blocks = max(self.blocks, skipped)
        if blocks - self.blocks >= ADDED_AT_ONCE:
            self._add(landmarks, biases, blocks)
        key = landmarks[:, :, : self.blocks].flatten(0, 1)
        bias = None if biases is None else biases[:, :, : self.blocks].flatten(0, 1)
        found = functools.partial(self._highest, key=key, bias=bias, k=k)
        return found, self.blocks

    def _add(self, landmarks: Tensor, biases: Tensor | None, blocks: int) -> None:
        if self.kind == "ivf" and blocks > GROWTH * self._made_for:
            self._indices, self._made_for, self.blocks = [], blocks, self.skipped
        part = slice(self.blocks, blocks)
        key = landmarks[:, :, part].flatten(0, 1).float()
        if biases is not None:
            key = torch.cat([key, biases[:, :, part].flatten(0, 1).float().unsqueeze(-1)], dim=-1)
        if self.kind == "hnsw":
            key = self._as_near(key)
        if not self._indices:
            self._indices = [self._new(x.contiguous().numpy()) for x in key]
        for index, x in zip(self._indices, key, strict=True):
            index.add(x.contiguous().numpy())
        self.blocks = blocks

    def _as_near(self, key: Tensor) -> Tensor:
        """`key` with one more dimension that gives all the same norm, so that the nearest have the highest products:
        links between near ones are what a graph searches well.
        """
        square = key.square().sum(-1, keepdim=True)
        self._largest = self._largest or 1.5 * float(square.max())
        return torch.cat([key, (self._largest - square).clamp_min(0).sqrt()], dim=-1)

    def _new(self, key: Any) -> Any:
        """An empty index, made for landmarks such as `key` (blocks, dimensions)."""
        size, metric = key.shape[1], self._faiss.METRIC_INNER_PRODUCT
        if self.kind == "hnsw":
            index = self._faiss.IndexHNSWFlat(size, LINKS, self._faiss.METRIC_L2)
            index.hnsw.efConstruction, index.hnsw.efSearch = BUILDING, SEARCHING
            return index
        index = self._faiss.IndexIVFFlat(self._faiss.IndexFlatIP(size), size, round(len(key) ** 0.5), metric)
        index.nprobe = LISTS_LOOKED_AT
        index.train(key)
        return index

    def _highest(self, query: Tensor, sharing: Sharing | None, *, key: Tensor, bias: Tensor | None, k: int) -> Highest:
        """As `highest_of_many`, for `query` (rows and heads, choices, queries, head_dim), of what is proposed."""
        asked = query.float()
        if bias is not None:
            asked = torch.cat([asked, asked.new_ones(*asked.shape[:-1], 1)], dim=-1)
        if self.kind == "hnsw":
            asked = torch.nn.functional.pad(asked, (0, 1))
        number = PROPOSED * k + 1  # more than k, as `top_latest` needs
        found = [
            torch.from_numpy(index.search(x.flatten(0, 1).contiguous().numpy(), number)[1])
            for index, x in zip(self._indices, asked, strict=True)
        ]
        place = torch.stack(found).view(*query.shape[:3], number)  # -1: none
        if sharing is not None:
            place = place.flatten(2)  # those that share a choice propose together
        place = place.sort(-1).values
        again = torch.nn.functional.pad(place[..., 1:] == place[..., :-1], (1, 0)) | (place < 0)
        index = place.clamp_min(0) + self.skipped
        row = torch.arange(len(key)).view(-1, *(1,) * (index.dim() - 1))
        chosen = key[row, index].to(query.dtype)
        added = 0 if bias is None else bias[row, index].to(query.dtype)
        if sharing is None:
            value, total = (chosen @ query.unsqueeze(-1)).squeeze(-1) + added, None
            value = value.masked_fill(again, -torch.inf)
        else:
            value = query @ chosen.transpose(-1, -2) + (added.unsqueeze(-2) if bias is not None else 0)
            value = value.masked_fill(again.unsqueeze(-2), -torch.inf)
            total = _estimated_sum(query, value, number, key[:, self.skipped :], bias, self.skipped) + sharing.total
            value = sharing.of_all(value.exp_(), total)
        value, place = top_latest(value, k)
        return Highest(value, index.gather(-1, place), total)


def _estimated_sum(query: Tensor, found: Tensor, number: int, key: Tensor, bias: Tensor | None, skipped: int) -> Tensor:
    """Sums of the exponentials of all scores, (rows and heads, choices, queries, 1), of which the `number` highest are
    among `found` (..., queries, proposed): of these, and of the rest as a sample says.

    key: (rows and heads, blocks, head_dim), without those skipped, which `bias` (rows and heads, all blocks) has.
    """
    step = -(-key.shape[1] // SAMPLED)
    scores = query @ key[:, None, ::step].to(query.dtype).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias[:, None, None, skipped::step].to(query.dtype)
    # what a query found for itself; the sample speaks for what scores less
    lowest = found.topk(min(number, found.shape[-1]), dim=-1).values[..., -1:]
    high = found.masked_fill(found < lowest, -torch.inf).exp().sum(-1, keepdim=True)
    return high + step * scores.masked_fill(scores >= lowest, -torch.inf).exp().sum(-1, keepdim=True)
