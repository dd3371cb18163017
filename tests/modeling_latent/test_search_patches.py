"""Which image tokens the search interleaves: schedules, budgets, what is locked, order, and the two layouts."""

import pytest
import torch

from modeling_latent.search_patches import PatchSchedule, RowPatches, interleaved, published_block


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (PatchSchedule(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (PatchSchedule(start=3), [3, 4, 5, 6, 7]),
        (PatchSchedule(interval=3), [0, 3, 6]),
        (PatchSchedule(start=1, interval=3), [1, 4, 7]),
        (PatchSchedule(start=2, interval=0), [2, 3, 4, 5, 6, 7]),
        (PatchSchedule(start=8), []),
    ],
    ids=str,
)
def test_which_steps_interleave(schedule: PatchSchedule, steps: list[int]) -> None:
    assert [step for step in range(8) if schedule.injects(step)] == steps


@pytest.mark.parametrize(
    ("schedule", "budgets"),
    [
        (PatchSchedule(), [None, None]),  # all, and nothing to grow to
        (PatchSchedule(increment=2), [None, None]),
        (PatchSchedule(cap=4), [4, 4]),
        (PatchSchedule(cap=4, increment=2), [4, 4]),
        (PatchSchedule(initial=3), [3, 3]),
        (PatchSchedule(initial=3, increment=2), [3, 3]),  # growth needs a cap
        (PatchSchedule(cap=6, initial=1, increment=2), [1, 3, 5, 6, 6]),
        (PatchSchedule(cap=2, initial=5, increment=1), [2, 2]),
        (PatchSchedule(cap=3, initial=0), [3, 3]),
        (PatchSchedule(cap=3, initial=2), [2, 2]),
    ],
    ids=str,
)
def test_budgets(schedule: PatchSchedule, budgets: list[int | None]) -> None:
    row = RowPatches([5, 6, 7], schedule)
    found = [row.budget]
    for _ in budgets[1:]:
        row.improve({})
        found.append(row.budget)
    assert found == budgets


def attention(*orders: list[int]) -> torch.Tensor:
    """Weights on image tokens by which these are in the order of falling attention."""
    weights = torch.zeros(len(orders), len(orders[0]))
    for row, order in enumerate(orders):
        for rank, index in enumerate(order):
            weights[row, index] = 1.0 / (rank + 1)
    return weights


def test_the_most_attended_come_first() -> None:
    row = RowPatches([10, 11, 12, 20], PatchSchedule(cap=2))
    assert row.select(attention([3, 0, 1, 2], [1, 2, 3, 0])) == {0: [20, 10], 1: [11, 12]}


def test_locked_ones_come_before_them() -> None:
    """In the order in which they were picked, up to the budget, filled up with others, none twice."""
    row = RowPatches([10, 11, 12, 20], PatchSchedule(cap=4, initial=1, increment=2))
    first = row.select(attention([2, 0, 1, 3], [0, 1, 2, 3]))
    assert first == {0: [12], 1: [10]}
    row.improve(first)
    second = row.select(attention([0, 2, 3, 1], [3, 2, 1, 0]))
    assert second == {0: [12, 10, 20], 1: [10, 20, 12]}
    # A step that did not improve leaves the lock as it was; one without image tokens that did empties it.
    assert row.select(attention([1, 0, 2, 3], [1, 0, 2, 3])) == {0: [12, 11, 10], 1: [10, 11, 12]}
    row.improve({})
    assert row.select(attention([1, 0, 2, 3], [1, 0, 2, 3])) == {0: [11, 10, 12, 20], 1: [11, 10, 12, 20]}


def test_what_is_locked_and_no_image_token_of_the_row_is_left_out() -> None:
    row = RowPatches([10, 11, 12], PatchSchedule(cap=2))
    row.improve({0: [99, 12, 12], 5: [10]})
    assert row.select(attention([0, 1, 2], [0, 1, 2])) == {0: [12, 10], 1: [10, 11]}


def test_all_of_them_and_no_more_than_there_are() -> None:
    for schedule in (PatchSchedule(), PatchSchedule(cap=9), PatchSchedule(initial=5)):
        assert RowPatches([4, 6], schedule).select(attention([1, 0])) == {0: [6, 4]}


def test_ties_go_to_the_first() -> None:
    row = RowPatches([7, 8, 9], PatchSchedule(cap=2))
    assert row.select(torch.ones(1, 3)) == {0: [7, 8]}


def test_strides() -> None:
    weights = attention(*[[0, 1]] * 6)
    for stride, offsets in ((1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (5, [0, 5]), (6, [0])):
        assert list(RowPatches([3, 4], PatchSchedule(cap=1, stride=stride)).select(weights)) == offsets


def test_layouts() -> None:
    """Thought tokens are -1, -2, ..."""
    selection = {0: [10, 12], 2: [11]}
    assert interleaved(3, selection) == [-1, 10, 12, -2, -3, 11]
    assert interleaved(3, {}) == published_block(3, {}) == [-1, -2, -3]
    # Written over the first rows: image tokens are lost, and thought tokens come again.
    assert published_block(3, selection) == [-1, -2, -3, -2, -3, 11]
    assert published_block(2, {0: [10]}) == [-1, -2, -2]
    assert published_block(2, {0: [10, 11], 1: [12]}) == [-1, -2, 11, -2, 12]
    assert published_block(2, {1: [12]}) == [-1, -2, 12]
