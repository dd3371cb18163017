"""Records of the data sets of `choice_tasks.py` from local files: no row is left out without being counted."""

import csv
import itertools
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.data.boxes import checked_option
from trainers.data.json_rows import existing_file, iter_rows
from trainers.data.llava_text import IMAGE_PLACEHOLDER
from trainers.data.records import Record, RecordError, RecordReport, make_record, validate_record
from trainers.data.sources import SkippedRow, Source, image_folder_of, read_sources
from trainers.data.table_rows import parquet_rows, row_images, text_fields

from .choice_items import letter_of, maze_of_map
from .choice_tasks import ChoiceTask, choice_task

NO_IMAGE = "row without image"


def read_choices(
    dataset: str,
    data_root: str | os.PathLike,
    task_name: str | Sequence[str] | None = None,
    *,
    max_samples: int | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
) -> list[Record]:
    """The records of a data set. Bad rows are left out and counted in the report.

    Args:
        dataset: name in `TASKS`.
        data_root: the folder of its file, or the file itself; of BLINK the folder of the tasks' folders.
        task_name: task or tasks of BLINK; default all that the folder holds.
        max_samples: only the first so many records.
        image_folder: where paths of images begin; default: the folder of the file.
        report: collects good, bad and skipped rows (of BLINK those without image are skipped, as published); without
            one, reading ends with an error above 1 % bad rows.

    Returns:
        Records: `question` (the prompt without `<image>`), `answer` (the ground truth as published), `choices` where
        they are known; `meta` has source (file), row, ds_name (name of the data set, or BLINK's task), prompt (as
        published), item (`meta` of the published prediction file), of VSP also maze.

    Raises:
        ValueError: an unknown data set or task, tasks of a set that has none, `max_samples` below 1, no record.
        RecordError: a missing file, folder or column.
        RecordShareError: see `report`.
    """
    own_report = report is None
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples!r} must be at least 1; leave it out for all")
    sources = list(_sources(dataset, Path(data_root), task_name, image_folder))
    report = RecordReport() if own_report else report

    def build(value: Any, path: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        return record_from_choice(dataset, value, path, row, folder, ds_name)

    def check(record: Record, path: Any, row: int) -> None:
        validate_record(record, path, row)

    records = list(itertools.islice(read_sources(sources, build, check, report), max_samples))
    if own_report:
        report.check()
    if not records:
        raise ValueError(f"{os.fspath(data_root)} has no record for {dataset}: {report.summary()}")
    return records


def record_from_choice(
    dataset: str, value: Any, source: Any, row: int, image_folder: str | os.PathLike = ".", ds_name: str = ""
) -> Record:
    """The record of one row, see [`read_choices`].

    Raises:
        RecordError: the row is damaged or lacks a column; a ground truth that is none of the choices, or no maze; an
            image that is missing or none.
        SkippedRow: for a row of BLINK without image.
    """
    task, origin = choice_task(dataset), (source, row)
    value = text_fields(value, task.texts, origin)
    missing = [name for name in task.others if name not in value]
    if missing:
        raise RecordError(*origin, f"the row lacks the columns {missing}, it has {list(value)}; repair the row")
    try:
        item = task.item(value, Path(image_folder), ds_name)
    except (AttributeError, TypeError, ValueError) as error:  # a column of another type than published
        raise RecordError(*origin, f"the row is not as published ({error}); repair it") from error
    if not item.images and task.has_tasks:
        raise SkippedRow(NO_IMAGE)
    if not item.images or not item.prompt.strip():
        raise RecordError(*origin, "the row has no image or no question; repair or remove it")
    record = make_record(
        id=item.id,
        question=item.prompt.replace(IMAGE_PLACEHOLDER, "").strip(),
        answer=item.ground_truth,
        images=[picture for image in item.images for picture in _pictures(image, origin)],
        choices=item.choices,
    )
    record["meta"] = {"source": os.fspath(source), "row": row, "ds_name": ds_name or dataset}
    record["meta"] |= {"prompt": item.prompt, "item": item.meta}
    if task.has_letters:
        _check_label(record, origin)
    else:
        record["meta"]["maze"] = _maze_text(item.ground_truth, origin)
    return record


def _pictures(image: Any, origin: tuple[Any, int]) -> list[Any]:
    """An image of an item, checked that it is there and that its head is that of a picture."""
    encoded = {"bytes": image, "path": None} if isinstance(image, bytes) else image
    return row_images(encoded, Path(), origin, "refuse")


def _check_label(record: Record, origin: tuple[Any, int]) -> None:
    letters = string.ascii_uppercase[: len(record["choices"] or "ABCD")]
    letter = letter_of(record["answer"])
    if not letter or letter not in letters:
        raise RecordError(
            *origin,
            f"the ground truth {record['answer']!r} is not one of the letters {letters!r} of the choices; repair the "
            "row (a test split may hide its answers: take the validation split)",
        )


def _maze_text(text: str, origin: tuple[Any, int]) -> str:
    try:
        return maze_of_map(text).to_text()
    except (TypeError, ValueError) as error:
        raise RecordError(*origin, f"map_desc is no maze ({error}); repair the row") from error


# Files


def _sources(
    dataset: str, root: Path, task_name: str | Sequence[str] | None, image_folder: str | os.PathLike | None
) -> Iterator[Source]:
    """The file of a data set, or those of its tasks, with their rows."""
    task = choice_task(dataset)
    names = [task_name] if isinstance(task_name, str) else list(task_name or ())
    if names and not task.has_tasks:
        raise ValueError(f"task_name={names}: {dataset} has no tasks; leave it out")
    if not root.exists():
        raise RecordError(root, None, "neither a file nor a folder; check data_root")
    file = root if root.is_file() else _file_in(root, task.files)
    own_name = names[0] if len(names) == 1 and root.is_file() else file and file.parent.name
    files = {} if file is None else {own_name if task.has_tasks else dataset: file}
    if task.has_tasks and file is None:
        found = {each.name: _file_in(each, task.files) for each in sorted(root.iterdir()) if each.is_dir()}
        files = {name: path for name, path in found.items() if path is not None}
    if not files:
        where = "in the folder of a task here" if task.has_tasks else "here"
        raise RecordError(root, None, f"none of the files {list(task.files)} is {where}; check data_root")
    for name in dict.fromkeys(names or files):
        path = files[checked_option("task_name", name, tuple(files))]
        yield Source(path, image_folder_of(path, image_folder), name, _checked_rows(path, task))


def _file_in(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _checked_rows(path: Path, task: ChoiceTask) -> Iterator[tuple[int, Any]]:
    """The rows of a file; a column that the first row lacks is missing in the whole file."""
    readers = {".csv": csv_rows, ".parquet": parquet_rows}
    for row, value in readers.get(path.suffix, iter_rows)(path):
        missing = [name for name in (*task.texts, *task.others) if isinstance(value, Mapping) and name not in value]
        if row == 0 and missing:
            raise RecordError(path, None, f"lacks the columns {missing}, it has {list(value)}; check data_root")
        yield row, value


def csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a table with a line of names; a line of another length is given as a RecordError.

    Raises:
        RecordError: no such file, or not a table of text.
    """
    try:
        with existing_file(path).open(encoding="utf-8-sig", newline="") as file:
            for row, value in enumerate(csv.DictReader(file, strict=True)):
                if None in value or None in value.values():
                    value = RecordError(path, row, f"the line has more or fewer fields than names: {value!r:.120}")
                yield row, value
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordError(path, None, f"not a readable table ({error}); fetch it again") from error


__all__ = ["NO_IMAGE", "csv_rows", "read_choices", "record_from_choice"]
