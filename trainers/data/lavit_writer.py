"""Rows of LaViT's training JSON (see `lavit.py`) from records, and the file."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .llava_checks import is_url
from .predictions import whole_file
from .records import RECORD_FIELDS, Record, RecordError
from .table_rows import text_fields

SIGNAL_FIELDS = {"concept": "v_top_path_abs", "attention": "attention_path_abs"}
KEPT = ("question_id", "dataset", "split")  # in the record's meta
# Fields of a record that the published format lacks, and the key that holds them in files written here.
EXTRA_FIELDS = ("choices", "steps", "boxes")
EXTRA_TEACHER = ("grid", "image_sha256")
FIELDS_KEY = "record_fields"


def write_lavit_json(
    rows: Iterable[Record | Mapping[str, Any]],
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
) -> int:
    """Writes a training JSON.

    Args:
        rows: records (see [`lavit_row`]), or rows as they stand in the file.
        path: the file; it appears only when all rows are written.
        image_root: see [`lavit_row`].

    Returns:
        The number of rows.

    Raises:
        RecordError: a row that lacks a text or a path; a record that the format cannot hold.
    """
    results = []
    for number, row in enumerate(rows):
        row = lavit_row(row, image_root, (path, number)) if set(row) == set(RECORD_FIELDS) else row
        needed = ("question", "ground_truth_enriched", "image_relative_path", *SIGNAL_FIELDS.values())
        results.append(dict(text_fields(row, needed, (path, number))))
    with whole_file(path) as file:
        json.dump({"results": results}, file, ensure_ascii=False, indent=2)
    return len(results)


def lavit_row(
    record: Record, image_root: str | os.PathLike | None = None, origin: tuple[Any, int | None] = ("record", None)
) -> dict[str, Any]:
    """The row of a record. What the format has no field for (choices, steps, boxes, the teacher's grid and the image's
    fingerprint) goes under the key `record_fields`, which other readers ignore and [`read_lavit`] reads.

    Args:
        record: with one image that is a file, and `teacher` in files of its own.
        image_root: images inside are named from there; others, and all without it, as they are.
        origin: file and row that errors name.

    Raises:
        RecordError: names the record's id; not one image that is a file, or a signal that is in no file of its own.
    """
    images, teacher = record["images"], record["teacher"] or {}
    if len(images) != 1 or not isinstance(images[0], str | os.PathLike):
        raise RecordError(*origin, f"record {record['id']!r}: needs one image that is a file, got {images!r:.80}")
    row: dict[str, Any] = {name: record["meta"][name] for name in KEPT if name in record["meta"]}
    row |= {"question": record["question"], "ground_truth_enriched": record["answer"]}
    row["image_relative_path"] = _from_root(os.fspath(images[0]), image_root)
    for signal, field in SIGNAL_FIELDS.items():
        reference = teacher.get(signal)
        alone = isinstance(reference, Mapping) and reference.get("path") and reference.get("key") is None
        if not alone or reference.get("step"):
            raise RecordError(
                *origin,
                f"record {record['id']!r}: the {signal} must be in a file of its own, got {reference!r:.80}; write "
                "the published layout with examples/extract_teacher.py --write_json",
            )
        row[field] = os.fspath(reference["path"])
    extra = {name: record[name] for name in EXTRA_FIELDS if record[name] is not None}
    kept = {name: teacher[name] for name in EXTRA_TEACHER if teacher.get(name) is not None}
    extra |= {"teacher": kept} if kept else {}
    return {**row, FIELDS_KEY: extra} if extra else row


def _from_root(name: str, image_root: str | os.PathLike | None) -> str:
    if image_root is None or is_url(name):
        return name
    found, root = Path(os.path.abspath(name)), Path(os.path.abspath(image_root))
    return found.relative_to(root).as_posix() if found.is_relative_to(root) else name
