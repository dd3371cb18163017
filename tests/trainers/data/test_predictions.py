"""Files of predictions: their published forms, the way back, and that none is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainers.data.predictions import (
    m3cot_prediction,
    read_m3cot_predictions,
    read_scienceqa_predictions,
    scienceqa_predictions,
    write_m3cot_predictions,
    write_scienceqa_predictions,
)
from trainers.data.records import Record, RecordError, make_record


def record(id: str = "p-1", **meta: Any) -> Record:
    facts = {"source": "f.json", "row": 4, "domain": "science", "topic": "physics", **meta}
    return make_record(id, "Which?", "B", choices=["ice", "fire"], meta=facts)


def test_m3cot(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    lines = [m3cot_prediction(record(f"p-{i}"), "[Question]:{Which?}\n", f"the answer is é{i}") for i in range(3)]
    assert write_m3cot_predictions(path, iter(lines)) == 3
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == {
        "id": "p-1",
        "choices": ["ice", "fire"],
        "answer": "B",
        "domain": "science",
        "topic": "physics",
        "messages": ["[Question]:{Which?}\n", "the answer is é1"],
    }
    assert list(lines[0]) == ["id", "choices", "answer", "domain", "topic", "messages"]
    assert read_m3cot_predictions(path) == lines
    assert list(path.parent.iterdir()) == [path]


def test_scienceqa(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    records = [record(position=0, row=1), record(position=1, row=11), record(position=10, row=2)]
    by_position = scienceqa_predictions(records, [1, -1, 0])
    assert by_position == {0: 1, 1: -1, 10: 0}
    assert scienceqa_predictions(records, [1, -1, 0], index="row") == {1: 1, 11: -1, 2: 0}
    assert write_scienceqa_predictions(path, by_position) == 3
    assert path.read_text() == '{"results": {"0": 1, "1": -1, "10": 0}}'
    assert read_scienceqa_predictions(path) == by_position


def test_an_id_occurs_once_and_nothing_is_written_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before\n")
    line = m3cot_prediction(record(), "q", "a")
    with pytest.raises(RecordError, match=r"out\.jsonl, row 1: id 'p-1' was predicted in row 0 already; drop one"):
        write_m3cot_predictions(path, [line, line])
    assert path.read_text() == "before\n" and list(tmp_path.iterdir()) == [path]
    path.write_text(2 * (json.dumps(line) + "\n"))
    with pytest.raises(RecordError, match="row 1: id 'p-1' was predicted in row 0 already"):
        read_m3cot_predictions(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "x"}, r"a prediction needs \['choices', 'answer', 'domain', 'topic', 'messages'\]"),
        (3, "a prediction needs"),
        ({**m3cot_prediction(record(), "q", "a"), "messages": ["q"]}, r"messages must be \[question, output\], got"),
        ({**m3cot_prediction(record(), "q", "a"), "messages": ["q", 3]}, "messages must be"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(RecordError, match=rf"row 1: {reason}"):
        write_m3cot_predictions(path, [m3cot_prediction(record("first"), "q", "a"), line])
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(RecordError, match=rf"row 0: {reason}"):
        read_m3cot_predictions(path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": ')
    with pytest.raises(RecordError, match="line 1 .* is not one JSON object"):
        read_m3cot_predictions(path)
    path.write_text('{"results": {"0": 1')
    with pytest.raises(RecordError, match="the file was cut"):
        read_scienceqa_predictions(path)


def test_no_prediction_takes_the_place_of_another(tmp_path: Path) -> None:
    records = [record(position=0), record(position=0)]
    with pytest.raises(RecordError, match=r"f\.json, row 4: position 0 was predicted already; give each record once"):
        scienceqa_predictions(records, [1, 1])
    with pytest.raises(ValueError, match="2 records but 1 predictions; give one a record"):
        scienceqa_predictions(records, [1])
    with pytest.raises(RecordError, match=r"f\.json, row 4: meta has no 'position'; read the records with read_scien"):
        scienceqa_predictions([record()], [1])
    with pytest.raises(ValueError, match="unknown index 'id'; choose 'position'"):
        scienceqa_predictions(records, [1, 1], index="id")
    with pytest.raises(RecordError, match=r"f\.json, row 4: no choices; read the records with read_m3cot"):
        m3cot_prediction({**record(), "choices": None}, "q", "a")
    path = tmp_path / "out.json"
    for text, reason in (
        ('{"results": {"0": 1, "0": 2}}', "an index occurs twice"),
        ('{"results": {"0": "1"}}', "index '0' with prediction '1'; both must be whole numbers"),
        ('{"results": {"x": 1}}', "index 'x' with prediction 1; both must be whole numbers"),
        ("[]", r"needs {'results': {index: prediction}}, got \[\]"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=reason):
            read_scienceqa_predictions(path)
    with pytest.raises(RecordError, match="index 0 with prediction None; both must be whole numbers"):
        write_scienceqa_predictions(path, {0: None})
    assert path.read_text() == "[]"
