r"""MathVista, MATH-Vision and MM-MATH, with the questions of DMLR's data files (arXiv 2512.12623, card 7).

`search_protocols.py` says how they are asked and scored.
"""

import os
import string
from collections.abc import Sequence
from functools import partial

from trainers.data.records import Record, RecordReport

from .benchmark import Benchmark
from .search_protocols import as_record, gold_of, search_protocols
from .search_tasks import SEARCH_TASKS, read_search

_SETS = {"mathvista": ("math_vista", "MathVista", "question_type"),
         "mathvision": ("math_vision", "MATH-Vision", "subject"),
         "mm_math": ("mm_math", "MM-MATH", "difficult")}  # fmt: skip


def _read(
    name: str,
    source: str | os.PathLike | None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
) -> list[Record]:
    if image_folder is not None:
        raise ValueError(f"image_folder={os.fspath(image_folder)!r}: pictures of {name} are in its table or beside it")
    return read_search(_SETS[name][0], source, report=report)[:max_samples]


def _benchmark(name: str) -> Benchmark:
    key, title, group = _SETS[name]
    task = SEARCH_TASKS[key]
    return Benchmark(
        name=name,
        title=title,
        sources=(task.repository,),
        reader=partial(_read, name),
        protocols=search_protocols(as_record),
        group=lambda record: str(record["meta"]["extra"].get(group) or "none"),
        cluster=None,
        answers=lambda record: tuple(string.ascii_uppercase[: len(record["choices"])]) if record["choices"] else None,
        gold=lambda record: gold_of(record["answer"], record),
        columns=(*task.texts, *task.others),
    )


MATH_BENCHMARKS = tuple(map(_benchmark, _SETS))

__all__ = ["MATH_BENCHMARKS"]
