"""Visual-CoT: questions about one image, each with the region that answers it, in the three published layouts.

Data: `deepcs233/Visual-CoT` on the Hub (paper: "Visual CoT", arXiv 2403.16999). Paper of the method that uses it here:
"LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2).

* raw (`viscot_363k.json`): `image` is `[path, path###[x0, y0, x1, y1]]` with the box in pixels of the image; four
  turns: question with a request for the region, the box again, an image placeholder, the answer. In the second turn
  the box is a fraction of the image padded to a square, as LLaVA sees it, not of the image.
* formatted (`viscot_363k_lvr_formatted.json` of LVR): two turns, the answer in `<answer>` tags, and `bboxes`,
  fractions of the image.
* mixed (`viscot_mixed_2m.json`): raw rows among conversations with one image or none.

Deviations from the published builder, on purpose: it reads all layouts as the second, and so takes the box of a raw
row for its answer; here the two boxes of a raw row must agree, `<image>` and `<lvr>` are taken out of the texts
wherever they stand, and question ids need not be numbers.
"""

import itertools
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .answers_lavit import parse_answer, parse_question
from .boxes import OUTSIDE, checked_option
from .llava import parse_turns
from .llava_text import expand_image_placeholders
from .lvr_text import REGION_PLACEHOLDER
from .records import Record, RecordError, RecordReport, make_record, validate_record
from .sources import SkippedRow, Source, open_source, read_sources
from .table_rows import check_question_text, row_images, table_meta
from .viscot_boxes import CROP, viscot_boxes

LAYOUTS = ("auto", "raw", "formatted", "mixed")
BAD_BOXES = ("refuse", "drop")

_KEPT = ("question_id", "dataset", "split")
_REQUEST = re.compile(r"\s*Please (?:think step by step and )?provide the bounding box.*\Z", re.DOTALL | re.IGNORECASE)

logger = logging.getLogger(__name__)


def shuffled_order(num_rows: int, seed: int) -> list[int]:
    """The published order of the rows: `random.seed(seed)`, then a shuffle of the indices.

    Args:
        num_rows: rows of the file, good or bad.
        seed: 5 in the published builder.
    """
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return order


def read_viscot(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    layout: str = "auto",
    seed: int | None = None,
    start_idx: int = 0,
    max_samples: int | None = None,
    outside: str = "refuse",
    bad_boxes: str = "refuse",
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads a file of Visual-CoT. Bad rows are left out and counted in the report; see [`record_from_viscot`].

    Args:
        path: JSON list (loaded at once) or JSON lines (streamed, unless shuffled).
        image_folder: where image paths begin; default: the folder of the file.
        layout: `"raw"` or `"formatted"` (see above) for all rows; `"auto"` takes each row as it is, and leaves out
            those without an image or with several, which the report counts; `"mixed"` is another name of that.
        seed: shuffles the rows as the published builder does (with 5); None keeps their order.
        start_idx: rows to pass over, after the shuffle.
        max_samples: rows to read from there on, good or bad; None for all.
        outside: `"refuse"` boxes that reach over the border of the image, or `"clip"` them there.
        bad_boxes: a row whose boxes cannot be used, or whose two boxes differ, is bad (`"refuse"`), or is read
            without boxes (`"drop"`; `meta["dropped_boxes"]` has the reason, and the log their number).
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `answer`, `images` (one), `boxes` (fractions of the image; None for a row
        without). `meta` has source (file), row, index, ds_name, question_id, dataset, split, layout, image_name (the
        path as in the file), ignored_turns. The id is the name of the file and the row.

    Raises:
        RecordError: at once for a missing file or folder, on reading for a file that is not JSON.
        RecordShareError: after the last row, see `report`.
        ValueError: an unknown option, or a negative number of rows.
    """
    checked_option("layout", layout, LAYOUTS)
    checked_option("outside", outside, OUTSIDE)
    checked_option("bad_boxes", bad_boxes, BAD_BOXES)
    for name, number in (("start_idx", start_idx), ("max_samples", max_samples)):
        if number is not None and number < 0:
            raise ValueError(f"{name} must be 0 or more rows, got {number}")
    source = open_source(path, image_folder)
    selected = replace(source, rows=_selected(source, seed, start_idx, max_samples))

    def build(*row: Any) -> Record:
        return record_from_viscot(*row, layout=layout, outside=outside, bad_boxes=bad_boxes)

    return _logged(read_sources([selected], build, check_viscot, report), source.path)


def _selected(source: Source, seed: int | None, start_idx: int, max_samples: int | None) -> Iterator[tuple[int, Any]]:
    rows = source.rows
    if seed is not None:
        loaded = list(rows)
        rows = (loaded[place] for place in shuffled_order(len(loaded), seed))
    yield from itertools.islice(rows, start_idx, None if max_samples is None else start_idx + max_samples)


def _logged(records: Iterator[Record], path: Path | str) -> Iterator[Record]:
    dropped, first = 0, ""
    for record in records:
        if "dropped_boxes" in record["meta"]:
            first = first or f"row {record['meta']['row']}: {record['meta']['dropped_boxes']}"
            dropped += 1
        yield record
    if dropped:
        logger.warning("%s: %d rows are read without their boxes, the first is %s", path, dropped, first)


def record_from_viscot(
    value: Any,
    source: str | os.PathLike,
    row: int,
    image_folder: str | os.PathLike = ".",
    ds_name: str = "viscot",
    index: int = 0,
    *,
    layout: str = "auto",
    outside: str = "refuse",
    bad_boxes: str = "refuse",
) -> Record:
    """The record of one row; the options are those of [`read_viscot`].

    Raises:
        RecordError: the row is damaged or no object; too few turns, or of other speakers; no request for a region in
            the first turn of a raw row; a missing image; a box that cannot be used (unless dropped).
        SkippedRow: no image, or several, in the layouts `"auto"` and `"mixed"`.
    """
    if isinstance(value, RecordError):
        raise value
    origin = (source, row)
    if not isinstance(value, Mapping):
        raise RecordError(*origin, f"a row must be a JSON object, got {value!r:.120}")
    check_question_id(value, origin)
    names = _image_names(value, layout, origin)
    turns = parse_turns(value.get("conversations"), source, row)
    layout = _layout_of_row(value, names, turns, layout)
    used = _used_turns(turns, 4 if layout == "raw" else 2, layout, origin)
    asked = _without_request(used[0], origin) if layout == "raw" else used[0]
    name = names[0].split(CROP)[0]
    record = make_record(
        id=f"{ds_name}-{row}",
        question=expand_image_placeholders(parse_question(asked), "").strip(),
        answer=parse_answer(used[-1]).replace(REGION_PLACEHOLDER, "").strip(),
        images=row_images(name, Path(image_folder), origin),
    )
    record["meta"] = table_meta(source, row, index, ds_name, value, _KEPT)
    record["meta"] |= {"layout": layout, "image_name": name, "ignored_turns": len(turns) - len(used)}
    try:
        told = used[1] if layout == "raw" else None
        record["boxes"] = viscot_boxes(value, names, told, record["images"][0], outside, origin)
    except RecordError as error:
        if bad_boxes == "refuse":
            raise
        record["boxes"], record["meta"]["dropped_boxes"] = None, error.reason
    return record


def check_viscot(record: Record, source: str | os.PathLike, row: int) -> None:
    """Checks that there is something to ask and to answer.

    Raises:
        RecordError: wrong field types, an empty question or answer.
    """
    validate_record(record, source, row)
    check_question_text(record, (source, row), require_steps=False)


def check_question_id(value: Mapping[str, Any], origin: tuple[Any, int]) -> None:
    """Checks that a row's question id, if it has one, is a number or a string.

    Raises:
        RecordError: when it is something else.
    """
    if not isinstance(value.get("question_id"), int | str | None):
        raise RecordError(*origin, f"'question_id' must be a number or a string, got {value['question_id']!r:.80}")


def _image_names(value: Mapping[str, Any], layout: str, origin: tuple[Any, int]) -> list[str]:
    """The entries of `image`, at least one, all crops of one image unless the layout is formatted (first one used)."""
    names = value.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise RecordError(*origin, f"'image' must be a path or a list of paths, got {names!r:.120}")
    files = dict.fromkeys(name.split(CROP)[0] for name in names)
    if len(files) == 1 or (files and layout == "formatted"):
        return names
    if layout in ("auto", "mixed"):
        raise SkippedRow("row with several images" if files else "row without image")
    raise RecordError(*origin, f"a row must have one image, got {list(files)!r:.120}; read with layout='auto'")


def _layout_of_row(value: Mapping[str, Any], names: Sequence[str], turns: Sequence[Any], layout: str) -> str:
    """`"raw"`, `"formatted"`, or `"plain"` for a conversation without a region."""
    if layout in ("raw", "formatted"):
        return layout
    if value.get("bboxes") is not None:
        return "formatted"
    return "raw" if len(turns) >= 4 and any(CROP in name for name in names) else "plain"


def _used_turns(turns: Sequence[Mapping[str, str]], number: int, layout: str, origin: tuple[Any, int]) -> list[str]:
    roles = [turn["role"] for turn in turns]
    if roles[:number] != ["user", "assistant"] * (number // 2):
        raise RecordError(
            *origin,
            f"a {layout} row needs {number} turns, 'human' and 'gpt' in alternation, got {roles}; repair or remove it",
        )
    return [turn["content"] for turn in turns[:number]]


def _without_request(text: str, origin: tuple[Any, int]) -> str:
    question, cut = _REQUEST.subn("", text)
    if not cut:
        raise RecordError(
            *origin,
            "the first turn of a raw row must end with 'Please provide the bounding box ...', got "
            f"{text[-80:]!r}; read it with layout='formatted', or repair the row",
        )
    return question
