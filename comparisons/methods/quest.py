"""Quest: a dense model, each of whose queries reads only the pages of the cache that may matter most to it.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. The cache is
cut into pages; of each, the least and the greatest value of every channel of its keys are kept. For a query q, `sum_d
max(q_d low_d, q_d high_d)` is no less than any score in the page. The `pages` pages with the greatest bounds are
read, for each query head by itself, and the page that is being filled. The first `dense_layers` layers read all. No
weight is trained. Prompts are read densely, as in the paper; losses are those of tokens decoded one by one.

Invariant: the bound holds, and with as many pages as the text has the model is the dense one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaForCausalLM

from comparisons.cached import CachedReader, Kept
from comparisons.layers import attend_causally, causal_mask
from comparisons.reader import Reader


class QuestReader(CachedReader):
    """Beside keys and values, the memory has `low` and `high` (B, H, complete pages, D) of the keys."""

    def __init__(self, base: LlamaForCausalLM, segment: int, page: int, pages: int, dense_layers: int):
        super().__init__(base, segment)
        self.page, self.pages, self.dense_layers, self.dense = page, pages, dense_layers, False

    def keep(self, kept: Kept | None, key: Tensor, value: Tensor) -> Kept:
        old = (key[:, :, :0],) * 4 if kept is None else kept
        key, value = (torch.cat([before, new], dim=2) for before, new in zip(old, (key, value), strict=False))
        first, complete = old[2].shape[2] * self.page, key.shape[2] // self.page * self.page
        new = key[:, :, first:complete].unflatten(2, (-1, self.page))
        bounds = (torch.cat([before, now], 2) for before, now in zip(old[2:], (new.amin(3), new.amax(3)), strict=True))
        return key, value, *bounds

    def attend(self, layer: int, query: Tensor, kept: Kept) -> Tensor:
        key, value, low, high = kept
        queries, keys, pages = query.shape[2], key.shape[2], low.shape[2]
        before = torch.arange(keys - queries, keys, device=query.device) // self.page  # pages before each query's own
        if self.training or self.dense or layer < self.dense_layers or before[-1] <= self.pages:
            return attend_causally(query, key, value)
        later = torch.arange(pages, device=before.device) >= before[:, None]
        bound = bounds(query, low, high).masked_fill(later, -torch.inf)
        chosen = bound.topk(self.pages, dim=-1).indices
        if queries == 1:
            return self._gathered(query, key, value, chosen[:, :, 0])
        mask = torch.zeros_like(bound, dtype=torch.bool).scatter_(-1, chosen, True)
        mask = pad(mask.repeat_interleave(self.page, dim=-1), (0, keys - pages * self.page), value=True)
        own = torch.arange(keys, device=before.device) >= (before * self.page)[:, None]
        return attend_causally(query, key, value, (mask | own) & causal_mask(queries, keys, before.device))

    def _gathered(self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
        """One query's attention over the pages `chosen` (B, H, pages) and its own."""
        place = (chosen.unsqueeze(-1) * self.page + torch.arange(self.page, device=key.device)).flatten(2)
        rest = torch.arange((key.shape[2] - 1) // self.page * self.page, key.shape[2], device=key.device)
        place = torch.cat([place, rest.expand(*place.shape[:2], -1)], dim=-1).unsqueeze(-1)
        read = (x.gather(2, place.expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, *read)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, list[Kept]]:
        self.dense = True
        try:
            return super().prefill(input_ids)
        finally:
            self.dense = False


def bounds(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B, H, T, pages): no less than the product of a query (B, H, T, D) with any key of the page."""
    return query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)


def build(base: LlamaForCausalLM, segment: int = 512, page: int = 16, pages: int = 32, dense_layers: int = 2) -> Reader:
    """Pages of `page` tokens, `pages` of which a query reads in all layers but the first `dense_layers`."""
    return QuestReader(base, segment, page, pages, dense_layers)
