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

from .choice_items import letter_of, options_in
from .read_tables import picture

NO_IMAGE = "row without image"
YES_NO = ("Yes", "No")
BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence",
    "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a row says.

    Args:
        id: of the item.
        pictures: as the row has them.
        question: without options, where the table has them apart.
        answer: letter, or `"Yes"` or `"No"`.
        choices: texts of the options, None where they are unknown or where there are none.
        group: category.
        cluster: what is shared with other items.
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
        split, config: of the first source.
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
    tasks: tuple[str, ...] = ()
    yes_no: bool = False


def _blink(row: Mapping[str, Any], task: str) -> Row:
    choices = [str(each) for each in row["choices"]] if not isinstance(row["choices"], str) else None
    if choices is None:
        raise TypeError(f"choices must be a list, got {row['choices']!r:.80}")
    answer = str(row["answer"])
    letter = letter_of(answer) or (string.ascii_uppercase[choices.index(answer)] if answer in choices else answer)
    images = [row[name] for name in (f"image_{i}" for i in range(1, 5)) if row.get(name) is not None]
    task = task or str(row.get("sub_task") or "_".join(str(row["idx"]).split("_")[1:-1]) or "BLINK")
    return Row(str(row["idx"]), images, row["question"], letter, choices, task, str(row["idx"]))


def _mmvp(row: Mapping[str, Any], task: str) -> Row:
    index = str(row["Index"])
    image = row.get("image") or f"MMVP Images/{index}.jpg"
    pair = str((int(index) - 1) // 2)
    options = options_in(row["Options"])
    return Row(
        index,
        [image],
        row["Question"],
        letter_of(row["Correct Answer"]) or row["Correct Answer"],
        options,
        "MMVP",
        pair,
    )


def _mmstar(row: Mapping[str, Any], task: str) -> Row:
    index, group = str(row["index"]), str(row.get("category") or "none")
    choices = options_in(row["question"])
    return Row(index, [row["image"]], row["question"], str(row["answer"]), choices, group, index, inside=True)


def _lettered(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [str(row[name]) for name in names]


def _seedbench(row: Mapping[str, Any], task: str) -> Row:
    choices = _lettered(row, ("choice_A", "choice_B", "choice_C", "choice_D"))
    image, index = row.get("image") or row.get("data_id"), str(row["question_id"])
    group = str(row.get("question_image_type") or "none")
    cluster = str(row.get("data_id") or index)
    return Row(index, [image], row["question"], str(row["answer"]), choices, group, cluster, archive="text_rich.zip")


def _hallusion(row: Mapping[str, Any], task: str) -> Row:
    polarity = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}.get(str(row["gt_answer"]).strip().lower())
    if polarity is None:
        raise ValueError(f"gt_answer must be 0 or 1, got {row['gt_answer']!r:.80}")
    group = str(row.get("category") or "unknown")
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    parts = [str(row.get(name)) for name in names]
    return Row("-".join(parts), [row["image"]], row["question"], polarity, None, group, "-".join(parts[:3]))


def _hrbench(row: Mapping[str, Any], task: str) -> Row:
    choices, index = _lettered(row, ("A", "B", "C", "D")), str(row["index"])
    cluster = f"{row['question']}|{'|'.join(sorted(choices))}"  # its rotated copies
    return Row(index, [row["image"]], row["question"], str(row["answer"]), choices, str(row.get("category")), cluster)


def _vstar(row: Mapping[str, Any], task: str) -> Row:
    text, index = row["text"], str(row.get("question_id"))
    question = re.sub(r"\n?Answer with the option's? letter from the given choices directly\.?\s*$", "", text)
    return Row(
        index,
        [row["image"]],
        question,
        str(row["label"]),
        options_in(text),
        str(row.get("category")),
        index,
        inside=True,
    )


def _statement(row: Mapping[str, Any], task: str) -> Row:
    """VSR: is a statement about the image true."""
    label = {"1": "Yes", "0": "No", "true": "Yes", "false": "No", "yes": "Yes", "no": "No"}.get(
        str(row["label"]).strip().lower()
    )
    if label is None:
        raise ValueError(f"label must be 0 or 1, got {row['label']!r:.80}")
    question = f"Is this statement about the image true? {row['caption']}"
    image = row["image"]
    cluster = image if isinstance(image, str) else question
    return Row(str(row.get("id", cluster)), [image], question, label, None, str(row.get("relation") or "VSR"), cluster)


def _listed(row: Mapping[str, Any], task: str) -> Row:
    """CUB and sets alike: a question with a list of choices, the answer a letter or one of the choices."""
    choices, answer = [str(each) for each in row["choices"]], str(row["answer"])
    letter = letter_of(answer) or (string.ascii_uppercase[choices.index(answer)] if answer in choices else answer)
    image = row["image"]
    index = str(row.get("id") or (image if isinstance(image, str) else row["question"]))
    return Row(index, [image], row["question"], letter, choices, str(row.get("category") or "CUB"), index)


CHOICE_SETS: dict[str, ChoiceSet] = {
    "blink": ChoiceSet(
        "BLINK", ("BLINK-Benchmark/BLINK",), ("idx", "question", "choices", "answer", "image_1"), _blink,
        ("val-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "val", tasks=BLINK_TASKS,
    ),
    "mmvp": ChoiceSet(
        "MMVP", ("MMVP/MMVP", "lmms-lab-eval/MMVP"), ("Index", "Question", "Options", "Correct Answer"), _mmvp,
        ("Questions.csv",), "train",
    ),
    "mmstar": ChoiceSet(
        "MMStar", ("Lin-Chen/MMStar",), ("index", "question", "answer", "image"), _mmstar, ("mmstar.parquet",), "val"
    ),
    "seedbench2plus": ChoiceSet(
        "SEED-Bench-2-Plus", ("AILab-CVC/SEED-Bench-2-plus", "doolayer/SEED-Bench-2-Plus"),
        ("question_id", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer"), _seedbench,
        ("SEED-Bench-2-plus-text-rich.json",), "test",
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
        ("test_questions.jsonl",), "test",
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(*origin, f"the row is not as published ({error}); repair it") from error
    if not found.pictures and entry.tasks:
        raise SkippedRow(NO_IMAGE)
    if not isinstance(found.question, str) or not found.question.strip():
        raise RecordError(*origin, f"the question is empty or no text ({found.question!r:.60}); repair the row")
    _check_answer(found, entry.yes_no, origin)
    place = Path(folder)
    raw = (picture(each, place, origin, found.archive) for each in found.pictures)
    images = [image for each in raw for image in row_images(each, place, origin, "refuse")]
    record = make_record(
        id=found.id, question=found.question, answer=found.answer, images=images, choices=found.choices
    )
    fields = {
        key: each
        for key, each in value.items()
        if key == "meta_info" or isinstance(each, str | int | float | list) and key != "image"
    }
    record["meta"] = {
        "source": os.fspath(source), "row": row, "ds_name": name, "group": found.group, "cluster": found.cluster,
        "inside": found.inside, "fields": {**fields, "task": task or found.group},
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


__all__ = ["BLINK_TASKS", "CHOICE_SETS", "NO_IMAGE", "YES_NO", "ChoiceSet", "Row", "record_of_choice"]
