"""What a layer attends with in one call through the cache, small: queries, blocks read before, groups, choices."""

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading.choice import Choice, choose_blocks, rotate_to_distances
from landmark_llama.reading.choice_triton import select_blocks
from landmark_llama.reading.groups import QueryGroups
from landmark_llama.reading.storage import DeviceStorage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3


class Case(NamedTuple):
    """What a layer attends with in one call: queries, what was read before, and how the queries stand in groups."""

    query: Tensor  # (batch, columns, kv_heads, group, head_dim)
    storage: DeviceStorage
    groups: QueryGroups
    angles: RotaryTable  # in float64
    k: int
    block_size: int
    landmark_query: Tensor | None = None  # the shape of `query`: what scores landmarks in its place

    @property
    def rotary(self) -> RotaryTable:
        """The table as it is kept for queries of this dtype."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return RotaryTable(self.angles.cos.to(dtype), self.angles.sin.to(dtype))

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in `dtype`."""
        storage = DeviceStorage(self.block_size)
        storage.key, storage.value, storage.landmark = (
            x.to(dtype) for x in (self.storage.key, self.storage.value, self.storage.landmark)
        )
        if self.storage.bias is not None:
            storage.bias = self.storage.bias.to(torch.promote_types(dtype, torch.float32))
        scoring = None if self.landmark_query is None else self.landmark_query.to(dtype)
        return self._replace(query=self.query.to(dtype), storage=storage, landmark_query=scoring)


def make_case(
    start: list[int],
    length: list[int],
    *,
    block_size: int = 4,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 8,
    k: int = 2,
    direct: int = 1,
    chunked: bool = False,
    share: bool = False,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    own: str = "",
) -> Case:
    """Rows that have read `start` landmarked positions and bring `length` more.

    own: what landmarks have of their own: `"query"`, `"bias"` or `"query_and_bias"`.
    """
    generator = torch.Generator().manual_seed(sum(start) + sum(length) + block_size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, before, columns = len(start), max(start), max(length)
    groups = QueryGroups.of(
        torch.tensor(start),
        torch.tensor(length),
        num_direct_blocks=direct,
        tile_blocks=2,
        chunked=chunked,
        share=share,
        block_size=block_size,
    )
    storage = DeviceStorage(block_size)
    for first, count in ((torch.zeros(batch, dtype=torch.long), before), (torch.tensor(start), columns)):
        if count:
            key, value = draw(batch, count, kv_heads, head_dim), draw(batch, count, kv_heads, head_dim)
            storage.write(key, value, first)
    if tie:
        storage.landmark[:] = storage.landmark[:, :, :1]
        storage.key[..., -1, :] = storage.landmark
    for name in ("key", "value", "landmark"):
        setattr(storage, name, getattr(storage, name).to(DEVICE))
    blocks = k + 2 + max(direct, columns // block_size + 1)
    angle = torch.arange(blocks * block_size).unsqueeze(1) * 50.0 ** -torch.linspace(0, 1, head_dim // 2).double()
    angles = RotaryTable(angle.cos(), angle.sin()).to(DEVICE)
    query = 2 * draw(batch, columns, kv_heads, heads // kv_heads, head_dim).to(DEVICE)
    scoring = 2 * draw(*query.shape).to(DEVICE) if "query" in own else None
    if "bias" in own:
        storage.bias = torch.randn(storage.key.shape[:3], generator=generator).to(DEVICE)
    return Case(query, storage, groups.to(DEVICE), angles, k, block_size, scoring)


def choose(case: Case, granularity: str, tie: bool = False, sinks: int = 0) -> Tensor:
    """Blocks by the kernels."""
    return select_blocks(
        case.query if case.landmark_query is None else case.landmark_query,
        case.storage.landmark,
        case.groups,
        bias=case.storage.bias,
        k=case.k,
        share=granularity == "head",
        landmarks_tie=tie,
        num_sink_blocks=sinks,
        block_size=case.block_size,
        rotary=case.rotary,
        scale=SCALE,
    )


def chosen_in_pytorch(case: Case, granularity: str, tie: bool = False, sinks: int = 0) -> Choice:
    """Blocks by the definition."""
    groups = case.groups
    grouped = groups.gather(case.query if case.landmark_query is None else case.landmark_query).permute(
        0, 3, 4, 1, 2, 5
    )
    rotated = rotate_to_distances(grouped * SCALE, groups.position, case.k, case.block_size, case.rotary)
    return choose_blocks(
        rotated,
        case.storage.landmarks(max(1, groups.candidates)),
        groups.first_block,
        groups.valid,
        granularity=granularity,
        landmarks_tie=tie,
        num_sink_blocks=sinks,
        biases=case.storage.biases(max(1, groups.candidates)),
    )
