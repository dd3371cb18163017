"""The multiple-choice and yes/no benchmarks of `choice_sets.py`: their files, and what `choice_protocols.py` asks."""

import itertools
import os
import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainers.data.records import Record, RecordError, RecordReport, validate_record
from trainers.data.sources import SkippedRow, Source, read_sources

from .benchmark import Benchmark
from .choice_protocols import choice_protocols
from .choice_sets import BLINK_TASKS, CHOICE_SETS, YES_NO, blink_task, record_of_choice
from .read_tables import checked_columns, fetch_files, table_source
from .search_protocols import dmlr_protocols

OTHER_TASK = "row of another task"


def read_choice_set(
    name: str,
    source: str | os.PathLike | None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
) -> list[Record]:
    """The records of a set in `CHOICE_SETS`, see [`Benchmark.read`].

    BLINK is a folder with one of each task, the folder of a task, or a file, whose rows name their tasks in `sub_task`
    or `idx`; rows of other tasks than those asked for are skipped and counted.
    """
    columns = CHOICE_SETS[name].columns
    sources = [checked_columns(each, columns) for each in _sources(name, source, tasks, image_folder)]

    def build(value: Any, path: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        record = record_of_choice(name, value, path, row, folder, ds_name)
        if tasks and record["meta"]["group"] not in tasks:
            raise SkippedRow(OTHER_TASK)
        return record

    return list(itertools.islice(read_sources(sources, build, validate_record, report), max_samples))


def _sources(
    name: str, source: str | os.PathLike | None, tasks: Sequence[str] | None, image_folder: str | os.PathLike | None
) -> list[Source]:
    """The tables of a set; `ds_name` is the task of all rows of a table, empty where rows name theirs or have none."""
    entry = CHOICE_SETS[name]
    if source is None and not entry.sources:
        raise ValueError(f"{name} has no public source; give the folder or file of its table")
    source = entry.sources[0] if source is None else source
    path = Path(source)
    if entry.fetched and os.fspath(source) == entry.sources[0] and not path.exists():
        source = path = fetch_files(entry.sources[0], entry.fetched)
    options = {"files": entry.files, "split": entry.split, "image_folder": image_folder}
    if not entry.tasks:
        return [_named(table_source(source, name, config=entry.config, **options), "")]
    if path.is_file() or any((path / each).is_file() for each in entry.files):
        return [_of_own_tasks(table_source(path, name, **options), tasks)]
    wanted = list(dict.fromkeys(tasks or entry.tasks))
    if path.is_dir():
        there = [task for task in wanted if (path / task).is_dir()]
        missing = [task for task in wanted if task not in there] if tasks else []
        if missing or not there:
            raise RecordError(path, None, f"has no folder of the tasks {missing or wanted}; check data_root")
        return [table_source(path / task, task, **options) for task in there]
    return [_named(table_source(source, task, config=task, **options), task) for task in wanted]


def _named(source: Source, ds_name: str) -> Source:
    return Source(source.path, source.image_folder, ds_name, source.rows)


def _of_own_tasks(source: Source, tasks: Sequence[str] | None) -> Source:
    """A table whose rows name their tasks; if the first does not, all are of the folder's, or of the one asked for."""
    rows = iter(source.rows)
    first = list(itertools.islice(rows, 1))
    folder = Path(source.path).parent.name
    own = first and isinstance(first[0][1], dict) and blink_task(first[0][1])
    named = folder if folder in BLINK_TASKS else tasks[0] if tasks and len(tasks) == 1 else ""
    return Source(source.path, source.image_folder, "" if own else named, itertools.chain(first, rows))


def _benchmark(name: str) -> Benchmark:
    entry = CHOICE_SETS[name]
    return Benchmark(
        name=name,
        title=entry.title,
        sources=entry.sources,
        reader=partial(read_choice_set, name),
        protocols={**choice_protocols(name), **dmlr_protocols(name)},
        group=lambda record: record["meta"]["group"],
        cluster=lambda record: record["meta"]["cluster"],
        answers=lambda record: YES_NO if entry.yes_no else _letters(record),
        gold=lambda record: record["answer"],
        tasks=entry.tasks,
        columns=entry.columns,
    )


def _letters(record: Record) -> tuple[str, ...]:
    return tuple(string.ascii_uppercase[: len(record["choices"] or "ABCD")])


CHOICE_BENCHMARKS = tuple(map(_benchmark, CHOICE_SETS))

__all__ = ["CHOICE_BENCHMARKS", "OTHER_TASK", "read_choice_set"]
