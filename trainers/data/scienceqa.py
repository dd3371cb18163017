"""ScienceQA as published: multiple-choice questions, many about an image, with a lecture and a solution.

Data: `derek-thomas/ScienceQA` on the Hub, with the columns `image`, `question`, `choices`, `answer` (an index),
`hint`, `task`, `grade`, `subject`, `topic`, `category`, `skill`, `lecture`, `solution`. Paper of the method that uses
it here: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card
2.3). It takes the rows with an image only, and neither the hint nor the rest.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .rationales import MAX_STEPS, rationale_steps, scienceqa_rationale
from .records import Record, RecordError, RecordReport, make_record, validate_record
from .sources import read_sources
from .staged_text import check_texts
from .table_rows import (
    check_question_text,
    check_without_image,
    open_table,
    row_images,
    table_meta,
    text_fields,
    with_positions,
)

_KEPT = ("task", "grade", "subject", "topic", "category", "skill")


def read_scienceqa(
    source: Any,
    split: str | None = None,
    *,
    image_folder: str | os.PathLike | None = None,
    max_steps: int | None = MAX_STEPS,
    require_steps: bool = False,
    without_image: str = "skip",
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads ScienceQA. Bad rows are left out and counted in the report; see [`check_scienceqa`].

    Args:
        source: a JSON list, JSON-lines or parquet file, a `datasets` table, or a Hub id or folder (with `split`).
        split: `"train"`, `"validation"` or `"test"` of a Hub id.
        image_folder: where image paths begin; default: the folder of the file.
        max_steps: the rationale (lecture and solution) becomes at most so many steps; None for one a sentence.
        require_steps: a row with neither lecture nor solution is bad. Else its step is the answer's number.
        without_image: rows without image are left out (`"skip"`, as published; the report counts them), bad
            (`"refuse"`), or text-only records (`"keep"`).
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `choices`, `answer` (the index as a digit), `steps`, `images`; `meta` has
        source (file), row (original index), index, position (among the rows that were not skipped),
        answer_index, ds_name, and the columns task, grade, subject, topic, category and skill.

    Raises:
        RecordError: at once for a missing file or folder.
        RecordShareError: after the last row, see `report`.
        ValueError: an option that is unknown or does not go with the source.
    """
    check_without_image(without_image)
    table = open_table(source, split, image_folder)

    def build(value: Any, name: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        record = record_from_scienceqa(value, name, row, folder, ds_name, index, max_steps, without_image)
        if require_steps and not _has_rationale(value):
            reason = "the row has neither lecture nor solution; remove it, or read with require_steps=False"
            raise RecordError(name, row, reason)
        return record

    return read_sources([table], with_positions(build), check_scienceqa, report)


def record_from_scienceqa(
    value: Any,
    source: Any,
    row: int,
    image_folder: str | os.PathLike = ".",
    ds_name: str = "scienceqa",
    index: int = 0,
    max_steps: int | None = MAX_STEPS,
    without_image: str = "keep",
) -> Record:
    """The record of one row.

    Raises:
        RecordError: the row is damaged or lacks a column; see also `row_images`.
        SkippedRow: for a row without image, with `without_image="skip"`.
    """
    origin = (source, row)
    value = text_fields(value, ("question",), origin)
    answer = value.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise RecordError(*origin, f"'answer' must be the index of a choice, got {answer!r:.80}; repair the row")
    for name in ("lecture", "solution"):
        if not isinstance(value.get(name), str | None):
            raise RecordError(*origin, f"{name!r} must be text or empty, got {value[name]!r:.80}; repair the row")
    images = row_images(value.get("image"), Path(image_folder), origin, without_image)
    record = make_record(
        id=str(value.get("id") or f"{ds_name}-{row}"),
        question=value["question"],
        answer=str(answer),
        images=images,
        choices=value.get("choices"),
        steps=rationale_steps(scienceqa_rationale(value.get("lecture"), value.get("solution"), answer), max_steps),
    )
    record["meta"] = {**table_meta(source, row, index, ds_name, value, _KEPT), "answer_index": answer}
    return record


def _has_rationale(value: Mapping[str, Any]) -> bool:
    return any((value.get(name) or "").strip() for name in ("lecture", "solution"))


def check_scienceqa(record: Record, source: Any, row: int) -> None:
    """Checks that a record can be trained on and scored.

    Raises:
        RecordError: wrong field types, an empty question, no choices, an answer that is not the index of a choice, an
            image or latent token in a text.
    """
    origin = (source, row)
    validate_record(record, source, row)
    check_question_text(record, origin, require_steps=False)
    number = len(record["choices"] or [])
    if not number:
        raise RecordError(*origin, "choices are empty; repair or remove the row")
    if record["meta"]["answer_index"] not in range(number):
        raise RecordError(
            *origin, f"answer {record['answer']} is not the index of one of the {number} choices; repair the row"
        )
    check_texts(record, origin)
