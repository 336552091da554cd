"""Memorizing Transformer: one layer looks up the nearest of all keys that were ever read.

Wu et al., "Memorizing Transformers", arXiv 2203.08913. All layers are Transformer-XL's. One of them also keeps the keys
and values of all tokens read, without gradient. Each head of a query takes the `k` keys with the greatest products and
attends to these alone; a gate that the head learns mixes the result with that of ordinary attention. In the lookup keys
and queries have length 1, a learned temperature and no position. The search is exact; with `faiss` it is approximate
while a text is read, through a graph (HNSW) of the faiss package.

Invariant: with its gates closed it is Transformer-XL; with as many neighbours as keys the lookup is attention over all.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

from comparisons.layers import project
from comparisons.methods.transformer_xl import XLReader
from comparisons.reader import Reader

PIECE = 16384  # keys that are scored at once


class Store:
    """Keys and values (B, H, N, D) of all that was read; `append` gives a longer store, and leaves this one as it is.

    Both share their memory, which grows by doubling. Of two stores made of one only the later can be searched.
    """

    def __init__(self, key: Tensor, value: Tensor, length: int, graphs: list | None):
        self.key, self.value, self.length, self.graphs = key, value, length, graphs

    @classmethod
    def of(cls, key: Tensor, value: Tensor, faiss: bool) -> "Store":
        """A store of a first segment."""
        return cls(key, value, key.shape[2], [None] * (key.shape[0] * key.shape[1]) if faiss else None)

    def append(self, key: Tensor, value: Tensor) -> "Store":
        """With a further segment's keys and values."""
        length, old = self.length + key.shape[2], (self.key, self.value)
        if torch.is_grad_enabled():  # which keeps what it computed with, so that nothing may be written into it
            return Store(torch.cat([old[0], key], dim=2), torch.cat([old[1], value], dim=2), length, self.graphs)
        if length > self.key.shape[2]:
            room = torch.empty_like(self.key[:, :, :1]).expand(-1, -1, max(length, 2 * self.length) - self.length, -1)
            old = tuple(torch.cat([x[:, :, : self.length], room], dim=2) for x in old)
        for x, new in zip(old, (key, value), strict=True):
            x[:, :, self.length : length] = new
        return Store(*old, length, self.graphs)

    def nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Products (B, H, T, k) of queries (B, H, T, D) with the nearest keys, and which these are."""
        k = min(k, self.length)
        if self.graphs is not None:
            return self._approximate(query, k)
        best, which = query.new_empty(*query.shape[:3], 0), query.new_empty(*query.shape[:3], 0, dtype=torch.long)
        for start in range(0, self.length, PIECE):
            key = self.key[:, :, start : min(start + PIECE, self.length)]
            scores = query @ key.transpose(2, 3)
            index = torch.arange(start, start + key.shape[2], device=key.device).expand_as(scores)
            best, order = torch.cat([best, scores], dim=-1).topk(min(k, best.shape[-1] + key.shape[2]), dim=-1)
            which = torch.cat([which, index], dim=-1).gather(-1, order)
        return best, which

    def values(self, which: Tensor) -> Tensor:
        """(B, H, T, k, D)"""
        rows, heads = (torch.arange(n, device=which.device) for n in which.shape[:2])
        return self.value[rows[:, None, None, None], heads[:, None, None], which]

    def _approximate(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        import faiss

        found = []
        for i, (queries, keys) in enumerate(zip(query.flatten(0, 1), self.key.flatten(0, 1), strict=True)):
            if self.graphs[i] is None:
                self.graphs[i] = faiss.IndexHNSWFlat(query.shape[-1], 32, faiss.METRIC_INNER_PRODUCT)
            self.graphs[i].add(keys[self.graphs[i].ntotal : self.length].cpu().numpy())
            found.append(torch.from_numpy(self.graphs[i].search(queries.detach().cpu().numpy(), k)[1]))
        which = torch.stack(found).to(query.device).clamp(min=0).unflatten(0, query.shape[:2])
        rows, heads = (torch.arange(n, device=query.device) for n in which.shape[:2])
        keys = self.key[rows[:, None, None, None], heads[:, None, None], which]
        return (keys @ query.unsqueeze(-1)).squeeze(-1), which


class MemorizingReader(XLReader):
    """A layer remembers its inputs as Transformer-XL does, and the one that looks up a `Store` (else None)."""

    def __init__(self, base: LlamaForCausalLM, segment: int, memory: int, k: int, number: int, faiss: bool):
        super().__init__(base, segment, memory)
        self.k, self.number, self.faiss = k, range(len(base.model.layers))[number], faiss
        heads = base.config.num_attention_heads
        self.gate = nn.Parameter(torch.zeros(heads, 1, 1))  # half and half
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 10.0).log())

    def keep(self, number: int, past: tuple | None, states: Tensor) -> tuple[Tensor, Store | None]:
        inputs, store = past or (None, None)
        inputs = super().keep(number, inputs, states)
        if number != self.number:
            return inputs, None
        layer = self.base.model.layers[number]
        with torch.no_grad():
            _, key, value = project(layer.self_attn, layer.input_layernorm(states))
            key = normalize(key, dim=-1)
        if store is None:
            return inputs, Store.of(key, value, self.faiss and not self.training)
        return inputs, store.append(key, value)

    def seen(self, past: tuple[Tensor, Store | None]) -> Tensor:
        return past[0]

    def attend(self, number: int, past: tuple | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        near = super().attend(number, past, query, key, value)
        if number != self.number or past is None:
            return near
        scores, which = past[1].nearest(normalize(query, dim=-1), self.k)
        weights = (scores * self.temperature.exp()).softmax(-1)
        far = (weights.unsqueeze(-1) * past[1].values(which)).sum(dim=3)
        return near + self.gate.sigmoid() * (far - near)


def build(
    base: LlamaForCausalLM, segment: int = 256, memory: int = 256, k: int = 32, layer: int = -2, faiss: bool = False
) -> Reader:
    """Transformer-XL whose layer number `layer` also takes the `k` nearest of all keys read."""
    return MemorizingReader(base, segment, memory, k, layer, faiss)
