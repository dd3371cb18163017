r"""MathVista, MATH-Vision and MM-MATH, asked as in DMLR's data files (arXiv 2512.12623, card 7).

`dmlr` scores by the published rule (the answer is the label, or contains it), `default` and `dmlr_strict` by letter,
value or words (`trainers/data/answers_dmlr.py`).
"""

import os
import string
from collections.abc import Sequence
from functools import partial

from trainers.data.answers_dmlr import extract_dmlr, score_dmlr
from trainers.data.records import Record, RecordReport
from trainers.data.staged_formats import chat_prompt

from ..runner import Prediction
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Benchmark, Scored
from .search_tasks import SEARCH_TASKS, read_search

STRICT, REFERENCE = "strict", "reference"
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
    return read_search(name, source, end_data_idx=max_samples, report=report)


def score_math(mode: str, record: Record, prediction: Prediction) -> Scored:
    """Whether the marked answer of a reply is the label."""
    answer = extract_dmlr(prediction.text, mode)
    return Scored(score_dmlr(prediction.text, record["answer"], mode), answer or None)


def _protocol(name: str, mode: str) -> AskProtocol:
    return AskProtocol(
        name, "2512.12623, card 7",
        lambda processor, record: chat_prompt(processor, record["question"], len(record["images"])),
        partial(score_math, mode), 1024, "\\boxed{{answer}}", ask=lambda record: record["question"],
    )  # fmt: skip


def _gold(record: Record) -> str:
    r"""The answer without its box; of an option its letter."""
    answer = record["answer"].strip().removeprefix("\\boxed{").removesuffix("}")
    return answer[0] if record["choices"] and answer[:1] in string.ascii_uppercase else answer


def _benchmark(name: str) -> Benchmark:
    key, title, group = _SETS[name]
    task = SEARCH_TASKS[key]
    return Benchmark(
        name=name,
        title=title,
        sources=(task.repository,),
        reader=partial(_read, key),
        protocols={each: _protocol(each, mode) for each, mode in
                   ((DEFAULT_PROTOCOL, STRICT), ("dmlr", REFERENCE), ("dmlr_strict", STRICT))},
        group=lambda record: str(record["meta"]["extra"].get(group) or "none"),
        cluster=None,
        answers=lambda record: tuple(string.ascii_uppercase[: len(record["choices"])]) if record["choices"] else None,
        gold=_gold,
        columns=(*task.texts, *task.others),
    )  # fmt: skip


MATH_BENCHMARKS = tuple(map(_benchmark, _SETS))

__all__ = ["MATH_BENCHMARKS", "score_math"]
