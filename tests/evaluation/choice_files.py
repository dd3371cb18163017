"""Files of the multiple-choice sets with the published columns, of a few rows, made from tiny images."""

import base64
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
LETTER = "\nAnswer with the option's letter from the given choices directly."
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


def image(number: int = 0) -> dict[str, Any]:
    return {"bytes": encoded(tiny_images(4)[number]), "path": None}


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(path)
    return path


def base64_image() -> str:
    return base64.b64encode(encoded(tiny_images(1)[0])).decode()


# A row of each set, with the columns of the published source or of the copies of evaluation harnesses.
ROWS: dict[str, dict[str, Any]] = {
    "blink": {"idx": "val_Counting_1", "question": "How many?", "choices": ["0", "3"], "answer": "(B)", "prompt": "",
              "image_1": image()},
    "mmvp": {"Index": 4, "Question": "Is it open?", "Options": "(a) Yes (b) No", "Correct Answer": "(b)",
             "image": image()},
    "mmstar": {"index": 7, "question": "What?\nOptions: A: one, B: two, C: three, D: four", "answer": "B",
               "category": "math", "l2_category": "geometry", "image": image()},
    "seedbench2plus": {"question_id": "s1", "question": "What is shown?", "choice_A": "a1", "choice_B": "b1",
                       "choice_C": "c1", "choice_D": "d1", "answer": "B", "data_id": "text_rich/1.png",
                       "question_image_type": "Chart", "image": image()},
    "hallusionbench": {"question": "Is it red?", "gt_answer": "0", "category": "VD", "subcategory": "chart",
                       "set_id": "0", "figure_id": "1", "question_id": "2", "image": image()},
    "hrbench4k": {"index": 3, "question": "What is it?", "A": "cat", "B": "dog", "C": "cow", "D": "pig", "answer": "B",
                  "category": "single", "cycle_category": "cycle", "image": base64_image()},
    "vstar": {"question_id": "115", "text": f"Of what? (A) wood (B) stone{LETTER}", "label": "B",
              "category": "relative_position", "image": image()},
    "vsr": {"caption": "The cat is on the mat.", "label": 0, "relation": "on", "image": image()},
    "cub": {"question": "Which bird?", "choices": ["crow", "gull"], "answer": "gull", "image": image()},
}  # fmt: skip
ROWS["hrbench8k"] = ROWS["hrbench4k"]
