"""Which replies of a teacher become training data: right, not answerable without the image, looking at the boxes.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 4.7 and 5.2). The
paper keeps a sample if the teacher is right, is not right without the image, and has at least 20 % of its attention in
the boxes; the published code asks a judge only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .data.boxes import checked_option

NO_BOXES = ("reject", "accept")
# Why a sample is rejected; the words are those of the counts in `index.json`.
WRONG, JUDGE_FAILED, ANSWERED_BLIND, OUTSIDE_BOXES, WITHOUT_BOXES, FEW_STEPS = (
    "wrong answer",
    "judge failed",
    "answered without the image",
    "attention outside the boxes",
    "no boxes",
    "too few steps",
)


@dataclass(frozen=True)
class AcceptanceRules:
    """The filters of a run, each of which can be off.

    Args:
        require_correct: the judge must find the answer right (the published code's `validation`).
        reject_text_only: the teacher must not be right without the image.
        min_box_mass: least share of the attention inside the boxes of the image, 0..1; None for no such filter.
        no_boxes: what becomes of a sample without boxes where there is such a filter: `"reject"` or `"accept"`.

    Raises:
        ValueError: a share outside 0..1, an unknown `no_boxes`, or `reject_text_only` without `require_correct`.
    """

    require_correct: bool = True
    reject_text_only: bool = True
    min_box_mass: float | None = 0.2
    no_boxes: str = "reject"

    def __post_init__(self) -> None:
        checked_option("no_boxes", self.no_boxes, NO_BOXES)
        if self.min_box_mass is not None and not 0 <= self.min_box_mass <= 1:
            raise ValueError(f"min_box_mass={self.min_box_mass!r} must be between 0 and 1; the paper has 0.2")
        if self.reject_text_only and not self.require_correct:
            raise ValueError(
                "reject_text_only=True with require_correct=False: an answer without the image counts against a "
                "sample only if answers are judged; set require_correct, or reject_text_only=False"
            )

    @property
    def judges(self) -> bool:
        """Whether answers are judged at all."""
        return self.require_correct

    def of_boxes(self, mass: float | None) -> str | None:
        """Why a sample whose attention has this mass in its boxes (None: it has no boxes) is rejected; None if not."""
        if self.min_box_mass is None:
            return None
        if mass is None:
            return WITHOUT_BOXES if self.no_boxes == "reject" else None
        return OUTSIDE_BOXES if mass < self.min_box_mass else None


ACCEPTANCE: dict[str, AcceptanceRules] = {
    "paper": AcceptanceRules(),
    "reference": AcceptanceRules(reject_text_only=False, min_box_mass=None),
    "none": AcceptanceRules(require_correct=False, reject_text_only=False, min_box_mass=None),
}


def acceptance_rules(preset: str = "paper", **changes: Any) -> AcceptanceRules:
    """The rules of a preset, with changes.

    Args:
        preset: `"paper"` (right, not answerable without the image, at least 20 % of the attention in the boxes),
            `"reference"` (right) or `"none"`.
        changes: fields of [`AcceptanceRules`]; None leaves the preset's; a `min_box_mass` of 0 switches it off.

    Raises:
        ValueError: an unknown preset, or see [`AcceptanceRules`].
    """
    rules = ACCEPTANCE[checked_option("acceptance", preset, tuple(ACCEPTANCE))]
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("min_box_mass") == 0:
        given["min_box_mass"] = None
    return replace(rules, **given)


# Boxes --------------------------------------------------------------------------------------------------------------


def box_cells(boxes: Iterable[Sequence[float]], grid: tuple[int, int]) -> np.ndarray:
    """The cells of a grid that a union of boxes touches: rows floor(y0 R) to ceil(y1 R), columns alike.

    The published raster took the short side for the rows, so that portrait images were read transposed; here rows are
    rows.

    Args:
        boxes: `[x0, y0, x1, y1]` each, in 0..1.
        grid: rows R and columns C.

    Returns:
        `(R, C)` bool.
    """
    rows, columns = grid
    cells = np.zeros((rows, columns), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        vertical = slice(max(math.floor(y0 * rows), 0), min(math.ceil(y1 * rows), rows))
        horizontal = slice(max(math.floor(x0 * columns), 0), min(math.ceil(x1 * columns), columns))
        cells[vertical, horizontal] = True
    return cells


def box_mass(attention: Any, grid: tuple[int, int], boxes: Iterable[Sequence[float]]) -> float:
    """Share of the attention inside a union of boxes: mass inside / (total mass + 1e-10).

    Args:
        attention: `(N,)`, the image tokens row by row, N = R C; not negative.
        grid: rows R and columns C.
        boxes: see [`box_cells`].

    Returns:
        0..1.

    Raises:
        ValueError: another number of values than the grid has cells.
    """
    values = np.asarray(attention, dtype=np.float64)
    rows, columns = grid
    if values.shape != (rows * columns,):
        raise ValueError(f"attention of shape {values.shape} for a grid of {rows} x {columns} image tokens")
    return float(values[box_cells(boxes, grid).reshape(-1)].sum() / (values.sum() + 1e-10))


def boxes_of_image(record: Mapping[str, Any], image: int = 0) -> list[list[float]]:
    """The boxes of a record that belong to one of its images, `[x0, y0, x1, y1]` each, in 0..1."""
    return [list(box["xyxy"]) for box in record["boxes"] or [] if box["image"] == image]


__all__ = [
    "ACCEPTANCE",
    "AcceptanceRules",
    "acceptance_rules",
    "box_cells",
    "box_mass",
    "boxes_of_image",
]
