"""Data files in the published list formats: one file, or a meta file that names several, read row by row.

The formats of LASER and LVR share this (both forked it): a meta file is `[{"data_path", "image_folder", "ds_name"},
...]`, a data file a JSON list or JSON lines. Each reader brings its own way to build and check a record.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_rows import existing_file, iter_json_lines, iter_rows
from .records import Record, RecordError, RecordReport


class SkippedRow(Exception):
    """Raised by `build` for a row that the user asked to leave out; the text is the reason that the report counts."""


@dataclass(frozen=True)
class Source:
    """A data file, where its images are, its name, and its rows `(0-based row, parsed value or RecordError)`.

    `path` is the name of a table that is no file.
    """

    path: Path | str
    image_folder: Path
    ds_name: str
    rows: Iterable[tuple[int, Any]]


def open_source(path: str | os.PathLike, image_folder: str | os.PathLike | None) -> Source:
    """One data file.

    Raises:
        RecordError: for a missing file or folder.
    """
    path = existing_file(path)
    return Source(path, image_folder_of(path, image_folder), path.stem, iter_rows(path))


def open_sources(path: str | os.PathLike, image_folder: str | os.PathLike | None) -> list[Source]:
    """A data file, or all files of a meta file, in order.

    Relative paths in a meta file are looked up beside it, then in the working directory.

    Raises:
        RecordError: for a missing file, and a meta entry without `data_path`, or whose file or folder does not exist.
        ValueError: when `image_folder` is given beside a meta file, which names its own.
    """
    path = existing_file(path)
    rows = iter_rows(path)
    head = list(itertools.islice(rows, 1))
    rows = itertools.chain(head, rows)
    if not (head and isinstance(head[0][1], dict) and "data_path" in head[0][1] and "conversations" not in head[0][1]):
        return [Source(path, image_folder_of(path, image_folder), path.stem, rows)]
    if image_folder is not None:
        raise ValueError(
            f"image_folder={os.fspath(image_folder)!r} with the meta file {path}; name the folders inside it"
        )
    return [_meta_entry(path, row, entry) for row, entry in rows]


def read_sources(
    sources: Sequence[Source],
    build: Callable[[Any, Path | str, int, Path, str, int], Record],
    check: Callable[[Record, Path | str, int], None],
    report: RecordReport | None = None,
    blacklist: str | os.PathLike | Iterable[Any] | None = None,
) -> Iterator[Record]:
    """The good records of all sources; bad ones are counted in the report.

    Args:
        sources: what to read, in order.
        build: makes a record of `(parsed row, file, 0-based row, image folder, name of the source, index over all
            sources)`; it may raise [`SkippedRow`].
        check: raises for a record that is bad.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.
        blacklist: question ids to leave out, or a JSON-lines file of `{"question_id": ...}`.

    Raises:
        RecordError: at once for a bad blacklist.
        RecordShareError: after the last row, when no report was given.
    """
    return _records(sources, build, check, report, _read_blacklist(blacklist))


def _records(
    sources: Sequence[Source],
    build: Callable[[Any, Path | str, int, Path, str, int], Record],
    check: Callable[[Record, Path | str, int], None],
    report: RecordReport | None,
    blacklist: frozenset,
) -> Iterator[Record]:
    own_report = report is None
    report = RecordReport() if own_report else report
    index = itertools.count()
    for source in sources:
        for row, value in source.rows:
            try:
                record = build(value, source.path, row, source.image_folder, source.ds_name, next(index))
                if record["meta"].get("question_id") in blacklist:
                    report.skipped("question_id_blacklist")
                    continue
                check(record, source.path, row)
            except SkippedRow as reason:
                report.skipped(str(reason))
                continue
            except RecordError as error:
                report.bad(error.file, error.row, error.reason)
                continue
            report.good()
            yield record
    if own_report:
        report.check()


def image_folder_of(path: Path, image_folder: str | os.PathLike | None) -> Path:
    if image_folder is None:
        return path.parent
    if not os.path.isdir(image_folder):
        raise RecordError(path, None, f"image_folder {os.fspath(image_folder)!r} does not exist; check the option")
    return Path(image_folder)


def _meta_entry(meta: Path, row: int, entry: Any) -> Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("data_path"), str):
        raise RecordError(meta, row, f"a source needs 'data_path' (and 'image_folder', 'ds_name'), got {entry!r:.120}")
    path = _beside(meta, row, "data_path", entry["data_path"])
    folder = _beside(meta, row, "image_folder", entry["image_folder"]) if entry.get("image_folder") else None
    if not path.is_file():
        raise RecordError(meta, row, f"data_path {entry['data_path']!r} is not a file")
    return Source(path, image_folder_of(path, folder), str(entry.get("ds_name") or path.stem), iter_rows(path))


def _beside(meta: Path, row: int, key: str, name: str) -> Path:
    """A path of a meta file: absolute, else beside the meta file, else in the working directory."""
    tried = [meta.parent / name, Path(name)]
    for path in tried:
        if path.exists():
            return path
    raise RecordError(
        meta, row, f"{key} {name!r} does not exist (tried {', '.join(map(str, tried))}); check the entry"
    )


def _read_blacklist(blacklist: str | os.PathLike | Iterable[Any] | None) -> frozenset:
    if blacklist is None or not isinstance(blacklist, str | os.PathLike):
        return frozenset(blacklist or ())
    path = existing_file(blacklist)
    ids = set()
    for row, value in iter_json_lines(path):
        if not isinstance(value, dict) or "question_id" not in value:
            raise RecordError(path, row, f"a blacklist line must be {{'question_id': ...}}, got {value!s:.120}")
        ids.add(value["question_id"])
    return frozenset(ids)
