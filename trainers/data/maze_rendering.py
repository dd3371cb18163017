"""Pictures of FrozenLake mazes, from the tiles of the PyPI package `gymnasium` (>= 0.29, < 1.4: 1.4 changed the art).

At 64 pixels a cell the pictures equal the published ones of the Visual Spatial Planning benchmark (arXiv
2407.01863) pixel for pixel. The tiles are read from the installed package (`gymnasium/envs/toy_text/img/*.png`);
gymnasium itself is not imported, pygame is not needed. How a cell is made, in the order of gymnasium's own drawing:
the 32-pixel ice tile doubled by nearest neighbour, over it the hole, the goal or (start cell) the stool, then a
line 1 pixel wide in RGB (180, 200, 230) along the four edges, then the elf or, if the player is in a hole, the
cracked hole. Semi-transparent pixels are blended in integers, `out = dst + (((src - dst) * alpha + src) >> 8)`,
alpha 0 and 255 exactly (the rule of SDL, which drew the published pictures).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .maze_planning import GOAL, HOLE, MOVE_WORDS, SAFE, START, Cell, Maze, is_valid_plan, simulate_plan

PUBLISHED_CELL_PIXELS = 64
LINE_COLOUR = (180, 200, 230)
VALID_COLOUR, INVALID_COLOUR = (0, 140, 60), (210, 30, 30)
MIN_GYMNASIUM, END_GYMNASIUM = (0, 29), (1, 4)

_OBJECTS = {SAFE: None, HOLE: "hole", GOAL: "goal", START: "stool"}


@lru_cache(maxsize=1)
def tile_folder() -> Path:
    """The folder of the installed gymnasium that holds the FrozenLake tiles.

    Raises:
        ImportError: gymnasium is absent, of another version (its art differs), or without its pictures.
    """
    remedy = "install it with: pip install 'gymnasium>=0.29,<1.4'"
    spec = importlib.util.find_spec("gymnasium")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the maze pictures need the package gymnasium; {remedy}")
    version = importlib.metadata.version("gymnasium")
    if not MIN_GYMNASIUM <= tuple(int(part) for part in version.split(".")[:2]) < END_GYMNASIUM:
        raise ImportError(f"gymnasium {version} has other maze tiles than the published benchmark; {remedy}")
    folder = Path(spec.submodule_search_locations[0]) / "envs" / "toy_text" / "img"
    if not (folder / "ice.png").is_file():
        raise ImportError(f"the installed gymnasium {version} lacks envs/toy_text/img/ice.png; {remedy}")
    return folder


def resize_by_area(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a picture by exact area averaging.

    The colour of an output pixel is the mean of the input under its area, each input pixel weighted by the share of
    it that is covered, computed in integers and rounded half up. So the result is the same on every machine,
    enlarging by a whole factor repeats pixels, and a picture made of cells is resized cell by cell or as a whole to
    the same pixels (as long as each cell becomes a whole number of pixels).

    Args:
        pixels: `[rows, columns, channels]` uint8.
        height, width: rows and columns of the result, at least 1.

    Returns:
        `[height, width, channels]` uint8.
    """
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height}x{width} pixels; use at least 1x1")
    rows, cols, channels = pixels.shape
    # Whole numbers below 2 ** 53 throughout, so the float64 products are exact in any order of summation.
    down = _overlaps(rows, height) @ pixels.reshape(rows, cols * channels).astype(np.float64)
    across = _overlaps(cols, width) @ down.reshape(height, cols, channels)
    total, area = across.astype(np.int64), rows * cols
    return ((2 * total + area) // (2 * area)).astype(np.uint8)


def _overlaps(num_in: int, num_out: int) -> np.ndarray:
    """`[num_out, num_in]` float64: overlaps of pixels in units of 1/num_out of an input pixel; rows sum to num_in."""
    low = np.maximum(np.arange(num_out)[:, None] * num_in, np.arange(num_in)[None] * num_out)
    high = np.minimum(np.arange(1, num_out + 1)[:, None] * num_in, np.arange(1, num_in + 1)[None] * num_out)
    return np.maximum(high - low, 0).astype(np.float64)


def _load_tile(name: str) -> np.ndarray:
    """`[64, 64, 4]` int64 RGBA: a tile of gymnasium, doubled by nearest neighbour."""
    with Image.open(tile_folder() / f"{name}.png") as image:
        pixels = np.asarray(image.convert("RGBA"), dtype=np.int64)
    factor = PUBLISHED_CELL_PIXELS // pixels.shape[0]
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _blend(below: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """Lays an RGBA tile over RGB pixels by the integer rule in the module docstring."""
    colour, alpha = tile[..., :3], tile[..., 3:]
    mixed = below + (((colour - below) * alpha + colour) >> 8)
    return np.where(alpha == 255, colour, np.where(alpha == 0, below, mixed))


def _draw_cell(symbol: str, facing: str | None) -> np.ndarray:
    """`[64, 64, 3]` uint8: one cell; `facing` is the elf's direction (L R U D), or None without the player."""
    pixels = _load_tile("ice")[..., :3]
    if _OBJECTS[symbol] is not None:
        pixels = _blend(pixels, _load_tile(_OBJECTS[symbol]))
    pixels[[0, -1], :] = LINE_COLOUR
    pixels[:, [0, -1]] = LINE_COLOUR
    if facing is not None:
        pixels = _blend(pixels, _load_tile("cracked_hole" if symbol == HOLE else f"elf_{MOVE_WORDS[facing]}"))
    return pixels.astype(np.uint8)


@lru_cache(maxsize=8)
def _cells(cell_pixels: int) -> tuple[np.ndarray, dict[tuple[str, str | None], int]]:
    """All kinds of cell: `[kinds, cell_pixels, cell_pixels * 3]` uint8, and the row of each (symbol, facing)."""
    kinds = [(symbol, facing) for symbol in _OBJECTS for facing in (None, *MOVE_WORDS)]
    stack = np.stack([resize_by_area(_draw_cell(*kind), cell_pixels, cell_pixels) for kind in kinds])
    stack = stack.reshape(len(kinds), cell_pixels, cell_pixels * 3)
    stack.flags.writeable = False
    return stack, {kind: row for row, kind in enumerate(kinds)}


def render_maze(
    maze: Maze, cell_pixels: int = PUBLISHED_CELL_PIXELS, agent: Cell | None = None, facing: str = "D"
) -> Image.Image:
    """Draws a maze, `cell_pixels * size` pixels a side, RGB.

    64 pixels a cell is the published picture; other sizes are [`resize_by_area`] of it. With 28 a cell is exactly
    one visual token of Qwen2.5-VL (patch 14, merged 2 by 2) and the processor leaves the picture as it is, as
    long as its `min_pixels` are not above 784 * size * size.

    Args:
        maze: the maze.
        cell_pixels: side of a cell, in pixels.
        agent: cell of the player; the start by default. The stool stays at the start.
        facing: direction in which the elf looks, L R U D; `"D"` is the published picture.

    Raises:
        ValueError: `cell_pixels` below 1, a player outside the grid, or an unknown direction.
    """
    if cell_pixels < 1:
        raise ValueError(f"cell_pixels is {cell_pixels}; use at least 1 (28: one visual token, 64: as published)")
    if facing not in MOVE_WORDS:
        raise ValueError(f"facing is {facing!r}; use one of {' '.join(MOVE_WORDS)}")
    agent = maze.start if agent is None else agent
    if not maze.contains(agent):
        raise ValueError(f"agent {agent} lies outside the {maze.size}x{maze.size} grid")
    stack, rows = _cells(cell_pixels)
    kinds = np.array([[rows[symbol, None] for symbol in row] for row in maze.rows()])
    kinds[agent] = rows[maze.symbol(agent), facing]
    side = maze.size * cell_pixels
    return Image.frombytes("RGB", (side, side), stack[kinds].transpose(0, 2, 1, 3).tobytes())


def resize_maze_image(image: Image.Image, cell_pixels: int, size: int) -> Image.Image:
    """Resizes the picture of a `size` x `size` maze to `cell_pixels` a cell with [`resize_by_area`]; RGB."""
    side = size * cell_pixels
    return Image.fromarray(resize_by_area(np.asarray(image.convert("RGB")), side, side))


def encode_png(image: Image.Image) -> bytes:
    """An RGB picture as a PNG file, for tables of many: without row filters, which costs these flat pictures no space
    and a third of the time of `Image.save`.

    Raises:
        ValueError: a picture of another mode.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode!r}; convert it to 'RGB'")
    lines = np.zeros((image.height, 1 + 3 * image.width), dtype=np.uint8)  # a line: filter type 0, then its pixels
    lines[:, 1:] = np.asarray(image).reshape(image.height, -1)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def render_steps(maze: Maze, moves: Sequence[str], cell_pixels: int = PUBLISHED_CELL_PIXELS) -> list[Image.Image]:
    """One picture after each executed move of a plan ([`simulate_plan`]); the elf looks where the move went."""
    cells = simulate_plan(maze, moves).cells
    return [render_maze(maze, cell_pixels, cell, move) for cell, move in zip(cells[1:], moves, strict=False)]


def draw_plan(image: Image.Image, maze: Maze, moves: Sequence[str]) -> Image.Image:
    """Draws a plan on a picture of the maze, for figures: green if it solves the maze (published rule), red if not.

    A line joins the centres of the cells visited, a ring marks the first and a dot the last one; a dot alone is a
    plan without a move that moves. Moves after the goal or after a hole are not drawn, since they are not executed.

    Args:
        image: picture of the whole maze, square, any size.
        maze: the maze.
        moves: the plan, L R U D.

    Returns:
        A new RGB picture of the same size.

    Raises:
        ValueError: a picture that is not square, or an unknown move.
    """
    if image.width != image.height:
        raise ValueError(f"the picture is {image.width}x{image.height} pixels; a maze is square")
    drawn = image.convert("RGB").copy()
    draw = ImageDraw.Draw(drawn)
    cell = image.width / maze.size
    colour = VALID_COLOUR if is_valid_plan(maze, moves) else INVALID_COLOUR
    centres = [((col + 0.5) * cell, (row + 0.5) * cell) for row, col in simulate_plan(maze, moves).cells]
    width = max(2, round(cell / 10))
    if len(set(centres)) > 1:
        draw.line(centres, fill=colour, width=width, joint="curve")
    for (x, y), radius, filled in [(centres[0], 1.5 * width, False), (centres[-1], 1.5 * width, True)]:
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=colour if filled else None, outline=colour, width=max(1, width // 2))
    return drawn
