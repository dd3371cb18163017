"""Files of the multiple-choice sets with the published columns, of a few rows, made from tiny images."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture

from tests.tiny import tiny_images

MMVP_COLUMNS = ("Index", "Question", "Options", "Correct Answer")
MAP = [[1, 0, -1], [0, 0, 0], [-1, 0, 2]]


def encoded(image: Picture) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mmvp_rows(number: int = 4) -> list[dict[str, str]]:
    return [
        {"Index": str(i + 1), "Question": "Is the door open? " * (i + 1), "Options": "(a) Yes (b) No",
         "Correct Answer": "(a)" if i % 2 == 0 else "(b)"}
        for i in range(number)
    ]  # fmt: skip


def write_mmvp(
    folder: Path, rows: Sequence[dict[str, str]] | None = None, columns: Sequence[str] = MMVP_COLUMNS
) -> Path:
    """`Questions.csv` and the folder of images."""
    rows = mmvp_rows() if rows is None else rows
    (folder / "MMVP Images").mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, tiny_images(len(rows)), strict=True):
        image.save(folder / "MMVP Images" / f"{row['Index']}.jpg")
    with (folder / "Questions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def blink_rows(task: str, number: int = 3) -> list[dict[str, Any]]:
    """The second row has two images, the last none; the answer of the second is the text of a choice."""
    first, second = ({"bytes": encoded(image), "path": None} for image in tiny_images(2))
    rows = [
        {"idx": f"val_{task}_{i}", "question": "Which spot is nearer?", "choices": ["red", "blue", "green"],
         "answer": "(B)", "prompt": "", "image_1": first, "image_2": None, "image_3": None, "image_4": None}
        for i in range(number)
    ]  # fmt: skip
    rows[1] |= {
        "answer": "green",
        "image_2": second,
        "prompt": "Which is nearer? <image>\n(A) red\n(B) blue\n(C) green",
    }
    rows[-1] |= {"image_1": None}
    return rows


def write_blink(
    folder: Path, task: str, rows: Sequence[dict[str, Any]] | None = None, split: str = "val", decoded: bool = True
) -> Path:
    """The parquet file of a task; with `decoded=False` without the mark that a column holds images."""
    rows = blink_rows(task) if rows is None else rows
    text = Value("string")
    image = Image() if decoded else {"bytes": Value("binary"), "path": text}
    features = Features(
        {**dict.fromkeys(("idx", "question"), text), "choices": List(text), "answer": text, "prompt": text,
         **{f"image_{i}": image for i in range(1, 5)}}
    )  # fmt: skip
    (folder / task).mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), features).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    return folder


def write_mmstar(folder: Path, number: int = 3) -> Path:
    """`mmstar.parquet` with the images as plain bytes."""
    rows = [
        {"index": i, "question": "Which?\nOptions: A: up, B: down, C: left, D: none, really", "answer": "ABCD"[i],
         "category": f"c{i % 2}", "l2_category": "sub", "meta_info": {"source": "toy"}, "image": encoded(image)}
        for i, image in enumerate(tiny_images(number))
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / "mmstar.parquet")
    return folder


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.parent


def write_vstar(folder: Path) -> Path:
    (folder / "direct").mkdir(parents=True)
    for i, image in enumerate(tiny_images(2)):
        image.save(folder / "direct" / f"{i}.jpg")
    text = "Of what?\n(A) wood\n(B) stone\nAnswer with the option's letter from the given choices directly."
    rows = [
        {"image": f"direct/{i}.jpg", "text": text, "category": f"c{i}", "label": "AB"[i], "question_id": str(i)}
        for i in range(2)
    ]
    return write_lines(folder / "test_questions.jsonl", rows)


def write_vsp(folder: Path, maps: Sequence[Any] = (MAP,)) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for i, (image, map_desc) in enumerate(zip(tiny_images(len(maps)), maps, strict=True)):
        image.save(folder / f"{i}.png")
        rows.append({"image_input": f"{i}.png", "text_input": "Go.", "map_id": i, "map_desc": map_desc})
    return write_lines(folder / "test_direct.jsonl", rows)
