"""A second, slow implementation of landmark LLaMA: one token and one head at a time, with the paper's positions.

It shares no code with the library. Keys and queries have absolute positions in the window (the paper's stingy mapping)
and are rotated anew for every query. Blocks are chosen by sorting Python tuples. Attention is the two softmaxes of the
definition. Where landmark keys are pooled, there are none: a landmark's score is the mean of its block's scores,
weighed by what the landmark's own query makes of the block, and the entropy of those weights. It reads one row without
padding, with default RoPE.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from landmark_llama import LandmarkLlamaForCausalLM


class Oracle:
    """Reads one text in calls of any lengths, with the weights of a landmark model, computing in `dtype`."""

    def __init__(self, model: LandmarkLlamaForCausalLM, dtype: torch.dtype = torch.float64, **settings: Any) -> None:
        self.config = c = model.config
        self.weights = {name: weight.detach().to(dtype) for name, weight in model.state_dict().items()}
        self.dtype = dtype
        self.k = settings.get("num_retrieved_blocks", c.num_retrieved_blocks)
        self.sliding = settings.get("local_attention", c.local_attention) == "sliding"
        self.granularity = settings.get("retrieval_granularity", c.retrieval_granularity)
        local = settings.get("num_local_blocks", c.num_local_blocks)
        window = c.train_context_length // c.block_size
        self.local = window - self.k - 2 if local is None else local
        self.chunk = window - self.k - 1
        half, theta = c.head_dim // 2, c.rope_parameters["rope_theta"]
        frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=dtype)
        angle = torch.arange(c.train_context_length, dtype=dtype).unsqueeze(1) * frequency
        self.cos, self.sin = angle.cos(), angle.sin()
        self.pooled = c.landmark_key == "pooled"
        self.tokens: list[int] = []  # landmarked
        self.shares: list[list[Tensor]] = [[] for _ in range(c.num_hidden_layers)]  # (kv_heads, block_size - 1) a block
        self.cache: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(c.num_hidden_layers)]
        self.chosen: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(c.num_hidden_layers)]

    def read(self, ids: list[int]) -> Tensor:
        """Logits (length, vocabulary) of one call's ordinary tokens."""
        c = self.config
        call: list[int] = []
        for token in ids:
            call.append(token)
            if (len(self.tokens) + len(call)) % c.block_size == c.block_size - 1:
                call.append(c.landmark_token_id)
        first = len(self.tokens)
        self.tokens += call
        edges = list(range(first // c.block_size * c.block_size, len(self.tokens), self.chunk * c.block_size))[1:]
        edges = [first, *edges, len(self.tokens)]
        # sliding attention ignores chunks
        parts = [(first, len(self.tokens))] if self.sliding else list(pairwise(edges))
        states = torch.cat([self._layers(start, stop) for start, stop in parts])
        logits = states @ self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"]).T
        spoken = []
        for place in range(first, len(self.tokens)):
            if self._is_landmark(place):
                if c.predict_from_landmark:
                    spoken[-1] = place - first  # for the ordinary token before it
            else:
                spoken.append(place - first)
        return logits[spoken]

    def _is_landmark(self, place: int) -> bool:
        return place % self.config.block_size == self.config.block_size - 1

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def _low_rank(self, x: Tensor, layer: str, kind: str) -> Tensor:
        down, up = (self.weights[f"{layer}.self_attn.landmark_calibration.{kind}{part}"] for part in ("down", "up"))
        return x @ down.T @ up.T

    def _layers(self, start: int, stop: int) -> Tensor:
        c = self.config
        states = self.weights["model.embed_tokens.weight"][torch.tensor(self.tokens[start:stop])]
        for layer in range(c.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = self._norm(states, f"{name}.input_layernorm")
            query, key, value = (self._linear(x, f"{name}.self_attn.{p}_proj") for p in "qkv")
            keys, values = self.cache[layer]
            keys += key.view(stop - start, -1, c.head_dim).unbind(0)
            values += value.view(stop - start, -1, c.head_dim).unbind(0)
            query = query.view(stop - start, -1, c.head_dim)
            scoring = query
            if c.landmark_query_rank:
                scoring = query + self._low_rank(x, name, "").view(query.shape)
            if self.pooled:
                prior = query.unflatten(1, (c.num_key_value_heads, -1)).mean(2)
                if c.landmark_query_rank:
                    prior = prior + self._low_rank(x, name, "prior_").view(prior.shape)
                self.shares[layer] += [
                    self._shares(keys, prior[place - start], place)
                    for place in range(start, stop)
                    if self._is_landmark(place)
                ]
            elif layer == 0:  # all landmarks have the same embedding, so their keys must be bitwise equal
                landmarks = [place for place in range(len(keys)) if self._is_landmark(place)]
                for place in landmarks:
                    keys[place] = keys[landmarks[0]]
            attended = self._attend(layer, query, scoring, start)
            states = states + self._linear(attended.flatten(1), f"{name}.self_attn.o_proj")
            x = self._norm(states, f"{name}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self._linear(x, f"{name}.mlp.gate_proj"))
            states = states + self._linear(gate * self._linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        return self._norm(states, "model.norm")

    def _shares(self, keys: list[Tensor], prior: Tensor, place: int) -> Tensor:
        """What the prior (kv_heads, head_dim) makes of the block that ends with the landmark at `place`."""
        c, size = self.config, self.config.block_size
        offsets = list(range(size - 1))
        block = [keys[place - size + 1 + offset] for offset in offsets]
        scores = [
            self._score(prior[head], size - 1, [key[head] for key in block], offsets)
            for head in range(c.num_key_value_heads)
        ]
        return torch.stack(scores).softmax(-1)

    def _landmark_score(self, layer: int, query: Tensor, here: int, block: int, slot: int, kv_head: int) -> Tensor:
        """Score (1,) of the landmark of a block that stands in a slot."""
        size, keys = self.config.block_size, self.cache[layer][0]
        if not self.pooled:
            return self._score(query, here, [keys[(block + 1) * size - 1][kv_head]], [(slot + 1) * size - 1])
        members = [keys[block * size + offset][kv_head] for offset in range(size - 1)]
        scores = self._score(query, here, members, list(range(slot * size, (slot + 1) * size - 1)))
        share = self.shares[layer][block][kv_head]
        return (share * (scores - share.log())).sum(0, keepdim=True)

    def _attend(self, layer: int, query: Tensor, scoring: Tensor, start: int) -> Tensor:
        c = self.config
        heads = c.num_attention_heads
        share = heads // c.num_key_value_heads
        places = range(start, start + len(query))
        block = {place: place // c.block_size for place in places}
        direct = {p: max(0, block[p] - self.local) if self.sliding else start // c.block_size for p in places}
        block_scores = {
            (p, h): self._block_scores(layer, scoring[p - start, h], p, direct[p], h // share)
            for p in places
            for h in range(heads)
        }
        output = torch.zeros_like(query)
        for p in places:
            for h in range(heads):
                if self.granularity == "token_and_head":
                    sharing = [(p, h)]
                elif self.granularity == "token":
                    sharing = [(p, other) for other in range(heads)]
                else:
                    sharing = [(other, h) for other in places if block[other] == block[p] or not self.sliding]
                best = [max(scores) for scores in zip(*(block_scores[who] for who in sharing), strict=True)]
                # the highest score first; of equal scores, the later block
                ranking = sorted(range(direct[p]), key=lambda b: (best[b], b), reverse=True)
                chosen = sorted(ranking[: self.k])
                self.chosen[layer][p, h] = chosen
                queries = query[p - start, h], scoring[p - start, h]
                output[p - start, h] = self._weigh(layer, *queries, p, direct[p], h // share, chosen)
        return output

    def _block_scores(self, layer: int, query: Tensor, place: int, direct: int, kv_head: int) -> list[float]:
        """A query's score for each candidate block: its landmark's, or the log-softmax of it if choices are shared."""
        recent = min(self.k, direct)
        if not direct:
            return []
        slots = [max(0, candidate - (direct - recent) + 1) for candidate in range(direct)]
        here = self._place(place, direct)
        # one by one: a product with several keys may round equal scores differently
        scores = torch.cat(
            [self._landmark_score(layer, query, here, block, slot, kv_head) for block, slot in enumerate(slots)]
        )
        return (scores if self.granularity == "token_and_head" else scores.log_softmax(0)).tolist()

    def _place(self, place: int, direct: int) -> int:
        """Position in the window of a token in the direct blocks, which follow the prefix of min(k, n) + 1 slots."""
        return place - direct * self.config.block_size + (min(self.k, direct) + 1) * self.config.block_size

    def _score(self, query: Tensor, query_position: int, keys: list[Tensor], key_positions: list[int]) -> Tensor:
        rotated = self._rotate(torch.stack(keys), key_positions)
        return rotated @ self._rotate(query, query_position) / math.sqrt(self.config.head_dim)

    def _rotate(self, x: Tensor, position: int | list[int]) -> Tensor:
        cos, sin = self.cos[position], self.sin[position]
        real, imaginary = x.chunk(2, dim=-1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)

    def _weigh(
        self, layer: int, query: Tensor, scoring: Tensor, place: int, direct: int, kv_head: int, chosen: list[int]
    ) -> Tensor:
        """The output of one query and head: a softmax over the own group, and one inside each other block."""
        c = self.config
        own_block, here = place // c.block_size, self._place(place, direct)
        recent = min(self.k, direct)
        slots = {b: rank + (1 if b >= direct - recent else 0) for rank, b in enumerate(chosen)}
        slots |= {b: recent + 1 + b - direct for b in range(direct, own_block)}
        keys, values = self.cache[layer]

        def scores(members: list[int], slot: int) -> Tensor:
            positions = [slot * c.block_size + at % c.block_size for at in members]
            return self._score(query, here, [keys[at][kv_head] for at in members], positions)

        def contents(members: list[int]) -> Tensor:
            return torch.stack([values[at][kv_head] for at in members])

        group, parts = [], []
        for b, slot in slots.items():
            ordinary = list(range(b * c.block_size, (b + 1) * c.block_size - 1))
            group.append(self._landmark_score(layer, scoring, here, b, slot, kv_head))
            parts.append((scores(ordinary, slot).softmax(0) @ contents(ordinary)).unsqueeze(0))
        own = [at for at in range(own_block * c.block_size, place + 1) if not self._is_landmark(at)]
        group.append(scores(own, here // c.block_size))
        parts.append(contents(own))
        return torch.cat(group).softmax(0) @ torch.cat(parts)
