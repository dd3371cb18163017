"""The two JSON formats of LVR: conversations with regions (first stage), and questions to be answered (second stage).

Paper: "Latent Visual Reasoning", arXiv 2509.24251 (card sections 2.2 and 2.7).

The first is the LLaVA format with `bboxes`, one normalised box for each `<lvr>`; `lvr_text.render_regions` turns its
records into text and targets. The second has no boxes; `lvr_text.grpo_example` turns its records into prompts.

Deviations from the reference, on purpose: rows that it would train on with the wrong regions, or without any, are bad
rows here (see `check_regions`); `image` and `bboxes` may be missing in text without regions.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .answers import extract_answer
from .boxes import BOX_UNITS, EMPTY_REGION, OUTSIDE, BoxError, checked_option, normalised_box
from .llava import parse_turns, record_from_llava, resolve_image
from .llava_checks import image_problems, prompt_problems, turn_problems
from .llava_text import expand_image_placeholders
from .lvr_text import LVR_TOKENS, REGION_PLACEHOLDER, grpo_messages, mismatch_reason, region_messages
from .records import IMAGE_ERRORS, Box, Record, RecordError, RecordReport, make_record, validate_record
from .sources import open_sources, read_sources

# Side that `empty_region="one_token"` gives a box of no width or height, as a share of the image's.
MIN_SIDE = 1e-4


def read_lvr(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    box_unit: str = "fraction",
    outside: str = "refuse",
    empty_region: str = "refuse",
    join_regions: bool = False,
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
    report: RecordReport | None = None,
    question_id_blacklist: str | os.PathLike | Iterable[Any] | None = None,
) -> Iterator[Record]:
    """Reads data of the first stage: a list of items, or a meta file of such lists (see `sources.open_sources`).

    Bad rows are left out and counted in the report; see `check_regions` for what makes a row bad.

    Args:
        path: JSON list (loaded at once) or JSON lines (streamed), or a meta file of such files.
        image_folder: where image paths are looked up; default: the folder of the file. Not with a meta file.
        box_unit: `"fraction"` of the image as published, or `"pixel"` (the size is read from the image's header).
        outside: `"refuse"` rows with a box over the border of the image, or `"clip"` the box there.
        empty_region: a box of no width or height, which covers no token: `"refuse"` the row, take the `"one_token"`
            that it lies in, or `"drop"` the box with its placeholder.
        join_regions: whether all boxes of a row together are one region, with one placeholder.
        latent_tokens: role to token string.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.
        question_id_blacklist: question ids to leave out, or a JSON-lines file of `{"question_id": ...}`.

    Returns:
        An iterator of records: `messages` with the placeholders as in the file, `boxes` (normalised, of image 0 as
        published), `question`, `answer`; `meta` has source (file), row, index, ds_name, question_id.

    Raises:
        RecordError: at once for a missing file, on reading for a file that is not JSON.
        RecordShareError: after the last row, see `report`.
        ValueError: an unknown option.
    """
    checked_option("box_unit", box_unit, BOX_UNITS)
    checked_option("outside", outside, OUTSIDE)
    checked_option("empty_region", empty_region, EMPTY_REGION)

    def build(value: Any, source: Path, row: int, *origin: Any) -> Record:
        record = record_from_llava(value, source, row, *origin)
        record["answer"] = record["answer"].replace(REGION_PLACEHOLDER, "").strip()
        return _with_checked_boxes(record, source, row, box_unit, outside, empty_region, join_regions)

    def check(record: Record, source: Path, row: int) -> None:
        check_regions(record, source, row, latent_tokens, join_regions)

    return read_sources(open_sources(path, image_folder), build, check, report, question_id_blacklist)


def _with_checked_boxes(
    record: Record, source: Path, row: int, unit: str, outside: str, empty_region: str, join_regions: bool
) -> Record:
    """The record with normalised boxes that all have an area; a box that is dropped takes its placeholder along."""
    boxes: list[Box] = []
    dropped: set[int] = set()
    for number, box in enumerate(record["boxes"] or []):
        try:
            size = _image_size(record, box["image"], source, row) if unit == "pixel" else None
            x0, y0, x1, y1 = normalised_box(box["xyxy"], unit, size, outside)
        except BoxError as error:
            raise RecordError(source, row, f"region {number}: {error}") from error
        except (KeyError, TypeError) as error:
            raise RecordError(source, row, f"region {number}: {box!r:.120} needs 'image' and 'xyxy'") from error
        if x0 == x1 or y0 == y1:
            if empty_region == "refuse":
                raise RecordError(
                    source,
                    row,
                    f"region {number}: box {box['xyxy']!r} has no width or no height and covers no token; repair it, "
                    "or read with empty_region='one_token' or 'drop'",
                )
            if empty_region == "drop":
                dropped.add(number)
                continue
            (x0, x1), (y0, y1) = _widened(x0, x1), _widened(y0, y1)
        boxes.append({"image": box["image"], "xyxy": [x0, y0, x1, y1]})
    if join_regions:
        dropped = {0} if dropped and not boxes else set()
    changed = {**record, "boxes": boxes if record["boxes"] is not None else None}
    return {**changed, "messages": _without_regions(record["messages"], dropped)} if dropped else changed


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (min(low, 1 - MIN_SIDE), min(low, 1 - MIN_SIDE) + MIN_SIDE)


def _image_size(record: Record, image: int, source: Path, row: int) -> tuple[int, int]:
    try:
        with Image.open(record["images"][image]) as file:
            return file.size
    except (IndexError, *IMAGE_ERRORS) as error:
        raise RecordError(
            source, row, f"box_unit='pixel' needs the size of image {image}, which cannot be read ({error}); fix it"
        ) from error


def _without_regions(messages: Sequence[Mapping[str, str]], dropped: set[int]) -> list[dict[str, str]]:
    numbers = itertools.count()
    kept = []
    for turn in messages:
        first, *parts = turn["content"].split(REGION_PLACEHOLDER)
        spans = ("" if next(numbers) in dropped else REGION_PLACEHOLDER for _ in parts)
        kept.append({**turn, "content": first + "".join(span + part for span, part in zip(spans, parts, strict=True))})
    return kept


def check_regions(
    record: Record,
    source: str | os.PathLike,
    row: int | None,
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
    join_regions: bool = False,
) -> None:
    """Checks that a record can be rendered and trained on as the method means it.

    Raises:
        RecordError: for wrong field types or boxes; turns that do not end with, or alternate towards, the assistant;
            images and `<image>` that do not match; a missing image file; a region in a prompt, or written out in
            latent tokens; more regions than placeholders, or fewer.
    """
    validate_record(record, source, row)
    messages = region_messages(record, join_regions)
    problems = itertools.chain(
        turn_problems(messages),
        image_problems(messages, record["images"]),
        prompt_problems(messages, latent_tokens, REGION_PLACEHOLDER),
        _region_problems(record, messages, latent_tokens, join_regions),
    )
    problem = next(problems, None)
    if problem is not None:
        raise RecordError(source, row, problem)


def _region_problems(
    record: Record, messages: Sequence[Mapping[str, str]], latent_tokens: Mapping[str, str], join_regions: bool
) -> Iterator[str]:
    replies = "".join(turn["content"] for turn in messages if turn["role"] == "assistant")
    written = next((token for token in latent_tokens.values() if token in replies), None)
    if written:
        yield f"a response contains the latent token {written}; write {REGION_PLACEHOLDER} where the region belongs"
    found, boxes = replies.count(REGION_PLACEHOLDER), len(record["boxes"] or [])
    if found != (min(boxes, 1) if join_regions else boxes):
        joined = f", joined to one region of {boxes} boxes" if join_regions else ""
        yield mismatch_reason(found, min(boxes, 1) if join_regions else boxes) + joined


# Second stage


def read_lvr_grpo(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
    report: RecordReport | None = None,
    question_id_blacklist: str | os.PathLike | Iterable[Any] | None = None,
) -> Iterator[Record]:
    """Reads data of the second stage: a list of items without boxes, or a meta file of such lists.

    Only the first two turns are used, as in the reference; `meta["ignored_turns"]` counts the others. `<image>` is
    taken out of the text, so prompts are the same with and without it.

    Args:
        path, image_folder, latent_tokens, report, question_id_blacklist: as in `read_lvr`.

    Returns:
        An iterator of records: `question` (without `<image>`, otherwise as in the file), `answer` (inside the answer
        tags, else the whole reply), `messages` (two turns, the images first).

    Raises:
        RecordError, RecordShareError: as in `read_lvr`.
    """

    def check(record: Record, source: Path, row: int) -> None:
        check_question(record, source, row, latent_tokens)

    sources = open_sources(path, image_folder)
    return read_sources(sources, record_from_lvr_grpo, check, report, question_id_blacklist)


def record_from_lvr_grpo(
    value: Any, source: str | os.PathLike, row: int, image_folder: str | os.PathLike, ds_name: str = "", index: int = 0
) -> Record:
    """One parsed JSON object of the second stage as a record; the arguments are those of `record_from_llava`.

    Raises:
        RecordError: when a field has another type than the format says, or there are no two turns.
    """
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, dict) or value.get("video"):
        what = "a video, which is not supported; remove the row" if isinstance(value, dict) else f"{value!r:.80}"
        raise RecordError(source, row, f"a record must be a JSON object on images, got {what}")
    turns = parse_turns(value.get("conversations"), source, row)
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        raise RecordError(
            source, row, f"the first two turns must be 'human' and 'gpt', got {[turn['role'] for turn in turns]}"
        )
    question, solution = expand_image_placeholders(turns[0]["content"], ""), turns[1]["content"]
    record = question_record(
        f"{ds_name}-{row}" if value.get("id") is None else str(value["id"]),
        question,
        solution,
        value.get("image"),
        image_folder,
        (source, row),
    )
    origin = {"source": os.fspath(source), "row": row, "index": index, "ds_name": ds_name}
    record["meta"] = {**origin, "question_id": value.get("question_id", -1), "ignored_turns": len(turns) - 2}
    return record


def question_record(
    id: str,
    question: str,
    solution: str,
    images: Any,
    image_folder: str | os.PathLike,
    origin: tuple[str | os.PathLike, int],
) -> Record:
    """A record of a question with a verifiable answer.

    Args:
        id: of the record.
        question: without `<image>`.
        solution: the published reply, with or without answer tags.
        images: a path, a list of paths, or None.
        image_folder: where they are looked up.
        origin: file and row that errors name.

    Raises:
        RecordError: when `images` is something else.
    """
    names = [images] if isinstance(images, str) else images or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise RecordError(*origin, f"'image' must be a path or a list of paths, got {images!r:.80}")
    answer = extract_answer(solution)
    return make_record(
        id=id,
        question=question,
        answer=solution.strip() if answer is None else answer,
        images=[resolve_image(name, image_folder) for name in names],
        messages=grpo_messages(question, solution, len(names)),
    )


def check_question(
    record: Record,
    source: str | os.PathLike,
    row: int | None,
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
) -> None:
    """Checks that a record can be asked and its answer verified.

    Raises:
        RecordError: for wrong field types, an empty question or answer, a missing image file, image tokens or latent
            tokens in the question.
    """
    validate_record(record, source, row)
    for name in ("question", "answer"):
        if not record[name].strip():
            raise RecordError(source, row, f"{name} is empty, so there is nothing to reward; remove the row")
    messages = grpo_messages(record["question"], record["answer"], len(record["images"]))
    problems = itertools.chain(
        image_problems(messages, record["images"]),
        prompt_problems(messages, latent_tokens, REGION_PLACEHOLDER),
    )
    problem = next(problems, None)
    if problem is not None:
        raise RecordError(source, row, problem)
