"""The data sets that DMLR was evaluated on, by name, from where their authors publish them; its data files by path.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7.5). The
repository of the paper has questions without images, and its ScienceQA file lacks every answer that is option A; here
the records come from the original data sets, images and all answers included, in the form of the data JSON
(`trainers/data/dmlr.py`), which `write_dmlr_json` writes. `search_items.py` says how a row is asked; MMStar and MMVP
are read by `choice_benchmarks.py`.
"""

import contextlib
import itertools
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.boxes import checked_option
from trainers.data.dmlr import check_dmlr, read_dmlr
from trainers.data.json_rows import existing_file, iter_rows
from trainers.data.records import Record, RecordError, RecordReport, make_record, validate_record
from trainers.data.sources import SkippedRow, Source, read_sources
from trainers.data.table_rows import open_table, parquet_rows, row_images, text_fields, with_positions

from .choice_benchmarks import read_choice_set
from .choice_items import mmstar_facts
from .read_tables import checked_columns, fetch_files
from .search_items import (
    SearchItem,
    hallusion_item,
    math_vision_item,
    math_vista_item,
    mm_math_item,
    mmstar_item,
    mmvp_item,
    scienceqa_item,
)

NO_IMAGE = "row without image"
_TABLES = (".parquet", ".json", ".jsonl")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class SearchTask:
    """A data set.

    Args:
        repository: on the Hub.
        split: of a repository of tables; None for one of files.
        num_rows: as many questions the data file of the paper has; None where it is not known.
        item: from a row to what is asked; None for sets that `choice_benchmarks.py` reads.
        texts: columns that hold text in every row.
        others: further columns that every row has.
        files: patterns of the files to fetch, where the repository has no tables.
        skip_without_image: rows without image are no part of the set.
    """

    repository: str
    split: str | None
    num_rows: int | None
    item: Callable[[Mapping[str, Any]], SearchItem] | None = None
    texts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    skip_without_image: bool = False


SEARCH_TASKS: dict[str, SearchTask] = {
    "hallusion": SearchTask(
        "lmms-lab/HallusionBench",
        "image",
        951,
        hallusion_item,
        ("question",),
        ("gt_answer", "image", "category", "subcategory", "set_id", "figure_id", "question_id"),
    ),
    "math_vision": SearchTask(
        "MathLLMs/MathVision",
        "test",
        3040,
        math_vision_item,
        ("question", "answer"),
        ("id", "options", "decoded_image"),
    ),
    "math_vista": SearchTask(
        "AI4Math/MathVista",
        "testmini",
        1000,
        math_vista_item,
        ("query", "answer"),
        ("pid", "choices", "decoded_image"),
    ),
    "mmstar": SearchTask("Lin-Chen/MMStar", None, 1500, files=("mmstar.parquet",)),
    "mmvp": SearchTask("MMVP/MMVP", None, 300, files=("Questions.csv", "MMVP Images/*")),
    "scienceqa": SearchTask(
        "derek-thomas/ScienceQA",
        "test",
        2017,
        scienceqa_item,
        ("question",),
        ("choices", "answer", "image"),
        skip_without_image=True,
    ),
    "mm_math": SearchTask(
        "THU-KEG/MM_Math",
        None,
        None,
        mm_math_item,
        ("question", "solution", "file_name"),
        files=("*MM_Math.jsonl", "*MM_Math.zip"),
    ),
}


def read_search(
    dataset: str | os.PathLike,
    data_root: str | os.PathLike | None = None,
    *,
    start_data_idx: int = 0,
    end_data_idx: int | None = None,
    report: RecordReport | None = None,
    **json_options: Any,
) -> list[Record]:
    """The records of a data set by name, or of a data JSON by path.

    Args:
        dataset: a name in `SEARCH_TASKS`, or the path of a data JSON.
        data_root: of a name: a folder of its files as published (tables `<split>-*.parquet` there or in `data/`, or
            one table), or the table itself; without it, they are fetched from the Hub. Of a path: where image paths
            begin, default the folder of the file.
        start_data_idx, end_data_idx: positions to read, the end excluded; None for all from the start on.
        report: collects good, bad and skipped rows (of ScienceQA those without image are skipped, as in the paper's
            file); without one, reading ends with an error above 1 % bad rows. Of a name, rows before the slice count.
        json_options: of a path: `repair`, `empty_answers`, `null_answers`, `check` of `read_dmlr`.

    Returns:
        Records: `question`, `answer` (see `search_items.py`), `choices` where they are known, `images` (one). `meta`
        has source, row, data_idx (the position, bad rows counted, whatever slice is read), ds_name and extra (further
        columns).

    Raises:
        ValueError: neither a name nor a file; an option that does not go with it; a slice without record.
        RecordError: a missing file, folder or column, a repository that cannot be fetched.
        RecordShareError: see `report`.
    """
    name = os.fspath(dataset)
    if name not in SEARCH_TASKS:
        if not os.path.isfile(name):
            raise ValueError(f"dataset={name!r} is neither a file nor one of the names {list(SEARCH_TASKS)}")
        options = {"start_data_idx": start_data_idx, "end_data_idx": end_data_idx, "report": report, **json_options}
        return list(read_dmlr(name, data_root, **options))
    if json_options:
        raise ValueError(f"{sorted(json_options)}: options of a data JSON, and {name!r} is read as published")
    for option, value in (("start_data_idx", start_data_idx), ("end_data_idx", end_data_idx)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{option}={value!r} must be a position, 0 or more")
    own_report = report is None
    report = RecordReport() if own_report else report
    records = _choice_records(name, data_root, report) if SEARCH_TASKS[name].item is None else None
    records = _table_records(name, data_root, report) if records is None else records
    found = []
    for record in records:
        position = record["meta"]["data_idx"]
        if end_data_idx is not None and position >= end_data_idx:
            break
        if position >= start_data_idx:
            found.append(record)
    if own_report:
        report.check()
    if not found:
        raise ValueError(
            f"{name!r} has no record from start_data_idx={start_data_idx} to end_data_idx={end_data_idx}: "
            f"{report.summary()}"
        )
    return found


# MMStar and MMVP


def _choice_records(name: str, data_root: str | os.PathLike | None, report: RecordReport) -> Iterator[Record]:
    for record in read_choice_set(name, _root(name, data_root), report=report):
        meta, fields = record["meta"], record["meta"]["fields"]
        if name == "mmvp":
            prompt, solution = mmvp_item(fields)
            extra = {key: value for key, value in fields.items() if key != "task"}
        else:
            prompt, solution = mmstar_item(record["question"], record["answer"], record["choices"])
            extra = mmstar_facts(fields)
        record |= {"question": prompt, "answer": solution}
        record["meta"] = {key: meta[key] for key in ("source", "row", "ds_name")}
        record["meta"] |= {"data_idx": meta["row"], "extra": extra}
        yield record


# Tables


def record_from_search(
    dataset: str, value: Any, source: Any, row: int, image_folder: str | os.PathLike = "."
) -> Record:
    """The record of one row as published, of a set with an `item`.

    Raises:
        RecordError: the row is damaged or lacks a column; an answer that is none of the choices; an image that is
            missing or none.
        SkippedRow: for a row without image that is no part of the set.
        ValueError: an unknown data set, or one that `choice_benchmarks.py` reads.
    """
    named = tuple(name for name, task in SEARCH_TASKS.items() if task.item is not None)
    task, origin = SEARCH_TASKS[checked_option("dataset", dataset, named)], (source, row)
    value = text_fields(value, task.texts, origin)
    missing = [name for name in task.others if name not in value]
    if missing:
        raise RecordError(*origin, f"the row lacks the columns {missing}, it has {list(value)}; repair the row")
    if task.skip_without_image and value["image"] is None:
        raise SkippedRow(NO_IMAGE)
    try:
        item = task.item(value)
    except (TypeError, ValueError) as error:  # a column of another type or value than published
        raise RecordError(*origin, f"the row is not as published ({error}); repair it") from error
    record = make_record(
        id=item.id or f"{dataset}-{row}",
        question=item.prompt,
        answer=item.solution,
        images=row_images(item.image, Path(image_folder), origin, "refuse"),
        choices=item.choices,
    )
    record["meta"] = {"source": os.fspath(source), "row": row, "ds_name": dataset, "extra": item.extra}
    return record


def _table_records(name: str, data_root: str | os.PathLike | None, report: RecordReport) -> Iterator[Record]:
    task = SEARCH_TASKS[name]
    if name == "mm_math":
        source = _mm_math_source(_root(name, data_root))
    elif data_root is None:
        source = open_table(task.repository, task.split)
    else:
        source = _local_source(name, Path(data_root))

    def build(value: Any, path: Any, row: int, folder: Path, ds_name: str, index: int) -> Record:
        return record_from_search(name, value, path, row, folder)

    def check(record: Record, path: Any, row: int) -> None:
        validate_record(record, path, row)
        check_dmlr(record, path, row)

    checked = checked_columns(source, (*task.texts, *task.others))
    for record in read_sources([checked], with_positions(build), check, report):
        record["meta"]["data_idx"] = record["meta"].pop("position")
        yield record


def _local_source(name: str, root: Path) -> Source:
    """The table or tables of a split below a folder, or a table itself, as one."""
    split = SEARCH_TASKS[name].split
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(root.glob(f"{split}-*.parquet")) or sorted(root.glob(f"data/{split}-*.parquet"))
        files = files or [path for path in sorted(root.iterdir()) if path.suffix in _TABLES and path.is_file()]
    else:
        raise RecordError(root, None, "neither a file nor a folder; check data_root")
    whole = all(path.name.startswith(f"{split}-") for path in files)
    if not files or not (whole or len(files) == 1):
        raise RecordError(
            root,
            None,
            f"holds no table {split}-*.parquet, in data/ neither, and {len(files)} other tables; name the file of "
            f"{name} as data_root",
        )
    rows = itertools.chain.from_iterable(
        parquet_rows(path) if path.suffix == ".parquet" else iter_rows(path) for path in files
    )
    path = files[0] if len(files) == 1 else root
    return Source(path, files[0].parent, name, ((number, value) for number, (_, value) in enumerate(rows)))


def _mm_math_source(root: Path) -> Source:
    """The lines of MM-MATH, each with its picture, from beside it or from the archive."""
    lines = sorted(root.rglob("MM_Math.jsonl")) if root.is_dir() else [existing_file(root)]
    if not lines:
        raise RecordError(root, None, "holds no MM_Math.jsonl; check data_root")
    folder = root if root.is_dir() else root.parent
    pictures = {path.name: path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES}
    return Source(
        lines[0], lines[0].parent, "mm_math", _with_pictures(lines[0], pictures, sorted(folder.rglob("*.zip")))
    )


def _with_pictures(lines: Path, pictures: Mapping[str, Path], archives: list[Path]) -> Iterator[tuple[int, Any]]:
    """Each line with `image`: the path of its picture, its bytes in an archive, or the name of one that is missing."""
    with contextlib.ExitStack() as stack:
        packed: dict[str, tuple[zipfile.ZipFile, str]] = {}
        for archive in archives:
            try:
                opened = stack.enter_context(zipfile.ZipFile(archive))
            except zipfile.BadZipFile as error:
                raise RecordError(archive, None, f"not a readable archive ({error}); fetch it again") from error
            packed |= {Path(member).name: (opened, member) for member in opened.namelist()}
        for row, value in iter_rows(lines):
            name = value.get("file_name") if isinstance(value, Mapping) else None
            if name in pictures:
                value = {**value, "image": os.fspath(pictures[name])}
            elif name in packed:
                opened, member = packed[name]
                value = {**value, "image": {"bytes": opened.read(member), "path": name}}
            elif isinstance(name, str):
                value = {**value, "image": name}
            yield row, value


def _root(name: str, data_root: str | os.PathLike | None) -> Path:
    """The folder of a data set's files, fetched where none is given.

    Raises:
        RecordError: the repository cannot be fetched.
    """
    if data_root is not None:
        if not os.path.exists(data_root):
            raise RecordError(data_root, None, "neither a file nor a folder; check data_root")
        return Path(data_root)
    return fetch_files(SEARCH_TASKS[name].repository, SEARCH_TASKS[name].files)


__all__ = ["NO_IMAGE", "SEARCH_TASKS", "SearchTask", "read_search", "record_from_search"]
