"""Which blocks are chosen, and at which distances they are scored and read: brute force over every candidate."""

import pytest
import torch
from torch import Tensor

from landmark_llama.attention.rotary import RotaryTable
from landmark_llama.reading import choice as retrieval
from landmark_llama.reading import highest, repeated
from landmark_llama.reading.choice import Choice, choose_blocks, rotate_to_distances, top_latest
from landmark_llama.reading.repeated import RepeatedLandmarks

BLOCK, HEAD_DIM, SCALE = 4, 8, 0.5
FREQUENCY = 100.0 ** -(torch.arange(HEAD_DIM // 2).double() / (HEAD_DIM // 2))


def table(length: int) -> RotaryTable:
    angle = torch.arange(length).unsqueeze(1) * FREQUENCY
    return RotaryTable(angle.cos(), angle.sin())


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotates the pairs (i, i + half) of `x` (head_dim,) as complex numbers."""
    half = len(x) // 2
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def brute_scores(query: Tensor, position: int, landmarks: Tensor, n: int, k: int) -> list[float]:
    """Scores of candidates 0 .. n - 1 for one query (head_dim,): the last k at their true distance, others at k + 1."""
    scores = []
    for block in range(n):
        distance = position + min(n - block, k + 1) * BLOCK
        scores.append(SCALE * (turn(query, distance * FREQUENCY) @ landmarks[block]).item())
    return scores


def random_case(n: list[int], *, heads: int = 4, kv_heads: int = 2, queries: int = 5, batch: int = 2):
    generator = torch.Generator().manual_seed(sum(n))
    groups = len(n)
    query = torch.randn(batch, kv_heads, heads // kv_heads, groups, queries, HEAD_DIM, generator=generator).double()
    landmarks = torch.randn(batch, kv_heads, max(n), HEAD_DIM, generator=generator).double()
    position = torch.randint(0, 3 * BLOCK, (batch, groups, queries), generator=generator)
    return query * 2, landmarks, torch.tensor([n] * batch), position


def choose(
    query: Tensor, landmarks: Tensor, candidates: Tensor, position: Tensor, k: int, granularity: str, **settings
) -> Choice:
    rotated = rotate_to_distances(query, position, k, BLOCK, table(3 * BLOCK + (k + 1) * BLOCK))
    settings = {"valid": torch.ones_like(position, dtype=torch.bool), "landmarks_tie": False, **settings}
    return choose_blocks(rotated * SCALE, landmarks, candidates, granularity=granularity, **settings)


def brute_wanted(case: tuple[Tensor, ...], k: int, granularity: str, valid: Tensor) -> Tensor:
    """What each candidate is worth (batch, kv_heads, group, groups, queries, blocks), -inf where it is none."""
    query, landmarks, candidates, position = case
    wanted = torch.full((*query.shape[:-1], landmarks.shape[2]), -torch.inf, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:-1])).tolist():
        b, h, _, g, q = index
        n = int(candidates[b, g])
        scores = torch.tensor(brute_scores(query[tuple(index)], int(position[b, g, q]), landmarks[b, h], n, k))
        wanted[tuple(index)][:n] = scores if granularity == "token_and_head" else scores.softmax(0)
    if granularity == "token":
        wanted = wanted.amax((1, 2), keepdim=True)
    if granularity == "head":
        wanted = wanted.masked_fill(~valid[:, None, None, ..., None], -torch.inf).amax(4, keepdim=True)
    return wanted


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("n", [[1], [2, 3], [5, 6, 7], [0, 11, 40]], ids=str)
def test_selection_equals_brute_force(n: list[int], k: int, granularity: str) -> None:
    case = random_case(n)
    valid = torch.rand(case[3].shape) > 0.3
    valid[..., 0] = True
    choice = choose(*case, k, granularity, valid=valid)
    wanted = brute_wanted(case, k, granularity, valid)
    assert choice.block.shape == (*wanted.shape[:-1], k)
    for chosen, worth, groups in zip(
        choice.block.flatten(0, -2).tolist(),
        wanted.flatten(0, -2),
        torch.arange(len(n)).view(-1, 1).expand(wanted.shape[:-1]).flatten().tolist(),
        strict=True,
    ):
        available = min(k, n[groups])
        blocks = chosen[k - available :]
        assert chosen[: k - available] == [-1] * (k - available)
        assert blocks == sorted(set(blocks)) and all(0 <= block < n[groups] for block in blocks)
        # on near-ties the worth of what was chosen counts, not its number
        torch.testing.assert_close(worth[blocks].sort().values, worth.sort().values[len(worth) - available :])


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("k", [1, 3])
def test_where_all_retrieved_blocks_are_sinks_nothing_is_compared(k: int, granularity: str) -> None:
    query, landmarks, candidates, position = random_case([0, 1, 2, 5, 9])
    landmarks[:] = torch.nan  # that nobody looks at
    choice = choose(query, landmarks, candidates, position, k, granularity, num_sink_blocks=k)
    shared = choose(*random_case([0, 1, 2, 5, 9]), k, granularity)
    assert choice.block.shape == shared.block.shape
    for group, n in enumerate(candidates[0].tolist()):
        sinks = [-1] * (k - min(k, n)) + list(range(min(k, n)))
        assert (choice.block[:, :, :, group] == torch.tensor(sinks)).all()
        assert torch.equal(choice.recent[:, :, :, group], choice.block[:, :, :, group] >= n - k)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_large_scores_are_compared_by_their_logarithms(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case([0, 11, 40])
    small = choose(*case, 3, granularity)
    monkeypatch.setattr(retrieval, "SMALLEST_SOFTMAX_TOTAL", 2.0)
    assert torch.equal(choose(*case, 3, granularity).block, small.block)
    monkeypatch.undo()
    query, landmarks, candidates, position = case
    far = choose(query.float() * 100, landmarks.float(), candidates, position, 3, granularity)  # would overflow
    chosen = (far.block >= 0).sum(-1)
    assert (chosen == candidates.clamp_max(3)[:, None, None, :, None].expand_as(chosen)).all()


def test_the_queries_of_a_shared_choice_are_given_the_same_blocks() -> None:
    case = random_case([9, 20])
    assert choose(*case, 3, "head").block.shape == (2, 2, 2, 2, 1, 3)
    assert choose(*case, 3, "token").block.shape == (2, 1, 1, 2, 5, 3)


@pytest.mark.parametrize("granularity", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("k", [1, 3])
def test_ties_go_to_the_later_block(k: int, granularity: str) -> None:
    query, landmarks, candidates, position = random_case([2, k, k + 1, 2 * k, 30])
    landmarks = landmarks[:, :, :1].expand_as(landmarks).contiguous()
    choice = choose(query, landmarks, candidates, position, k, granularity, landmarks_tie=True)
    valid = torch.ones_like(position, dtype=torch.bool)
    wanted = brute_wanted((query, landmarks, candidates, position), k, granularity, valid)
    wanted = (wanted * 1e9).round()  # equal scores are equal, whatever their last bits
    blocks = landmarks.shape[2]
    order = (torch.arange(blocks).expand_as(wanted)).flip(-1)
    order = order.gather(-1, wanted.flip(-1).sort(dim=-1, descending=True, stable=True).indices)[..., :k]
    available = wanted.gather(-1, order) > -torch.inf
    expected = order.masked_fill(~available, -1).sort(-1).values
    assert torch.equal(choice.block, expected)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_of_equal_scores_the_later_ones_are_taken(k: int) -> None:
    scores = torch.randint(0, 4, (40, 10), generator=torch.Generator().manual_seed(k)).float()
    scores[5:, :3] = -torch.inf
    values, indices = top_latest(scores.clone(), k)
    assert torch.equal(scores.gather(-1, indices), values)
    for row, chosen in zip(scores.tolist(), indices.tolist(), strict=True):
        expected = sorted(range(10), key=lambda block: (row[block], block), reverse=True)[:k]
        real = {block for block in expected if row[block] > -torch.inf}
        assert {block for block in chosen if row[block] > -torch.inf} == real


def test_noise_below_rounding_does_not_decide_where_landmarks_tie() -> None:
    query, landmarks, candidates, position = random_case([30])
    landmarks = landmarks[:, :, :1].expand_as(landmarks).contiguous()
    noisy = landmarks.clone()
    noisy[:, :, 1:] += 1e-9 * torch.randn(noisy[:, :, 1:].shape, dtype=torch.float64)
    for granularity in ("token_and_head", "head", "token"):
        expected = choose(query, landmarks, candidates, position, 3, granularity, landmarks_tie=True)
        actual = choose(query, noisy, candidates, position, 3, granularity, landmarks_tie=True)
        assert torch.equal(actual.block, expected.block)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_chosen_blocks_take_slots_in_order_one_further_if_among_the_last(n: int, k: int) -> None:
    case = random_case([n], queries=12)
    choice = choose(*case, k, "token_and_head")
    distance = choice.distance()
    taken = min(k, n)
    for chosen, back in zip(choice.block.flatten(0, -2).tolist(), distance.flatten(0, -2).tolist(), strict=True):
        for rank, (block, apart) in enumerate(zip(chosen[k - taken :], back[k - taken :], strict=True)):
            slot = rank + (1 if block >= n - taken else 0)
            assert taken + 1 - slot == apart  # the first direct block is in slot k' + 1
            if n <= k:
                assert apart == n - block  # everything at its true distance
            assert 1 <= apart <= k + 1
        assert sorted(back[k - taken :], reverse=True) == back[k - taken :]
        assert len(set(back[k - taken :])) == taken


def test_queries_come_back_rotated_to_the_distances_of_what_they_chose() -> None:
    query, landmarks, candidates, position = random_case([9])
    rotary = table(100)
    choice = choose(query, landmarks, candidates, position, 3, "token_and_head")
    rotated = choice.at_their_distances(rotate_to_distances(query, position, 3, BLOCK, rotary))
    place = position[:, None, None, ..., None] + choice.distance() * BLOCK
    torch.testing.assert_close(rotated, rotary.rotate(query.unsqueeze(-2), place))


def test_a_choice_of_many_groups_does_not_depend_on_how_many_are_scored_at_once(monkeypatch) -> None:
    case = random_case([3, 9, 12, 17, 22, 30])
    expected = choose(*case, 2, "head")
    monkeypatch.setattr("landmark_llama.reading.choice.SCORES_AT_ONCE", 1)
    assert torch.equal(choose(*case, 2, "head").block, expected.block)


def in_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets few candidates count as many."""
    for module in (retrieval, highest):
        few = {"TILE": 32, "TILE_QUERIES": 12, "SEGMENT": 4, "MANY_FROM": 40, "MANY_SHARED_FROM": 40, "TILED_FROM": 1}
        for name, number in few.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, number)
    monkeypatch.setattr(highest, "FOLDED_FROM", 20)


@pytest.mark.parametrize("different", [1, 3, 20, 500], ids="{} different landmarks".format)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("sinks", [0, 2], ids="{} sinks".format)
def test_a_choice_among_many_is_that_of_brute_force_ties_included(
    sinks: int, granularity: str, biased: bool, different: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, landmarks, candidates, position = random_case([100, 101, 163, 230, 231])
    # numbers whose products are exact, so that equal landmarks tie to the bit whatever the order of a sum
    query, landmarks = (x.mul(4).round().div(4) for x in (query, landmarks))
    rotated = query.unsqueeze(-2).expand(*query.shape[:-1], 4, -1) * SCALE
    landmarks = landmarks[:, :, torch.randint(0, min(different, 231), (231,))]
    biases = torch.randint(0, 3, landmarks.shape[:3]).double() if biased else None
    valid = torch.rand(position.shape) > 0.2
    settings = {"granularity": granularity, "landmarks_tie": False, "biases": biases, "num_sink_blocks": sinks}
    expected = choose_blocks(rotated, landmarks, candidates, valid, **settings)
    in_two_levels(monkeypatch)
    asked, many = [], retrieval.highest_of_many
    monkeypatch.setattr(retrieval, "highest_of_many", lambda *args, **kw: asked.append(args) or many(*args, **kw))
    choice = choose_blocks(rotated, landmarks, candidates, valid, **settings)
    assert asked
    keep = valid[:, None, None] if granularity == "token_and_head" else valid.any(-1, keepdim=True)[:, None, None]
    assert torch.equal(
        choice.block[keep.expand(choice.block.shape[:-1])], expected.block[keep.expand(choice.block.shape[:-1])]
    )


@pytest.mark.parametrize("different", [4, 9], ids="{} different landmarks".format)
@pytest.mark.parametrize("granularity", ["token_and_head", "head"])
@pytest.mark.parametrize("sinks", [0, 2], ids="{} sinks".format)
def test_a_choice_among_repeated_landmarks_is_that_of_brute_force(
    sinks: int, granularity: str, different: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated, "FROM_BLOCKS", 40)
    found, taken = RepeatedLandmarks(), []
    among = repeated.highest_of_groups
    monkeypatch.setattr(repeated, "highest_of_groups", lambda *args, **kw: taken.append(1) or among(*args, **kw))
    query, landmarks, _, position = random_case([80] * 3, batch=1)
    landmarks = landmarks.mul(4).round().div(4)[:, :, :different]
    query, landmarks = query.mul(4).round().div(4), landmarks[:, :, torch.randint(0, different, (300,))]
    landmarks[:, 1, 100] = landmarks[:, 1, 99]  # two groups that tie in one head
    rotated = query.unsqueeze(-2).expand(*query.shape[:-1], 4, -1) * SCALE
    valid = torch.rand(position.shape) > 0.2
    settings = {"granularity": granularity, "landmarks_tie": False, "num_sink_blocks": sinks}
    for candidates in [80, 81, 95], [95, 95, 97], [160, 290, 300], [50, 60, 70], [300, 299, 300]:
        candidates = torch.tensor([candidates])
        shown = landmarks[:, :, : int(candidates.max())]
        expected = choose_blocks(rotated, shown, candidates, valid, **settings).block
        block = choose_blocks(rotated, shown, candidates, valid, repeated=found, **settings).block
        keep = valid[:, None, None] if granularity == "token_and_head" else valid.any(-1, keepdim=True)[:, None, None]
        keep = keep.expand(block.shape[:-1])
        assert torch.equal(block[keep], expected[keep])
    assert len(taken) >= 4 and found.pay


def test_landmarks_that_differ_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "FROM_BLOCKS", 40)
    monkeypatch.setattr(repeated, "HOPELESS_FROM", 50)
    found, landmarks = RepeatedLandmarks(), torch.randn(1, 2, 100, 8)
    assert found.groups(landmarks, 3) is None and found.hopeless
    found = RepeatedLandmarks()
    assert found.groups(landmarks[:, :, torch.arange(100) % 5], 3).count.tolist() == [20.0] * 5
    found.forget(99)
    assert found.groups(landmarks, 3) is None


def test_scores_too_large_for_exponentials_are_chosen_from_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, landmarks, candidates, position = random_case([100, 231])
    expected = choose(query * 500, landmarks, candidates, position, 3, "head")
    in_two_levels(monkeypatch)
    assert torch.equal(choose(query * 500, landmarks, candidates, position, 3, "head").block, expected.block)


@pytest.mark.parametrize("values", [1, 4, 1000])
def test_the_latest_of_the_highest_in_long_rows(values: int) -> None:
    scores = torch.randint(0, values, (5, 3000)).float()
    scores[1, 5:] = -torch.inf
    for k in (1, 6):
        value, index = top_latest(scores, k)
        for row in range(5):
            wanted = sorted(range(3000), key=lambda i: (-float(scores[row, i]), -i))[:k]
            assert value[row].tolist() == scores[row, wanted].tolist()
            if row != 1 or k == 1:
                assert sorted(index[row].tolist()) == sorted(wanted)
