"""Routing Transformer: half of the heads look nearby, the others at tokens of the same cluster, however far back.

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997. A routed head has
`clusters` centroids, found by k-means while training: each centroid drifts towards the mean of the vectors that are
nearest to it. Queries serve as keys, too, normalised, so that a token attends to earlier tokens whose vectors have
the same nearest centroid. The paper gives each centroid the tokens of the whole sequence that fit it best, which
looks ahead; here a token goes to its nearest centroid, and a cluster remembers its last `members` tokens of earlier
segments. Local heads see the `segment` tokens before each token. Routed heads have no positions.

Invariant: a routed head attends to exactly the earlier tokens of its query's cluster, as many as are remembered.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot
from transformers import LlamaForCausalLM

from comparisons.layers import Rotary, attend_causally, through_layers
from comparisons.reader import Reader


class Kept(NamedTuple):
    """Of one layer: the last tokens of local heads (B, H / 2, n, D), not rotated, and the clusters' members.

    member_key, member_value: (B, routed heads, clusters, members, D), the latest last.
    member: which of these there are.
    """

    key: Tensor
    value: Tensor
    member_key: Tensor
    member_value: Tensor
    member: Tensor


class RoutingReader(Reader):
    """The first half of the heads is local."""

    def __init__(self, base: LlamaForCausalLM, segment: int, clusters: int, members: int, decay: float):
        super().__init__(base, segment)
        self.members, self.decay, self.rotary = members, decay, Rotary(base.model.rotary_emb)
        layers, heads, width = base.config.num_hidden_layers, base.config.num_attention_heads, base.config.head_dim
        self.local = heads // 2
        self.register_buffer(
            "centroids", layer_norm(torch.randn(layers, heads - self.local, clusters, width), (width,))
        )

    def read(self, input_ids: Tensor, memory: list[Kept] | None) -> tuple[Tensor, list[Kept]]:
        layers: list[Kept] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kept = memory[layer] if memory else self._empty(query)
            keys, values = (
                torch.cat([old, x[:, : self.local]], 2) for old, x in ((kept.key, key), (kept.value, value))
            )
            shared, routed_value = layer_norm(query[:, self.local :], query.shape[-1:]), value[:, self.local :]
            cluster = (shared @ self.centroids[layer].transpose(-1, -2)).argmax(-1)
            output = [self._nearby(query[:, : self.local], keys, values)]
            output.append(attend_in_clusters(shared, routed_value, cluster, kept))
            members = add_members(kept, shared, routed_value, cluster)
            layers.append(Kept(keys[:, :, -self.segment :], values[:, :, -self.segment :], *members))
            if self.training:
                self._move_centroids(layer, shared, cluster)
            return torch.cat(output, dim=1)

        return through_layers(self.base.model, self.base.model.embed_tokens(input_ids), attend), layers

    def _nearby(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Local heads: each query sees itself and the `segment` tokens before it."""
        queries, keys = query.shape[2], key.shape[2]
        position = torch.arange(keys, device=key.device)
        distance = position[keys - queries :, None] - position
        query, key = self.rotary(query, position[keys - queries :]), self.rotary(key, position)
        return attend_causally(query, key, value, (distance >= 0) & (distance <= self.segment))

    def _empty(self, query: Tensor) -> Kept:
        rows, heads, _, width = query.shape
        members = query.new_zeros(rows, heads - self.local, self.centroids.shape[2], self.members, width)
        none = query.new_zeros(rows, self.local, 0, width)
        return Kept(none, none, members, members, torch.zeros_like(members[..., 0], dtype=torch.bool))

    @torch.no_grad()
    def _move_centroids(self, layer: int, shared: Tensor, cluster: Tensor) -> None:
        """Towards the mean of their vectors of this segment; those that have none stay."""
        assigned = one_hot(cluster, self.centroids.shape[2]).to(shared)
        total, count = torch.einsum("bhtc,bhtd->hcd", assigned, shared), assigned.sum((0, 2)).unsqueeze(-1)
        moved = layer_norm(torch.lerp(total / count.clamp(min=1), self.centroids[layer], self.decay), total.shape[-1:])
        centroids = self.centroids.clone()  # the old ones may be needed for gradients
        centroids[layer] = torch.where(count > 0, moved, centroids[layer])
        self.centroids = centroids


def attend_in_clusters(shared: Tensor, value: Tensor, cluster: Tensor, kept: Kept) -> Tensor:
    """Output (B, H, T, D) of tokens over their cluster: its members, and those of the segment up to themselves.

    shared: (B, H, T, D), queries and keys; cluster: (B, H, T).
    """
    place = cluster[..., None, None].expand(-1, -1, -1, *kept.member_key.shape[3:])
    keys, values = kept.member_key.gather(2, place), kept.member_value.gather(2, place)  # (B, H, T, members, D)
    before = torch.einsum("bhtd,bhtmd->bhtm", shared, keys)
    before = before.masked_fill(~kept.member.gather(2, place[..., 0]), -torch.inf)
    same = (cluster.unsqueeze(-1) == cluster.unsqueeze(-2)).tril()
    within = (shared @ shared.transpose(-1, -2)).masked_fill(~same, -torch.inf)
    weight = (torch.cat([before, within], dim=-1) * shared.shape[-1] ** -0.5).softmax(-1)
    of_members, of_segment = weight.split([before.shape[-1], within.shape[-1]], dim=-1)
    return torch.einsum("bhtm,bhtmd->bhtd", of_members, values) + of_segment @ value


def add_members(kept: Kept, shared: Tensor, value: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The clusters' latest members once a segment has been read."""
    clusters, most = kept.member.shape[2:]
    new = (cluster.unsqueeze(2) == torch.arange(clusters, device=cluster.device)[:, None]).expand(-1, -1, clusters, -1)
    there = torch.cat([kept.member, new], dim=-1)  # (B, H, clusters, members + T)
    age = torch.arange(1, there.shape[-1] + 1, device=cluster.device)
    latest = (there * age).topk(most, dim=-1).indices.sort(-1).values
    place = latest.unsqueeze(-1).expand(*latest.shape, shared.shape[-1])
    both = [
        torch.cat([old, x.unsqueeze(2).expand(-1, -1, clusters, -1, -1)], dim=3).gather(3, place)
        for old, x in ((kept.member_key, shared), (kept.member_value, value))
    ]
    return both[0], both[1], there.gather(-1, latest)


def build(
    base: LlamaForCausalLM, segment: int = 256, clusters: int = 16, members: int = 64, decay: float = 0.99
) -> Reader:
    """`clusters` a routed head, each of which remembers `members` tokens."""
    return RoutingReader(base, segment, clusters, members, decay)
