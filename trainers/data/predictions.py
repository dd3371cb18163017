"""Files of predictions in the published forms: JSON lines of M3CoT, one JSON object of ScienceQA.

Paper: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 7).
A file appears only when all of it is written, and no prediction can take the place of another.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .json_rows import existing_file, iter_json_lines
from .records import Record, RecordError, record_origin

M3COT_FIELDS = ("id", "choices", "answer", "domain", "topic", "messages")
INDEXES = ("position", "row")


def m3cot_prediction(record: Record, question: str, output: str) -> dict[str, Any]:
    """One line of a prediction file of M3CoT.

    Args:
        record: of `read_m3cot`.
        question: the user text as it was asked (`staged_text.user_text`).
        output: the generated text.

    Returns:
        `id`, `choices`, `answer` (the gold letter), `domain`, `topic`, `messages` (`[question, output]`).

    Raises:
        RecordError: names file and row of a record without choices.
    """
    if not record["choices"]:
        raise RecordError(*record_origin(record), "no choices; read the records with read_m3cot")
    meta = record["meta"]
    return {
        "id": record["id"],
        "choices": record["choices"],
        "answer": record["answer"],
        "domain": meta.get("domain"),
        "topic": meta.get("topic"),
        "messages": [question, output],
    }


def write_m3cot_predictions(path: str | os.PathLike, predictions: Iterable[Mapping[str, Any]]) -> int:
    """Writes lines of [`m3cot_prediction`].

    Returns:
        Their number.

    Raises:
        RecordError: a field is missing or of the wrong type, or an id occurs twice; the row is that of the line.
    """
    seen: dict[str, int] = {}
    with whole_file(path) as file:
        for row, prediction in enumerate(predictions):
            _check_m3cot(prediction, path, row, seen)
            file.write(json.dumps({name: prediction[name] for name in M3COT_FIELDS}, ensure_ascii=False) + "\n")
    return len(seen)


def read_m3cot_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a prediction file of M3CoT.

    Raises:
        RecordError: no such file; a damaged line, a wrong field, an id that occurs twice.
    """
    path, seen, lines = existing_file(path), {}, []
    for row, value in iter_json_lines(path):
        if isinstance(value, RecordError):
            raise value
        _check_m3cot(value, path, row, seen)
        lines.append(value)
    return lines


def _check_m3cot(value: Any, path: str | os.PathLike, row: int, seen: dict[str, int]) -> None:
    missing = [name for name in M3COT_FIELDS if name not in value] if isinstance(value, Mapping) else M3COT_FIELDS
    if missing:
        raise RecordError(path, row, f"a prediction needs {list(missing)}, got {value!r:.120}; see m3cot_prediction()")
    messages = value["messages"]
    if not (isinstance(messages, list) and len(messages) == 2 and all(isinstance(text, str) for text in messages)):
        raise RecordError(path, row, f"messages must be [question, output], got {messages!r:.120}")
    if value["id"] in seen:
        raise RecordError(path, row, f"id {value['id']!r} was predicted in row {seen[value['id']]} already; drop one")
    seen[value["id"]] = row


def scienceqa_predictions(
    records: Sequence[Record], predictions: Sequence[int], index: str = "position"
) -> dict[int, int]:
    """Predictions by index.

    Args:
        records: of `read_scienceqa`.
        predictions: for each record the index of a choice (`answers_staged.extract_scienceqa`), -1 for none.
        index: `"position"` among the rows with an image, as published, or `"row"` of the data set.

    Raises:
        ValueError: the numbers of records and predictions differ; an unknown index.
        RecordError: names file and row of a record without that index, or with that of another record.
    """
    if index not in INDEXES:
        raise ValueError(f"unknown index {index!r}; choose 'position' (among the rows with an image) or 'row'")
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records but {len(predictions)} predictions; give one a record")
    results: dict[int, int] = {}
    for record, prediction in zip(records, predictions, strict=True):
        place = record["meta"].get(index)
        if not isinstance(place, int):
            raise RecordError(*record_origin(record), f"meta has no {index!r}; read the records with read_scienceqa")
        if place in results:
            raise RecordError(*record_origin(record), f"{index} {place} was predicted already; give each record once")
        results[place] = int(prediction)
    return results


def write_scienceqa_predictions(path: str | os.PathLike, results: Mapping[int, int]) -> int:
    """Writes `{"results": {index: prediction}}`, see [`scienceqa_predictions`].

    Returns:
        The number of predictions.

    Raises:
        RecordError: an index or a prediction that is no whole number.
    """
    for place, prediction in results.items():
        _check_result(path, place, prediction)
    with whole_file(path) as file:
        json.dump({"results": {str(place): results[place] for place in sorted(results)}}, file)
    return len(results)


def read_scienceqa_predictions(path: str | os.PathLike) -> dict[int, int]:
    """The predictions of such a file, by index.

    Raises:
        RecordError: no such file, not of this form, or an index that occurs twice.
    """
    path = existing_file(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise RecordError(path, None, "an index occurs twice; write the file again")
        return found

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(path, None, f"not JSON ({error}); the file was cut: write it again") from error
    results = value.get("results") if isinstance(value, Mapping) else None
    if not isinstance(results, Mapping):
        raise RecordError(path, None, f"needs {{'results': {{index: prediction}}}}, got {value!r:.120}")
    for place, prediction in results.items():
        _check_result(path, place, prediction)
    return {int(place): prediction for place, prediction in results.items()}


def _check_result(path: str | os.PathLike, place: Any, prediction: Any) -> None:
    whole = isinstance(prediction, int) and not isinstance(prediction, bool)
    if not (whole and str(place).isdecimal()):
        raise RecordError(path, None, f"index {place!r} with prediction {prediction!r}; both must be whole numbers")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[str]]:
    """A file that appears under its name when everything is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
