"""Pictures of results, drawn with Pillow."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainers.data.mazes import Maze, draw_plan, parse_plan, render_maze

_CELL = 48
_MARGIN = 24
_TEXT_WIDTH = 560


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
            f"need one text, path and score per maze, got {len(mazes)}, {len(texts)}, {len(latent_paths)}"
        )
    pictures = [draw_plan(render_maze(m, _CELL), m, parse_plan(t) or []) for m, t in zip(mazes, texts, strict=True)]
    column = max(picture.width for picture in pictures)
    height = sum(max(picture.height, 150) + _MARGIN for picture in pictures) + _MARGIN
    page = Image.new("RGB", (column + _TEXT_WIDTH + 3 * _MARGIN, height), "white")
    draw = ImageDraw.Draw(page)
    top = _MARGIN
    for picture, text, latent, solved in zip(pictures, texts, latent_paths, correct, strict=True):
        page.paste(picture, (_MARGIN, top))
        _write(draw, (column + 2 * _MARGIN, top), text, latent, solved)
        top += max(picture.height, 150) + _MARGIN
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target)
    return target


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, latent: str, solved: bool) -> None:
    left, top = corner
    colour = (20, 120, 50) if solved else (180, 30, 30)
    top = _paragraph(draw, (left, top), "solved" if solved else "not solved", colour, 18)
    top = _paragraph(draw, (left, top + 6), f"answer: {text}", (20, 20, 20), 16)
    span = latent.split("⟩")[0] + "⟩" if "⟩" in latent else latent
    _paragraph(draw, (left, top + 6), "latent path (what each slot would have said):", (90, 90, 90), 14)
    _paragraph(draw, (left, top + 26), span, (40, 60, 140), 16)


def _paragraph(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> int:
    """Text wrapped at the column's width; returns the y below it."""
    font = ImageFont.load_default(size)
    left, top = corner
    line = ""
    for character in text.replace("\n", " "):
        if draw.textlength(line + character, font=font) > _TEXT_WIDTH:
            draw.text((left, top), line, fill=colour, font=font)
            top, line = top + size + 6, ""
        line += character
    draw.text((left, top), line, fill=colour, font=font)
    return top + size + 6
