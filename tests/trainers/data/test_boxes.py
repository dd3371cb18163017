"""Boxes to image tokens and back: a naive mapper beside it, every grid, several images, and what is refused."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from trainers.data.boxes import (
    BoxError,
    box_tokens,
    join_regions,
    normalised_box,
    reference_box_tokens,
    reference_pixel_tokens,
    region_tokens,
    token_grid,
    tokens_box,
)
from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_record
from trainers.data.records import RecordError


def naive_tokens(box: list[Fraction], rows: int, columns: int) -> list[int]:
    """Every token whose square shares an area with the box, in exact arithmetic."""
    x0, y0, x1, y1 = box
    return [
        row * columns + column
        for row, column in itertools.product(range(rows), range(columns))
        if x0 * columns < column + 1 and x1 * columns > column and y0 * rows < row + 1 and y1 * rows > row
    ]


@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_a_box_takes_every_token_that_it_touches(merge_size: int) -> None:
    """Edges are multiples of 1/60 and 1/42, so many of them lie on patch lines of the grids drawn here."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows, columns = (int(size) for size in rng.integers(1, 22, 2))
        parts = int(rng.choice([60, 42]))
        (x0, x1), (y0, y1) = (sorted(rng.choice(parts + 1, 2, replace=False).tolist()) for _ in range(2))
        box = [Fraction(edge, parts) for edge in (x0, y0, x1, y1)]
        grid = (1, rows * merge_size, columns * merge_size)
        found = box_tokens([float(edge) for edge in box], grid, merge_size)
        assert found.tolist() == naive_tokens(box, rows, columns), (box, grid)
        assert found.dtype == np.int64


def test_tokens_come_back_through_their_box_on_every_grid() -> None:
    """The reference's rounding takes a line of tokens too much for some of them; the default must not."""
    off = 0
    for columns in range(1, 100):
        spans = [range(first, stop) for first in range(columns) for stop in {first + 1, columns}]
        for tokens in map(list, spans):
            box = tokens_box(tokens, (1, 2, 2 * columns))
            assert box_tokens(box, (1, 2, 2 * columns)).tolist() == tokens
            off += reference_box_tokens(box, (2, 2 * columns)).tolist() != tokens
    assert off > 0


def test_a_rectangle_of_tokens_comes_back() -> None:
    tokens = box_tokens([0.2, 0.5, 0.7, 1.0], (1, 8, 20))
    assert tokens.tolist() == [22, 23, 24, 25, 26, 32, 33, 34, 35, 36]
    assert tokens_box(tokens, (1, 8, 20)) == [0.2, 0.5, 0.7, 1.0]
    assert tokens_box(tokens[::-1], (1, 8, 20)) == [0.2, 0.5, 0.7, 1.0]


@pytest.mark.parametrize(
    ("box", "token"),
    [([0.5, 0.5, 0.5, 0.5], 10), ([0, 0, 0, 0], 0), ([0.5, 0.1, 0.5, 0.9], 10)],
)
def test_a_box_that_covers_no_token_follows_the_policy(box: list[float], token: int) -> None:
    grid = (1, 8, 8)
    assert reference_box_tokens(box, grid[1:]).size == 0
    assert box_tokens(box, grid).tolist() == [token]
    assert box_tokens(box, grid, empty_region="drop").shape == (0,)
    with pytest.raises(BoxError, match=r"covers no token of the 4x4 grid.*empty_region='one_token' or 'drop'"):
        box_tokens(box, grid, empty_region="refuse")


def test_a_box_without_area_is_not_empty_off_the_lines_and_in_the_last_corner() -> None:
    assert box_tokens([0.6, 0.1, 0.6, 0.2], (1, 8, 8), empty_region="refuse").tolist() == [2]
    assert box_tokens([1, 1, 1, 1], (1, 8, 8), empty_region="refuse").tolist() == [15]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0.1, 0.2, float("nan"), 0.4], "a value that is not finite"),
        ([0.1, 0.2, float("inf"), 0.4], "a value that is not finite"),
        ([30, 40, 220, 300], r"\[30, 40, 220, 300\] is in pixels.*divide by its width and height"),
        ([0.5, 0.2, 0.3, 0.4], "is reversed"),
        ([0.1, 0.6, 0.3, 0.4], "is reversed"),
        ([1.1, 0.2, 1.3, 0.4], "lies outside the image"),
        ([0.1, -0.4, 0.3, -0.1], "lies outside the image"),
        ([0.1, 0.2, 1.01, 0.4], "reaches outside the image.*outside='clip'"),
        ([-0.01, 0.2, 0.4, 0.4], "reaches outside the image"),
        ([0.1, 0.2, 0.3], "is not a list of four numbers"),
        ([0.1, 0.2, 0.3, None], "is not a list of four numbers"),
        ("0123", "is not a list of four numbers"),
        (7, "is not a list of four numbers"),
    ],
)
def test_what_is_no_box_is_refused_with_its_value(box: Any, reason: str) -> None:
    with pytest.raises(BoxError, match=reason):
        normalised_box(box)
    with pytest.raises(BoxError, match=reason):
        box_tokens(box, (1, 8, 8))


def test_boxes_are_normalised_explicitly() -> None:
    assert normalised_box([30, 40, 60, 80], "pixel", (120, 80)) == [0.25, 0.5, 0.5, 1.0]
    assert normalised_box([0, 0, 1 + 1e-7, 1]) == [0, 0, 1, 1]
    assert normalised_box([-0.1, 0.2, 1.5, 0.4], outside="clip") == [0, 0.2, 1, 0.4]
    for outside in ("refuse", "clip"):
        with pytest.raises(BoxError, match="lies outside the image"):
            normalised_box([130, 10, 140, 20], "pixel", (120, 80), outside)
    with pytest.raises(ValueError, match=r"boxes in pixels need the image's \(width, height\), got None"):
        normalised_box([30, 40, 60, 80], "pixel")
    with pytest.raises(ValueError, match="unknown box unit 'mm'"):
        normalised_box([0, 0, 1, 1], "mm")
    with pytest.raises(ValueError, match="unknown outside 'cut'"):
        normalised_box([0, 0, 1, 1], outside="cut")
    with pytest.raises(ValueError, match="unknown empty_region 'one'"):
        box_tokens([0, 0, 1, 1], (1, 2, 2), empty_region="one")


@pytest.mark.parametrize(
    ("grid", "merge_size", "reason"),
    [
        ((1, 7, 8), 2, "7x8 patches is no multiple of merge_size=2"),
        ((1, 8, 8), 3, "no multiple of merge_size=3"),
        ((1, 0, 8), 2, "0x8 patches"),
        ((4, 8, 8), 2, "a grid of 4 frames"),
    ],
)
def test_a_wrong_grid_is_refused(grid: tuple, merge_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        token_grid(grid, merge_size)


@pytest.mark.parametrize("tokens", [[], [16], [-1, 2]])
def test_tokens_outside_the_grid_have_no_box(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="of the 4x4 tokens of the image"):
        tokens_box(tokens, (1, 8, 8))


def test_regions_of_several_images_point_into_all_embeddings() -> None:
    grids = [(1, 4, 4), (1, 4, 8), (1, 6, 6)]
    boxes = [
        {"image": 1, "xyxy": [0.0, 0.5, 0.5, 1.0]},
        {"image": 0, "xyxy": [0.5, 0.5, 1.0, 1.0]},
        {"image": 2, "xyxy": [0.0, 0.0, 1.0, 0.3]},
    ]
    assert [region.tolist() for region in region_tokens(boxes, grids)] == [[8, 9], [3], [12, 13, 14]]
    assert region_tokens(None, grids) == []


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ({"image": 2, "xyxy": [0, 0, 1, 1]}, r"belongs to image 2, but there are 1"),
        ({"image": 0, "xyxy": [0, 0, 90, 90]}, r"box \[0, 0, 90, 90\] is in pixels"),
    ],
)
def test_a_region_that_cannot_be_used_names_file_and_row(box: dict, reason: str) -> None:
    with pytest.raises(RecordError, match=f"^data.json, row 7: .*{reason}"):
        region_tokens([box], [(1, 4, 4)], origin=("data.json", 7))


def test_joined_regions_keep_their_order_and_each_token_once() -> None:
    regions = [np.array([5, 6]), np.array([6, 2]), np.array([5, 9])]
    assert join_regions(regions).tolist() == [5, 6, 2, 9]
    assert join_regions([]).shape == (0,)


def test_the_pixel_mapper_takes_at_least_one_cell() -> None:
    assert reference_pixel_tokens([0.5, 0.5, 0.5, 0.5], (112, 112)).tolist() == [10]
    assert reference_pixel_tokens([28, 0, 56, 28], (112, 120)).tolist() == [1]


@pytest.mark.parametrize("size", range(2, 13))
@pytest.mark.parametrize(("patches", "merge_size"), [(2, 2), (1, 1), (4, 2)])
def test_the_boxes_of_a_maze_are_its_cells(size: int, patches: int, merge_size: int) -> None:
    """`patches` a side of a cell: at 2 (with merge size 2) a cell is one token, the default picture of a maze."""
    record = maze_record(Maze(size, (0, 0), (size - 1, size - 1)))
    grid = (1, size * patches, size * patches)
    regions = region_tokens(record["boxes"], [grid], merge_size)
    side = patches // merge_size
    assert [len(region) for region in regions] == [side**2] * (2 * size - 1)
    if side == 1:
        cells = [row * size + column for row, column in record["meta"]["path_cells"]]
        assert join_regions(regions).tolist() == cells
