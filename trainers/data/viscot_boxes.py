"""The regions of Visual-CoT rows (see `viscot.py`): from the two boxes of a raw row, or from `bboxes`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .boxes import BoxError, normalised_box
from .llava_checks import is_url
from .records import IMAGE_ERRORS, Box, RecordError, check_boxes

CROP = "###"  # between the path and the box of a crop
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
# How far the two boxes of a raw row may differ: pixels are whole numbers, fractions have three decimals.
_PIXELS, _FRACTION = 2.0, 0.001


def viscot_boxes(
    value: Mapping[str, Any],
    names: Sequence[str],
    told: str | None,
    image: str,
    outside: str,
    origin: tuple[Any, int],
) -> list[Box] | None:
    """The boxes of a row, as fractions of its image.

    Args:
        value: the row; `bboxes` is read unless the row is raw, `width` and `height` where the image is a URL.
        names: the entries of `image`.
        told: the turn of a raw row that tells the box; None for a row of another layout.
        image: the path of the image, or its URL.
        outside: see `boxes.normalised_box`.
        origin: file and row that errors name.

    Returns:
        None for a row that is not raw and has no `bboxes`.

    Raises:
        RecordError: a box that cannot be used; two boxes of a raw row that differ, or cannot be compared because the
            size of the image is unknown.
    """
    try:
        if told is not None:
            boxes = _raw_boxes(value, names, told, image, outside)
        elif value.get("bboxes") is None:
            return None
        elif isinstance(value["bboxes"], list):
            boxes = [normalised_box(box, outside=outside) for box in value["bboxes"]]
        else:
            raise BoxError(f"'bboxes' must be a list of boxes, got {value['bboxes']!r:.80}; repair the row")
    except BoxError as error:
        raise RecordError(*origin, str(error)) from error
    found: list[Box] = [{"image": 0, "xyxy": box} for box in boxes]
    check_boxes(found, 1, *origin)
    return found


def _raw_boxes(
    value: Mapping[str, Any], names: Sequence[str], told: str, image: str, outside: str
) -> list[list[float]]:
    pixels = [box for name in names if CROP in name for box in _numbers(name.split(CROP, 1)[1])]
    fractions = _numbers(told)
    if not pixels or len(pixels) != len(fractions):
        raise BoxError(
            f"{len(pixels)} boxes in 'image' but {len(fractions)} in the second turn {told!r:.80}; repair the row"
        )
    size = _image_size(value, image)
    for box, fraction in zip(pixels, fractions, strict=True):
        if not boxes_agree(box, fraction, size):
            raise BoxError(
                f"box {box} in pixels and box {fraction} of the second turn differ in an image of {size[0]}x{size[1]} "
                "pixels, whether the second is a fraction of the image or of its square; the image is another one, or "
                "was resized: fetch it again, or read with bad_boxes='drop'"
            )
    return [normalised_box(box, "pixel", size, outside) for box in pixels]


def _numbers(text: str) -> list[list[float]]:
    """The boxes `[x0, y0, x1, y1]` in a text."""
    boxes = []
    for inside in _BRACKETS.findall(text):
        try:
            x0, y0, x1, y1 = (float(number) for number in inside.split(","))
        except ValueError:
            raise BoxError(f"[{inside:.80}] is not a box of four numbers [x0, y0, x1, y1]; repair the row") from None
        boxes.append([x0, y0, x1, y1])
    return boxes


def boxes_agree(pixels: Sequence[float], fractions: Sequence[float], image_size: tuple[int, int]) -> bool:
    """Whether a box in pixels is the same as one in fractions, of the image padded to a square or of the image itself.

    Args:
        pixels: `[x0, y0, x1, y1]` in pixels of the image.
        fractions: the same in 0..1, rounded to three decimals.
        image_size: `(width, height)` in pixels.
    """
    side = max(image_size)
    square = [((side - length) // 2, side) for length in image_size]  # where the image begins, and the whole, by axis
    return any(
        all(
            abs(fraction * length - (pixel + begin)) <= _PIXELS + _FRACTION * length
            for pixel, fraction, (begin, length) in zip(pixels, fractions, frame * 2, strict=True)
        )
        for frame in (square, [(0, length) for length in image_size])
    )


def _image_size(value: Mapping[str, Any], image: str) -> tuple[int, int]:
    """Width and height, from the image's header; for a URL, from the row."""
    if is_url(image):
        width, height = value.get("width"), value.get("height")
        if all(isinstance(length, int) and length > 0 for length in (width, height)):
            return width, height
        raise BoxError(f"the size of {image!r:.120} is not known; fetch it, or add 'width' and 'height' to the row")
    try:
        with Image.open(image) as file:
            return file.size
    except IMAGE_ERRORS as error:
        raise BoxError(f"image {image!r:.120} cannot be read ({error}); fix the file") from error
