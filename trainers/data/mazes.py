"""The maze task as records: generated FrozenLake mazes with all annotations, and the published ones.

The task, the pictures and the scoring are those of the Visual Spatial Planning benchmark (VSP, arXiv 2407.01863).
This module is the front door: what the others of the family offer (`maze_planning`, `maze_generation`,
`maze_rendering`) is here too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .generated import generated_numbers
from .maze_generation import HOLE_PROBABILITY, SIZES, MazeGenerator, split_of
from .maze_planning import (
    MOVE_WORDS,
    Cell,
    Maze,
    PlanOutcome,
    cell_name,
    chance_level,
    is_valid_plan,
    parse_plan,
    random_plan_success,
    score_plan,
    shortest_plan,
    simulate_plan,
)
from .maze_rendering import PUBLISHED_CELL_PIXELS, draw_plan, encode_png, render_maze, render_steps, resize_maze_image
from .records import Record, make_record, record_features

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = [
    "Maze",
    "MazeGenerator",
    "PlanOutcome",
    "cell_name",
    "chance_level",
    "draw_plan",
    "is_valid_plan",
    "maze_dataset",
    "maze_of_record",
    "maze_record",
    "maze_stream",
    "parse_plan",
    "published_identities",
    "random_plan_success",
    "read_published_mazes",
    "render_maze",
    "score_plan",
    "shortest_plan",
    "simulate_plan",
    "split_of",
]

QUESTION = "Find a path from the elf to the gift without falling into a hole. Answer with the moves L, R, U, D."
TOKEN_CELL_PIXELS = 28  # one visual token of Qwen2.5-VL a cell


def maze_record(
    maze: Maze,
    *,
    id: str | None = None,
    image: Image.Image | None = None,
    cell_pixels: int = TOKEN_CELL_PIXELS,
    tie_seed: int = 0,
    question: str = QUESTION,
    step_images: bool = False,
    attention: str | None = None,
    meta: dict[str, Any] | None = None,
) -> Record:
    """A maze with all its annotations, which all follow one shortest plan.

    | field | content |
    |---|---|
    | `answer` | the moves, separated by one space: `"D R R"` |
    | `chain` | the cells of the path from start to goal, named as in a spreadsheet: `["A1", "A2", "B2", "C2"]` |
    | `steps` | one sentence a move: `"Move down to A2."` |
    | `boxes` | the cells of `chain` as boxes, normalised x0, y0, x1, y1 of image 0 |
    | `step_images` | the picture after each move (only if asked for) |
    | `teacher` | `{"attention": rows, "grid": [size, size], "image": 0}`, one row a move (only if asked for) |
    | `meta` | `maze` (text form), `size`, `identity`, `path_cells` (row, column), `tie_seed`, and what `meta` adds |

    Args:
        maze: a solvable maze.
        id: of the record; `maze-{identity}` by default.
        image: picture of the maze; drawn at `cell_pixels` a cell by default.
        cell_pixels: side of a cell in `images` (if drawn here) and `step_images`.
        tie_seed: rule among equally short plans, see `shortest_plan`.
        question: the user's words.
        step_images: whether to draw them.
        attention: oracle attention of each step over the size * size cells, row by row from the top left, sum 1:
            `"one_hot"` (the cell that the move enters), `"remaining"` (uniform over the cells from there to the
            goal) or None.
        meta: more entries for `meta`.

    Raises:
        ValueError: the maze has no path, or an unknown kind of attention.
    """
    plan = shortest_plan(maze, tie_seed)
    cells = simulate_plan(maze, plan).cells
    entered = list(zip(plan, cells[1:], strict=True))
    facts = {"maze": maze.to_text(), "size": maze.size, "identity": maze.identity, "tie_seed": tie_seed}
    return make_record(
        id=id or f"maze-{maze.identity}",
        images=[render_maze(maze, cell_pixels) if image is None else image],
        question=question,
        answer=" ".join(plan),
        chain=[cell_name(cell) for cell in cells],
        steps=[f"Move {MOVE_WORDS[move]} to {cell_name(cell)}." for move, cell in entered],
        boxes=[{"image": 0, "xyxy": _box(cell, maze.size)} for cell in cells],
        step_images=render_steps(maze, plan, cell_pixels) if step_images else None,
        teacher=None if attention is None else _teacher(maze.size, cells, attention),
        meta={**facts, "path_cells": [list(cell) for cell in cells], **(meta or {})},
    )


def _box(cell: Cell, size: int) -> list[float]:
    row, col = cell
    return [col / size, row / size, (col + 1) / size, (row + 1) / size]


def _teacher(size: int, cells: Sequence[Cell], attention: str) -> dict[str, Any]:
    if attention not in ("one_hot", "remaining"):
        raise ValueError(f"attention is {attention!r}; use 'one_hot', 'remaining' or None")
    rows = []
    for step in range(1, len(cells)):
        looked_at = cells[step : step + 1] if attention == "one_hot" else cells[step:]
        row = [0.0] * (size * size)
        for cell_row, cell_col in looked_at:
            row[cell_row * size + cell_col] = 1.0 / len(looked_at)
        rows.append(row)
    return {"attention": rows, "grid": [size, size], "image": 0}


def maze_of_record(record: Mapping[str, Any]) -> Maze:
    """The maze of a record, or of a table row (where `meta` is a JSON string): what a scorer needs."""
    meta = record["meta"]
    return Maze.from_text((json.loads(meta) if isinstance(meta, str) else meta)["maze"])


def maze_dataset(
    num: int,
    seed: int = 0,
    split: str = "train",
    sizes: Sequence[int] = SIZES,
    *,
    hole_probability: float = HOLE_PROBABILITY,
    min_moves: int = 1,
    exclude: Collection[str] = frozenset(),
    unique: bool | None = None,
    **record_options: Any,
) -> Dataset:
    """`num` generated mazes as a table in memory (about 10 kB a maze; take [`maze_stream`] for very many).

    Args:
        num: number of mazes.
        seed, split, sizes, hole_probability, min_moves, exclude: see [`MazeGenerator`].
        unique: whether a map may occur only once. By default not for `"train"` (repeats keep the distribution as
            described), but for the two others (repeats would make an accuracy look surer than it is).
        record_options: `cell_pixels`, `tie_seed`, `question`, `step_images`, `attention` of [`maze_record`].

    Returns:
        `Dataset` with the columns of `record_features()`; `meta` and `teacher` are JSON strings. The first k rows of
        a longer table are the table of k rows. Without `unique`, row i is element i of [`maze_stream`].

    Raises:
        ValueError: an option out of its range, or fewer different mazes than asked for.
    """
    from datasets import Dataset

    if num < 1:
        raise ValueError(f"num is {num}; ask for at least one maze")
    make_row = _GeneratedRow(MazeGenerator(seed, split, sizes, hole_probability, min_moves, exclude), record_options)
    unique = split != "train" if unique is None else unique
    taken: set[str] = set()
    rows = []
    for index in range(num):
        maze = make_row.generator.maze(index, taken)
        if unique:
            taken.add(maze.identity)
        row = make_row.of_maze(index, maze)
        for name in ("images", "step_images"):
            row[name] = row[name] and [{"bytes": encode_png(image), "path": None} for image in row[name]]
        rows.append(row)
    return Dataset.from_list(rows, features=record_features())


def maze_stream(
    seed: int = 0,
    split: str = "train",
    sizes: Sequence[int] = SIZES,
    *,
    num: int | None = None,
    num_shards: int = 1,
    hole_probability: float = HOLE_PROBABILITY,
    min_moves: int = 1,
    exclude: Collection[str] = frozenset(),
    **record_options: Any,
) -> IterableDataset:
    """Generated mazes without end (or `num` of them) as an `IterableDataset`, drawn when they are asked for.

    Shard s of k holds the mazes s, s + k, s + 2k, ...; give at least as many shards as processes times loader
    workers. Iterated by one process, an endless stream never leaves its first shard. `state_dict()` and
    `load_state_dict()` resume it without drawing again what was seen: only numbers are skipped.

    Args:
        num: number of mazes in all; endless by default.
        num_shards: number of shards.
        seed, split, sizes, hole_probability, min_moves, exclude: see [`MazeGenerator`].
        record_options: `cell_pixels`, `tie_seed`, `question`, `step_images`, `attention` of [`maze_record`].

    Returns:
        `IterableDataset` with the columns of `record_features()`; `meta` and `teacher` are JSON strings.

    Raises:
        ValueError: an option out of its range.
    """
    make_row = _GeneratedRow(MazeGenerator(seed, split, sizes, hole_probability, min_moves, exclude), record_options)
    make_row({"index": 0})  # refuses wrong options here, not in a worker
    return generated_numbers(num, num_shards).map(make_row, remove_columns=["index"], features=record_features())


@dataclass(frozen=True)
class _GeneratedRow:
    """From the number of a maze to its row (`meta` and `teacher` as JSON); a class, so that it can be pickled."""

    generator: MazeGenerator
    record_options: dict[str, Any]

    def __call__(self, example: dict[str, int]) -> dict[str, Any]:
        return self.of_maze(example["index"], self.generator.maze(example["index"]))

    def of_maze(self, index: int, maze: Maze) -> dict[str, Any]:
        seed, split = self.generator.seed, self.generator.split
        origin = {"ds_name": "generated mazes", "split": split, "seed": seed, "row": index}
        row = maze_record(maze, id=f"maze-{split}-{seed}-{index}", meta=origin, **self.record_options)
        row["meta"] = json.dumps(row["meta"])
        row["teacher"] = row["teacher"] and json.dumps(row["teacher"])
        return row


def _published_tables(
    folder: str | os.PathLike, levels: Collection[int] | None, parity: str | None
) -> list[tuple[int, int, Path]]:
    """(level, number, table file) of the published mazes, in this order."""
    folder = Path(folder)
    if parity not in (None, "even", "odd"):
        raise ValueError(f"parity is {parity!r}; use 'even', 'odd' or None")
    found = [(path, re.fullmatch(r"level(\d+)", path.parts[-3])) for path in folder.glob("level*/table/*.txt")]
    tables = []
    for path, level in found:
        if level is None or not path.stem.isdecimal():
            raise ValueError(f"{path}: is not named level<number>/table/<number>.txt; move it out of the folder")
        tables.append((int(level[1]), int(path.stem), path))
    missing = sorted(set(levels or ()) - {level for level, _, _ in tables})
    if missing or not tables:
        wanted = " or ".join(f"level{level}" for level in missing) or "level<number>"
        raise FileNotFoundError(f"no {wanted}/table/<number>.txt in {folder}; give the folder of the published mazes")
    remainders = {"even": (0,), "odd": (1,), None: (0, 1)}[parity]
    return sorted(row for row in tables if (levels is None or row[0] in levels) and row[1] % 2 in remainders)


def _published_maze(level: int, path: Path) -> Maze:
    maze = Maze.from_file(path)
    if maze.size != level:
        raise ValueError(f"{path}: the maze is {maze.size}x{maze.size}, but level {level} has {level}x{level} mazes")
    return maze


def published_identities(folder: str | os.PathLike, levels: Collection[int] | None = None) -> frozenset[str]:
    """The identities of all published mazes in a folder: give them as `exclude` to train on none of them.

    Raises:
        FileNotFoundError, ValueError: as [`read_published_mazes`].
    """
    return frozenset(
        _published_maze(level, path).identity for level, _, path in _published_tables(folder, levels, None)
    )


def read_published_mazes(
    folder: str | os.PathLike,
    levels: Collection[int] | None = None,
    parity: str | None = None,
    *,
    cell_pixels: int = PUBLISHED_CELL_PIXELS,
    from_file: bool = True,
    **record_options: Any,
) -> list[Record]:
    """The published mazes as records, by level and number. They are for evaluation: train on none of them.

    Args:
        folder: holds `level{n}/table/{k}.txt` (maps) and `level{n}/img/{k}.png` (pictures, 64 pixels a cell).
        levels: sizes to read; all by default.
        parity: `"even"` or `"odd"` numbered mazes only.
        cell_pixels: side of a cell; pictures from file are resized by `resize_maze_image` unless it is 64.
        from_file: take the published picture; False draws it (the same pixels), so only the maps are needed.
        record_options: `tie_seed`, `question`, `step_images`, `attention` of [`maze_record`].

    Returns:
        Records with `ds_name` (`"vsp_maze"`), `source` (file below `folder`), `level` and `number` in `meta`.

    Raises:
        FileNotFoundError: no such folder, a level without maps, or a map without picture.
        ValueError: a wrong file name, map, picture size or option; names the file, row and value.
    """
    records = []
    for level, number, path in _published_tables(folder, levels, parity):
        maze = _published_maze(level, path)
        image = (
            _published_image(path.parents[1] / "img" / f"{path.stem}.png", maze, cell_pixels) if from_file else None
        )
        meta = {
            "ds_name": "vsp_maze",
            "source": path.relative_to(folder).as_posix(),
            "level": level,
            "number": number,
        }
        name = f"vsp-maze-level{level}-{number}"
        records.append(maze_record(maze, id=name, image=image, cell_pixels=cell_pixels, meta=meta, **record_options))
    return records


def _published_image(path: Path, maze: Maze, cell_pixels: int) -> Image.Image:
    side = maze.size * PUBLISHED_CELL_PIXELS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the picture of this map is missing; restore it, or draw it: from_file=False")
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.size != (side, side):
        raise ValueError(
            f"{path}: {image.width}x{image.height} pixels; a {maze.size}x{maze.size} maze has {side}x{side}"
        )
    return image if cell_pixels == PUBLISHED_CELL_PIXELS else resize_maze_image(image, cell_pixels, maze.size)
