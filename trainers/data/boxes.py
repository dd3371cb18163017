"""From boxes to image tokens and back: which embeddings of an image belong to a region of interest.

Paper: "Latent Visual Reasoning", arXiv 2509.24251 (card section 2.5); other methods with regions use it too.

An image of `grid_thw = (t, h, w)` patches becomes a grid of `h / merge_size` x `w / merge_size` tokens, numbered row
by row from the top left. Boxes are fractions of the image's width and height, so the size of a patch (14 pixels in
Qwen2.5-VL, 16 in Qwen3-VL) does not matter. All arithmetic is in float64.

Deviations from the reference, on purpose, in `box_tokens` (`reference_box_tokens` has none of them):

* what is no normalised box (NaN, pixels, reversed, outside the image) is refused instead of being clipped to
  something else;
* an edge within `SNAP` patches of a patch line lies on it: in the reference the rounding of `c / n * n` makes a box
  that ends on a line take one more column of tokens;
* a box that covers no token takes the one where its centre lies, or is left out (`empty_region`);
* each box names its image; in the reference all belong to the first one.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .records import RecordError

EMPTY_REGION = ("one_token", "drop", "refuse")
BOX_UNITS = ("fraction", "pixel")
OUTSIDE = ("refuse", "clip")
SNAP = 1e-6  # patches
# How far a fraction may lie outside 0..1 by rounding (float32 data), and from where on a value must be pixels.
_ROUNDING, _PIXELS = 1e-6, 2.0


class BoxError(ValueError):
    """A box that cannot be used: its value and the remedy."""


def checked_option(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value of an option.

    Raises:
        ValueError: when it is none of the choices.
    """
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {list(choices)}")
    return value


def normalised_box(
    box: Any, unit: str = "fraction", image_size: tuple[int, int] | None = None, outside: str = "refuse"
) -> list[float]:
    """A box as `[x0, y0, x1, y1]` in 0..1, with x0 <= x1 and y0 <= y1.

    Args:
        box: four numbers.
        unit: `"fraction"` of width and height, or `"pixel"`.
        image_size: `(width, height)` in pixels, needed for pixels.
        outside: what to do with a box that reaches over the border: `"refuse"`, or `"clip"` it there. A box with no
            point in the image is refused in any case.

    Raises:
        BoxError: not four finite numbers, reversed, outside the image, or pixels where fractions belong.
        ValueError: an unknown option, or pixels without a size.
    """
    checked_option("box unit", unit, BOX_UNITS)
    checked_option("outside", outside, OUTSIDE)
    try:
        if isinstance(box, str | Mapping) or len(box) != 4:
            raise TypeError
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError):
        raise BoxError(f"box {box!r:.120} is not a list of four numbers [x0, y0, x1, y1]; repair it") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise BoxError(f"box {box!r} has a value that is not finite; repair it or remove the row")
    if unit == "pixel":
        if image_size is None or min(image_size) < 1:
            raise ValueError(f"boxes in pixels need the image's (width, height), got {image_size!r}")
        width, height = image_size
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    elif max(x0, y0, x1, y1) > _PIXELS:
        raise BoxError(
            f"box {box!r} is in pixels, fractions of the image are expected; divide by its width and height, or read "
            "with box_unit='pixel'"
        )
    if x1 < x0 or y1 < y0:
        raise BoxError(f"box {box!r} is reversed; the order is [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1")
    if min(x1, y1) < -_ROUNDING or max(x0, y0) > 1 + _ROUNDING:
        raise BoxError(f"box {box!r} lies outside the image; repair it or remove the row")
    if outside == "refuse" and (min(x0, y0) < -_ROUNDING or max(x1, y1) > 1 + _ROUNDING):
        raise BoxError(f"box {box!r} reaches outside the image; repair it, or clip such boxes with outside='clip'")
    return [min(max(value, 0.0), 1.0) for value in (x0, y0, x1, y1)]


def token_grid(grid_thw: Iterable[int], merge_size: int = 2) -> tuple[int, int]:
    """Rows and columns of an image's token grid.

    Args:
        grid_thw: `(frames, rows, columns)` in patches, as the image processor gives it.
        merge_size: patches a side of a token.

    Raises:
        ValueError: for a video, or a grid that the merge size does not divide.
    """
    frames, height, width = (int(size) for size in grid_thw)
    if merge_size < 1 or min(height, width) < 1 or height % merge_size or width % merge_size:
        raise ValueError(f"a grid of {height}x{width} patches is no multiple of merge_size={merge_size!r}; check both")
    if frames != 1:
        raise ValueError(f"boxes are defined on images, got a grid of {frames} frames; use one frame")
    return height // merge_size, width // merge_size


def box_tokens(box: Any, grid_thw: Iterable[int], merge_size: int = 2, empty_region: str = "one_token") -> np.ndarray:
    """The tokens of an image that a box touches.

    Args:
        box: `[x0, y0, x1, y1]` in 0..1.
        grid_thw: see `token_grid`.
        merge_size: patches a side of a token.
        empty_region: for a box that touches none (zero width or height, on a patch line): `"one_token"` takes the
            token of its centre, `"drop"` gives an empty array, `"refuse"` raises.

    Returns:
        `[num_tokens]` int64, indices into the image's tokens, ascending.

    Raises:
        BoxError: see `normalised_box`, and `empty_region="refuse"`.
        ValueError: see `token_grid`.

    Example:
        >>> box_tokens([0.5, 0.5, 1.0, 1.0], (1, 8, 8)).tolist()
        [10, 11, 14, 15]
    """
    checked_option("empty_region", empty_region, EMPTY_REGION)
    x0, y0, x1, y1 = normalised_box(box)
    rows, columns = token_grid(grid_thw, merge_size)
    row_range = _touched(y0, y1, rows * merge_size, merge_size, SNAP)
    column_range = _touched(x0, x1, columns * merge_size, merge_size, SNAP)
    if not (row_range and column_range):
        if empty_region == "refuse":
            raise BoxError(
                f"box {box!r} covers no token of the {rows}x{columns} grid; repair it, or choose "
                "empty_region='one_token' or 'drop'"
            )
        if empty_region == "drop":
            return np.zeros(0, dtype=np.int64)
        row_range, column_range = _centre(y0, y1, rows), _centre(x0, x1, columns)
    return _indices(row_range, column_range, columns)


def _touched(low: float, high: float, patches: int, merge_size: int, snap: float = 0.0) -> range:
    """Tokens of one axis that the interval touches."""
    first = min(max(math.floor(low * patches + snap), 0), patches - 1)
    stop = min(max(math.ceil(high * patches - snap), 0), patches)
    return range(first // merge_size, -(-stop // merge_size))


def _centre(low: float, high: float, tokens: int) -> range:
    token = min(math.floor((low + high) / 2 * tokens), tokens - 1)
    return range(token, token + 1)


def _indices(rows: range, columns: range, width: int) -> np.ndarray:
    return (np.arange(rows.start, rows.stop)[:, None] * width + np.arange(columns.start, columns.stop)).reshape(-1)


def tokens_box(tokens: Iterable[int], grid_thw: Iterable[int], merge_size: int = 2) -> list[float]:
    """The smallest box around some tokens, the inverse of `box_tokens` for a rectangle of them.

    Args:
        tokens: indices into the image's tokens.
        grid_thw, merge_size: see `token_grid`.

    Returns:
        `[x0, y0, x1, y1]` in 0..1, the outer edges of the tokens.

    Raises:
        ValueError: for no tokens, or one outside the grid.
    """
    rows, columns = token_grid(grid_thw, merge_size)
    tokens = np.asarray(list(tokens), dtype=np.int64)
    if not tokens.size or tokens.min() < 0 or tokens.max() >= rows * columns:
        raise ValueError(f"tokens {tokens.tolist()} are not one or more of the {rows}x{columns} tokens of the image")
    y, x = np.divmod(tokens, columns)
    edges = (x.min() / columns, y.min() / rows, (x.max() + 1) / columns, (y.max() + 1) / rows)
    return [float(edge) for edge in edges]


def region_tokens(
    boxes: Iterable[Mapping[str, Any]] | None,
    grids_thw: Sequence[Iterable[int]],
    merge_size: int = 2,
    empty_region: str = "one_token",
    origin: tuple[str | os.PathLike, int | None] = ("record", None),
) -> list[np.ndarray]:
    """The tokens of every region of a record.

    Args:
        boxes: the record's boxes, each with the index of its image (see `records.Box`).
        grids_thw: grid of each image of the record, in order.
        merge_size, empty_region: see `box_tokens`.
        origin: file and row that errors name (see `records.record_origin`).

    Returns:
        One array a box, `[num_tokens]` int64: indices into the embeddings of **all** images of the record, one image
        after the other. Empty arrays only for `empty_region="drop"`.

    Raises:
        RecordError: names file, row, the box and the remedy.
    """
    try:
        counts = [math.prod(token_grid(grid, merge_size)) for grid in grids_thw]
        regions = []
        for box in boxes or []:
            image = box["image"]
            if image not in range(len(counts)):
                raise BoxError(
                    f"box {box!r} belongs to image {image!r}, but there are {len(counts)}; correct the index"
                )
            regions.append(sum(counts[:image]) + box_tokens(box["xyxy"], grids_thw[image], merge_size, empty_region))
    except ValueError as error:
        raise RecordError(*origin, str(error)) from error
    return regions


def join_regions(regions: Sequence[np.ndarray]) -> np.ndarray:
    """Several regions as one: the tokens in the order of the regions, each once (where it comes first)."""
    joined = dict.fromkeys(token for region in regions for token in region.tolist())
    return np.fromiter(joined, dtype=np.int64, count=len(joined))


# As in the reference


def reference_box_tokens(box: Sequence[float], grid_hw: Iterable[int], merge_size: int = 2) -> np.ndarray:
    """The reference's mapper, with its defects: nothing is refused, values outside 0..1 are clipped.

    Args:
        box: `[x0, y0, x1, y1]`.
        grid_hw: `(rows, columns)` in patches, even.
        merge_size: patches a side of a token.

    Returns:
        `[num_tokens]` int64, indices into the tokens of the (first) image, ascending; empty for a reversed box, and
        for one of zero width or height on an even patch line.
    """
    height, width = (int(size) for size in grid_hw)
    x0, y0, x1, y1 = (float(value) for value in box)
    columns = _touched(x0, x1, width, merge_size)
    return _indices(_touched(y0, y1, height, merge_size), columns, width // merge_size)


def reference_pixel_tokens(box: Sequence[float], image_size: tuple[int, int], cell: int = 28) -> np.ndarray:
    """The reference's other mapper, on a grid of `cell` pixels; its published training does not use it.

    Args:
        box: `[x0, y0, x1, y1]`, in pixels when any value is above 1.
        image_size: `(width, height)` in pixels; a rest of less than a cell belongs to no cell.
        cell: side of a cell in pixels.

    Returns:
        `[num_cells]` int64, ascending, at least one.
    """
    width, height = image_size
    x0, y0, x1, y1 = (float(value) for value in box)
    if max(x0, y0, x1, y1) > 1:
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    columns = width // cell
    return _indices(_at_least_one(y0, y1, height // cell), _at_least_one(x0, x1, columns), columns)


def _at_least_one(low: float, high: float, cells: int) -> range:
    first = min(max(math.floor(low * cells), 0), cells - 1)
    return range(first, max(min(math.ceil(high * cells), cells), first + 1))
