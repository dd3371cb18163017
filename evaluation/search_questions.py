"""Questions of a run of the search: the rows of a data file or of a data set by name, each with its index in the file.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 2.4, 7.3).
A row that cannot be asked stays in the run, with the reason: result files have an entry for it, as those of published
runs with several workers.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.json_rows import iter_rows
from trainers.data.records import Record, RecordReport

from .benchmarks.search_tasks import SEARCH_TASKS, read_search

TEXT_FIELDS = ("ground_truth_text", "answer_text")  # of the right option, in repaired files and in original data sets


@dataclass(frozen=True)
class Question:
    """A row of the data.

    Args:
        data_idx: its position in the file or data set, whatever part of it is run.
        question: what is asked.
        image_path: as the file has it; empty without image, and for data sets by name.
        solution: the ground truth as the file has it; None says "skip".
        solution_text: text of the right option, where the row has one.
        record: what is asked; None for a row that cannot be.
        problem: why it cannot be asked, with file and row.
    """

    data_idx: int
    question: str
    image_path: str
    solution: Any
    solution_text: str | None = None
    record: Record | None = None
    problem: str | None = None

    @property
    def digest(self) -> str:
        """Fingerprint of what is asked and of its ground truth."""
        facts = [self.question, self.solution, self.image_path]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def has_image(self) -> bool:
        """Whether it is asked with an image."""
        return bool(self.record["images"]) if self.record is not None else bool(self.image_path)


class QuestionReport(RecordReport):
    """A report that knows every bad row, not the first ten alone."""

    def __init__(self, max_bad_share: float) -> None:
        super().__init__(max_bad_share)
        self.bad_rows: dict[int | None, str] = {}

    def bad(self, file: str | os.PathLike, row: int | None, reason: str) -> None:
        super().bad(file, row, reason)
        self.bad_rows[row] = f"{os.fspath(file)}, row {row}: {reason}"


def read_questions(
    dataset: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    start_data_idx: int = 0,
    end_data_idx: int | None = None,
    repair: bool = True,
    empty_answers: str = "refuse",
    max_bad_share: float = 0.01,
) -> tuple[list[Question], QuestionReport]:
    """The questions of a run, in the order of the file.

    Args:
        dataset: path of a data JSON, or a name in `SEARCH_TASKS`.
        image_root: where the image paths of a file begin; by default the folder of the file, or the working directory
            (published) where the first image is there and not below the folder. Of a name: the folder of its files.
        start_data_idx, end_data_idx: positions to ask, the end excluded; the file may end before it.
        repair, empty_answers: see `read_dmlr`; for a path only.
        max_bad_share: share of bad rows above which nothing is run.

    Returns:
        The questions, and the report of the rows. A solution of null is a question to be skipped; a bad row of a file
        is a question with a `problem`.

    Raises:
        RecordError: no such file, empty solutions (with all positions), see `read_dmlr`.
        RecordShareError: too many bad rows.
        ValueError: neither a file nor a name, or a slice without rows.
    """
    report = QuestionReport(max_bad_share)
    name, part = os.fspath(dataset), {"start_data_idx": start_data_idx, "end_data_idx": end_data_idx}
    if name in SEARCH_TASKS:
        records = read_search(name, image_root, report=report, **part)
        report.check()
        return [_question(record) for record in records], report
    options = {"repair": repair, "empty_answers": empty_answers, "null_answers": "keep"}
    root = image_root_of(name, image_root) if os.path.isfile(name) else image_root
    records = read_search(name, root, report=report, **part, **options)
    report.check()
    questions = [_question(record) for record in records]
    if report.bad_rows:
        questions += [_bad(row, value, report.bad_rows[row]) for row, value in _rows(name) if row in report.bad_rows]
        questions.sort(key=lambda question: question.data_idx)
    return questions, report


def image_root_of(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> str:
    """Where the image paths of a file begin, see [`read_questions`]."""
    if image_root is not None:
        return os.fspath(image_root)
    folder = Path(path).parent
    rows = (value for _, value in _rows(path) if isinstance(value, Mapping))
    first = next((value["image_path"] for value in rows if isinstance(value.get("image_path"), str)), "")
    published = first and not (folder / first).is_file() and Path(first).is_file()
    return "." if published else os.fspath(folder)


def _rows(path: str | os.PathLike) -> list[tuple[int, Any]]:
    return list(iter_rows(Path(path)))


def _question(record: Record) -> Question:
    meta = record["meta"]
    extra = meta.get("extra", {})
    texts = (extra.get(name) for name in TEXT_FIELDS)
    return Question(
        data_idx=meta["data_idx"],
        question=record["question"],
        image_path=meta.get("image_path", ""),
        solution=meta.get("solution", record["answer"]),
        solution_text=next((text for text in texts if isinstance(text, str) and text), None),
        record=record,
    )


def _bad(row: int, value: Any, problem: str) -> Question:
    value = value if isinstance(value, Mapping) else {}
    prompt, image = (value.get(name) if isinstance(value.get(name), str) else "" for name in ("prompt", "image_path"))
    return Question(row, prompt, image, value.get("solution", ""), problem=problem)


__all__ = ["Question", "QuestionReport", "image_root_of", "read_questions"]
