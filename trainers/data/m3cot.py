"""M3CoT as published: multiple-choice questions about an image, with a rationale.

Data: `LightChen2333/M3CoT` on the Hub (train 7863, validation 1108, test 2318 rows), with the columns `id`,
`category`, `image_id`, `question`, `choices`, `context`, `answer` (a letter), `rationale`, `split`, `image`, `domain`,
`topic`. Paper of the method that uses it here: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent
Space", arXiv 2510.12603 (IVT-LR; card 2.2). `context` is not used, as there.
"""

import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rationales import MAX_STEPS, rationale_steps
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

_KEPT = ("domain", "topic", "category", "image_id", "split")


def read_m3cot(
    source: Any,
    split: str | None = None,
    *,
    image_folder: str | os.PathLike | None = None,
    max_steps: int | None = MAX_STEPS,
    require_steps: bool = False,
    without_image: str = "skip",
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads M3CoT. Bad rows are left out and counted in the report; see [`check_m3cot`].

    Args:
        source: a JSON list, JSON-lines or parquet file, a `datasets` table, or a Hub id or folder (with `split`).
        split: `"train"`, `"validation"` or `"test"` of a Hub id.
        image_folder: where image paths begin; default: the folder of the file.
        max_steps: the rationale becomes at most so many steps; None for one a sentence.
        require_steps: a row without steps is bad.
        without_image: rows without image are left out (`"skip"`, as published; the report counts them), bad
            (`"refuse"`), or text-only records (`"keep"`).
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `choices`, `answer` (the letter), `steps`, `images`; `meta` has source
        (file), row (original index), index, position (among the rows that were not skipped), answer_index,
        ds_name, and the columns domain, topic, category, image_id and split.

    Raises:
        RecordError: at once for a missing file or folder.
        RecordShareError: after the last row, see `report`.
        ValueError: an option that is unknown or does not go with the source.
    """
    check_without_image(without_image)
    table = open_table(source, split, image_folder)

    def build(value: Any, name: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        return record_from_m3cot(value, name, row, folder, ds_name, index, max_steps, without_image)

    def check(record: Record, name: Any, row: int) -> None:
        check_m3cot(record, name, row, require_steps)

    return read_sources([table], with_positions(build), check, report)


def record_from_m3cot(
    value: Any,
    source: Any,
    row: int,
    image_folder: str | os.PathLike = ".",
    ds_name: str = "m3cot",
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
    value = text_fields(value, ("question", "answer"), origin)
    rationale = value.get("rationale")
    if not isinstance(rationale, str | None):
        raise RecordError(*origin, f"'rationale' must be text or empty, got {rationale!r:.80}; repair the row")
    images = row_images(value.get("image"), Path(image_folder), origin, without_image)
    record = make_record(
        id=str(value.get("id") or f"{ds_name}-{row}"),
        question=value["question"],
        answer=value["answer"].strip(),
        images=images,
        choices=value.get("choices"),
        steps=rationale_steps(rationale or "", max_steps),
    )
    record["meta"] = table_meta(source, row, index, ds_name, value, _KEPT)
    if len(record["answer"]) == 1 and record["answer"] in string.ascii_uppercase:
        record["meta"]["answer_index"] = string.ascii_uppercase.index(record["answer"])
    return record


def check_m3cot(record: Record, source: Any, row: int, require_steps: bool = False) -> None:
    """Checks that a record can be trained on and scored.

    Raises:
        RecordError: wrong field types, an empty question, no choices, an answer that is not the letter of a choice, no
            steps (with `require_steps`), an image or latent token in a text.
    """
    origin = (source, row)
    validate_record(record, source, row)
    check_question_text(record, origin, require_steps)
    letters = string.ascii_uppercase[: len(record["choices"] or [])]
    if not letters:
        raise RecordError(*origin, "choices are empty; repair or remove the row")
    if record["answer"] not in list(letters):
        raise RecordError(
            *origin,
            f"answer {record['answer']!r} is not one of the letters {letters!r} of its choices; repair the row",
        )
    check_texts(record, origin)
