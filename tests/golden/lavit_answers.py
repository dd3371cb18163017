"""LaViT golden vectors: letters, scores, final answers, verdicts, turns of the data, and the builder's choice of rows
(card 5.2, 7.1, 7.3, 7.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.answers_lavit import (
    accuracy_lavit,
    count_learned_tokens,
    extract_final_answer,
    extract_letter_lavit,
    judge_verdict,
    parse_answer,
    parse_question,
    score_lavit,
)
from trainers.data.lavit import read_lavit, write_lavit_json
from trainers.data.records import Record, RecordReport
from trainers.data.viscot import read_viscot, shuffled_order

FOLDER = golden_dir("lavit")
ANSWERS: dict[str, Any] = golden_json(FOLDER, "answers.json", {})
BUILDER: dict[str, Any] = ANSWERS.get("builder", {})
IMAGES = "data/images"


def table(name: str) -> list[Any]:
    return ANSWERS.get(name, [])


def shown(*fields: str) -> Callable[[dict[str, Any]], str]:
    """Names a case by some of its fields."""
    return lambda case: " | ".join(repr(case[field])[:40] for field in fields)


@each("case", table("extract_answer_letter"), ids=shown("text"))
def test_letter_of_an_output(case: dict[str, Any]) -> None:
    assert extract_letter_lavit(case["text"]) == case["letter"]


@each("case", table("check_answer_correct"), ids=shown("prediction", "ground_truth"))
def test_score_of_an_output(case: dict[str, Any]) -> None:
    assert score_lavit(case["prediction"], case["ground_truth"], "reference") is case["correct"]


@each("expected", [ANSWERS["calculate_accuracy"]] if "calculate_accuracy" in ANSWERS else [], ids=lambda _: "all")
def test_accuracy_of_outputs(expected: dict[str, Any]) -> None:
    pairs = [(case["prediction"], case["ground_truth"]) for case in table("check_answer_correct")]
    assert accuracy_lavit(pairs) == expected


@each("case", table("lvr_count"), ids=shown("text"))
def test_count_of_learned_tokens(case: dict[str, Any]) -> None:
    assert count_learned_tokens(case["text"]) == case["count"]


@each("case", table("extract_final_answer"), ids=shown("text"))
def test_final_answer_of_a_teacher(case: dict[str, Any]) -> None:
    assert extract_final_answer(case["text"]) == case["answer"]


@each("case", table("judge_verdict"), ids=shown("reply"))
def test_verdict_of_the_judge(case: dict[str, Any]) -> None:
    assert judge_verdict(case["reply"], "reference") is case["accepted"]


@each("case", table("judge_verdict"), ids=shown("reply"))
def test_the_strict_verdict_differs_only_where_it_should(case: dict[str, Any]) -> None:
    """It gives none where the first word is neither yes nor no (or both are named), and reads through marks."""
    first = re.search(r"[A-Za-z]+", case["reply"])
    word = {"yes": True, "no": False}.get(first.group().lower() if first else "")
    both = re.match(r"(?i)\W*(yes|no)\W+(or|and)\W+(yes|no)\b", case["reply"])
    assert judge_verdict(case["reply"]) is (None if both else word)


@each("expected", [ANSWERS[key] for key in ("judge_api_failure_counts_as",) if key in ANSWERS])
def test_a_judge_that_fails(expected: bool) -> None:
    assert judge_verdict(None, "reference") is expected
    assert judge_verdict(None) is None


@each("case", table("parse_question"), ids=shown("text"))
def test_question_of_the_builder(case: dict[str, Any]) -> None:
    assert parse_question(case["text"]) == case["question"]


@each("case", table("extract_answer"), ids=shown("text"))
def test_answer_of_the_builder(case: dict[str, Any]) -> None:
    assert parse_answer(case["text"]) == case["answer"]


@each("case", table("shuffle_order"), ids=shown("seed", "n"))
def test_order_of_the_builder(case: dict[str, Any]) -> None:
    assert shuffled_order(case["n"], case["seed"]) == case["order"]


# The builder: which rows it takes, in which order, with which question and answer


@pytest.fixture
def builder_input(tmp_path: Path) -> Path:
    """The data file, beside the images that the builder found."""
    for name in BUILDER["copy_images"]["files"]:
        if name.startswith(IMAGES):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (56, 56)).save(tmp_path / name)
    (tmp_path / "data.json").write_text(json.dumps(BUILDER["input"]), encoding="utf-8")
    return tmp_path


def built(folder: Path) -> list[Record]:
    """The records that the published builder keeps: those that its judge accepts, with a number as question id."""
    rejected = re.search(r'rejects ground truth "(.*)"', BUILDER["judge"])
    assert rejected, BUILDER["judge"]
    report = RecordReport()
    options = {"layout": "formatted", "seed": BUILDER["random_seed"], "report": report}
    records = list(read_viscot(folder / "data.json", folder / IMAGES, **options))
    assert len(records) + report.num_bad == len(BUILDER["input"]), report.summary()
    return [
        record
        for record in records
        if record["answer"] != rejected[1] and isinstance(record["meta"].get("question_id"), int)
    ]


@each("variant", [name for name in ("copy_images", "no_copy_images") if name in BUILDER])
def test_training_json_of_the_builder(variant: str, builder_input: Path) -> None:
    """The rows, their order and texts; written with the published feature files they are the published file."""
    expected = json.loads(
        json.dumps(BUILDER[variant]["training_json"])
        .replace("<OUT>", builder_input.as_posix())
        .replace("<IMAGES>", (builder_input / IMAGES).as_posix())
    )
    records = built(builder_input)
    assert [record["meta"]["question_id"] for record in records] == [row["question_id"] for row in expected["results"]]
    for record, row in zip(records, expected["results"], strict=True):
        record["teacher"] = {
            "concept": {"path": row["v_top_path_abs"], "key": None},
            "attention": {"path": row["attention_path_abs"], "key": None, "step": 0},
        }
        for name in ("v_top_path_abs", "attention_path_abs"):
            Path(row[name]).parent.mkdir(parents=True, exist_ok=True)
            Path(row[name]).touch()
    path, root = builder_input / "written.json", builder_input / IMAGES
    write_lavit_json(records, path, root if variant == "copy_images" else None)
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    back = list(read_lavit(path, root, check="files"))
    assert [(r["question"], r["answer"]) for r in back] == [(r["question"], r["answer"]) for r in records]
    assert [r["images"] for r in back] == [r["images"] for r in records]
