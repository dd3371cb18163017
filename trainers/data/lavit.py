"""The training JSON of LaViT: questions with the files of what a larger model saw. Its writer is in `lavit_writer.py`.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 2.4; data set
`Svard/LaViT-15k`). A file is `{"results": [{"question", "ground_truth_enriched", "image_relative_path",
"v_top_path_abs", "attention_path_abs", "question_id", "dataset", "split"}, ...]}`. The signals themselves are read by
`teacher_signals.py`.

Deviations from the reference, on purpose: a row whose signals are missing or unusable is bad (there it is trained on
zeros), and so is one whose texts contain a learned token (there it is trained at the wrong place).
"""

import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .answers_lavit import LEARNED_TOKEN
from .boxes import checked_option
from .json_rows import existing_file
from .lavit_writer import EXTRA_FIELDS, EXTRA_TEACHER, FIELDS_KEY, KEPT, SIGNAL_FIELDS, lavit_row, write_lavit_json
from .llava_checks import is_url
from .records import Record, RecordError, RecordReport, make_record, open_image, validate_record
from .sources import Source, image_folder_of, read_sources
from .table_rows import row_images, table_meta, text_fields
from .viscot import check_question_id

__all__ = [
    "check_lavit",
    "lavit_row",
    "read_lavit",
    "record_from_lavit",
    "resolve_feature_path",
    "write_lavit_json",
]

CHECKS = ("content", "files")

_DATA, _IMAGES = "data/", "/data/images"


def read_lavit(
    path: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    v_top_dir: str | os.PathLike | None = None,
    attention_dir: str | os.PathLike | None = None,
    max_samples: int | None = None,
    check: str = "content",
    need: Collection[str] = tuple(SIGNAL_FIELDS),
    concept_size: int | None = None,
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads a training JSON. Bad rows are left out and counted in the report, with the id of the record.

    Args:
        path: the file (loaded at once).
        image_root: where image paths begin; also decides on feature paths, see [`resolve_feature_path`].
        v_top_dir, attention_dir: where the relative paths of the two signals begin.
        max_samples: reads the first so many rows, good or bad; None for all.
        check: `"content"` loads the signals of every row, so that NaN, zero attention, another width or another image
            are found before a run; `"files"` looks only whether the files are there.
        need: the signals that a row must have, `"concept"` and `"attention"`; others are not looked at.
        concept_size: the width that a concept must have (with `check="content"`); None for any.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `answer` (the enriched ground truth, which may be empty), `images` (one)
        and `teacher` (see `teacher_signals.py`; the grid is unknown unless the file was written here). `meta` has
        source (file), row, index, ds_name, question_id, dataset, split, image_name (the path as in the file). The id
        is made of dataset, split and question_id.

    Raises:
        RecordError: at once for a missing file or folder, on reading for a file that is no training JSON.
        RecordShareError: after the last row, see `report`.
        ValueError: an unknown option, or a negative number of rows.
    """
    checked_option("check", check, CHECKS)
    for name in need:
        checked_option("signal in need", name, tuple(SIGNAL_FIELDS))
    if max_samples is not None and max_samples < 0:
        raise ValueError(f"max_samples must be 0 or more rows, got {max_samples}")
    path = existing_file(path)
    folder = image_folder_of(path, image_root)
    rows = itertools.islice(_results(path), max_samples)
    folders = {"concept": v_top_dir, "attention": attention_dir}

    def build(value: Any, source: Any, row: int, image_folder: Path, ds_name: str, index: int) -> Record:
        return record_from_lavit(value, source, row, image_folder, ds_name, index, folders)

    def check_row(record: Record, source: Any, row: int) -> None:
        check_lavit(record, source, row, need)
        if check == "content":
            _load_signals(record, need, concept_size)

    return read_sources([Source(path, folder, path.stem, rows)], build, check_row, report)


def _results(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise RecordError(path, None, f"not JSON ({error}); the file was cut: fetch it again") from error
    results = value.get("results") if isinstance(value, dict) else None
    if not isinstance(results, list):
        raise RecordError(
            path,
            None,
            f"a training JSON is {{'results': [...]}}, this is {value!r:.80}; write it with write_lavit_json, or with "
            "examples/extract_teacher.py --write_json",
        )
    yield from enumerate(results)


def record_from_lavit(
    value: Any,
    source: str | os.PathLike,
    row: int,
    image_root: str | os.PathLike,
    ds_name: str = "lavit",
    index: int = 0,
    feature_dirs: Mapping[str, str | os.PathLike | None] | None = None,
) -> Record:
    """The record of one row.

    Args:
        value: the parsed row.
        source, row: named by errors.
        image_root, ds_name, index: see [`read_lavit`].
        feature_dirs: `"concept"` and `"attention"` to the folder of their relative paths.

    Raises:
        RecordError: names the record's id; a field of another type, a missing image, a relative path without folder.
    """
    value = text_fields(value, (), (source, row))
    check_question_id(value, (source, row))
    name = _id(value, ds_name, row)
    try:
        fields = {"ground_truth_enriched": "", **value}
        text_fields(fields, ("question", "ground_truth_enriched", "image_relative_path"), (source, row))
        record = make_record(
            id=name,
            question=fields["question"],
            answer=fields["ground_truth_enriched"],
            images=row_images(_joined(fields["image_relative_path"], image_root), Path(), (source, row), "refuse"),
            teacher=_teacher(fields, image_root, feature_dirs or {}, (source, row)),
            **{field: stored for field, stored in _stored(fields, (source, row)).items() if field in EXTRA_FIELDS},
        )
    except RecordError as error:
        raise RecordError(source, row, f"record {name!r}: {error.reason}") from error
    record["meta"] = table_meta(source, row, index, ds_name, fields, KEPT)
    record["meta"]["image_name"] = fields["image_relative_path"]
    return record


def _joined(name: str, image_root: str | os.PathLike) -> str:
    return name if not name or is_url(name) else os.path.join(image_root, name)


def _id(value: Mapping[str, Any], ds_name: str, row: int) -> str:
    if value.get("question_id") is None:
        return f"{ds_name}-{row}"
    parts = (value.get(name) for name in ("dataset", "split", "question_id"))
    return "-".join(str(part) for part in parts if part is not None)


def _stored(value: Mapping[str, Any], origin: tuple[Any, int]) -> dict[str, Any]:
    stored = value.get(FIELDS_KEY) or {}
    known = {*EXTRA_FIELDS, "teacher"}
    if not (isinstance(stored, dict) and set(stored) <= known and isinstance(stored.get("teacher", {}), dict)):
        raise RecordError(*origin, f"'{FIELDS_KEY}' must be an object of {sorted(known)}, got {stored!r:.80}")
    return stored


def _teacher(
    value: Mapping[str, Any],
    image_root: str | os.PathLike,
    feature_dirs: Mapping[str, str | os.PathLike | None],
    origin: tuple[Any, int],
) -> dict[str, Any]:
    """The reference to the signals; one without a path is None."""
    teacher: dict[str, Any] = {"grid": None, "image": 0, "image_sha256": None}
    stored = _stored(value, origin).get("teacher", {})
    teacher |= {key: stored[key] for key in EXTRA_TEACHER if key in stored}
    for signal, field in SIGNAL_FIELDS.items():
        name = value.get(field)
        if not isinstance(name, str | None):
            raise RecordError(*origin, f"{field!r} must be a path, got {name!r:.80}; repair the row")
        teacher[signal] = None
        if name:
            try:
                found = resolve_feature_path(name, image_root, feature_dirs.get(signal))
            except ValueError as error:
                raise RecordError(*origin, f"{field}: {error}") from error
            teacher[signal] = {"path": found, "key": None} | ({"step": 0} if signal == "attention" else {})
    return teacher


def resolve_feature_path(
    name: str, image_root: str | os.PathLike, feature_dir: str | os.PathLike | None = None
) -> str:
    """Where a feature file is: an absolute path as it is; one that begins with `data/`, if the absolute image root
    contains `/data/images`, from what stands before the last of these; any other in its folder (card 2.4).

    Args:
        name: as in the file.
        image_root: folder of the images.
        feature_dir: folder of the features.

    Raises:
        ValueError: the last case without a folder.
    """
    if os.path.isabs(name):
        return name
    root = Path(os.path.abspath(image_root)).as_posix()
    if name.startswith(_DATA) and _IMAGES in root:
        return os.path.join(root[: root.rindex(_IMAGES)] or "/", name)
    if feature_dir is None:
        raise ValueError(
            f"the path {name!r} is relative, and the image root {os.fspath(image_root)!r} does not say from where; "
            "pass v_top_dir and attention_dir"
        )
    return os.path.join(feature_dir, name)


def check_lavit(record: Record, source: str | os.PathLike, row: int, need: Collection[str] = ()) -> None:
    """Checks a record of the training JSON; the answer may be empty.

    Raises:
        RecordError: names the record's id; wrong field types, an empty question, a learned token in a text, a needed
            signal without a path or whose file does not exist.
    """
    validate_record(record, source, row)
    problem = next(_problems(record, need), None)
    if problem is not None:
        raise RecordError(source, row, f"record {record['id']!r}: {problem}")


def _problems(record: Record, need: Collection[str]) -> Iterator[str]:
    if not record["question"].strip():
        yield "question is empty; repair or remove the row"
    for name in ("question", "answer"):
        written = LEARNED_TOKEN.search(record[name])
        if written:
            yield f"the {name} contains the learned token {written.group()}; remove it: {record[name]!r:.80}"
    for signal in need:
        reference, field = record["teacher"][signal], SIGNAL_FIELDS[signal]
        if reference is None:
            yield f"{field} is missing, so there is no {signal} to learn; extract it, or read without need={signal!r}"
        elif not os.path.isfile(reference["path"]):
            yield f"{field}: file {reference['path']!r} does not exist; check the folders, or extract it again"


def _load_signals(record: Record, need: Collection[str], concept_size: int | None) -> None:
    from .teacher_signals import load_teacher_signals

    fingerprint, image = record["teacher"]["image_sha256"], record["images"][0]
    opened = open_image(image, record) if fingerprint is not None and not is_url(image) else None
    load_teacher_signals(record, concept_size=concept_size, image=opened, need=need)
