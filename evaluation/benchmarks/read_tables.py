"""Rows of a benchmark from where they are: a folder, a table file, or a Hub repository.

Formats: parquet, JSON, JSON lines, CSV, TSV. A folder may hold the files as published, shards `<split>-*.parquet` (in
`data/` too), or one table. Pictures are paths, bytes of the table, base64 text (HR-Bench), or members of an archive.
"""

import base64
import binascii
import csv
import itertools
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.data.json_rows import existing_file, iter_rows
from trainers.data.records import RecordError
from trainers.data.sources import Source, image_folder_of
from trainers.data.table_rows import open_table, parquet_rows

Rows = Iterator[tuple[int, Any]]
_TABLES = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
LONGEST_PATH = 1_024  # a longer text in an image column is a picture in base64
_MOST_CHARACTERS = 2**31 - 1  # of a field of a table: pictures in base64 are long


def table_source(
    source: str | os.PathLike,
    name: str,
    *,
    files: Sequence[str] = (),
    split: str | None = None,
    config: str | None = None,
    image_folder: str | os.PathLike | None = None,
) -> Source:
    """A table as a source of rows.

    Args:
        source: folder, file or Hub id.
        name: of the benchmark.
        files: names of its file in a folder, the first that exists is read.
        split, config: of a Hub repository, and of shards in a folder.
        image_folder: where image paths begin; default: the folder of the file.

    Raises:
        RecordError: a missing file or folder, a folder without one table, a repository that cannot be loaded.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / each for each in files if (path / each).is_file()][:1] or shards(path, split)
        if not found:
            raise RecordError(path, None, f"holds no table of {name} ({list(files)}, {split}-*.parquet or one table)")
        rows = itertools.chain.from_iterable(file_rows(each) for each in found)
        first = found[0] if len(found) == 1 else path
        return Source(first, image_folder_of(found[0], image_folder), name, _numbered(rows))
    if path.exists() or path.suffix in _TABLES or os.fspath(source).count("/") != 1:
        return Source(path, image_folder_of(existing_file(path), image_folder), name, file_rows(path))
    if config is None:
        return open_table(os.fspath(source), split, image_folder)
    return open_table(load_part(os.fspath(source), config, split), None, image_folder)


def shards(folder: Path, split: str | None) -> list[Path]:
    """The shards of a split in a folder, or its only table."""
    found = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"data/{split}-*.parquet"))
    tables = [path for path in sorted(folder.iterdir()) if path.suffix in _TABLES and path.is_file()]
    return found or (tables if len(tables) == 1 else [])


def file_rows(path: Path) -> Rows:
    """The rows of a table file."""
    if path.suffix == ".parquet":
        return parquet_rows(existing_file(path))
    if path.suffix in (".csv", ".tsv"):
        return delimited_rows(path, "\t" if path.suffix == ".tsv" else ",")
    return iter_rows(existing_file(path))


def delimited_rows(path: Path, delimiter: str = ",") -> Rows:
    """Rows of a table with a line of names; a line of another length is given as a RecordError.

    Raises:
        RecordError: no such file, or not a table of text.
    """
    csv.field_size_limit(_MOST_CHARACTERS)
    try:
        with existing_file(path).open(encoding="utf-8-sig", newline="") as file:
            for row, value in enumerate(csv.DictReader(file, strict=True, delimiter=delimiter)):
                if None in value or None in value.values():
                    value = RecordError(path, row, f"the line has more or fewer fields than names: {value!r:.120}")
                yield row, value
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordError(path, None, f"not a readable table ({error}); fetch it again") from error


def checked_columns(source: Source, columns: Sequence[str]) -> Source:
    """The source; a column that its first row lacks is missing in the whole table.

    Raises:
        RecordError: names the missing columns and those that there are.
    """

    def rows() -> Rows:
        for row, value in source.rows:
            if row == 0 and isinstance(value, Mapping):
                missing = [name for name in columns if name not in value]
                if missing:
                    reason = f"lacks the columns {missing}, it has {list(value)}; check data_root"
                    raise RecordError(source.path, None, reason)
            yield row, value

    return Source(source.path, source.image_folder, source.ds_name, rows())


def picture(value: Any, folder: Path, origin: tuple[Any, int], archive: str | None = None) -> Any:
    """What a row has as its picture, as `row_images` takes it.

    Args:
        value: a path, bytes, base64 text (with or without a data-URL prefix), `{"bytes", "path"}`, a picture, None.
        folder: where paths begin.
        origin: file and row that errors name.
        archive: name of a zip file in the folder that may hold the path.

    Raises:
        RecordError: text that is neither a path nor a picture.
    """
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, str) or not value:
        return value
    if len(value) > LONGEST_PATH or value.startswith("data:"):
        try:
            return {"bytes": base64.b64decode(value.rpartition(",")[2], validate=True), "path": None}
        except binascii.Error as error:
            raise RecordError(*origin, f"the picture is no base64 text ({error}); fetch the table again") from error
    if archive is not None and not (folder / value).is_file() and (folder / archive).is_file():
        with zipfile.ZipFile(folder / archive) as packed:
            names = {Path(name).name: name for name in packed.namelist()}
            inside = value if value in packed.namelist() else names.get(Path(value).name)
            if inside is not None:
                return {"bytes": packed.read(inside), "path": value}
    return value


def fetch_files(repository: str, patterns: Sequence[str]) -> Path:
    """The folder of a repository's files that match the patterns, fetched where they are not in the cache.

    Raises:
        RecordError: the repository cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # no network, no such repository, no access
        reason = f"cannot be fetched ({error}); fetch it once, and pass its folder as data_root"
        raise RecordError(repository, None, reason) from error


def _numbered(rows: Rows) -> Rows:
    """Rows of several files, counted through."""
    return ((number, value) for number, (_, value) in enumerate(rows))


def load_part(name: str, config: str, split: str | None) -> Any:
    """A split of a part (configuration) of a Hub repository.

    Raises:
        RecordError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError, ConnectionError) as error:
        reason = f"the part {config}/{split} cannot be loaded ({error}); check the name, or give a local folder"
        raise RecordError(name, None, reason) from error


__all__ = [
    "LONGEST_PATH", "checked_columns", "delimited_rows", "fetch_files", "file_rows", "load_part", "picture", "shards",
    "table_source",
]  # fmt: skip
