r"""The data JSON of DMLR: questions with an image each, read and written.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 2.4, 7.5).
A file is a list of `{"prompt", "solution", "image_path", "idx"}`, in repaired files also `choices`, `answer_text`,
`completion`, `ground_truth_text`.

Deviations from the reference, on purpose: a row without image is a question of text alone (there an error); every
field is kept; empty solutions, of which the published ScienceQA file has 713 (all questions whose answer is option
A), are refused unless asked for; `\n` written as two characters becomes a new line (`repair=False` keeps it); image
paths begin at the folder of the file, not at the working directory; an image behind a URL is not fetched.
"""

import json
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .boxes import checked_option
from .json_rows import existing_file, iter_rows
from .llava_checks import is_url
from .predictions import whole_file
from .records import IMAGE_ERRORS, Record, RecordError, RecordReport, make_record, open_image, validate_record
from .sources import SkippedRow, Source, image_folder_of, read_sources
from .table_rows import text_fields

ANSWER_POLICIES = ("refuse", "skip", "keep")
CHECKS = ("head", "content")
FIELDS = ("prompt", "solution", "image_path", "idx")

_NEW_LINE = re.compile(r"(?<!\\)\\n(?![A-Za-z]) ?")  # no LaTeX command: \neq, \nu, and none after a line break \\
_HEADER = re.compile(r"\b(?:Options|Choices)\s*:", re.IGNORECASE)
_LABEL = re.compile(r"(?<![A-Za-z0-9])(?:\(([A-Ja-j])\)|([A-J])[.:](?=\s))\s*")


def read_dmlr(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    start_data_idx: int = 0,
    end_data_idx: int | None = None,
    repair: bool = True,
    empty_answers: str = "refuse",
    null_answers: str = "skip",
    check: str = "head",
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads a data file. Bad rows are left out and counted in the report; see [`record_from_dmlr`].

    Args:
        path: JSON list (loaded at once), or the same rows as JSON lines.
        image_root: where image paths begin; default: the folder of the file.
        start_data_idx, end_data_idx: positions in the file to read, the end excluded; None for all from the start on.
        repair: see [`repaired`].
        empty_answers: what to do with rows whose solution is empty or missing: `"refuse"` the file, `"skip"` them
            (counted in the report) or `"keep"` them as they are.
        null_answers: the same for a solution of null, which in this format says "skip". `"refuse"` makes such a row
            bad.
        check: `"head"` reads the head of each image, `"content"` all of it.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `answer` (as text), `choices` (the field, else what the prompt lists, see
        [`choices_in`]), `images` (one or none). `meta` has source (file), row and data_idx (both the position in the
        file, whatever slice is read), ds_name, image_path (as in the file), and where they are there: idx, extra (all
        other fields), prompt (as in the file, if it was repaired), solution (if it is no string).

    Raises:
        RecordError: at once for a missing file or folder, a file that is no list, empty solutions (all positions),
            an `idx` that occurs twice.
        RecordShareError: after the last row, see `report`.
        ValueError: an unknown option, or a slice without rows.
    """
    for name, value in (("empty_answers", empty_answers), ("null_answers", null_answers)):
        checked_option(name, value, ANSWER_POLICIES)
    checked_option("check", check, CHECKS)
    path = existing_file(path)
    folder = image_folder_of(path, image_root)
    rows = list(iter_rows(path))
    _refuse_equal_idx(path, rows)
    rows = rows[_slice(start_data_idx, end_data_idx, len(rows), path)]
    empty = [row for row, value in rows if isinstance(value, Mapping) and _is_empty(value)]
    if empty and empty_answers == "refuse":
        raise RecordError(
            path,
            None,
            f"{len(empty)} of {len(rows)} rows have an empty solution and could only count as wrong, rows "
            f"{_ranges(empty)}; repair them, or read the original data set by its name "
            "(evaluation.benchmarks.search_tasks), or choose "
            "empty_answers='skip' or 'keep'",
        )

    def build(value: Any, source: Any, row: int, image_folder: Path, ds_name: str, index: int) -> Record:
        solution = value.get("solution", "") if isinstance(value, Mapping) else ""
        if solution is None and null_answers == "refuse":
            raise RecordError(source, row, "'solution' is null; fill it in, or choose null_answers='skip' or 'keep'")
        if solution is None and null_answers == "skip":
            raise SkippedRow("solution is null")
        if isinstance(value, Mapping) and _is_empty(value) and empty_answers == "skip":
            raise SkippedRow("solution is empty")
        return record_from_dmlr(value, source, row, image_folder, ds_name, repair=repair)

    def check_row(record: Record, source: Any, row: int) -> None:
        check_dmlr(record, source, row, check)

    return read_sources([Source(path, folder, path.stem, rows)], build, check_row, report)


def _slice(start: int, end: int | None, number: int, path: Path) -> slice:
    for name, value in (("start_data_idx", start), ("end_data_idx", end)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name}={value!r} must be a position in the file, 0 or more")
    if start >= (number if end is None else min(end, number)):
        raise ValueError(f"start_data_idx={start}, end_data_idx={end}: no row of the {number} of {path} lies between")
    return slice(start, end)


def _refuse_equal_idx(path: Path, rows: Iterable[tuple[int, Any]]) -> None:
    seen: dict[Any, int] = {}
    for row, value in rows:
        idx = value.get("idx") if isinstance(value, Mapping) else None
        if not isinstance(idx, int | str):
            continue  # none, or a bad row
        if idx in seen:
            raise RecordError(
                path,
                row,
                f"idx {idx!r} is also that of row {seen[idx]}; was a file joined to itself? Number the rows anew",
            )
        seen[idx] = row


def _is_empty(value: Mapping[str, Any]) -> bool:
    solution = value.get("solution", "")
    return isinstance(solution, str) and not solution.strip()


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 7]` as `1-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# Rows


def record_from_dmlr(
    value: Any,
    source: str | os.PathLike,
    row: int,
    image_root: str | os.PathLike = ".",
    ds_name: str = "dmlr",
    *,
    repair: bool = True,
) -> Record:
    """The record of one row; a null solution is the answer `""`.

    Args:
        value: the parsed row.
        source, row: named by errors.
        image_root, ds_name, repair: see [`read_dmlr`].

    Raises:
        RecordError: the row is no object; a field of another type; an image that does not exist, or is a URL.
    """
    value, origin = text_fields(value, (), (source, row)), (source, row)
    prompt, solution, name = value.get("prompt", ""), value.get("solution", ""), value.get("image_path")
    if not isinstance(prompt, str):
        raise RecordError(*origin, f"'prompt' must be a string, got {prompt!r:.80}; repair the row")
    if isinstance(solution, bool | Mapping):
        raise RecordError(
            *origin, f"'solution' must be text, a number or a list, got {solution!r:.80}; repair the row"
        )
    if not isinstance(value.get("idx"), int | str | None) or isinstance(value.get("idx"), bool):
        raise RecordError(*origin, f"'idx' must be a number or a string, got {value['idx']!r:.80}; repair the row")
    question = repaired(prompt) if repair else prompt
    record = make_record(
        id=f"{ds_name}-{row}",
        question=question,
        answer=_answer(solution),
        images=_images(name, image_root, origin),
        choices=_choices(value.get("choices"), prompt),
    )
    meta = {"source": os.fspath(source), "row": row, "data_idx": row, "ds_name": ds_name, "image_path": name or ""}
    meta |= {"idx": value["idx"]} if value.get("idx") is not None else {}
    meta |= {"prompt": prompt} if question != prompt else {}
    meta |= {"solution": solution} if not isinstance(solution, str) else {}
    extra = {key: field for key, field in value.items() if key not in FIELDS}
    record["meta"] = meta | ({"extra": extra} if extra else {})
    return record


def _answer(solution: Any) -> str:
    return "" if solution is None else solution if isinstance(solution, str) else str(solution)


def _images(name: Any, image_root: str | os.PathLike, origin: tuple[Any, int]) -> list[str]:
    if name is None or name == "":
        return []
    if not isinstance(name, str):
        raise RecordError(*origin, f"'image_path' must be a path or empty, got {name!r:.80}; repair the row")
    if is_url(name):
        raise RecordError(*origin, f"'image_path' is the URL {name!r}; fetch the image and name the file")
    path = os.path.join(image_root, name)
    if not os.path.isfile(path):
        raise RecordError(*origin, f"image file {path!r} does not exist; check image_root, or the row")
    return [path]


def _choices(field: Any, prompt: str) -> list[str] | None:
    usable = isinstance(field, list) and field and all(isinstance(each, str) and each.strip() for each in field)
    return list(field) if usable else choices_in(prompt)


def repaired(prompt: str) -> str:
    r"""A prompt with `\n`, written as two characters, as a new line; the blank behind it goes. LaTeX stays.

    Example:
        >>> repaired(r"In \boxed{}. \n Question: is $a \neq b$?").splitlines()
        ['In \\boxed{}. ', 'Question: is $a \\neq b$?']
    """
    return _NEW_LINE.sub("\n", prompt)


def choices_in(prompt: str) -> list[str] | None:
    """The options that a prompt lists behind its last `Options:` or `Choices:`, in the published forms: `A. ...`,
    `A: ...`, `(A) ...` or `(a) ...`, each up to the next or to the end of its line. None unless it lists two.

    Example:
        >>> choices_in("What is it?\\nOptions: A: A desk., B: A chair.")
        ['A desk.', 'A chair.']
    """
    headers = list(_HEADER.finditer(prompt))
    text = repaired(prompt[headers[-1].end() :]) if headers else ""
    found: list[re.Match] = []
    for label in _LABEL.finditer(text):
        if len(found) < 10 and (label[1] or label[2]).upper() == string.ascii_uppercase[len(found)]:
            found.append(label)
    starts = [*(label.start() for label in found), len(text)]
    lines = [text[label.end() : end].strip().split("\n")[0] for label, end in zip(found, starts[1:], strict=True)]
    options = [line.strip().rstrip(",;").rstrip() for line in lines]
    return options if len(options) > 1 and all(options) else None


def check_dmlr(record: Record, source: str | os.PathLike, row: int, check: str = "head") -> None:
    """Checks that there is something to ask and that the image opens; the answer may be empty.

    Raises:
        RecordError: wrong field types, an empty question, an image that cannot be read.
    """
    validate_record(record, source, row)
    if not record["question"].strip():
        raise RecordError(source, row, "'prompt' is empty or missing; repair or remove the row")
    for image in record["images"]:
        if check == "content":
            open_image(image, record)
        elif isinstance(image, str | os.PathLike):
            try:
                with Image.open(image):  # reads the head of the picture only
                    pass
            except IMAGE_ERRORS as error:
                reason = f"image {os.fspath(image)!r} cannot be read ({error}); fix the file"
                raise RecordError(source, row, reason) from error


# Writing


def write_dmlr_json(
    records: Iterable[Record], path: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> int:
    """Writes a data file. Records of [`read_dmlr`] become the rows that they were, of others `idx` is the position,
    and what their `meta["extra"]` holds is written beside the published fields.

    Args:
        records: with one image or none.
        path: the file; it appears only when all rows are written.
        image_root: image paths begin there where they can, default the folder of the file; images that are no files
            are saved there as `<file stem>/<position>.png`.

    Returns:
        The number of rows.

    Raises:
        RecordError: a record that the format cannot hold, with its position.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    rows = [dmlr_row(record, (path, number), root) for number, record in enumerate(records)]
    with whole_file(path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=2)
    return len(rows)


def dmlr_row(record: Record, origin: tuple[str | os.PathLike, int], image_root: str | os.PathLike) -> dict[str, Any]:
    """The row of a record, see [`write_dmlr_json`]; `origin` is the file and the position there.

    Raises:
        RecordError: several images, wrong field types, or an image that cannot be read.
    """
    validate_record(record, *origin)
    if len(record["images"]) > 1:
        raise RecordError(*origin, f"record {record['id']!r} has {len(record['images'])} images, a row holds one")
    meta = record["meta"]
    prompt, solution = record["question"], record["answer"]
    if isinstance(meta.get("prompt"), str) and repaired(meta["prompt"]) == prompt:
        prompt = meta["prompt"]
    if "solution" in meta and _answer(meta["solution"]) == solution:
        solution = meta["solution"]
    row = {"prompt": prompt, **meta.get("extra", {})}
    if record["choices"] is not None and _choices(row.get("choices"), prompt) != record["choices"]:
        row["choices"] = record["choices"]
    row |= {"solution": solution, "image_path": _image_path(record, origin, Path(image_root))}
    idx = meta.get("idx", None if "image_path" in meta else origin[1])  # a row that was read without one has none
    return row if idx is None else {**row, "idx": idx}


def _image_path(record: Record, origin: tuple[str | os.PathLike, int], root: Path) -> str:
    if not record["images"]:
        return ""
    image = record["images"][0]
    if isinstance(image, str | os.PathLike):
        found, start = Path(os.path.abspath(image)), Path(os.path.abspath(root))
        return found.relative_to(start).as_posix() if found.is_relative_to(start) else os.fspath(found)
    name = f"{Path(origin[0]).stem}/{origin[1]}.png"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    open_image(image, record).save(root / name)
    return name


__all__ = [
    "ANSWER_POLICIES",
    "CHECKS",
    "check_dmlr",
    "choices_in",
    "dmlr_row",
    "read_dmlr",
    "record_from_dmlr",
    "repaired",
    "write_dmlr_json",
]
