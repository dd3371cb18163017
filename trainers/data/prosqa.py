"""The text-only sets of Coconut: ProsQA, GSM8K with augmented steps, and ProntoQA.

Paper: "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut; card 11.2).

| reader | form |
|---|---|
| `read_prosqa` | JSON list (or JSON lines) of `{"question", "steps": [...], "answer"}`: ProsQA and any set like it |
| `read_gsm8k_steps` | text, a line `question||step step ...##answer` (any number of `#` from two on) |
| `read_prontoqa` | one JSON object of examples `{"question", "query", "chain_of_thought", "answer"}` |

Questions of the manner of ProsQA without end are in `graphs.py`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .json_rows import existing_file
from .records import Record, RecordError, RecordReport, make_record, validate_record
from .sources import Source, read_sources
from .staged_text import check_texts
from .table_rows import check_question_text, open_table, table_meta, text_fields

PRONTOQA_SPLITS = {"train": (0, 9000), "validation": (9000, 9200), "test": (9200, None)}


def read_prosqa(
    source: Any, split: str | None = None, *, require_steps: bool = False, report: RecordReport | None = None
) -> Iterator[Record]:
    """Reads rows of the form `{"question", "steps", "answer"}`. Bad rows are left out and counted in the report.

    Args:
        source: a JSON list, JSON-lines or parquet file, a `datasets` table, or a Hub id or folder (with `split`).
        split: part of a Hub id.
        require_steps: a row without steps is bad.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `steps`, `answer`, no images; `meta` has source (file), row, index and
        ds_name.

    Raises:
        RecordError: at once for a missing file.
        RecordShareError: after the last row, see `report`.
    """
    return _read(open_table(source, split), _steps_record, require_steps, report)


def read_gsm8k_steps(
    path: str | os.PathLike, *, require_steps: bool = False, report: RecordReport | None = None
) -> Iterator[Record]:
    """Reads lines `question||step step ...##answer`, as GSM8K is published with augmented steps.

    Args:
        path: the text file.
        require_steps, report: see [`read_prosqa`].

    Returns, Raises:
        See [`read_prosqa`].
    """
    path = existing_file(path)
    return _read(Source(path, path.parent, path.stem, _lines(path)), _gsm8k_record, require_steps, report)


def read_prontoqa(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    require_steps: bool = False,
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads ProntoQA: the question and its query, with two sentences of the chain a step.

    Args:
        path: one JSON object of examples, in order; an example may lie under the key `test_example`.
        split: `"train"` for the first 9,000 examples, `"validation"` for the next 200, `"test"` for the rest; all by
            default.
        require_steps, report: see [`read_prosqa`].

    Returns, Raises:
        See [`read_prosqa`]; also ValueError for an unknown split.
    """
    path = existing_file(path)
    if split is not None and split not in PRONTOQA_SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(PRONTOQA_SPLITS)}, or None for all")
    begin, end = PRONTOQA_SPLITS[split] if split else (0, None)
    rows = list(enumerate(_examples(path)))[begin:end]
    return _read(Source(path, path.parent, path.stem, rows), _prontoqa_record, require_steps, report)


def _read(
    source: Source,
    fields: Callable[[Any, tuple[Any, int]], dict[str, Any]],
    require_steps: bool,
    report: RecordReport | None,
) -> Iterator[Record]:
    def build(value: Any, name: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        record = make_record(id=f"{ds_name}-{row}", **fields(value, (name, row)))
        record["meta"] = table_meta(name, row, index, ds_name, {}, ())
        return record

    def check(record: Record, name: Any, row: int) -> None:
        validate_record(record, name, row)
        check_question_text(record, (name, row), require_steps)
        check_texts(record, (name, row))

    return read_sources([source], build, check, report)


def _steps_record(value: Any, origin: tuple[Any, int]) -> dict[str, Any]:
    value = text_fields(value, ("question", "answer"), origin)
    return {name: value.get(name) for name in ("question", "steps", "answer")}


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for row, line in enumerate(lines):
            try:
                yield row, line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield row, RecordError(path, row, f"the line is not UTF-8 ({error.reason}); fetch the file again")


def _gsm8k_record(value: Any, origin: tuple[Any, int]) -> dict[str, Any]:
    if isinstance(value, RecordError):
        raise value
    parts = re.fullmatch(r"(.*?)\|\|(.*?)##+(.*)", value, re.DOTALL)
    if parts is None:
        raise RecordError(*origin, f"the line is not 'question||steps##answer': {value!r:.120}; repair or remove it")
    return {"question": parts[1].strip(), "steps": parts[2].split(), "answer": parts[3].strip()}


def _examples(path: Path) -> list[Any]:
    try:
        examples = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise RecordError(path, None, f"not one JSON object ({error}); fetch the file again") from error
    if not isinstance(examples, Mapping):
        raise RecordError(path, None, f"must be one JSON object of examples, got {type(examples).__name__}")
    return [value.get("test_example", value) if isinstance(value, Mapping) else value for value in examples.values()]


def _prontoqa_record(value: Any, origin: tuple[Any, int]) -> dict[str, Any]:
    value = text_fields(value, ("question", "query", "answer"), origin)
    chain = value.get("chain_of_thought")
    if not (isinstance(chain, list) and all(isinstance(sentence, str) for sentence in chain)):
        raise RecordError(*origin, f"'chain_of_thought' must be a list of sentences, got {chain!r:.120}")
    steps = [" ".join(chain[start : start + 2]) for start in range(0, len(chain), 2)]
    return {"question": f"{value['question']} {value['query']}", "steps": steps, "answer": value["answer"]}
