"""Reading a table of blocks on a CPU where blocks weigh what their tokens do: ordinary attention over their tokens.

`table` has the definition, for every device and weight. Here PyTorch's fused kernel does the work: it holds no scores
in memory, and landmarks, which weigh nothing, are left out of the keys.

Blocks are chosen as everywhere (`choice`), but of the keys that choose the recent ones are rotated, not each query to
each of them. Then, where

- the queries of a group share a choice (`_attend_shared`), its blocks are laid out one after the other, rotated
  to their slots, and read in one call;
- each query has a choice of its own (`_attend_by_block`), the queries that chose a block are gathered, not a block for
  each of its queries: it is read once for `PAGE_QUERIES` of them.

Queries and results are (batch, kv_heads, group, groups, queries, head_dim), as in `choice`. Results are in fp32, or in
float64 for such queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.choice import Choice, choose_blocks, landmarks_at_their_distances, rotate_to_distances
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.rerank import choose_by_weight
from landmark_llama.reading.storage import BlockStorage

LAID_OUT_ELEMENTS = 1 << 21  # of keys at once: few, to stay in the cores' caches
PAGE_QUERIES = 32  # that read a block together

# with the logsumexp of each query, which `scaled_dot_product_attention` does not return
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Direct(NamedTuple):
    """What some groups read directly: keys and values (batch, kv_heads, groups, keys, head_dim), and which of them each
    query sees (batch, groups, queries, keys). A key is rotated once for all groups that read it, so that their queries
    stand `turn` (batch, groups) positions further than in their windows.
    """

    part: slice
    key: Tensor
    value: Tensor
    seen: Tensor
    turn: Tensor

    @classmethod
    def of_parts(
        cls, storage: BlockStorage, groups: QueryGroups, like: Tensor, rotary: RotaryTable
    ) -> Iterator[_Direct]:
        """The groups of `like`, queries, in parts whose keys fit the caches and the rotary table."""
        block_size, window = storage.block_size, groups.window
        column = torch.arange(window * block_size).view(window, -1)[:, :-1].flatten()
        fitting = min(len(rotary.cos) // block_size, LAID_OUT_ELEMENTS // (block_size * like[:, :, 0, 0, 0].numel()))
        at_once = max(1, min(fitting - window, window))  # each key is rotated about twice
        for start in range(0, like.shape[3], at_once):
            part = slice(start, start + at_once)
            first, position = groups.first_block[:, part], groups.position[:, part]
            base = first.amin(1, keepdim=True)
            later = first - base  # blocks that a group's window begins later
            most = int(later.max())
            block = (base + torch.arange(most + window)).minimum(groups.last_block[:, None])
            key, value = _ordinary(storage, block.unsqueeze(1), like.dtype)
            key = rotary.rotate(key, (torch.arange(most + window) * block_size).unsqueeze(-1))
            seen = column <= position.unsqueeze(-1)
            yield cls(part, *(_windows(x, later, window) for x in (key, value)), seen, later * block_size)


def _windows(x: Tensor, first: Tensor, window: int) -> Tensor:
    """Of `x` (batch, kv_heads, blocks, tokens, head_dim) `window` blocks for each group, the first of them `first`
    (batch, groups), as (batch, kv_heads, groups, keys, head_dim): without a copy where they follow one another.
    """
    number = first.shape[1]
    if (first == torch.arange(number)).all():
        x = x.contiguous()
        return x.as_strided((*x.shape[:2], number, window * x.shape[3], x.shape[4]), x.stride())
    row = torch.arange(len(x)).view(-1, 1, 1)
    return x.transpose(1, 2)[row, first.unsqueeze(-1) + torch.arange(window)].movedim(3, 1).flatten(3, 4)


def attend_exact_table(
    query: Tensor,
    landmark_query: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    *,
    k: int,
    granularity: str,
    landmarks_tie: bool,
    num_sink_blocks: int,
    rotary: RotaryTable,
    scale: float,
    num_reranked_blocks: int = 0,
) -> Tensor:
    """`table.attend_through_table` with exact weights, on a CPU.

    Args:
        query: (batch, columns, kv_heads, group, head_dim), not rotated; `landmark_query` likewise, if there is one.
        k: blocks that a query retrieves; the rest as in `choose_blocks` and `choose_by_weight`.
    """
    groups = _of_use(groups)

    def grouped(x: Tensor) -> Tensor:
        return groups.gather(x).permute(0, 3, 4, 1, 2, 5)

    by_group, distances, choice = grouped(query), None, None
    if k and groups.candidates:
        scoring = by_group if landmark_query is None else grouped(landmark_query)
        how = {"granularity": granularity, "landmarks_tie": landmarks_tie, "num_sink_blocks": num_sink_blocks}
        if num_reranked_blocks:
            asked = {"num_reranked_blocks": num_reranked_blocks, "num_sink_blocks": num_sink_blocks}
            distances = rotate_to_distances(by_group * scale, groups.position, k, storage.block_size, rotary)
            farthest = _rotated(scoring * scale, groups.position + (k + 1) * storage.block_size, rotary)
            choice = choose_by_weight(distances, farthest, storage, groups.first_block, groups.valid, **asked)
        else:
            choice = _choose(scoring * scale, storage, groups, k, rotary, how)
    if choice is not None and choice.block.shape[4] == 1 and choice.block.shape[1:3] == by_group.shape[1:3]:
        output = _attend_shared(by_group, storage, groups, choice, rotary, scale)
    else:
        if choice is not None and distances is None:
            distances = rotate_to_distances(by_group * scale, groups.position, k, storage.block_size, rotary)
        output = _attend_by_block(by_group, distances, storage, groups, choice, rotary, scale)
    return groups.scatter(output.permute(0, 3, 4, 1, 2, 5)).to(query.dtype)


def _of_use(groups: QueryGroups) -> QueryGroups:
    """`groups` without those that only fill the last tile; `window` is that of a group, not of a tile."""
    of_a_tile = groups.first_block.shape[1] // groups.base.shape[1]
    used = groups.valid.any(-1).any(0).nonzero()
    number = int(used[-1]) + 1 if len(used) else 1
    fields = ("column", "valid", "first_block", "position")
    some = {name: getattr(groups, name)[:, :number] for name in fields}
    return groups._replace(window=groups.window + 1 - of_a_tile, **some)


def _choose(
    scoring: Tensor, storage: BlockStorage, groups: QueryGroups, k: int, rotary: RotaryTable, how: dict
) -> Choice:
    """The blocks that `scoring`, scaled queries, choose."""
    landmarks, block_size = storage.landmarks(groups.candidates), storage.block_size
    shown = landmarks, groups.first_block, groups.valid
    how["biases"] = storage.biases(groups.candidates)
    if how["landmarks_tie"]:
        return choose_blocks(rotate_to_distances(scoring, groups.position, k, block_size, rotary), *shown, **how)
    recent = landmarks_at_their_distances(landmarks, groups.first_block, k, block_size, rotary)
    farthest = _rotated(scoring, groups.position + (k + 1) * block_size, rotary).unsqueeze(-2)
    return choose_blocks(farthest, *shown, **how, recent_landmarks=recent)


def _attend_shared(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, choice: Choice, rotary: RotaryTable, scale: float
) -> Tensor:
    """Attention of `query`, not rotated, whose groups share a choice a head."""
    block_size, k, query_heads = storage.block_size, choice.block.shape[-1], query.shape[1] * query.shape[2]
    output, lse = _attend_directly(query, storage, groups, rotary, scale)
    query = _rotated(query, groups.position + (k + 1) * block_size, rotary)
    slot, none = (k + 1 - choice.distance()) * block_size, choice.block < 0
    at_once = max(1, LAID_OUT_ELEMENTS // (k * block_size * len(query) * query_heads * query.shape[-1]))
    for start in range(0, query.shape[3], at_once):
        part = slice(start, start + at_once)
        block, missing = (x[:, :, :, part, 0] for x in (choice.block, none))
        key, value = _ordinary(storage, block.clamp_min(0), query.dtype)
        key = rotary.rotate(key, slot[:, :, :, part, 0].unsqueeze(-1))
        seen = None
        if missing.any():  # how many blocks there are to choose is the same for all heads
            seen = ~missing[:, :1, :1].repeat_interleave(block_size - 1, -1).unsqueeze(-2)
            seen = seen.expand(-1, -1, -1, -1, query.shape[4], -1)
        found, found_lse = _of_groups(query[:, :, :, part], key.flatten(4, 5), value.flatten(4, 5), seen, scale)
        if seen is not None:
            nothing = missing.all(-1).unsqueeze(-1)
            found = found.masked_fill(nothing.unsqueeze(-1), 0.0)
            found_lse = found_lse.masked_fill(nothing, -torch.inf)
        near = lse[:, :, :, part]
        total = torch.logaddexp(near, found_lse)
        near = output[:, :, :, part].mul_((near - total).exp_().unsqueeze(-1))
        near.addcmul_(found, (found_lse - total).exp_().unsqueeze(-1))
    return output


def _attend_directly(
    query: Tensor, storage: BlockStorage, groups: QueryGroups, rotary: RotaryTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `query`, not rotated, over what its group reads directly; and the logsumexp of each query."""
    group = query.shape[2]
    like = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
    output, lse = like.new_empty(query.shape), like.new_empty(query.shape[:-1])
    for direct in _Direct.of_parts(storage, groups, query.to(like.dtype), rotary):
        # the query heads of a KV head read the same keys
        place = groups.position[:, direct.part] + direct.turn.unsqueeze(-1)
        together = _rotated(query[:, :, :, direct.part], place, rotary).movedim(2, 3).flatten(3, 4).unsqueeze(2)
        seen = direct.seen.repeat(1, 1, group, 1)[:, None, None]
        near = (x.unsqueeze(2) for x in (direct.key, direct.value))
        found, found_lse = _of_groups(together, *near, seen, scale)
        output[:, :, :, direct.part] = found[:, :, 0].unflatten(3, (group, -1)).movedim(3, 2)
        lse[:, :, :, direct.part] = found_lse[:, :, 0].unflatten(3, (group, -1)).movedim(3, 2)
    return output, lse


def _attend_by_block(
    query: Tensor,
    rotated: Tensor | None,
    storage: BlockStorage,
    groups: QueryGroups,
    choice: Choice | None,
    rotary: RotaryTable,
    scale: float,
) -> Tensor:
    """Attention of `query`, not rotated; where there is a choice, each query has its own.

    rotated: the queries, scaled, at all distances, from `rotate_to_distances`.
    """
    output, lse = _attend_directly(query, storage, groups, rotary, scale)
    if choice is None:
        return output
    chosen, chosen_lse = _by_block(choice.at_their_distances(rotated), storage, choice.block)
    chosen_lse.masked_fill_(choice.block < 0, -torch.inf)
    total = torch.logaddexp(lse, chosen_lse.logsumexp(-1))
    output *= (lse - total).exp_().unsqueeze(-1)
    weight = (chosen_lse - total.unsqueeze(-1)).exp_()
    return output.add_((weight.unsqueeze(-2) @ chosen).squeeze(-2))


def _by_block(query: Tensor, storage: BlockStorage, block: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (..., queries, k, head_dim) of `query`, scaled and rotated to the k blocks of each, over each of them
    by itself; and the logsumexp (..., queries, k).
    """
    batch, kv_heads = query.shape[:2]
    heads, blocks = batch * kv_heads, int(block.max()) + 1
    # each query's head and block as one number; queries of one number share pages
    head = torch.arange(heads).view(batch, kv_heads, *(1,) * (block.dim() - 2))
    owner, order = (head * blocks + block.clamp_min(0)).expand(query.shape[:-1]).flatten().sort(stable=True)
    count = owner.bincount(minlength=heads * blocks)
    pages = -(-count // PAGE_QUERIES).view(heads, blocks)
    last_page = pages.cumsum(1)
    most = int(last_page[:, -1].max())
    first_page = (last_page - pages + torch.arange(heads).unsqueeze(1) * most).flatten()
    rank = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    place = first_page[owner] * PAGE_QUERIES + rank
    page = query.new_zeros(heads * most * PAGE_QUERIES, query.shape[-1])
    page[place] = query.flatten(0, -2)[order]
    page = page.view(heads, most, PAGE_QUERIES, -1)
    output, lse = torch.empty_like(page), page.new_empty(page.shape[:-1])
    block_of_page = torch.searchsorted(last_page, torch.arange(most).repeat(heads, 1), right=True).clamp_max(blocks - 1)
    for part in torch.arange(most).split(max(1, LAID_OUT_ELEMENTS // (heads * storage.block_size * query.shape[-1]))):
        part = slice(int(part[0]), int(part[-1]) + 1)
        keys = _ordinary(storage, block_of_page[:, part].view(batch, kv_heads, -1), query.dtype)
        found, found_lse = _attend(*(x.flatten(0, -3).unsqueeze(1) for x in (page[:, part], *keys)), scale=1.0)
        output[:, part], lse[:, part] = found.view_as(output[:, part]), found_lse.view_as(lse[:, part])
    back = torch.empty_like(place)
    back[order] = place
    output, lse = output.flatten(0, 2)[back], lse.flatten()[back]
    return output.view(query.shape), lse.view(query.shape[:-1])


def _of_groups(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One call over (batch, kv_heads, group, groups, ...): its groups are a batch, its heads are heads.

    seen: boolean, (batch, kv_heads or 1, group or 1, groups, queries, keys); None: all.
    """
    given = [query, key, value]
    if seen is not None:
        given.append(torch.zeros((), dtype=query.dtype).where(seen, -torch.inf))
    query_by_group, key, value, *mask = (x.movedim(3, 1).flatten(0, 1).flatten(1, 2) for x in given)
    output, lse = _attend(query_by_group, key, value, attn_mask=mask[0] if mask else None, scale=scale)
    shape = (len(query), query.shape[3], *query.shape[1:3], query.shape[4])
    return output.reshape(*shape, -1).movedim(1, 3), lse.reshape(shape).movedim(1, 3)


def _rotated(query: Tensor, position: Tensor, rotary: RotaryTable) -> Tensor:
    return rotary.rotate(query.to(torch.promote_types(query.dtype, torch.float32)), position[:, None, None])


def _ordinary(storage: BlockStorage, block: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the ordinary tokens of `block`."""
    key, value = (x[..., :-1, :].to(dtype) for x in storage.gather(block))
    return key, value
