"""Questions of the published LaViT evaluation: from a row as published to what is asked, one pure function a data set.

MMVP, BLINK, MMStar, V* and the maze questions of VSP as in "LaViT: Aligning Latent Visual Thoughts for Multi-modal
Reasoning", arXiv 2601.10129 (card 7.2). `choice_tasks.py` reads the files.
"""

import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.maze_planning import GOAL, HOLE, SAFE, START, Maze

INSTRUCTION = "Answer with the option letter from the given choices directly."

_LETTER = re.compile(r"\s*\(?([A-Ha-h])\)?[.:]?\s*")
_OPTION = re.compile(r"(?<![A-Za-z0-9])(?:\(([A-Ha-h])\)|([A-H])[.:)])\s*")
_MOST_OPTIONS = 8
_MAP_SYMBOLS = {0: SAFE, -1: HOLE, 1: START, 2: GOAL}  # of a cell in VSP's `map_desc`


@dataclass(frozen=True)
class ChoiceItem:
    """A row as it is asked.

    Args:
        id: of the row.
        images: as the row has them: paths, bytes, or `{"bytes", "path"}`; none where the row has none.
        prompt: what the user says.
        ground_truth: the right answer as published, mostly the letter of an option.
        meta: facts that the published prediction file keeps.
        choices: texts of the options in order, where they are known.
    """

    id: str
    images: list[Any]
    prompt: str
    ground_truth: str
    meta: dict[str, Any]
    choices: list[str] | None = None


# Adapters


def mmvp_item(row: Mapping[str, Any], folder: str | os.PathLike) -> ChoiceItem:
    """MMVP: a line of `Questions.csv` in `folder`, its picture in `MMVP Images`."""
    return ChoiceItem(
        id=str(row["Index"]),
        images=[os.fspath(Path(folder) / "MMVP Images" / f"{row['Index']}.jpg")],
        prompt=f"{row['Question']}\n{row['Options']}\n{INSTRUCTION}",
        ground_truth=row["Correct Answer"],
        meta=dict(row),
        choices=options_in(row["Options"]),
    )


def blink_item(row: Mapping[str, Any], task: str) -> ChoiceItem:
    """BLINK: a row of the table of a task, up to four pictures in it.

    Raises:
        TypeError: the choices are no list.
    """
    if isinstance(row["choices"], str):
        raise TypeError(f"choices must be a list, got {row['choices']!r:.80}")
    choices = list(row["choices"] or ())
    images = [row[name] for name in (f"image_{i}" for i in range(1, 5)) if row.get(name) is not None]
    asked = [row["question"], "Options:", *map("({}) {}".format, string.ascii_uppercase, choices), INSTRUCTION]
    return ChoiceItem(
        id=str(row["idx"]),
        images=images,
        prompt=row["prompt"] or "\n".join(asked),
        ground_truth=_blink_letter(row["answer"], choices),
        meta={"task": task, "choices": choices, "num_images": len(images)},
        choices=choices or None,
    )


def _blink_letter(answer: str, choices: list[str]) -> str:
    """The letter of an answer that is one, with or without brackets, or that is the text of a choice."""
    letter = answer.replace("(", "").replace(")", "").strip()
    if re.fullmatch("[A-H]", letter):
        return letter
    return string.ascii_uppercase[choices.index(answer)] if answer in choices else answer


def mmstar_item(row: Mapping[str, Any]) -> ChoiceItem:
    """MMStar: a row of its table, the options inside the question."""
    question, facts = row["question"], row.get("meta_info")
    facts = json.loads(facts) if isinstance(facts, str) else facts
    choices = options_in(question)
    return ChoiceItem(
        id=str(row["index"]),
        images=[] if row["image"] is None else [row["image"]],
        prompt=question if "Answer with" in question else f"{question}\n{INSTRUCTION}",
        ground_truth=row["answer"],
        meta={**{key: row.get(key) for key in ("category", "l2_category")}, "source": (facts or {}).get("source")},
        choices=choices if choices and len(choices) == 4 else None,  # every question has four
    )


def vstar_item(row: Mapping[str, Any], folder: str | os.PathLike) -> ChoiceItem:
    """V*: a line of `test_questions.jsonl` in `folder`, whose text has options and instruction already."""
    return ChoiceItem(
        id=str(row["question_id"]),
        images=[row["image"] if not isinstance(row["image"], str) else os.fspath(Path(folder) / row["image"])],
        prompt=row["text"],
        ground_truth=row["label"],
        meta={"category": row["category"]},
        choices=options_in(row["text"]),
    )


def vsp_item(row: Mapping[str, Any], folder: str | os.PathLike) -> ChoiceItem:
    """VSP, spatial planning: a line of `test_direct.jsonl`, its picture in `folder`; the ground truth is the map."""
    text = row["map_desc"] if isinstance(row["map_desc"], str) else json.dumps(row["map_desc"])
    return ChoiceItem(
        id=str(row["map_id"]),
        images=[os.fspath(Path(folder) / row["image_input"])],
        prompt=row["text_input"],
        ground_truth=text,
        meta={"map_id": row["map_id"]},
    )


# What they and the scorers share


def options_in(text: str) -> list[str] | None:
    """The options that a text lists as `(a) ... (b) ...`, `A: ..., B: ...` or `A. ...`, each up to the next or to the
    end of its line; None unless it lists two.

    Example: `options_in("(a) Yes (b) No")` is `["Yes", "No"]`.
    """
    found: list[re.Match] = []
    for match in _OPTION.finditer(text):
        expected = string.ascii_uppercase[len(found)]
        if len(found) < _MOST_OPTIONS and (match[1] or match[2]).upper() == expected:
            found.append(match)
    starts = [*(match.start() for match in found), len(text)]
    spans = [text[match.end() : end] for match, end in zip(found, starts[1:], strict=True)]
    options = [span.split("\n")[0].strip().rstrip(",;") for span in spans]
    return options if len(options) > 1 and all(options) else None


def letter_of(label: str) -> str:
    """The upper-case letter of a label such as `"(a)"`, `"A"` or `"A."`; empty when it is none."""
    found = _LETTER.fullmatch(label)
    return found[1].upper() if found else ""


def maze_of_map(text: str) -> Maze:
    """The maze of VSP's `map_desc`: rows of numbers as JSON (0 free, -1 hole, 1 player, 2 goal), or a text form.

    Raises:
        ValueError: it is neither, or no maze.
    """
    if not text.lstrip().startswith("["):
        return Maze.from_text(text, "map_desc")
    rows: Sequence[Sequence[Any]] = json.loads(text)
    return Maze.from_rows(["".join(_MAP_SYMBOLS.get(cell, "?") for cell in row) for row in rows], "map_desc")


__all__ = [
    "INSTRUCTION",
    "ChoiceItem",
    "blink_item",
    "letter_of",
    "maze_of_map",
    "mmstar_item",
    "mmvp_item",
    "options_in",
    "vsp_item",
    "vstar_item",
]
