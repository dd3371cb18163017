"""ViRL39K as published: questions with verifiable answers, the data of the second stage of LVR.

Data: `TIGER-Lab/ViRL39K` on the Hub, one parquet file beside a folder of images, with the columns `question`, `answer`
(inside `\\boxed{}`), `image` (list of paths), `qid`, `category`, `source` and two pass rates. Paper of the method that
uses it here: "Latent Visual Reasoning", arXiv 2509.24251 (card section 2.7).
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .json_rows import existing_file, iter_rows
from .llava_text import expand_image_placeholders
from .lvr import check_question, question_record
from .lvr_text import LVR_TOKENS
from .records import Record, RecordError, RecordReport
from .sources import Source, read_sources
from .table_rows import parquet_rows

_BOXED = "\\boxed{"
_KEPT = ("category", "source", "PassRate_32BTrained", "PassRate_7BBase")


def read_virl39k(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """Reads the parquet file (streamed), or the same rows as a JSON list or JSON lines.

    `<image>` is taken out of the questions: some rows have an image and no placeholder. Bad rows are left out and
    counted in the report; see `lvr.check_question`.

    Args:
        path: the file.
        image_folder: where the paths of `image` begin; default: the folder of the file.
        latent_tokens: role to token string; a question must not contain them.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Returns:
        An iterator of records: `question`, `answer` (what is inside `\\boxed{}`), `images`, `messages` (the reply is
        `<answer>{answer}</answer>`, as in the LVR data); `meta` has source (file), row, index, ds_name, the columns
        `category` and `PassRate_*`, and `origin` (the column `source`).

    Raises:
        RecordError: at once for a missing file or folder.
        RecordShareError: after the last row, see `report`.
    """
    path = existing_file(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    if not folder.is_dir():
        raise RecordError(path, None, f"image_folder {os.fspath(folder)!r} does not exist; check the option")
    rows = parquet_rows(path) if path.suffix == ".parquet" else iter_rows(path)

    def check(record: Record, source: Path, row: int) -> None:
        check_question(record, source, row, latent_tokens)

    return read_sources([Source(path, folder, path.stem, rows)], _record, check, report)


def _record(value: Any, source: Path, row: int, image_folder: Path, ds_name: str, index: int) -> Record:
    if isinstance(value, RecordError):
        raise value
    if not (isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("question", "answer"))):
        raise RecordError(source, row, f"a row needs the strings 'question' and 'answer', got {value!r:.120}")
    question = expand_image_placeholders(value["question"], "")
    answer = unboxed(value["answer"])
    if answer is None:
        raise RecordError(source, row, f"the braces of the answer {value['answer']!r:.120} do not pair; repair it")
    solution = f"<answer>{answer}</answer>"
    name = str(value.get("qid") or f"{ds_name}-{row}")
    record = question_record(name, question, solution, value.get("image"), image_folder, (source, row))
    facts = {("origin" if key == "source" else key): value[key] for key in _KEPT if key in value}
    record["meta"] = {"source": os.fspath(source), "row": row, "index": index, "ds_name": ds_name, **facts}
    return record


def unboxed(text: str) -> str | None:
    """What stands inside the last `\\boxed{...}`, the whole text without one, None if its braces do not pair."""
    start = text.rfind(_BOXED)
    if start < 0:
        return text.strip()
    depth, begin = 1, start + len(_BOXED)
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None
