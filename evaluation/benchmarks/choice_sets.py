"""Multiple-choice and yes/no benchmarks: from a row as published to what every protocol can ask.

BLINK, MMVP, MMStar, SEED-Bench-2-Plus, HallusionBench, HR-Bench, V*, VSR and CUB, with the columns of the published
source and of the copies of evaluation harnesses. A record has the bare question, the options apart where the table has
them apart, and the letter (or Yes, No) of the right one; `meta["fields"]` keeps the columns for prompts as published.
"""

import os
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.records import Record, RecordError, make_record, validate_record
from trainers.data.sources import SkippedRow
from trainers.data.table_rows import row_images

from .choice_items import letter_of, mmstar_facts, options_in
from .read_tables import LONGEST_PATH, picture

NO_IMAGE = "row without image"
YES_NO = ("Yes", "No")
_LAST_ATTRIBUTE = 114  # question id of V*; questions with a later one are about positions
BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence",
    "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a row says.

    Args:
        id: of the item; empty: made from the number of the row.
        pictures: as the row has them.
        question: without options, where the table has them apart.
        answer: letter, or `"Yes"` or `"No"`.
        choices: texts of the options, None where they are unknown or where there are none.
        group: category.
        cluster: what is shared with other items; empty: nothing.
        inside: whether the question lists its options itself.
        archive: zip file that may hold the pictures.
    """

    id: str
    pictures: list[Any]
    question: str
    answer: str
    choices: list[str] | None
    group: str
    cluster: str
    inside: bool = False
    archive: str | None = None


@dataclass(frozen=True)
class ChoiceSet:
    """A data set.

    Args:
        title: as in papers.
        sources: Hub ids, the published one first.
        columns: that every row has.
        parse: `(row, task)` to a [`Row`]; raises `ValueError`, `KeyError` or `TypeError` for a row that is not as
            published.
        files: names of its file in a folder.
        split, config: of the repositories.
        fetched: patterns of the files of the first source, where that has no tables.
        tasks: folders or configurations of its own.
        yes_no: the answers are Yes and No.
    """

    title: str
    sources: tuple[str, ...]
    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], Row]
    files: tuple[str, ...] = ()
    split: str | None = None
    config: str | None = None
    fetched: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    yes_no: bool = False


def _blink(row: Mapping[str, Any], task: str) -> Row:
    index = str(row["idx"])
    images = [row[name] for name in (f"image_{i}" for i in range(1, 5)) if row.get(name) is not None]
    choices, letter = _choices_and_letter(row)
    group = task or blink_task(row) or "BLINK"
    return Row(index, images, row["question"], letter, choices, group, "")


def blink_task(row: Mapping[str, Any]) -> str:
    """The task that a row of BLINK names, in `sub_task` or in `idx` (`val_Counting_1`); empty for none."""
    named = str(row.get("sub_task") or "_".join(str(row.get("idx")).split("_")[1:-1]))
    return named if named in BLINK_TASKS else ""


def _choices_and_letter(row: Mapping[str, Any]) -> tuple[list[str], str]:
    """The choices of a list, and the letter of an answer that is a letter or the text of one of them."""
    if isinstance(row["choices"], str):
        raise TypeError(f"choices must be a list, got {row['choices']!r:.80}")
    choices, answer = [str(each) for each in row["choices"]], str(row["answer"])
    if len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"{len(choices)} choices are more than there are letters")
    named = string.ascii_uppercase[choices.index(answer)] if answer in choices else ""
    return choices, letter_of(answer) or named or answer


def _mmvp(row: Mapping[str, Any], task: str) -> Row:
    index, answer, options = str(row["Index"]), row["Correct Answer"], options_in(row["Options"])
    image, pair = row.get("image") or f"MMVP Images/{index}.jpg", str((int(index) - 1) // 2)
    return Row(index, [image], row["Question"], letter_of(answer) or answer, options, "MMVP", pair)


def _mmstar(row: Mapping[str, Any], task: str) -> Row:
    mmstar_facts(row)  # refuses what the published prediction files cannot hold
    choices = options_in(row["question"])
    choices = choices if choices and len(choices) == 4 else None  # every question has four
    return Row(_text(row, "index"), [row["image"]], row["question"], str(row["answer"]), choices,
               _text(row, "category", "none"), "", inside=True)  # fmt: skip


def _text(row: Mapping[str, Any], name: str, default: str = "") -> str:
    return default if row.get(name) in (None, "") else str(row[name])


def _lettered(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [str(row[name]) for name in names]


def _seedbench(row: Mapping[str, Any], task: str) -> Row:
    choices = _lettered(row, ("choice_A", "choice_B", "choice_C", "choice_D"))
    image = row.get("image") or row.get("data_id")
    return Row(str(row["question_id"]), [image], row["question"], str(row["answer"]), choices,
               _text(row, "question_image_type", "none"), _text(row, "data_id"), archive="text_rich.zip")  # fmt: skip


def _hallusion(row: Mapping[str, Any], task: str) -> Row:
    polarity = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}.get(str(row["gt_answer"]).strip().lower())
    if polarity is None:
        raise ValueError(f"gt_answer must be 0 or 1, got {row['gt_answer']!r:.80}")
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    parts = [_text(row, name) for name in names]
    index = "-".join(parts) if all(parts) else ""
    cluster = "-".join(parts[:3]) if all(parts[:3]) else ""  # the questions about a figure and its edited copies
    return Row(index, [row["image"]], row["question"], polarity, None, parts[0] or "unknown", cluster)


def _hrbench(row: Mapping[str, Any], task: str) -> Row:
    choices = _lettered(row, ("A", "B", "C", "D"))
    cluster = f"{row['question']}|{'|'.join(sorted(choices))}"  # its rotated copies
    return Row(str(row["index"]), [row["image"]], row["question"], str(row["answer"]), choices,
               _text(row, "category", "none"), cluster)  # fmt: skip


def _vstar(row: Mapping[str, Any], task: str) -> Row:
    text, index = row["text"], _text(row, "question_id")
    question = re.sub(r"\n?Answer with the option's? letter from the given choices directly\.?\s*$", "", text)
    kind = "direct_attributes" if index.isdigit() and int(index) <= _LAST_ATTRIBUTE else "relative_position"
    group = _text(row, "category", kind if index.isdigit() else "none")
    return Row(index, [row["image"]], question, str(row["label"]), options_in(text), group, "", inside=True)


def _statement(row: Mapping[str, Any], task: str) -> Row:
    """VSR: is a statement about the image true."""
    answers = {"1": "Yes", "0": "No", "true": "Yes", "false": "No", "yes": "Yes", "no": "No"}
    label = answers.get(str(row["label"]).strip().lower())
    if label is None:
        raise ValueError(f"label must be 0 or 1, got {row['label']!r:.80}")
    question = f"Is this statement about the image true? {row['caption']}"
    return Row(_text(row, "id"), [row["image"]], question, label, None, _text(row, "relation", "VSR"), _path(row))


def _listed(row: Mapping[str, Any], task: str) -> Row:
    """CUB and sets alike: a question with a list of choices, the answer a letter or one of the choices."""
    choices, letter = _choices_and_letter(row)
    return Row(_text(row, "id"), [row["image"]], row["question"], letter, choices, _text(row, "category", "CUB"),
               _path(row))  # fmt: skip


def _path(row: Mapping[str, Any]) -> str:
    """The path of a row's picture, which rows about the same one share; empty where the table has it inside."""
    image = row["image"].get("path") if isinstance(row["image"], Mapping) else row["image"]
    return image if isinstance(image, str) and len(image) <= LONGEST_PATH else ""


CHOICE_SETS: dict[str, ChoiceSet] = {
    "blink": ChoiceSet(
        "BLINK", ("BLINK-Benchmark/BLINK",), ("idx", "question", "choices", "answer", "image_1"), _blink,
        ("val-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "val", tasks=BLINK_TASKS,
    ),
    "mmvp": ChoiceSet(
        "MMVP", ("MMVP/MMVP", "lmms-lab-eval/MMVP"), ("Index", "Question", "Options", "Correct Answer"), _mmvp,
        ("Questions.csv",), "train", fetched=("Questions.csv", "MMVP Images/*"),
    ),
    "mmstar": ChoiceSet(
        "MMStar", ("Lin-Chen/MMStar",), ("index", "question", "answer", "image"), _mmstar, ("mmstar.parquet",), "val"
    ),
    "seedbench2plus": ChoiceSet(
        "SEED-Bench-2-Plus", ("AILab-CVC/SEED-Bench-2-plus", "doolayer/SEED-Bench-2-Plus"),
        ("question_id", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer"), _seedbench,
        ("SEED-Bench-2-plus-text-rich.json",), "test",
        fetched=("SEED-Bench-2-plus-text-rich.json", "text_rich.zip"),
    ),
    "hallusionbench": ChoiceSet(
        "HallusionBench", ("lmms-lab/HallusionBench", "lmms-lab-encoder/HallusionBench"),
        ("question", "gt_answer", "image"), _hallusion, (), "image", yes_no=True,
    ),
    "hrbench4k": ChoiceSet(
        "HR-Bench 4K", ("DreamMr/HR-Bench",), ("index", "question", "A", "B", "C", "D", "answer", "image"), _hrbench,
        ("hr_bench_4k.parquet", "hr_bench_4k.tsv"), "hrbench_4k", "hrbench_version_split",
    ),
    "hrbench8k": ChoiceSet(
        "HR-Bench 8K", ("DreamMr/HR-Bench",), ("index", "question", "A", "B", "C", "D", "answer", "image"), _hrbench,
        ("hr_bench_8k.parquet", "hr_bench_8k.tsv"), "hrbench_8k", "hrbench_version_split",
    ),
    "vstar": ChoiceSet(
        "V*", ("craigwu/vstar_bench", "lmms-lab-encoder/vstar-bench"), ("image", "text", "label"), _vstar,
        ("test_questions.jsonl",), "test", fetched=("test_questions.jsonl", "*.jpg", "*.jpeg", "*.png"),
    ),
    "vsr": ChoiceSet(
        "VSR", ("cambridgeltl/vsr_random",), ("image", "caption", "label"), _statement, (), "test", yes_no=True
    ),
    "cub": ChoiceSet("CUB", (), ("image", "question", "choices", "answer"), _listed, (), "test"),
}  # fmt: skip


def record_of_choice(
    name: str, value: Any, source: Any, row: int, folder: str | os.PathLike, task: str = ""
) -> Record:
    """The record of one row.

    Raises:
        RecordError: a damaged row, a missing column, an answer that is none of the options, an image that is missing.
        SkippedRow: a row of BLINK without image.
    """
    entry, origin = CHOICE_SETS[name], (source, row)
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, Mapping):
        raise RecordError(*origin, f"a row must be an object with columns, got {value!r:.120}")
    missing = [column for column in entry.columns if column not in value]
    if missing:
        raise RecordError(*origin, f"the row lacks the columns {missing}, it has {list(value)}; repair the row")
    try:
        found = entry.parse(value, task)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(*origin, f"the row is not as published ({error}); repair it") from error
    if not found.pictures and entry.tasks:
        raise SkippedRow(NO_IMAGE)
    if not isinstance(found.question, str) or not found.question.strip():
        raise RecordError(*origin, f"the question is empty or no text ({found.question!r:.60}); repair the row")
    _check_answer(found, entry.yes_no, origin)
    place = Path(folder)
    raw = (picture(each, place, origin, found.archive) for each in found.pictures)
    images = [image for each in raw for image in row_images(each, place, origin, "refuse")]
    index = found.id or f"{name}-{row}"
    record = make_record(id=index, question=found.question, answer=found.answer, images=images, choices=found.choices)
    fields = {
        key: each
        for key, each in value.items()
        if key == "meta_info" or isinstance(each, str | int | float | list) and key != "image"
    }
    record["meta"] = {
        "source": os.fspath(source), "row": row, "ds_name": name, "group": found.group,
        "cluster": found.cluster or index, "inside": found.inside, "fields": {**fields, "task": task or found.group},
    }  # fmt: skip
    validate_record(record, source, row)
    return record


def _check_answer(found: Row, yes_no: bool, origin: tuple[Any, int]) -> None:
    letters = string.ascii_uppercase[: len(found.choices or "ABCD")]
    allowed = YES_NO if yes_no else letters
    if found.answer not in tuple(allowed):
        raise RecordError(
            *origin,
            f"the answer {found.answer!r} is not one of {list(allowed)}; repair the row (a test split may hide its "
            "answers: take the validation split)",
        )


__all__ = ["BLINK_TASKS", "CHOICE_SETS", "NO_IMAGE", "YES_NO", "ChoiceSet", "Row", "blink_task", "record_of_choice"]
