"""Longer answers of Visual-CoT's metadata: which line matches a record, and what is wrong with a file."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from trainers.data.records import RecordError, make_record
from trainers.data.viscot_answers import enrich_answers

LINES = [
    {"image": "a.jpg", "question": "What colour is the kite?", "answer": "The kite is blue.", "bboxs": [[1, 2, 3, 4]]},
    {"image": "a.jpg", "question": "What colour is it?", "answer": "It is the kite that is red."},
    {"image": "a.jpg", "question": "Where?", "answer": "up"},
    {"image": "b.jpg", "question": "What colour is the kite?", "answer": "Green, as far as one can see."},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gqa_cot_train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def record(question: str, answer: str = "blue", image: Any = "cot/gqa/a.jpg", **meta: Any) -> dict[str, Any]:
    made = make_record("r", question, answer, [image])
    return {**made, "meta": {"dataset": "gqa", **meta}}


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        (record("What colour is the kite?"), "The kite is blue."),
        (record(" what  COLOUR is the kite? "), "The kite is blue."),
        (record("What colour is the kite? Answer in one word."), "The kite is blue."),  # contains a line's question
        (record("colour is it"), "It is the kite that is red."),  # is contained
        (record("What colour is"), "It is the kite that is red."),  # in two; the nearer one
        (record("What colour is the kite?", image="x/b.jpg"), "Green, as far as one can see."),
        (record("What colour is the kite?", image="x.png", image_name="v/b.jpg"), "Green, as far as one can see."),
        (record("Where?"), "blue"),  # the line's is shorter
        (record("Who?"), "blue"),
        (record("What colour is the kite?", image="c.jpg"), "blue"),
        (record("What colour is the kite?", image={"bytes": b"x", "path": None}), "blue"),
        (record(" "), "blue"),
    ],
)
def test_lines_match_by_image_and_question(folder: Path, changed: dict[str, Any], answer: str) -> None:
    (found,) = enrich_answers([changed], folder)
    assert found["answer"] == answer
    assert found["meta"].get("ground_truth") == (None if answer == "blue" else "blue")
    assert changed["answer"] == "blue" and "ground_truth" not in changed["meta"]


def test_records_of_no_data_set_are_passed_on_and_the_log_counts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_record("o", "What colour is the kite?", "blue", ["a.jpg"])
    with caplog.at_level(logging.INFO):
        assert list(enrich_answers([other, record("What colour is it?")], folder))[0] == other
    assert "1 of 2 answers were replaced" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        list(enrich_answers([other], folder))
    assert "0 of 1 answers were replaced" in caplog.text


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    with pytest.raises(RecordError, match="cub_cot_train.jsonl, whole file: the file does not exist"):
        list(enrich_answers([record("Q", dataset="cub")], folder))
    (folder / "cub_cot_train.jsonl").write_text('{"image": "a.jpg", "question": "Q"}\n')
    with pytest.raises(RecordError, match="row 0: a row needs the string 'answer'"):
        list(enrich_answers([record("Q", dataset="cub")], folder))
    (folder / "cub_cot_train.jsonl").write_text('{"image": "a.jpg", "que')
    with pytest.raises(RecordError, match="is not one JSON object"):
        list(enrich_answers([record("Q", dataset="cub")], folder))
