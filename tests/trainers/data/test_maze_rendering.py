"""Tests of maze pictures: resizing against a definition, cell by cell against the whole, the player, figures."""

import importlib.metadata
import io
import itertools
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from trainers.data import maze_rendering
from trainers.data.maze_generation import MazeGenerator
from trainers.data.maze_planning import Maze, shortest_plan
from trainers.data.maze_rendering import (
    INVALID_COLOUR,
    LINE_COLOUR,
    VALID_COLOUR,
    draw_plan,
    encode_png,
    render_maze,
    render_steps,
    resize_by_area,
    resize_maze_image,
    tile_folder,
)

MAZE = Maze.from_rows(["@_#", "__*", "#__"])


def cell_of(image: Image.Image, row: int, col: int, cell_pixels: int) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[row * cell_pixels : (row + 1) * cell_pixels, col * cell_pixels : (col + 1) * cell_pixels]


def naive_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The definition, in fractions: mean over the area of an output pixel, halves rounded up."""
    rows, cols, channels = pixels.shape
    resized = np.zeros((height, width, channels), dtype=np.uint8)

    def shares(index: int, num_in: int, num_out: int) -> list[tuple[int, Fraction]]:
        low, high = Fraction(index * num_in, num_out), Fraction((index + 1) * num_in, num_out)
        return [(j, min(high, j + 1) - max(low, j)) for j in range(num_in) if min(high, j + 1) > max(low, j)]

    for y, x, channel in itertools.product(range(height), range(width), range(channels)):
        parts = itertools.product(shares(y, rows, height), shares(x, cols, width))
        total = sum(down * across * int(pixels[j, i, channel]) for (j, down), (i, across) in parts)
        mean = total / (Fraction(rows, height) * Fraction(cols, width))
        resized[y, x, channel] = (2 * mean + 1) // 2
    return resized


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (8, 8), (16, 24), (3, 11)])
def test_resizing_is_the_mean_over_the_area(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(resize_by_area(pixels, height, width), naive_resize(pixels, height, width))


def test_resizing_by_whole_factors() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(resize_by_area(pixels, 6, 6), pixels)
    assert np.array_equal(resize_by_area(pixels, 12, 18), pixels.repeat(2, 0).repeat(3, 1))
    with pytest.raises(ValueError, match="0x4"):
        resize_by_area(pixels, 0, 4)


@pytest.mark.parametrize("cell_pixels", [1, 14, 28, 37, 64, 128])
def test_cells_resized_once_equal_the_picture_resized_as_a_whole(cell_pixels: int) -> None:
    for size in (3, 5):
        maze = MazeGenerator(sizes=(size,)).maze(0)
        composed = render_maze(maze, cell_pixels)
        assert composed.size == (size * cell_pixels, size * cell_pixels)
        assert composed.mode == "RGB"
        whole = resize_maze_image(render_maze(maze), cell_pixels, size)
        assert np.array_equal(np.asarray(composed), np.asarray(whole))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_halving_agrees_with_pillow_up_to_rounding(factor: int) -> None:
    """Where a cell shrinks by a whole factor, Pillow's `reduce` is the same mean."""
    maze = MazeGenerator(sizes=(6,)).maze(3)
    reduced = np.asarray(render_maze(maze).reduce(factor), dtype=int)
    assert np.abs(np.asarray(render_maze(maze, 64 // factor), dtype=int) - reduced).max() <= 1


def test_equal_cells_look_equal_and_kinds_differ() -> None:
    for cell_pixels in (28, 64):
        image = render_maze(MAZE, cell_pixels)
        kinds = {}
        for row, line in enumerate(MAZE.rows()):
            for col, symbol in enumerate(line):
                kinds.setdefault(symbol, []).append(cell_of(image, row, col, cell_pixels))
        for cells in kinds.values():
            assert all(np.array_equal(cell, cells[0]) for cell in cells)
        for one, other in itertools.combinations(kinds.values(), 2):
            assert np.abs(one[0].astype(int) - other[0]).mean() > 2


def test_ice_is_the_doubled_tile_with_a_line() -> None:
    """Built here by Pillow alone: nearest neighbour, and a 1-pixel frame."""
    with Image.open(tile_folder() / "ice.png") as file:
        ice = np.asarray(file.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)).copy()
    ice[[0, -1]], ice[:, [0, -1]] = LINE_COLOUR, LINE_COLOUR
    assert np.array_equal(cell_of(render_maze(MAZE), 2, 2, 64), ice)


def test_drawing_twice_gives_a_new_equal_picture() -> None:
    first = render_maze(MAZE, 28)
    expected = np.asarray(first).copy()
    first.paste((0, 0, 0), (0, 0, 84, 84))
    assert np.array_equal(np.asarray(render_maze(MAZE, 28)), expected)


def test_the_player_stands_where_asked_and_the_stool_stays() -> None:
    before, moved = render_maze(MAZE), render_maze(MAZE, agent=(1, 1))
    assert np.array_equal(np.asarray(render_maze(MAZE, agent=MAZE.start)), np.asarray(before))
    changed = {
        (row, col)
        for row, col in itertools.product(range(3), repeat=2)
        if not np.array_equal(cell_of(before, row, col, 64), cell_of(moved, row, col, 64))
    }
    assert changed == {(0, 0), (1, 1)}
    # The left start cell shows the stool, not ice; the goal and the hole look different with the player in them.
    assert not np.array_equal(cell_of(moved, 0, 0, 64), cell_of(moved, 0, 1, 64))
    for cell in [(1, 2), (0, 2)]:
        there = render_maze(MAZE, agent=cell)
        assert not np.array_equal(cell_of(there, *cell, 64), cell_of(before, *cell, 64))
    looks = {render_maze(MAZE, agent=(1, 1), facing=move).tobytes() for move in "LRUD"}
    assert len(looks) == 4


def test_a_player_in_a_hole_is_the_cracked_tile_alone() -> None:
    with Image.open(tile_folder() / "cracked_hole.png") as file:
        cracked = np.asarray(file.convert("RGB").resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(cell_of(render_maze(MAZE, agent=(0, 2)), 0, 2, 64), cracked)


def test_step_pictures_follow_the_plan() -> None:
    pictures = render_steps(MAZE, list("RDR"), 28)
    expected = [render_maze(MAZE, 28, *where) for where in [((0, 1), "R"), ((1, 1), "D"), ((1, 2), "R")]]
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]
    assert len(render_steps(MAZE, list("RRDD"), 28)) == 2  # the second move ends in a hole
    assert render_steps(MAZE, [], 28) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_pixels": 0}, "cell_pixels is 0"),
        ({"facing": "down"}, "facing is 'down'; use one of L R U D"),
        ({"agent": (3, 0)}, r"agent \(3, 0\) lies outside"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_maze(MAZE, **options)


@pytest.mark.parametrize("version", ["1.4.0", "2.0", "0.28.1"])
def test_another_gymnasium_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(
        ImportError, match=f"gymnasium {version} has other maze tiles.*pip install 'gymnasium>=0.29,<1.4'"
    ):
        tile_folder.__wrapped__()


@pytest.mark.parametrize("version", ["0.29.0", "1.0.0a1", "1.3.0"])
def test_the_gymnasium_versions_in_range_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert (tile_folder.__wrapped__() / "elf_down.png").is_file()


def test_absent_gymnasium_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maze_rendering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need the package gymnasium; install it with: pip install"):
        tile_folder.__wrapped__()


@pytest.mark.parametrize("size", [(1, 1), (84, 84), (30, 7)])
def test_png_files_hold_the_picture(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels)))) as decoded:
        assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", size)
        decoded.verify()
    with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels)))) as decoded:
        assert np.array_equal(np.asarray(decoded), pixels)
    with pytest.raises(ValueError, match="mode 'L'"):
        encode_png(Image.new("L", (2, 2)))


@pytest.mark.parametrize("cell_pixels", [28, 64])
def test_plans_are_drawn_in_the_colour_of_their_outcome(cell_pixels: int) -> None:
    image = render_maze(MAZE, cell_pixels)
    before = image.tobytes()

    def colour_at(drawn: Image.Image, row: float, col: float) -> tuple[int, int, int]:
        return drawn.getpixel((round((col + 0.5) * cell_pixels), round((row + 0.5) * cell_pixels)))

    good, bad, short = (draw_plan(image, MAZE, list(plan)) for plan in ("DRR", "RRD", "D"))
    assert image.tobytes() == before
    assert good.size == image.size
    assert colour_at(good, 1, 0.5) == colour_at(good, 1, 2) == VALID_COLOUR
    assert colour_at(bad, 0, 0.5) == colour_at(bad, 0, 2) == INVALID_COLOUR
    assert colour_at(bad, 1, 2) == image.getpixel((round(2.5 * cell_pixels), round(1.5 * cell_pixels)))
    assert colour_at(short, 0.5, 0) == colour_at(short, 1, 0) == INVALID_COLOUR
    assert colour_at(draw_plan(image, MAZE, []), 0, 0) == INVALID_COLOUR
    colours = {colour for _, colour in good.getcolors(10**6)}
    assert VALID_COLOUR in colours
    assert INVALID_COLOUR not in colours


def test_figures_refuse_pictures_that_are_not_square() -> None:
    with pytest.raises(ValueError, match="84x56"):
        draw_plan(Image.new("RGB", (84, 56)), MAZE, ["R"])


def test_a_cell_is_one_visual_token() -> None:
    """The stock image processor leaves the picture as it is and cuts it into size x size merged tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56)
    for size in (2, 3, 6):
        maze = MazeGenerator(sizes=(size,)).maze(0)
        assert len(shortest_plan(maze)) >= 1
        grid = processor(images=[render_maze(maze, 28)], return_tensors="pt")["image_grid_thw"].tolist()
        merged = processor.merge_size
        assert [grid[0][0], grid[0][1] // merged, grid[0][2] // merged] == [1, size, size]
