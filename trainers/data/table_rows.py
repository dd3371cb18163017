"""Rows of a table, wherever it is: a JSON, JSON-lines or parquet file, a `datasets` table, a folder or Hub repository.

Images of a row stay encoded until they are needed: of a picture inside the table only the head is read.
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .json_rows import existing_file, iter_rows
from .llava import resolve_image
from .llava_checks import is_url
from .records import IMAGE_ERRORS, Record, RecordError
from .sources import SkippedRow, Source, image_folder_of

WITHOUT_IMAGE = ("skip", "refuse", "keep")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".json", ".jsonl", ".ndjson", ".parquet")


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file, streamed.

    Raises:
        RecordError: when it is no parquet file, or damaged.
    """
    from datasets import load_dataset

    try:
        table = load_dataset("parquet", data_files=os.fspath(path), split="train", streaming=True)
        yield from enumerate(_undecoded(table))
    except (OSError, ValueError) as error:  # what Arrow raises is one of the two
        raise RecordError(path, None, f"not a readable parquet file ({error}); fetch it again") from error


def open_table(source: Any, split: str | None = None, image_folder: str | os.PathLike | None = None) -> Source:
    """A table as a source of rows.

    Args:
        source: a JSON list, JSON-lines or parquet file; a folder or Hub repository that `load_dataset` reads; a
            `datasets` table, or any iterable of rows.
        split: which part of a folder or repository.
        image_folder: where image paths begin; default: the folder of the file, else the working directory.

    Raises:
        RecordError: for a missing file or folder, or a repository that cannot be loaded.
        ValueError: a split where there is none to choose, or no split where one is needed.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        hub = not os.path.exists(name) and _HUB_ID.fullmatch(name) and not name.endswith(_FILES)
        if not (hub or os.path.isdir(name)):
            return _file(existing_file(source), split, image_folder)
        source, split, name = _loaded(name, split), None, f"{name}[{split}]"
    else:
        name = f"{getattr(getattr(source, 'info', None), 'dataset_name', None) or 'table'}"
    if split is not None:
        raise ValueError(f"split={split!r} chooses a part of a repository; this table has been chosen already")
    if isinstance(source, Mapping):
        raise ValueError(f"the table has the parts {list(source)}; pass one of them")
    folder = Path(".") if image_folder is None else image_folder_of(name, image_folder)
    return Source(name, folder, name, enumerate(_undecoded(source)))


def _file(path: Path, split: str | None, image_folder: str | os.PathLike | None) -> Source:
    if split is not None:
        raise ValueError(f"split={split!r} with the file {path}; a file has no parts, pass the file of that part")
    rows = parquet_rows(path) if path.suffix == ".parquet" else iter_rows(path)
    return Source(path, image_folder_of(path, image_folder), path.stem, rows)


def _loaded(name: str, split: str | None) -> Any:
    from datasets import load_dataset

    if split is None:
        raise ValueError(f"{name} is a repository or folder of tables; say which part, e.g. split='train'")
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError, ConnectionError) as error:  # not found, no network, or no such split
        raise RecordError(
            name, None, f"the part {split!r} cannot be loaded ({error}); check name and split"
        ) from error


def _undecoded(table: Iterable[Any]) -> Iterable[Any]:
    """The table with its images as bytes or paths, so that a damaged one costs a row and not the run."""
    from datasets import Image as ImageFeature

    for name, feature in (getattr(table, "features", None) or {}).items():
        if isinstance(feature, ImageFeature) and feature.decode:
            table = table.cast_column(name, ImageFeature(decode=False))
    return table


def check_without_image(policy: str) -> None:
    """Checks the option `without_image`.

    Raises:
        ValueError: when it is unknown.
    """
    if policy not in WITHOUT_IMAGE:
        raise ValueError(f"unknown without_image {policy!r}; choose one of {', '.join(WITHOUT_IMAGE)}")


def row_images(image: Any, image_folder: Path, origin: tuple[Any, int], without_image: str = "keep") -> list[Any]:
    """The images of a row with the one column `image`.

    Args:
        image: a path or URL, a PIL image, `{"bytes", "path"}` of a table, or None.
        image_folder: where paths are looked up.
        origin: file and row that errors name.
        without_image: what a row without an image is: `"skip"` (left out on request), `"refuse"` (a bad row) or
            `"keep"` (a text-only record).

    Raises:
        RecordError: an image that does not exist, is none or cannot be opened; a row without, with `"refuse"`.
        SkippedRow: a row without, with `"skip"`.
    """
    if isinstance(image, dict) and image.get("bytes") is not None:
        try:
            with Image.open(io.BytesIO(image["bytes"])):  # reads the head of the picture only
                return [{"bytes": image["bytes"], "path": image.get("path")}]
        except (TypeError, *IMAGE_ERRORS) as error:
            raise RecordError(*origin, f"the bytes of 'image' are no picture ({error}); remove the row") from error
    if isinstance(image, dict):
        image = image.get("path")
    if image is None or image == "":
        if without_image == "skip":
            raise SkippedRow("row without image")
        if without_image == "refuse":
            raise RecordError(*origin, "the row has no image; remove it, or read with without_image='skip'")
        return []
    if isinstance(image, str):
        image = resolve_image(image, image_folder)
        if not (is_url(image) or os.path.isfile(image)):
            raise RecordError(*origin, f"image file {image!r} does not exist; check image_folder")
    elif not isinstance(image, Image.Image):
        raise RecordError(*origin, f"'image' must be a path, a picture or empty, got {image!r:.80}")
    return [image]


def text_fields(value: Any, names: Iterable[str], origin: tuple[Any, int]) -> Mapping[str, Any]:
    """A row whose named fields are strings.

    Raises:
        RecordError: the row is damaged, not an object, or lacks a field.
    """
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, Mapping):
        raise RecordError(*origin, f"a row must be an object with columns, got {value!r:.120}")
    for name in names:
        if not isinstance(value.get(name), str):
            raise RecordError(
                *origin, f"a row needs the string {name!r}, got {value.get(name)!r:.120}; repair the row"
            )
    return value


def with_positions(build: Callable[..., Record]) -> Callable[..., Record]:
    """A `build` of `read_sources` that puts `position` into `meta`: among the rows not skipped, bad ones counted."""
    positions = itertools.count()

    def positioned(*row: Any) -> Record:
        try:
            record = build(*row)
        except RecordError:
            next(positions)
            raise
        record["meta"]["position"] = next(positions)
        return record

    return positioned


def table_meta(source: Any, row: int, index: int, ds_name: str, value: Mapping[str, Any], kept: Iterable[str]) -> dict:
    """`meta` of a record: where it comes from, and the columns of its row that are kept."""
    origin = {"source": os.fspath(source), "row": row, "index": index, "ds_name": ds_name}
    return {**origin, **{name: value[name] for name in kept if value.get(name) is not None}}


def check_question_text(record: Record, origin: tuple[Any, int], require_steps: bool) -> None:
    """Checks what every question needs: text, an answer, and steps if they are asked for.

    Raises:
        RecordError: names what is empty.
    """
    for name in ("question", "answer"):
        if not record[name].strip():
            raise RecordError(*origin, f"{name} is empty; repair or remove the row")
    if require_steps and not record["steps"]:
        raise RecordError(*origin, "the row has no steps; remove it, or read with require_steps=False")
