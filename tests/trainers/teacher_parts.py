"""Parts of the tests of teacher signals: a teacher that needs no model, records with pictures, folders compared."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.tiny import tiny_images
from trainers.data.records import Record, make_record
from trainers.teacher_capture import CapturedSignals

WIDTH = 6
LEFT = [{"image": 0, "xyxy": [0.0, 0.0, 0.5, 1.0]}]


class StubTeacher:
    """Says what a function of question and `with_image` says; looks at the left half of an image, a token for 14 x 14
    pixels. Its signals follow from image and piece.

    Args:
        reply: from a question, and whether it sees the image, to a reply.
        spoil: changes the signals of a question before they are given.
    """

    def __init__(
        self,
        reply: Callable[[str, bool], str] = lambda question, with_image: "blue" if with_image else "?",
        spoil: Callable[[str, CapturedSignals], CapturedSignals] = lambda question, signals: signals,
    ) -> None:
        self.reply, self.spoil = reply, spoil
        self.asked: list[tuple[int, bool]] = []  # size of each batch, and whether it had images
        self.questions: list[str] = []
        self.captured: list[list[list[str]]] = []

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], with_image: bool = True) -> list[str]:
        self.asked.append((len(images), with_image))
        self.questions += questions
        return [self.reply(question, with_image) for question in questions]

    def capture(
        self, images: Sequence[Image.Image], questions: Sequence[str], pieces: Sequence[Sequence[str]]
    ) -> list[list[CapturedSignals]]:
        self.captured.append([list(each) for each in pieces])
        samples = zip(images, questions, pieces, strict=True)
        return [
            [self.spoil(question, stub_signals(image, text)) for text in texts] for image, question, texts in samples
        ]

    def facts(self) -> dict[str, Any]:
        return {"teacher": "stub"}


def stub_signals(image: Image.Image, text: str) -> CapturedSignals:
    """Signals that follow from image and text: 9 of 10 parts of the attention on the left half of an even grid."""
    rows, columns = max(image.height // 14, 1), max(image.width // 14, 1)
    seed = int(hashlib.sha256(image.tobytes() + text.encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    concept = torch.randn(rows * columns, WIDTH, generator=generator)
    scores = torch.rand(rows, columns, generator=generator) + 0.1
    left = torch.arange(columns) < columns / 2
    scores[:, left] *= 0.9 / scores[:, left].sum()
    if columns > 1:
        scores[:, ~left] *= 0.1 / scores[:, ~left].sum()
    attention = scores.reshape(-1)
    return CapturedSignals(concept, attention, attention / 3, (rows, columns))


def teacher_records(number: int, folder: Path | None = None) -> list[Record]:
    """Records with a picture and a box on its left half; with a folder the pictures lie there as files."""
    records = []
    for index, image in enumerate(tiny_images(number)):
        source: Any = image
        if folder is not None:
            source = folder / "pictures" / f"{index}.png"
            source.parent.mkdir(parents=True, exist_ok=True)
            image.save(source)
            source = str(source)
        meta = {"source": "toy.json", "row": index, "question_id": 10 + index, "dataset": "toy", "split": "train"}
        question = f"Which colour is thing {index}?"
        records.append(make_record(f"toy-{index}", question, "blue", [source], boxes=LEFT, meta=meta))
    return records


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
