"""Landmark keys that are equal to the bit, as a text that repeats itself makes them: one is scored for all of them.

The choice stays that of brute force: a score stands for all members of its group, and of equal scores the later blocks
win. Groups pay where there are far fewer of them than blocks; where there are not, none are kept.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.reading.highest import Highest, Sharing, top_latest

FROM_BLOCKS = 4096  # before, grouping saves little
FEWER = 3  # times fewer groups than blocks are worth their scoring
SCORES_AT_ONCE = 1 << 18  # 1 MB
HOPELESS_FROM = 8192  # groups, if blocks are not so many times more: the text does not repeat itself


class Groups(NamedTuple):
    """Groups of the first `blocks` blocks of one row, without those skipped, in the order of their latest members.

    key: (kv_heads, groups, head_dim).
    count: (groups,): members, in the dtype of `key`.
    latest: (groups, k): the last k members, -1 where there are fewer.
    """

    key: Tensor
    count: Tensor
    latest: Tensor
    blocks: int


class RepeatedLandmarks:
    """Finds the groups of one layer's landmarks as they come.

    pay: whether there were few enough of them when they were last asked for.
    hopeless: they were found to be too many; no more are looked for.
    """

    def __init__(self) -> None:
        self.pay = self.hopeless = False
        self.skipped = 0
        self._clear()

    def _clear(self) -> None:
        self.blocks, self.k = self.skipped, 0
        self._group: dict[bytes, int] = {}
        self._count: list[int] = []
        self._latest: list[deque[int]] = []
        self._first: list[int] = []  # a member of each group, whose landmark is the group's

    def forget(self, block: int) -> None:
        """Announces that blocks from `block` on are written anew."""
        if block < self.blocks:
            self._clear()
            self.pay = self.hopeless = False

    def search(
        self, landmarks: Tensor, biases: Tensor | None, k: int, skipped: int = 0
    ) -> tuple[Callable[..., Highest], int] | None:
        """What finds the k highest among the first of `landmarks` (batch, kv_heads, blocks, head_dim), and how many
        blocks those are; None where groups do not pay, or where there are `biases`, which differ within a group.

        skipped: so many of the first blocks are not searched.
        """
        groups = None if biases is not None else self.groups(landmarks, k, skipped)
        return None if groups is None else (functools.partial(highest_of_groups, groups=groups, k=k), groups.blocks)

    def groups(self, landmarks: Tensor, k: int, skipped: int = 0) -> Groups | None:
        """Those of `landmarks` (1, kv_heads, blocks, head_dim) on a CPU; None where they do not pay.

        skipped: so many of the first blocks are in no group.
        """
        blocks = landmarks.shape[2]
        if blocks < self.blocks or k > self.k or skipped != self.skipped:
            self.skipped = skipped
            self._clear()
            self.k = k
        if len(landmarks) > 1 or blocks < FROM_BLOCKS or self.hopeless or landmarks.device.type != "cpu":
            return None
        added = landmarks[0, :, self.blocks :].transpose(0, 1).contiguous()
        for block, key in enumerate(added.flatten(1).view(torch.uint8).numpy(), self.blocks):
            group = self._group.setdefault(key.tobytes(), len(self._group))
            if group == len(self._count):
                self._count.append(0)
                self._latest.append(deque(maxlen=self.k))
                self._first.append(block)
            self._count[group] += 1
            self._latest[group].append(block)
            if group >= HOPELESS_FROM and len(self._count) * FEWER > block:
                self._clear()
                self.pay, self.hopeless = False, True
                return None
        self.blocks = blocks
        self.pay = k < len(self._count) <= blocks // FEWER
        if not self.pay:
            return None
        order = sorted(range(len(self._count)), key=lambda group: self._latest[group][-1])
        latest = [[-1] * (k - len(self._latest[group])) + list(self._latest[group])[-k:] for group in order]
        return Groups(
            landmarks[0, :, [self._first[group] for group in order]],
            torch.tensor([self._count[group] for group in order], dtype=landmarks.dtype, device="cpu"),
            torch.tensor(latest, device="cpu"),
            blocks,
        )


def highest_of_groups(query: Tensor, groups: Groups, k: int, sharing: Sharing | None) -> Highest:
    """As `highest_of_many`, among all members of the groups, for `query` (kv_heads, choices, queries, head_dim)."""
    key, count = groups.key.to(query.dtype).transpose(-1, -2), groups.count.to(query.dtype)
    at_once = max(1, SCORES_AT_ONCE // (query.shape[2] * key.shape[-1]))
    values, chosen, totals = [], [], []
    for head in range(len(query)):  # few scores at a time, to stay in a core's cache
        for first in range(0, query.shape[1], at_once):
            part = slice(first, first + at_once)
            scores = (query[head, part].flatten(0, 1) @ key[head]).unflatten(0, (-1, query.shape[2]))
            if sharing is not None:
                rest, valid = (x[head, part] for x in sharing)
                total = (scores.exp_() @ count).unsqueeze(-1) + rest
                totals.append(total)
                scores = Sharing(rest, valid).of_all(scores, total)
            # the k highest members, the later of equal ones, lie in the k groups first by score and latest member
            value, group = top_latest(scores, k)
            values.append(value)
            chosen.append(group)
    value, group = (torch.cat(x).unflatten(0, (len(query), -1)) for x in (values, chosen))
    index = groups.latest[group].flatten(-2)
    value = value.repeat_interleave(k, dim=-1).masked_fill(index < 0, -torch.inf)
    index, order = index.sort(dim=-1, descending=True)
    value, place = value.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    total = torch.cat(totals).unflatten(0, (len(query), -1)) if totals else None
    return Highest(value[..., :k], index.gather(-1, place)[..., :k], total)
