"""Longer answers for Visual-CoT questions, from the metadata files that the data set brings.

Data: `metadata/<dataset>_cot_train.jsonl` of `deepcs233/Visual-CoT` on the Hub, a `{"question", "answer", "image"}` a
line. Paper of the method that uses it here: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning",
arXiv 2601.10129 (card 2.4, the enriched ground truth).
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .json_rows import existing_file, iter_json_lines
from .records import Record
from .table_rows import text_fields

logger = logging.getLogger(__name__)

# Base name of an image -> (question as it is compared, answer) of each line.
_Answers = dict[str, list[tuple[str, str]]]


def enrich_answers(records: Iterable[Record], metadata_folder: str | os.PathLike) -> Iterator[Record]:
    """Replaces answers by longer ones of the metadata.

    A line matches a record when the base names of their images are equal, and their questions are, or one contains
    the other; of several lines the one whose question is nearest in length counts. Case and blanks do not matter.

    Args:
        records: with `meta["dataset"]`, e.g. of `read_viscot` or `read_lavit`; those without are passed on.
        metadata_folder: folder of the files `<dataset>_cot_train.jsonl`; each is read when a record needs it.

    Returns:
        An iterator of the records, those with a longer answer as copies whose `meta["ground_truth"]` is the answer
        before. The log says at the end how many there were.

    Raises:
        RecordError: there is no file of a data set, or a line of it is damaged or lacks a text.
    """
    known: dict[str, _Answers] = {}
    replaced = total = 0
    for record in records:
        total += 1
        dataset = record["meta"].get("dataset")
        if dataset is not None and dataset not in known:
            known[dataset] = _read_answers(Path(metadata_folder) / f"{dataset}_cot_train.jsonl")
        longer = _longer_answer(record, known[dataset]) if dataset is not None else None
        if longer is not None:
            meta = {**record["meta"], "ground_truth": record["answer"]}
            record = {**record, "answer": longer, "meta": meta}
            replaced += 1
        yield record
    logger.log(
        logging.INFO if replaced else logging.WARNING,
        "%d of %d answers were replaced by longer ones of %s",
        replaced,
        total,
        os.fspath(metadata_folder),
    )


def _read_answers(path: Path) -> _Answers:
    answers: _Answers = defaultdict(list)
    for row, value in iter_json_lines(existing_file(path)):
        line = text_fields(value, ("question", "answer", "image"), (path, row))
        answers[os.path.basename(line["image"])].append((_plain(line["question"]), line["answer"].strip()))
    return answers


def _longer_answer(record: Record, answers: _Answers) -> str | None:
    image = record["images"][0] if record["images"] else None
    name = record["meta"].get("image_name") or (image if isinstance(image, str | os.PathLike) else "")
    asked = _plain(record["question"])
    matching = [
        (abs(len(question) - len(asked)), answer)
        for question, answer in answers.get(os.path.basename(name), [])
        if question and asked and (question in asked or asked in question)
    ]
    answer = min(matching, key=lambda match: match[0])[1] if matching else ""
    return answer if len(answer) > len(record["answer"]) else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
