"""Rationales as steps: cut at sentence ends, and put into a fixed number of groups.

Paper: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 2.2,
step 1, and 2.3). A curriculum replaces one step a stage, so a rationale of any length becomes at most three steps.
"""

from collections.abc import Sequence
from typing import Any

SEPARATOR = ". "
MAX_STEPS = 3


def split_rationale(text: str) -> list[str]:
    """The pieces of a rationale between the two characters period and space, newlines taken as spaces.

    The separators are lost; the last piece usually keeps its period. An empty text gives no piece.

    Example:
        ```python
        split_rationale("It is red.\\nRed is warm. So it is warm.")  # ['It is red', 'Red is warm', 'So it is warm.']
        ```
    """
    pieces = text.replace("\n", " ").strip().split(SEPARATOR)
    return pieces if pieces[-1] else pieces[:-1]


def group_steps(pieces: Sequence[str], max_steps: int | None = MAX_STEPS) -> list[str]:
    """At most `max_steps` steps: consecutive pieces joined by period and space, the first groups one piece longer.

    Args:
        pieces: see [`split_rationale`].
        max_steps: number of groups when there are more pieces; None leaves the pieces as they are.

    Raises:
        ValueError: when `max_steps` is below 1.

    Example:
        ```python
        group_steps(["a", "b", "c", "d", "e", "f", "g"])  # ['a. b. c', 'd. e', 'f. g']
        ```
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; use at least 1, or None for one step a piece")
    if max_steps is None or len(pieces) <= max_steps:
        return list(pieces)
    size, longer = divmod(len(pieces), max_steps)
    ends = [(group + 1) * size + min(group + 1, longer) for group in range(max_steps)]
    return [SEPARATOR.join(pieces[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def rationale_steps(text: str, max_steps: int | None = MAX_STEPS) -> list[str]:
    """The grouped steps of a rationale without blank ones, which stray periods leave (the reference keeps them)."""
    return [step for step in group_steps(split_rationale(text), max_steps) if step.strip()]


def scienceqa_rationale(lecture: Any, solution: Any, answer: int) -> str:
    """Lecture and solution with a space between, the one that there is, or the answer's number (card 2.3).

    Args:
        lecture, solution: text, stripped here, or None.
        answer: index of the right choice.
    """
    parts = [part.strip() for part in (lecture, solution) if part]
    return " ".join(part for part in parts if part) or str(answer)
