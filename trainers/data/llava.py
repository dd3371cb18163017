"""LLaVA-style conversation data as published for LASER: reader and writer; text rules and labels in `llava_text.py`.

Paper: "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning", arXiv 2601.06803 (card section 2.2).

A file is a JSON list or JSON lines of `{"image", "conversations": [{"from", "value"}], "reasoning_chain", ...}`; a
meta file lists several such files. `read_source` turns either into records, `render_turns` a record into the text of
each turn, and `encode_conversation` the turns into token ids and labels.

Deviations from the reference, on purpose: `bboxes` never switch a record with a chain to the ROI mode; records without
a chain are refused for DWAL instead of being trained on an empty region; regions in user turns are refused, because
they would hand the answer to the model.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .answers import extract_answer
from .llava_checks import check_conversation, is_url
from .llava_text import (
    LASER_TOKENS,
    encode_conversation,
    expand_image_placeholders,
    expand_latent_placeholders,
    expand_slot_placeholders,
    pad_batch,
    record_form,
    record_messages,
    render_turns,
)
from .records import Record, RecordError, RecordReport, make_record
from .sources import Source, open_source, open_sources, read_sources

__all__ = [
    "LASER_TOKENS",
    "check_conversation",
    "encode_conversation",
    "expand_image_placeholders",
    "expand_latent_placeholders",
    "expand_slot_placeholders",
    "pad_batch",
    "read_llava",
    "read_source",
    "record_form",
    "record_from_llava",
    "render_turns",
    "resolve_image",
    "write_llava",
]

logger = logging.getLogger(__name__)

_ROLES = {"human": "user", "gpt": "assistant"}
# Fields of a record that the published format lacks, and the key that holds them in files written here.
_EXTRA_FIELDS = ("choices", "steps", "boxes", "teacher", "meta")
_FIELDS_KEY = "record_fields"
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read_source(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    require_chain: bool = True,
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
    report: RecordReport | None = None,
    question_id_blacklist: str | os.PathLike | Iterable[Any] | None = None,
) -> Iterator[Record]:
    """Reads a data file, or a meta file `[{"data_path", "image_folder", "ds_name"}, ...]`, sources joined in order.

    Relative paths in a meta file are looked up beside it, then in the working directory. `meta["index"]` counts rows
    over all sources (bad and skipped ones too), as in the reference. The rest is as in `read_llava`.

    Raises:
        RecordError: for a meta entry without `data_path`, or whose file or folder does not exist.
        ValueError: when `image_folder` is given beside a meta file, which names its own.
    """
    sources = open_sources(path, image_folder)
    return _read(sources, require_chain, latent_tokens, report, question_id_blacklist)


def read_llava(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    require_chain: bool = True,
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
    report: RecordReport | None = None,
    question_id_blacklist: str | os.PathLike | Iterable[Any] | None = None,
) -> Iterator[Record]:
    """Reads one LLaVA JSON list (loaded at once) or JSON-lines file (streamed) into records.

    Bad rows are left out and counted in the report; see `check_conversation` for what makes a row bad.

    Args:
        path: the file.
        image_folder: where image paths that do not exist as they are (and are no URLs) are looked up; default: the
            folder of the file.
        require_chain: refuse rows that DWAL cannot train on (no `reasoning_chain`).
        latent_tokens: role (`start`, `slot`, `end`) to token string.
        report: collects the rows; without one, the reader makes its own and calls `check()` after the last row, so
            reading stops with an error above 1 % bad rows. With one, calling `check()` is the caller's part.
        question_id_blacklist: question ids to leave out, or a JSON-lines file of `{"question_id": ...}`.

    Returns:
        An iterator of records: `messages` with the placeholders as in the file, `question` (first user turn),
        `answer` (of the last turn), `chain`, `boxes`; `meta` has source (file), row, index, ds_name, question_id.

    Raises:
        RecordError: at once for a missing file, on reading for a file that is not JSON (with its byte offset).
        RecordShareError: after the last row, see `report`.
    """
    source = open_source(path, image_folder)
    return _read([source], require_chain, latent_tokens, report, question_id_blacklist)


def _read(
    sources: Sequence[Source],
    require_chain: bool,
    latent_tokens: Mapping[str, str],
    report: RecordReport | None,
    blacklist: str | os.PathLike | Iterable[Any] | None,
) -> Iterator[Record]:
    def check(record: Record, path: Path, row: int) -> None:
        check_conversation(record, path, row, require_chain, latent_tokens)

    return read_sources(sources, record_from_llava, check, report, blacklist)


def record_from_llava(
    value: Any,
    source: str | os.PathLike,
    row: int,
    image_folder: str | os.PathLike,
    ds_name: str = "",
    index: int | None = None,
) -> Record:
    """One parsed JSON object as a record; types are checked here, the rules of the format in `check_conversation`.

    Args:
        value: the object (or the `RecordError` that parsing it gave, which is raised).
        source: file that errors name.
        row: 0-based row in that file.
        image_folder: where image paths that do not exist as they are, and are no URLs, are looked up.
        ds_name: name of the source, kept in `meta`.
        index: index over all sources, kept in `meta`.

    Raises:
        RecordError: when a field has another type than the format says.
    """
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, dict):
        raise RecordError(source, row, f"a record must be a JSON object, got {value!r:.80}")
    if "data_path" in value and "conversations" not in value:
        raise RecordError(source, row, "this is an entry of a meta file, not a record; read the file with read_source")
    messages = parse_turns(value.get("conversations"), source, row)
    names = value.get("image", [])
    names = [names] if isinstance(names, str) else names or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise RecordError(source, row, f"'image' must be a path or a list of paths, got {names!r:.80}")
    boxes, fields = value.get("bboxes"), value.get(_FIELDS_KEY) or {}
    if not (isinstance(boxes or [], list) and isinstance(fields, dict) and set(fields) <= set(_EXTRA_FIELDS)):
        raise RecordError(source, row, f"'bboxes' must be a list and '{_FIELDS_KEY}' an object of {_EXTRA_FIELDS}")
    question_id = value.get("question_id", -1)
    if not isinstance(question_id, int | str):
        raise RecordError(source, row, f"'question_id' must be a number or a string, got {question_id!r:.80}")
    question = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    reply = next((turn["content"] for turn in reversed(messages) if turn["role"] == "assistant"), "")
    answer = extract_answer(reply)
    origin = {"source": os.fspath(source), "row": row, "index": index, "ds_name": ds_name}
    record = make_record(
        id=f"{ds_name}-{row}" if value.get("id") is None else str(value["id"]),
        images=[resolve_image(name, image_folder) for name in names],
        question=expand_image_placeholders(question, "").strip(),
        answer=expand_latent_placeholders(reply, "", "", "").strip() if answer is None else answer,
        chain=value.get("reasoning_chain"),
        boxes=None if boxes is None else [{"image": 0, "xyxy": box} for box in boxes],
        messages=messages,
    )
    record.update(fields)
    record["meta"] = {**(record["meta"] or {}), **origin, "question_id": question_id}
    return record


def parse_turns(turns: Any, source: str | os.PathLike, row: int) -> list[dict[str, str]]:
    """The turns of `conversations` as messages; placeholders stay.

    Raises:
        RecordError: when they are not a list of `{"from": str, "value": str}`.
    """
    if not isinstance(turns, list) or not turns:
        raise RecordError(source, row, f"'conversations' must be a list of at least one turn, got {turns!r:.80}")
    for number, turn in enumerate(turns):
        if not (isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))):
            raise RecordError(source, row, f"turn {number} must be {{'from': str, 'value': str}}, got {turn!r:.80}")
    return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]


def resolve_image(name: str, image_folder: str | os.PathLike) -> str:
    """The path of an image: as it is if it exists or is a URL, else inside `image_folder` (card 2.2)."""
    return name if is_url(name) or os.path.exists(name) else os.path.join(image_folder, name)


# Writing


def write_llava(
    records: Iterable[Record],
    path: str | os.PathLike,
    image_folder: str | os.PathLike,
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
) -> int:
    """Writes records in the published format: a JSON list, or JSON lines for the suffix `.jsonl`.

    Records without `messages` become one pair `<image>\\n{question}` / `<laser><answer>{answer}</answer>` (without
    `<laser>` if there is no chain). What the format has no field for (`choices`, `steps`, `boxes`, `teacher`, `meta`)
    goes under the key `record_fields`, which other readers ignore and `read_llava` reads; boxes are not written as
    `bboxes`, which would switch the reference to its ROI mode. `step_images` are left out, with a warning.

    Args:
        records: what to write.
        path: the file; it appears only when all records are written.
        image_folder: where images are saved as `<file stem>/<row>_<number>.png`; images that are already files in
            it, and URLs, are referred to as they are.
        latent_tokens: role (`start`, `slot`, `end`) to token string, for the checks.

    Returns:
        The number of records.

    Raises:
        RecordError: for a record that `read_llava` would not take back (see `check_conversation`).
    """
    path, folder = Path(path), Path(image_folder)
    lines = path.suffix in (".jsonl", ".ndjson")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = left_out = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row, record in enumerate(records):
                check_conversation(record, path, row, record["chain"] is not None, latent_tokens)
                separator = "" if lines else ("[\n", ",\n")[row > 0]
                text = json.dumps(_to_llava(record, path.stem, row, folder), ensure_ascii=False)
                file.write(separator + text + ("\n" if lines else ""))
                left_out += record["step_images"] is not None
                count += 1
            if not lines:
                file.write("\n]\n" if count else "[]\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if left_out:
        logger.warning(
            "%s: the format has no field for step_images; those of %d records were left out", path, left_out
        )
    return count


def _to_llava(record: Record, stem: str, row: int, folder: Path) -> dict[str, Any]:
    names = [
        _save_image(image, folder, f"{stem}/{row:06d}_{number}.png") for number, image in enumerate(record["images"])
    ]
    speakers = {role: speaker for speaker, role in _ROLES.items()}
    value: dict[str, Any] = {"id": record["id"], "question_id": record["meta"].get("question_id", -1)}
    if names:
        value["image"] = names if len(names) > 1 else names[0]
    value["conversations"] = [
        {"from": speakers.get(turn["role"], turn["role"]), "value": turn["content"]}
        for turn in record_messages(record)
    ]
    if record["chain"] is not None:
        value["reasoning_chain"] = record["chain"]
    value[_FIELDS_KEY] = {name: record[name] for name in _EXTRA_FIELDS if record[name] is not None}
    return value


def _save_image(image: Any, folder: Path, name: str) -> str:
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        if is_url(image):
            return os.fspath(image)
        inside, root = Path(image).resolve(), folder.resolve()
        if inside.is_relative_to(root):
            return inside.relative_to(root).as_posix()
        with Image.open(image) as opened:
            return _save_image(opened.copy(), folder, name)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(target, "PNG")
    return name
