"""The page of mazes: a PNG of the right size with every maze and every line of text on it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.figures import draw_maze_page
from trainers.data.mazes import Maze, draw_plan, maze_dataset, maze_of_record, render_maze

CELL, MARGIN, TEXT = 48, 24, 560


@pytest.fixture(scope="module")
def mazes() -> list[Maze]:
    """A maze of 3 x 3 and one of 5 x 5 cells."""
    return [maze_of_record(maze_dataset(1, seed=6, sizes=(size,))[0]) for size in (3, 5)]


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """The gold plans of these mazes."""
    return [maze_dataset(1, seed=6, sizes=(size,))[0]["answer"] for size in (3, 5)]


def read(path: Path) -> np.ndarray:
    """The pixels of a PNG file."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def ink(pixels: np.ndarray) -> np.ndarray:
    """Where a picture is not white."""
    return (pixels < 200).any(axis=-1)


def test_size_place_and_drawn_plans(mazes: list[Maze], answers: list[str], tmp_path: Path) -> None:
    target = draw_maze_page(mazes, answers, ["⟨A1·B1⟩ x", "⟨A2⟩"], [True, True], tmp_path / "a" / "b" / "page.png")
    assert target == tmp_path / "a" / "b" / "page.png"
    page = read(target)
    heights = [3 * CELL, 5 * CELL]  # both are higher than the four lines beside them
    assert page.shape == (sum(heights) + 3 * MARGIN, 5 * CELL + TEXT + 3 * MARGIN, 3)
    top = MARGIN
    for maze, answer, height in zip(mazes, answers, heights, strict=True):
        drawn = draw_plan(render_maze(maze, CELL), maze, answer.split())
        assert np.array_equal(page[top : top + height, MARGIN : MARGIN + height], np.asarray(drawn))
        assert ink(page[top : top + height, 5 * CELL + 2 * MARGIN :]).sum() > 500
        top += height + MARGIN
    assert not ink(page[:MARGIN]).any() and not ink(page[-MARGIN:]).any() and not ink(page[:, -MARGIN:]).any()


def test_verdicts_are_coloured(mazes: list[Maze], answers: list[str], tmp_path: Path) -> None:
    left = 3 * CELL + 2 * MARGIN
    line = {}
    for solved in (True, False):
        page = read(draw_maze_page(mazes[:1], answers[:1], [""], [solved], tmp_path / f"{solved}.png"))
        line[solved] = page[MARGIN : MARGIN + 20, left:][ink(page[MARGIN : MARGIN + 20, left:])].mean(axis=0)
    assert line[True][1] > line[True][0] + 40 and line[False][0] > line[False][1] + 40


def test_text_without_a_plan_is_drawn_beside_the_bare_maze(mazes: list[Maze], tmp_path: Path) -> None:
    page = read(draw_maze_page(mazes[:1], ["no idea at all"], ["nothing"], [False], tmp_path / "p.png"))
    empty = np.asarray(draw_plan(render_maze(mazes[0], CELL), mazes[0], []))
    assert np.array_equal(page[MARGIN : MARGIN + 3 * CELL, MARGIN : MARGIN + 3 * CELL], empty)


def test_long_text_makes_its_row_higher(mazes: list[Maze], answers: list[str], tmp_path: Path) -> None:
    long = "the elf walks on and on\n" * 40
    page = read(
        draw_maze_page([mazes[0]] * 2, [long, answers[0]], [f"⟨{long}", ""], [False, True], tmp_path / "p.png")
    )
    rows = np.flatnonzero(ink(page[:, 3 * CELL + 2 * MARGIN :]).any(axis=1))
    assert rows.max() < len(page) - MARGIN
    # The picture of the second maze begins below all text of the first.
    second = np.asarray(draw_plan(render_maze(mazes[0], CELL), mazes[0], answers[0].split()))
    top = len(page) - MARGIN - 3 * CELL
    assert np.array_equal(page[top : top + 3 * CELL, MARGIN : MARGIN + 3 * CELL], second)
    assert top > 2 * MARGIN + 3 * CELL and not ink(page[top - MARGIN : top]).any()
    narrow = ink(page[:, 3 * CELL + 2 * MARGIN + TEXT :])
    assert not narrow.any()


@pytest.mark.parametrize("missing", range(4))
def test_lists_of_different_length_are_refused(
    missing: int, mazes: list[Maze], answers: list[str], tmp_path: Path
) -> None:
    lists = [list(mazes), list(answers), ["", ""], [True, False]]
    lists[missing] = lists[missing][:1]
    counts = [len(part) for part in lists]
    expected = "got {} mazes, {} texts, {} paths and {} scores".format(*counts)
    with pytest.raises(ValueError, match=f"one text, path and score for each; {expected}"):
        draw_maze_page(*lists, tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_no_mazes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need at least one maze.*got 0 mazes"):
        draw_maze_page([], [], [], [], tmp_path / "p.png")
