"""Pictures of results, drawn with Pillow."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from trainers.data.mazes import Maze, draw_plan, parse_plan, render_maze

_CELL = 48
_MARGIN = 24
_TEXT_WIDTH = 560
_GAP = 6


def draw_maze_page(
    mazes: Sequence[Maze], texts: Sequence[str], latent_paths: Sequence[str], correct: Sequence[bool], path: str | Path
) -> Path:
    """One picture: each maze with the predicted plan drawn on it, beside it the answer and the readable latent path.

    Args:
        mazes: the mazes shown, one row each.
        texts: what the model wrote, latents hidden.
        latent_paths: the same with spans shown as what their slots would have said.
        correct: whether each plan solves its maze.
        path: PNG file to write.

    Raises:
        ValueError: lists of different length, or empty ones.
    """
    if not mazes or not len(mazes) == len(texts) == len(latent_paths) == len(correct):
        raise ValueError(
            f"need at least one maze, and one text, path and score for each; got {len(mazes)} mazes, {len(texts)} "
            f"texts, {len(latent_paths)} paths and {len(correct)} scores"
        )
    pictures = [draw_plan(render_maze(m, _CELL), m, parse_plan(t) or []) for m, t in zip(mazes, texts, strict=True)]
    columns = [_column(*row) for row in zip(texts, latent_paths, correct, strict=True)]
    width = max(picture.width for picture in pictures)
    heights = [
        max(picture.height, sum(line.size + _GAP for line in lines))
        for picture, lines in zip(pictures, columns, strict=True)
    ]
    page = Image.new("RGB", (width + _TEXT_WIDTH + 3 * _MARGIN, sum(heights) + _MARGIN * (len(heights) + 1)), "white")
    draw = ImageDraw.Draw(page)
    top = _MARGIN
    for picture, lines, height in zip(pictures, columns, heights, strict=True):
        page.paste(picture, (_MARGIN, top))
        below = top
        for line in lines:
            font = ImageFont.load_default(line.size)
            draw.text((width + 2 * _MARGIN, below), line.text, fill=line.colour, font=font)
            below += line.size + _GAP
        top += height + _MARGIN
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target)
    return target


class _Line(NamedTuple):
    text: str
    colour: tuple[int, int, int]
    size: int


def _column(text: str, latent_path: str, solved: bool) -> list[_Line]:
    """The lines beside one maze."""
    has_span = "⟨" in latent_path and "⟩" in latent_path
    span = latent_path.split("⟨", 1)[1].split("⟩", 1)[0] if has_span else "(no span)"  # the font lacks the brackets
    return [
        *_wrapped("solved" if solved else "not solved", (20, 120, 50) if solved else (180, 30, 30), 18),
        *_wrapped(f"answer: {text}", (20, 20, 20), 16),
        *_wrapped("latent path (what each slot would have said):", (90, 90, 90), 14),
        *_wrapped(span, (40, 60, 140), 16),
    ]


def _wrapped(text: str, colour: tuple[int, int, int], size: int) -> list[_Line]:
    """Text cut into lines of the column's width."""
    font = ImageFont.load_default(size)
    lines = [""]
    for character in text.replace("\n", " "):
        if font.getlength(lines[-1] + character) > _TEXT_WIDTH:
            lines.append("")
        lines[-1] += character
    return [_Line(line, colour, size) for line in lines]
