"""MInference: a dense model that reads its prompt by sparse attention.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", arXiv
2407.02490. Heads of long-context models look at few places, in patterns that can be found cheaply:
pattern="a_shape": the text's first `sinks` tokens and the nearest `window`.
pattern="vertical_slash": the last `asked` queries of the prompt attend densely. The `verticals` tokens and the
`slashes` distances (in blocks of `block` tokens, the nearest two always) at which they look most are what all queries
of the head look at. Such a pattern is made of a prompt's end: it is no forecast and has no perplexity.
Decoding is dense. No weight is trained. The paper chooses a pattern for each head beforehand; here all have one.

Invariant: with room for the whole text both are the dense model, and a query's output is softmax attention over
exactly the tokens that its pattern names, each counted once.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import LlamaForCausalLM

from comparisons.cached import CachedReader, Kept
from comparisons.layers import causal_mask
from comparisons.reader import Reader

QUERIES = 256  # of a prompt that attend at once, at most
PATTERNS = ("a_shape", "vertical_slash")


class MInferenceReader(CachedReader):
    """Reads a prompt in one call; keys and values of all tokens are kept."""

    def __init__(self, base: LlamaForCausalLM, segment: int, pattern: str, sizes: dict[str, int]):
        super().__init__(base, segment)
        if pattern not in PATTERNS:
            raise ValueError(f"pattern={pattern!r}: choose from {', '.join(PATTERNS)}")
        self.pattern, self.sizes, self.sparse = pattern, sizes, True

    def attend(self, layer: int, query: Tensor, kept: Kept) -> Tensor:
        if self.training or not self.sparse:
            return super().attend(layer, query, kept)
        if self.pattern == "a_shape":
            return self._a_shape(query, *kept)
        return self._vertical_slash(query, *kept)

    def _a_shape(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Pieces of queries over the sinks and their windows."""
        sinks, window, outputs = self.sizes["sinks"], self.sizes["window"], []
        start = key.shape[2] - query.shape[2]
        for piece in query.split(QUERIES, dim=2):
            end = start + piece.shape[2]
            first = min(max(sinks, start - window + 1), end)
            column = torch.cat([torch.arange(min(sinks, end)), torch.arange(first, end)]).to(key.device)
            distance = torch.arange(start, end, device=key.device)[:, None] - column
            mask = (distance >= 0) & ((column < sinks) | (distance < window))
            outputs.append(scaled_dot_product_attention(piece, key[:, :, column], value[:, :, column], attn_mask=mask))
            start = end
        return torch.cat(outputs, dim=2)

    def _vertical_slash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Blocks of queries over the columns and the blocks at the distances that the last queries look at most."""
        if key.shape[2] != query.shape[2]:
            raise ValueError(
                f"{query.shape[2]} of {key.shape[2]} tokens: a vertical-slash pattern needs a whole prompt"
            )
        block, length = self.sizes["block"], key.shape[2]
        columns, distances = find_pattern(query, key, **{name: self.sizes[name] for name in SLASH_SIZES})
        query, blocked_key, blocked_value = (pad(x, (0, 0, 0, -length % block)) for x in (query, key, value))
        of_columns = [take(x, columns) for x in (key, value)]
        outputs, at_once = [], max(1, QUERIES // block)
        for start in range(0, query.shape[2] // block, at_once):
            number = torch.arange(start, min(start + at_once, query.shape[2] // block), device=key.device)
            piece = query[:, :, start * block : (start + len(number)) * block]
            outputs.append(self._piece(piece, number, blocked_key, blocked_value, columns, of_columns, distances))
        return torch.cat(outputs, dim=2)[:, :, :length]

    def _piece(self, query, number, key, value, columns, of_columns, distances) -> Tensor:
        """The blocks `number` (n,) of queries: (B, H, n * block, D)."""
        block = self.sizes["block"]
        source = number.view(-1, 1) - distances.unsqueeze(2)  # (B, H, n, slashes): key blocks
        place = source.clamp(min=0).unsqueeze(-1) * block + torch.arange(block, device=key.device)
        slashed = [take(x, place.flatten(2)).unflatten(2, place.shape[2:]).flatten(3, 4) for x in (key, value)]
        query = query.unflatten(2, (-1, block))  # (B, H, n, block, D)
        position = (number[:, None] * block + torch.arange(block, device=key.device))[..., None]
        seen_slash = ((source >= 0).unsqueeze(-1) & torch.ones_like(place, dtype=torch.bool)).flatten(3, 4).unsqueeze(3)
        seen_slash = seen_slash & (place.flatten(3, 4).unsqueeze(3) <= position)
        # a column that stands in a block that is read has been counted there
        again = (columns[:, :, None, :, None] // block == source.unsqueeze(3)).any(-1).unsqueeze(3)
        seen_column = (columns[:, :, None, None, :] <= position) & ~again
        mask = torch.cat([seen_slash, seen_column], dim=-1)
        all_keys, all_values = (
            torch.cat([x, y.unsqueeze(2).expand(-1, -1, len(number), -1, -1)], dim=3)
            for x, y in zip(slashed, of_columns, strict=True)
        )
        return scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask).flatten(2, 3)

    @torch.no_grad()
    def losses(self, input_ids: Tensor) -> Tensor:
        if self.pattern == "vertical_slash":
            raise ValueError("pattern='vertical_slash' looks at a prompt's end: it reads prompts and has no perplexity")
        return super().losses(input_ids)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, list[Kept]]:
        states, memory = self.read(input_ids, None)
        return self.logits(states[:, -1]), memory

    @torch.no_grad()
    def decode(self, token: Tensor, state: list[Kept]) -> tuple[Tensor, list[Kept]]:
        self.sparse = False
        try:
            return super().decode(token, state)
        finally:
            self.sparse = True


SLASH_SIZES = ("asked", "verticals", "slashes", "block")


def find_pattern(
    query: Tensor, key: Tensor, asked: int, verticals: int, slashes: int, block: int
) -> tuple[Tensor, Tensor]:
    """Columns (B, H, verticals) and distances in blocks (B, H, slashes), by the weights of the last `asked` queries."""
    query, length = query[:, :, -asked:], key.shape[2]
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    weight = scores.masked_fill(~causal_mask(query.shape[2], length, key.device), -torch.inf).softmax(-1)
    columns = weight.sum(2).topk(min(verticals, length), dim=-1).indices
    row = torch.arange(length - query.shape[2], length, device=key.device) // block
    distance = (row[:, None] - torch.arange(length, device=key.device) // block).clamp(min=0)
    blocks = -(-length // block)
    total = weight.new_zeros(*weight.shape[:2], blocks)
    total.scatter_add_(2, distance.flatten().expand(*weight.shape[:2], -1), weight.flatten(2))
    total[..., :2] = torch.inf  # the own block and the one before it
    return columns, total.topk(min(slashes, blocks), dim=-1).indices


def take(x: Tensor, place: Tensor) -> Tensor:
    """x (B, H, N, D) at `place` (B, H, n)."""
    return x.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def build(base: LlamaForCausalLM, segment: int = 512, pattern: str = "vertical_slash", **sizes: int) -> Reader:
    """Sizes in tokens: `sinks`, `window` of the A-shape; `asked`, `verticals`, `block`, and `slashes` in blocks."""
    default = {"sinks": 64, "window": 448, "asked": 64, "verticals": 128, "slashes": 6, "block": 64}
    if foreign := sizes.keys() - default.keys():
        raise ValueError(f"{foreign.pop()}: no such size; there are {', '.join(default)}")
    return MInferenceReader(base, segment, pattern, default | sizes)
