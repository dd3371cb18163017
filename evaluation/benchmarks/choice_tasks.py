"""The data sets of the published LaViT evaluation: where each is, and what it must hold.

MMVP, BLINK, MMStar, V* and the maze questions of VSP as in "LaViT: Aligning Latent Visual Thoughts for Multi-modal
Reasoning", arXiv 2601.10129 (card 7.2), from local files as published. `choice_items.py` says how a row is asked,
`choice_records.py` reads the files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.boxes import checked_option

from .choice_items import ChoiceItem, blink_item, mmstar_item, mmvp_item, vsp_item, vstar_item


@dataclass(frozen=True)
class ChoiceTask:
    """A data set.

    Args:
        item: from row, folder of its images and name of the task (BLINK) to the item.
        files: names of its file below the root; the first that exists is read.
        texts: columns that hold text in every row.
        others: further columns that every row has.
        has_tasks: the root holds a folder a task (BLINK).
        has_letters: the ground truth is the letter of an option; else the map of a maze (VSP).
    """

    item: Callable[[Mapping[str, Any], Path, str], ChoiceItem]
    files: tuple[str, ...]
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()
    has_tasks: bool = False
    has_letters: bool = True


TASKS: dict[str, ChoiceTask] = {
    "mmvp": ChoiceTask(
        lambda row, folder, _: mmvp_item(row, folder),
        ("Questions.csv",),
        ("Index", "Question", "Options", "Correct Answer"),
    ),
    "blink": ChoiceTask(
        lambda row, _, task: blink_item(row, task),
        ("val-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("idx", "question", "answer"),
        ("choices", "prompt", "image_1"),
        has_tasks=True,
    ),
    "mmstar": ChoiceTask(
        lambda row, *_: mmstar_item(row), ("mmstar.parquet",), ("question", "answer"), ("index", "image")
    ),
    "vstar": ChoiceTask(
        lambda row, folder, _: vstar_item(row, folder),
        ("test_questions.jsonl",),
        ("image", "text", "label", "category"),
        ("question_id",),
    ),
    "vsp": ChoiceTask(
        lambda row, folder, _: vsp_item(row, folder),
        ("test_direct.jsonl",),
        ("image_input", "text_input"),
        ("map_id", "map_desc"),
        has_letters=False,
    ),
}


def choice_task(name: str) -> ChoiceTask:
    """A data set by name.

    Raises:
        ValueError: for an unknown one.
    """
    return TASKS[checked_option("dataset", name, tuple(TASKS))]


__all__ = ["TASKS", "ChoiceTask", "choice_task"]
