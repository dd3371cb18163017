"""All benchmarks by name.

from evaluation.benchmarks.registry import benchmark
records = benchmark("blink").read("data/blink", tasks=["Counting"])
protocol = benchmark("blink").protocol("laser")
"""

import itertools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainers.data.records import Record, RecordError, RecordReport, validate_record
from trainers.data.sources import Source, read_sources

from .benchmark import Benchmark
from .choice_protocols import choice_protocols
from .choice_sets import BLINK_TASKS, CHOICE_SETS, YES_NO, record_of_choice
from .math_benchmarks import MATH_BENCHMARKS
from .maze_benchmarks import MAZE_BENCHMARKS
from .read_tables import checked_columns, table_source
from .step_benchmarks import STEP_BENCHMARKS

LETTERS = "ABCDEFGH"


def read_choice_set(
    name: str,
    source: str | os.PathLike | None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
) -> list[Record]:
    """The records of a set in `CHOICE_SETS`, see [`Benchmark.read`]."""
    sources = [
        checked_columns(each, CHOICE_SETS[name].columns) for each in _sources(name, source, tasks, image_folder)
    ]

    def build(value: Any, path: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        return record_of_choice(name, value, path, row, folder, ds_name if CHOICE_SETS[name].tasks else "")

    def check(record: Record, path: Any, row: int) -> None:
        validate_record(record, path, row)

    return list(itertools.islice(read_sources(sources, build, check, report), max_samples))


def _sources(
    name: str, source: str | os.PathLike | None, tasks: Sequence[str] | None, image_folder: str | os.PathLike | None
) -> list[Source]:
    entry = CHOICE_SETS[name]
    if source is None and not entry.sources:
        raise ValueError(f"{name} has no public source; give the folder or file of its table")
    source = entry.sources[0] if source is None else source
    options = {"files": entry.files, "split": entry.split, "image_folder": image_folder}
    if not entry.tasks:
        return [table_source(source, name, config=entry.config, **options)]
    path = Path(source)
    if path.is_file():
        return [table_source(path, tasks[0] if tasks else "", **options)]
    wanted = list(tasks or entry.tasks)
    if path.is_dir():
        there = [task for task in wanted if (path / task).is_dir()]
        missing = [task for task in tasks or () if task not in there]
        if missing or not there:
            raise RecordError(path, None, f"has no folder of the tasks {missing or wanted}; check data_root")
        return [table_source(path / task, task, **options) for task in there]
    return [table_source(source, task, config=task, **options) for task in wanted]


def _choice_benchmark(name: str) -> Benchmark:
    entry = CHOICE_SETS[name]
    return Benchmark(
        name=name,
        title=entry.title,
        sources=entry.sources,
        reader=partial(read_choice_set, name),
        protocols=choice_protocols(name),
        group=lambda record: record["meta"]["group"],
        cluster=lambda record: record["meta"]["cluster"],
        answers=lambda record: YES_NO if entry.yes_no else tuple(LETTERS[: len(record["choices"] or "ABCD")]),
        gold=lambda record: record["answer"],
        tasks=BLINK_TASKS if name == "blink" else (),
        columns=entry.columns,
    )


BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (*map(_choice_benchmark, CHOICE_SETS), *MATH_BENCHMARKS, *STEP_BENCHMARKS, *MAZE_BENCHMARKS)
}
ALIASES = {
    "v*": "vstar", "vstarbench": "vstar", "hrbench": "hrbench4k", "hallusion": "hallusionbench",
    "seedbench2_plus": "seedbench2plus", "seed-bench-2-plus": "seedbench2plus", "math_vista": "mathvista",
    "math_vision": "mathvision", "mm-math": "mm_math", "maze": "mazes",
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """A benchmark by name or alias, in any case.

    Raises:
        ValueError: an unknown one; lists those there are.
    """
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; choose one of {sorted(BENCHMARKS)}")
    return BENCHMARKS[key]


__all__ = ["ALIASES", "BENCHMARKS", "benchmark", "read_choice_set"]
