"""Acceptance of teacher samples: presets and thresholds, the raster of boxes, the mass of attention in them."""

from typing import Any

import numpy as np
import pytest

from trainers.data.records import make_record
from trainers.teacher_acceptance import (
    ACCEPTANCE,
    AcceptanceRules,
    acceptance_rules,
    box_cells,
    box_mass,
    boxes_of_image,
)

# Rules ---------------------------------------------------------------------------------------------------------------


def test_the_presets_are_those_of_paper_and_code() -> None:
    assert acceptance_rules() == acceptance_rules("paper") == AcceptanceRules(True, True, 0.2, "reject")
    assert acceptance_rules("reference") == AcceptanceRules(True, False, None)
    assert acceptance_rules("none") == AcceptanceRules(False, False, None)
    assert set(ACCEPTANCE) == {"paper", "reference", "none"}


def test_each_threshold_can_be_set() -> None:
    assert acceptance_rules("reference", min_box_mass=0.1) == AcceptanceRules(True, False, 0.1)
    assert acceptance_rules("paper", reject_text_only=False).min_box_mass == 0.2
    assert acceptance_rules("paper", min_box_mass=0).min_box_mass is None
    assert acceptance_rules("paper", min_box_mass=None, require_correct=None) == ACCEPTANCE["paper"]


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("strict", {}, r"unknown acceptance 'strict'; choose one of \['paper', 'reference', 'none'\]"),
        ("paper", {"min_box_mass": 20}, "min_box_mass=20 must be between 0 and 1"),
        ("paper", {"require_correct": False}, "reject_text_only=True with require_correct=False"),
        ("none", {"reject_text_only": True}, "set require_correct, or reject_text_only=False"),
        ("paper", {"no_boxes": "keep"}, "unknown no_boxes 'keep'"),
    ],
)
def test_wrong_rules_are_refused(preset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acceptance_rules(preset, **changes)


def test_the_threshold_itself_passes() -> None:
    rules = acceptance_rules("paper")
    assert [rules.of_boxes(mass) for mass in (0.19, 0.2, 1.0)] == ["attention outside the boxes", None, None]
    assert rules.of_boxes(None) == "no boxes"
    assert acceptance_rules("paper", no_boxes="accept").of_boxes(None) is None
    assert acceptance_rules("reference").of_boxes(0.0) is acceptance_rules("reference").of_boxes(None) is None


# Boxes ---------------------------------------------------------------------------------------------------------------


def naive_cells(boxes: list[list[float]], grid: tuple[int, int]) -> np.ndarray:
    """A cell belongs to a box if they share more than an edge."""
    rows, columns = grid
    cells = np.zeros(grid, dtype=bool)
    for row in range(rows):
        for column in range(columns):
            cells[row, column] = any(
                x0 * columns < column + 1 and x1 * columns > column and y0 * rows < row + 1 and y1 * rows > row
                for x0, y0, x1, y1 in boxes
            )
    return cells


@pytest.mark.parametrize("grid", [(6, 3), (3, 6), (1, 5), (4, 4)])
def test_cells_are_those_that_a_box_touches(grid: tuple[int, int]) -> None:
    random = np.random.default_rng(sum(grid))
    for _ in range(50):
        corners = np.sort(random.random((3, 2, 2)), axis=1)
        boxes = [[*low, *high] for low, high in corners.tolist()]
        assert (box_cells(boxes, grid) == naive_cells(boxes, grid)).all()


def test_a_portrait_image_is_not_read_transposed() -> None:
    cells = box_cells([[0.0, 0.0, 1.0, 0.25]], (4, 2))  # the top quarter of 4 rows and 2 columns
    assert cells.tolist() == [[True, True], [False, False], [False, False], [False, False]]


def test_edges_on_a_line_belong_to_no_further_cell() -> None:
    assert box_cells([[0.25, 0.5, 0.75, 1.0]], (2, 4)).tolist() == [[False] * 4, [False, True, True, False]]


def test_mass_of_a_union_counts_no_cell_twice() -> None:
    attention = np.arange(8.0)
    left, middle = [0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0]
    assert box_mass(attention, (2, 4), [left]) == pytest.approx((0 + 1 + 4 + 5) / 28)
    assert box_mass(attention, (2, 4), [left, middle]) == pytest.approx((0 + 1 + 2 + 4 + 5 + 6) / 28)
    assert box_mass(attention, (2, 4), [[0, 0, 1, 1]]) == pytest.approx(1.0)
    assert box_mass(attention / 7, (2, 4), [left]) == pytest.approx(10 / 28)  # whatever it sums to
    assert box_mass(np.zeros(8), (2, 4), [left]) == 0.0 and box_mass(attention, (2, 4), []) == 0.0


def test_attention_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention of shape \(8,\) for a grid of 3 x 4 image tokens"):
        box_mass(np.ones(8), (3, 4), [])


def test_boxes_of_other_images_do_not_count() -> None:
    boxes = [{"image": 0, "xyxy": [0, 0, 0.5, 1]}, {"image": 1, "xyxy": [0, 0, 1, 1]}]
    assert boxes_of_image(make_record("a", "q", "a", boxes=boxes)) == [[0, 0, 0.5, 1]]
    assert boxes_of_image(make_record("a", "q", "a")) == []
