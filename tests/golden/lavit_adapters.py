"""LaViT golden vectors through its protocol: rows as they are asked, prediction lines, letters, scores (card 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_sets import record_of_choice
from evaluation.benchmarks.registry import benchmark
from evaluation.harness.published_outputs import lavit_line
from evaluation.runner import Prediction
from tests.evaluation.choice_files import encoded
from tests.golden.conftest import each, golden_dir, golden_json
from tests.tiny import tiny_images
from trainers.data.records import Record, RecordError, make_record
from trainers.data.sources import SkippedRow

ANSWERS: dict[str, Any] = golden_json(golden_dir("lavit"), "answers.json", {})
ADAPTERS: dict[str, Any] = ANSWERS.get("adapters", {})
ASKED = ("mmvp", "blink", "mmstar")
FACTS = ("id", "prompt", "ground_truth", "meta")


def said(raw: str) -> Prediction:
    return Prediction("", raw, raw, 4, 5, (), raw=raw)


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a set; their images, which the file only names, are a tiny one."""
    (picture,) = tiny_images(1)
    inside = {"bytes": encoded(picture), "path": None}
    rows = [
        {key: inside if value == "image bytes" else value for key, value in row.items()}
        for row in ADAPTERS[name]["input"]
    ]
    if name == "mmvp":
        (folder / "MMVP Images").mkdir()
        for row in rows:
            picture.save(folder / "MMVP Images" / f"{row['Index']}.jpg")
    return rows


def shown(record: Record, folder: Path) -> str:
    """The images in the form of the file: a path, or their number."""
    (*more, last) = record["images"]
    if isinstance(last, str):
        return f"mmvp/{Path(last).relative_to(folder).as_posix()}"
    return f"{1 + len(more)} image{'s' if more else ''}"


@each("name", [name for name in ADAPTERS if name in ASKED])
def test_rows_are_asked_and_written_as_published(name: str, tmp_path: Path) -> None:
    """A row whose answer is no option is refused here, and published code scores it as wrong: it is asked with
    another answer. A row without image is passed over by both."""
    wanted = {entry["id"]: entry for entry in ADAPTERS[name]["output"]}
    protocol, refused, skipped, written = benchmark(name).protocol("lavit"), [], [], []
    for number, row in enumerate(rows_of(name, tmp_path)):
        given = ["rows", number, tmp_path, "Toy" if name == "blink" else ""]
        truth = None
        try:
            record = record_of_choice(name, row, *given)
        except SkippedRow:
            skipped.append(row["idx"])
            continue
        except RecordError:
            truth = row["answer"]
            refused.append(truth)
            record = record_of_choice(name, {**row, "answer": "A"}, *given)
        line = {key: value for key, value in lavit_line(record, said("A"), protocol).items() if key in FACTS}
        line |= {"image": shown(record, tmp_path)} | ({} if truth is None else {"ground_truth": truth})
        written.append(line)
    assert (refused, skipped) == ((["neither"], ["val_Toy_4"]) if name == "blink" else ([], []))
    assert written == list(wanted.values()) and written


@each("names", [sorted(ADAPTERS)] if ADAPTERS else [], ids=lambda _: "all")
def test_every_data_set_of_the_file_is_tested(names: list[str]) -> None:
    unknown = sorted(set(names) - set(ASKED))
    if unknown:
        pytest.fail(f"no adapter is compared with the vectors of {unknown}; add it to ASKED")


def scored(name: str, raw: str, truth: str) -> tuple[bool, str | None]:
    return tuple(benchmark(name).protocol("lavit").score(make_record("0", "?", truth), said(raw)))


@each("case", ANSWERS.get("extract_answer_letter", []), ids=lambda case: repr(case["text"])[:40])
def test_the_protocol_reads_the_published_letter(case: dict[str, Any]) -> None:
    letter = case["letter"] and case["letter"].upper()
    for name in ("mmvp", "blink", "mmstar", "vstar"):
        assert scored(name, case["text"], letter or "A") == (letter is not None, letter), name


@each("case", ANSWERS.get("check_answer_correct", []), ids=lambda case: repr(case["prediction"])[:40])
def test_the_protocol_scores_as_published(case: dict[str, Any]) -> None:
    for name in ("mmvp", "blink", "mmstar", "vstar"):
        assert scored(name, case["prediction"], case["ground_truth"])[0] is case["correct"], name
