"""The maze questions of VSP in the form in which LaViT's evaluation has them (arXiv 2601.10129, card 7.2).

A line of `test_direct.jsonl` has the picture's path, what is asked, and the map as rows of numbers.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.data.llava_text import IMAGE_PLACEHOLDER
from trainers.data.maze_planning import GOAL, HOLE, SAFE, START, Maze
from trainers.data.records import Record, RecordError, RecordReport, make_record, validate_record
from trainers.data.sources import read_sources
from trainers.data.table_rows import row_images, text_fields

from .read_tables import checked_columns, table_source

LINES = "test_direct.jsonl"
COLUMNS = ("image_input", "text_input", "map_id", "map_desc")
_MAP_SYMBOLS = {0: SAFE, -1: HOLE, 1: START, 2: GOAL}  # of a cell in `map_desc`


def maze_of_map(text: str) -> Maze:
    """The maze of VSP's `map_desc`: rows of numbers as JSON (0 free, -1 hole, 1 player, 2 goal), or a text form.

    Raises:
        ValueError: it is neither, or no maze.
    """
    if not text.lstrip().startswith("["):
        return Maze.from_text(text, "map_desc")
    rows: Sequence[Sequence[Any]] = json.loads(text)
    return Maze.from_rows(["".join(_MAP_SYMBOLS.get(cell, "?") for cell in row) for row in rows], "map_desc")


def read_vsp_lines(
    path: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
) -> list[Record]:
    """The good lines of the file, or of `test_direct.jsonl` in a folder, as records.

    `answer` is `map_desc` as text; `meta` has maze, prompt (with `<image>`), item (facts of LaViT's prediction files).

    Args:
        path: file or folder.
        image_folder: where the paths of the pictures begin; default: the folder of the file.
        report: collects good and bad lines; without one, reading ends with an error above 1 % bad lines.
        max_samples: only the first so many records.

    Raises:
        RecordError: a missing file or column.
        RecordShareError: see `report`.
    """
    source = checked_columns(table_source(path, "vsp", files=(LINES,), image_folder=image_folder), COLUMNS)

    def build(value: Any, place: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        return record_of_line(value, place, row, folder)

    return list(itertools.islice(read_sources([source], build, validate_record, report), max_samples))


def record_of_line(value: Any, source: Any, row: int, folder: str | os.PathLike) -> Record:
    """The record of one line.

    Raises:
        RecordError: a damaged line, a missing column, a picture that is missing, a map that is none.
    """
    origin = (source, row)
    value = text_fields(value, ("image_input", "text_input"), origin)
    missing = [name for name in COLUMNS if name not in value]
    if missing:
        raise RecordError(*origin, f"the row lacks the columns {missing}, it has {list(value)}; repair the row")
    if not value["text_input"].strip():
        raise RecordError(*origin, "the row has no question; repair or remove it")
    text = value["map_desc"] if isinstance(value["map_desc"], str) else json.dumps(value["map_desc"])
    try:
        maze = maze_of_map(text).to_text()
    except (TypeError, ValueError) as error:
        raise RecordError(*origin, f"map_desc is no maze ({error}); repair the row") from error
    record = make_record(
        id=str(value["map_id"]),
        question=value["text_input"].replace(IMAGE_PLACEHOLDER, "").strip(),
        answer=text,
        images=row_images(value["image_input"], Path(folder), origin, "refuse"),
    )
    record["meta"] = {"source": os.fspath(source), "row": row, "ds_name": "vsp", "maze": maze}
    record["meta"] |= {"prompt": value["text_input"], "item": {"map_id": value["map_id"]}}
    return record


__all__ = ["COLUMNS", "LINES", "maze_of_map", "read_vsp_lines", "record_of_line"]
