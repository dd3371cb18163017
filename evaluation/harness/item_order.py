"""The order in which items are asked: those of similar size together, so that batches hold little padding."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from trainers.data.records import IMAGE_ERRORS, Record, RecordError, record_origin


def item_order(records: Sequence[Record]) -> list[int]:
    """Numbers of the records by the area of their images and the length of their question.

    Only the heads of image files are read.

    Raises:
        RecordError: an image that is missing or none; names file and row.
    """
    sizes = [sum(_area(image, record) for image in record["images"]) for record in records]
    return sorted(range(len(records)), key=lambda number: (sizes[number], len(records[number]["question"])))


def _area(image: Any, record: Record) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height
    source = image
    if isinstance(image, dict):
        source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    try:
        with Image.open(source) as opened:
            return opened.width * opened.height
    except IMAGE_ERRORS as error:
        reason = f"image {str(image)!r:.200} cannot be read ({error}); fix the path or the file"
        raise RecordError(*record_origin(record), reason) from error


__all__ = ["item_order"]
