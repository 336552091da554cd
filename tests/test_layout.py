"""Rows of a batch in plain columns, laid out in landmarked ones: against the same in loops."""

import pytest
import torch

from landmark_llama.rows.layout import compact, find_landmarks, lay_out


@pytest.mark.parametrize("predict_from_landmark", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 5])
def test_rows_lie_from_their_first_real_token_on_whatever_is_padded(
    block_size: int, predict_from_landmark: bool
) -> None:
    generator = torch.Generator().manual_seed(block_size)
    for _ in range(20):
        real = torch.rand(4, 11, generator=generator) > 0.4
        real[3] = False
        before = torch.randint(0, 9, (4,), generator=generator)
        layout = lay_out(real, None, before, block_size=block_size, predict_from_landmark=predict_from_landmark)
        for row in range(4):
            expected, speaks = [], {}
            seen = int(before[row])
            for column in real[row].nonzero().flatten().tolist():
                speaks[column] = len(expected)
                expected.append(column)
                seen += 1
                if seen % (block_size - 1) == 0:
                    if predict_from_landmark:
                        speaks[column] = len(expected)
                    expected.append(11)  # one past the plain columns stands for the landmark
            assert layout.source[row, : len(expected)].tolist() == expected
            assert (layout.source[row, len(expected) :] == 11).all()
            assert int(layout.length[row]) == len(expected) and int(layout.ordinary[row]) == int(real[row].sum())
            assert int(layout.start[row]) == int(before[row]) + int(before[row]) // (block_size - 1)
            assert {column: int(layout.output[row, column]) for column in speaks} == speaks
            assert (layout.output[row] >= 0).all() and (layout.output[row] < layout.source.shape[1]).all()


def test_kept_columns_move_to_the_right() -> None:
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert compact(x, keep, fill=-1).tolist() == [[1, 3, 4], [-1, -1, 7], [-1, -1, -1]]


def find(ids: list[int], before: int = 0, real: list[int] | None = None) -> torch.Tensor | None:
    mask = torch.ones(1, len(ids), dtype=torch.bool) if real is None else torch.tensor([real]).bool()
    return find_landmarks(torch.tensor([ids]), mask, torch.tensor([before]), block_size=4, landmark_token_id=7)


def test_landmarks_in_their_regular_places_are_found() -> None:
    assert find([1, 2, 3, 4]) is None
    assert find([1, 2, 3, 7, 4]).tolist() == [[False, False, False, True, False]]
    assert find([7, 4], before=3).tolist() == [[True, False]]
    assert find([0, 0, 1, 2, 3, 7], real=[0, 0, 1, 1, 1, 1]).tolist() == [[False] * 5 + [True]]
    # padding may be any token, the landmark included
    assert find([7, 7, 1, 2], real=[0, 0, 1, 1]) is None
    # it need not stand at every block: the model sets each one itself
    assert find([1, 2, 3, 4, 5, 6, 7]).tolist() == [[False] * 6 + [True]]


@pytest.mark.parametrize(
    ("ids", "before", "position"),
    [([1, 7], 0, 1), ([7, 1], 0, 0), ([1, 2, 3, 7, 7], 0, 4), ([1, 7], 1, 1), ([1, 2, 7], 2, 2)],
)
def test_a_landmark_anywhere_else_is_named_with_row_and_position(ids: list[int], before: int, position: int) -> None:
    with pytest.raises(ValueError, match=f"row 0, position {position}: a landmark token \\(7\\)"):
        find(ids, before)
