"""One item of a card as a picture: what its slots look at and say, what the answer reads, what edits do to it.

Specification, section 6: the image, one tile a slot with the attention over the image (one colour scale), the patch
with most attention in a box, regions of interest in dashes; below it the top tokens of the logit lens, the norm over
that of token embeddings, and the cosine with the slot before.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .card_data import ItemView, SlotView
from .card_style import BLUE, GREEN, GREY, INK, READS, RED, new_figure, save_figure

COLUMNS = 5  # tiles in a row
_TILE, _TEXT = 1.9, 0.8  # inches: a tile's picture, the text below it


def heat_on_image(heat: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """A map over patches `[rows][columns]` as `(height, width)` over an image, nearest upsampling: the patch grid
    covers the whole image, whatever the processor resized it to.

    Args:
        heat: weights of the patches.
        size: `(width, height)` of the image in pixels.
    """
    weights = np.asarray(heat, dtype=np.float64)
    width, height = size
    rows = np.minimum(np.arange(height) * weights.shape[0] // height, weights.shape[0] - 1)
    columns = np.minimum(np.arange(width) * weights.shape[1] // width, weights.shape[1] - 1)
    return weights[rows[:, None], columns[None, :]]


def peak_box(heat: Sequence[Sequence[float]], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`(x0, y0, x1, y1)` in pixels of the patch with most attention."""
    weights = np.asarray(heat)
    row, column = np.unravel_index(int(np.argmax(weights)), weights.shape)
    wide, high = size[0] / weights.shape[1], size[1] / weights.shape[0]
    return column * wide, row * high, (column + 1) * wide, (row + 1) * high


def draw_item(view: ItemView, images: Sequence[Image.Image], path: str | Path) -> Path:
    """Draw one item.

    Args:
        view: of a card.
        images: its pictures, in order.
        path: PNG file to write.

    Raises:
        ValueError: another number of pictures than the view has.
    """
    if len(images) != len(view.images):
        raise ValueError(f"item {view.index} has {len(view.images)} pictures, {len(images)} were given")
    columns = max(1, min(COLUMNS, len(view.slots)))
    tile_rows = math.ceil(len(view.slots) / columns) * max(1, len(images)) if view.slots and images else 0
    height = 0.9 + tile_rows * (_TILE + _TEXT) + 2.05
    left = 3.2
    width = left + columns * (_TILE + 0.25) + 0.3 if tile_rows else 8.5
    width = max(width, 9.5)
    figure = new_figure(width, height)
    _heading(figure, view, height)
    _originals(figure, view, images, width, height, left)
    _tiles(figure, view, images, columns, width, height, left)
    _bottom(figure, view, width, height)
    return save_figure(figure, path)


def _axes(figure: Any, box: tuple[float, float, float, float], width: float, height: float) -> Any:
    """Axes from a box in inches, `(left, top, wide, high)` from the top left."""
    left, top, wide, high = box
    return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))


def _heading(figure: Any, view: ItemView, height: float) -> None:
    colour, word = (GREEN, "right") if view.correct else (RED, "wrong")
    figure.text(0.02, 1 - 0.18 / height, _short(view.question, 120), fontsize=9, va="top", color=INK)
    line = f"answer: {_short(view.answer, 70)}   ({word}; gold: {_short(view.gold, 50)})"
    figure.text(0.02, 1 - 0.45 / height, line, fontsize=10, va="top", color=colour, weight="bold")


def _originals(
    figure: Any, view: ItemView, images: Sequence[Image.Image], width: float, height: float, left: float
) -> None:
    for number, image in enumerate(images):
        axes = _axes(figure, (0.2, 0.9 + number * (_TILE + _TEXT), left - 0.5, _TILE), width, height)
        axes.imshow(image)
        axes.axis("off")
        _draw_roi(axes, view, number, image)
        axes.set_title("image" if len(images) == 1 else f"image {number + 1}", fontsize=8, color=GREY)


def _draw_roi(axes: Any, view: ItemView, number: int, image: Image.Image) -> None:
    from matplotlib.patches import Rectangle

    for which, x0, y0, x1, y1 in view.roi:
        if int(which) == number:
            corner, wide, high = (
                (x0 * image.width, y0 * image.height),
                (x1 - x0) * image.width,
                (y1 - y0) * image.height,
            )
            axes.add_patch(Rectangle(corner, wide, high, fill=False, ls="--", lw=0.9, ec="white"))
            axes.add_patch(Rectangle(corner, wide, high, fill=False, ls=(4, (4, 4)), lw=0.9, ec=INK))


def _tiles(
    figure: Any, view: ItemView, images: Sequence[Image.Image], columns: int, width: float, height: float, left: float
) -> None:
    """One tile a slot and image; one colour scale for the item."""
    maps = [np.asarray(table) for slot in view.slots for table in slot.heat]
    top = max((float(each.max()) for each in maps if each.size), default=1.0)
    rows = math.ceil(len(view.slots) / columns)
    for place, slot in enumerate(view.slots):
        for number, image in enumerate(images):
            row, column = number * rows + place // columns, place % columns
            box = (left + column * (_TILE + 0.25), 0.9 + row * (_TILE + _TEXT), _TILE, _TILE)
            axes = _axes(figure, box, width, height)
            axes.axis("off")
            axes.set_title(f"slot {slot.number}", fontsize=8, color=GREY)
            axes.imshow(image)
            if number < len(slot.heat):
                _draw_heat(axes, slot.heat[number], image, top)
            _draw_roi(axes, view, number, image)
            if number == len(images) - 1:
                _caption(figure, slot, box, width, height)


def _draw_heat(axes: Any, heat: Sequence[Sequence[float]], image: Image.Image, top: float) -> None:
    from matplotlib.patches import Rectangle

    spread = heat_on_image(heat, image.size)
    strength = np.clip(0.1 + 0.8 * spread / max(top, 1e-12), 0, 0.9)
    axes.imshow(spread, cmap="inferno", vmin=0, vmax=top, alpha=strength)
    x0, y0, x1, y1 = peak_box(heat, image.size)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=1.4, ec="#4dd2ff"))


def _caption(figure: Any, slot: SlotView, box: tuple[float, float, float, float], width: float, height: float) -> None:
    lines = [f"{_printable(token)} {share:.2f}" for token, share in slot.tokens[:5]]
    said = "  ".join(lines[:2]) + ("\n" + "  ".join(lines[2:5]) if len(lines) > 2 else "")
    cosine = "" if slot.cosine is None else f", cos to last {slot.cosine:.2f}"
    text = f"{said}\nnorm {slot.norm_ratio:.1f} x{cosine}"
    figure.text(box[0] / width, 1 - (box[1] + _TILE + 0.08) / height, text, fontsize=6.8, va="top", color=INK)


def _bottom(figure: Any, view: ItemView, width: float, height: float) -> None:
    """What the answer reads, and the replies (with option probabilities) under the conditions."""
    if view.reads:
        axes = _axes(figure, (0.3, height - 2.0, width - 0.6, 0.28), width, height)
        start = 0.0
        for name, colour in READS.items():
            share = view.reads.get(name, 0.0)
            axes.barh(0, share, left=start, color=colour, height=1.0)
            if share > 0.025:
                axes.text(
                    start + share / 2,
                    0,
                    f"{name} {share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7.5 if share > 0.07 else 5.5,
                    color="white",
                )
            start += share
        axes.set_xlim(0, max(start, 1e-6))
        axes.axis("off")
        axes.set_title("answer reads (attention, mean over layers and heads)", fontsize=8, color=GREY, loc="left")
    for place, (name, reply) in enumerate(view.replies.items()):
        probs = view.option_probs.get(name)
        shares = "" if not probs else "   " + "  ".join(
            f"{_short(option, 10)} {share:.2f}" for option, share in zip(view.options, probs, strict=True)
        )  # fmt: skip
        same = reply == view.replies.get("clean")
        figure.text(
            0.3 / width, (1.45 - 0.24 * place) / height, f"{name:<14}  {_short(reply, 70)}{shares}", fontsize=8,
            family="monospace", va="top", color=BLUE if name == "clean" else INK if same else RED,
        )  # fmt: skip


def _printable(token: str) -> str:
    """A token as it can be drawn: spaces and line breaks as signs, no dollar (which begins a formula)."""
    shown = "".join(character if character.isprintable() else "?" for character in token.replace("\n", "\\n"))
    shown = shown.replace("$", "\\$").strip() or "_"
    return shown if len(shown) <= 12 else shown[:11] + "."


def _short(text: str, length: int) -> str:
    line = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    line = line.replace("$", "\\$")
    return line if len(line) <= length else line[: length - 3] + "..."


__all__ = ["draw_item", "heat_on_image", "peak_box"]
