"""Rationales as steps: where they are cut, how they are grouped."""

import pytest

from trainers.data.rationales import group_steps, rationale_steps, scienceqa_rationale, split_rationale


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        (" \n ", []),
        ("One", ["One"]),
        ("One. Two.", ["One", "Two."]),
        ("One.\nTwo. ", ["One", "Two."]),
        ("At 3.5 m. v1.2", ["At 3.5 m", "v1.2"]),
        ("One.  Two", ["One", " Two"]),
    ],
)
def test_split(text: str, pieces: list[str]) -> None:
    assert split_rationale(text) == pieces


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(0, []), (1, [1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (7, [3, 2, 2]), (8, [3, 3, 2]), (10, [4, 3, 3])],
)
def test_groups_are_consecutive_and_the_first_are_longer(number: int, sizes: list[int]) -> None:
    pieces = [f"p{i}" for i in range(number)]
    steps = group_steps(pieces)
    assert [len(step.split(". ")) for step in steps] == sizes
    assert ". ".join(steps) == ". ".join(pieces)


def test_number_of_groups() -> None:
    pieces = list("abcdefg")
    assert group_steps(pieces, 2) == ["a. b. c. d", "e. f. g"]
    assert group_steps(pieces, None) == pieces
    with pytest.raises(ValueError, match="max_steps is 0; use at least 1"):
        group_steps(pieces, 0)


def test_blank_steps_are_left_out() -> None:
    assert split_rationale("a. . b") == ["a", "", "b"]
    assert rationale_steps("a. . b") == ["a", "b"]


@pytest.mark.parametrize(
    ("lecture", "solution", "rationale"),
    [
        (" L. ", "S\n", "L. S"),
        (None, "S", "S"),
        ("L", " ", "L"),
        (None, None, "2"),
        ("", "  ", "2"),
    ],
)
def test_rationale_of_scienceqa(lecture: str | None, solution: str | None, rationale: str) -> None:
    assert scienceqa_rationale(lecture, solution, 2) == rationale
