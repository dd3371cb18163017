"""Rows of JSON lists and JSON lines, with the place of the damage when a file was cut."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .records import RecordError


def existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise RecordError(path, None, "the file does not exist; check the path")
    return path


def iter_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list or of JSON lines; a damaged line is given as a RecordError, a damaged list is raised."""
    if path.suffix in (".jsonl", ".ndjson"):
        yield from iter_json_lines(path)
        return
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from enumerate(_json_list(path))
    elif head.startswith(b"{"):
        yield from iter_json_lines(path)
    else:
        raise RecordError(
            path, None, f"neither a JSON list nor JSON lines, it begins with {head[:20]!r}; check the file"
        )


def _json_list(path: Path) -> list[Any]:
    data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, offset, reason = data.count(b"\n", 0, error.start) + 1, error.start, f"not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        offset = len(error.doc[: error.pos].encode()) + len(data) - len(error.doc.encode())
        line, reason = error.lineno, error.msg
    raise RecordError(
        path,
        None,
        f"not valid JSON at line {line}, byte {offset} of {len(data)}: {reason}; the file is damaged or was "
        "cut while it was copied: fetch it again and compare its size",
    )


def iter_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    row, offset = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError
                    value = RecordError(
                        path,
                        row,
                        f"line {number} (byte {offset}) is not one JSON object: {error}; the line is damaged or was "
                        "cut: write one object a line or fetch the file again",
                    )
                yield row, value
                row += 1
            offset += len(line)
