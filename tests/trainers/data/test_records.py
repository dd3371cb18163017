"""The record: table round trip, checks, and the report of bad rows."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from PIL import Image

from trainers.data.records import (
    RECORD_FIELDS,
    Record,
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    record_features,
    record_from_row,
    record_to_row,
    records_to_dataset,
    validate_record,
)

ROOT = Path(__file__).resolve().parents[3]


def full_record(image: object) -> Record:
    return make_record(
        id="x-1",
        question="What is it?",
        answer="cat",
        images=[Image.new("RGB", (6, 4), (10, 20, 30)), image],
        choices=["cat", "dog"],
        chain=["room", "cat"],
        steps=["Look at the room.", "See the cat."],
        boxes=[{"image": 1, "xyxy": [0.1, 0.2, 0.30000000000000004, 1.0]}],
        step_images=[Image.new("L", (3, 3), 7)],
        teacher={"file": "t.safetensors", "rows": [[0.25, 0.75]]},
        messages=[{"role": "user", "content": "<image><image>\nWhat is it?"}],
        meta={"source": "a.json", "row": 3, "nested": {"é": [1, None]}},
    )


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "p.png"
    Image.new("RGB", (5, 5), (1, 2, 3)).save(path)
    return str(path)


def assert_same(record: Record, expected: Record) -> None:
    """Equal field by field; images by pixels, where a path stands for the picture in it."""
    for name in set(RECORD_FIELDS) - {"images", "step_images"}:
        assert record[name] == expected[name], name
    for name in ("images", "step_images"):
        if expected[name] is None:
            assert record[name] is None
            continue
        opened = [Image.open(image) if isinstance(image, str) else image for image in expected[name]]
        assert [(i.mode, i.size, i.tobytes()) for i in record[name]] == [(i.mode, i.size, i.tobytes()) for i in opened]


def test_a_table_gives_the_records_back(picture: str) -> None:
    records = [full_record(picture), make_record("x-2", "Text only?", "yes"), make_record("x-3", "q", "a", chain=[])]
    table = records_to_dataset(records)
    assert table.features == record_features()
    for row, record in zip(table, records, strict=True):
        assert_same(record_from_row(row), record)


def test_parquet_keeps_the_schema_and_the_records(picture: str, tmp_path: Path) -> None:
    records_to_dataset([full_record(picture)]).to_parquet(str(tmp_path / "d.parquet"))
    table = Dataset.from_parquet(str(tmp_path / "d.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table.features == record_features()
    assert_same(record_from_row(table[0]), full_record(picture))


def test_a_stream_gives_the_records_back(picture: str) -> None:
    records = [full_record(picture), make_record("x-2", "Text only?", "yes")]
    stream = IterableDataset.from_generator(lambda: map(record_to_row, records), features=record_features())
    for row, record in zip(stream, records, strict=True):
        assert_same(record_from_row(row), record)


def test_a_row_of_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"missing columns \['answer'.*unknown columns \['label'\]"):
        record_from_row({"id": "1", "question": "q", "label": 3})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": 7}, "id must be a string, got 7"),
        ({"answer": None}, "answer must be a string, got None"),
        ({"images": None}, "images must be a list"),
        ({"images": [3.5]}, "images must hold PIL images or paths, got float: 3.5"),
        ({"chain": "cat"}, "chain must be a list of non-empty strings or None, got 'cat'"),
        ({"chain": ["cat", " "]}, "chain must be a list of non-empty strings"),
        ({"steps": [1]}, r"steps must be a list of non-empty strings or None, got \[1\]"),
        ({"boxes": [{"image": 2, "xyxy": [0, 0, 1, 1]}]}, r"an index below 2 \(the number of images\)"),
        ({"boxes": [{"image": 0, "xyxy": [0, 0, 56, 56]}]}, "divide pixels by the image size"),
        ({"boxes": [{"image": 0, "xyxy": [0.5, 0, 0.5, 1]}]}, "is not"),
        ({"boxes": [{"image": 0, "xyxy": [0, 0, float("nan"), 1]}]}, "is not"),
        ({"boxes": [[0, 0, 1, 1]]}, "is not"),
        ({"messages": [{"role": "user"}]}, "messages must hold"),
        ({"meta": None}, "meta must be a dict, got None"),
        ({"meta": {"x": {1, 2}}}, "meta must be JSON-able"),
        ({"teacher": {"x": b"raw"}}, "teacher must be JSON-able"),
        ({"extra": 1}, r"unknown fields \['extra'\]"),
    ],
)
def test_a_wrong_field_names_file_row_and_value(change: dict, reason: str, picture: str) -> None:
    record = {**full_record(picture), **change}
    with pytest.raises(RecordError, match=rf"^file\.json, row 5: .*{reason}"):
        validate_record(record, "file.json", 5)


def test_the_full_record_is_valid_and_unknown_fields_are_refused(picture: str) -> None:
    validate_record(full_record(picture), "file.json", 0)
    with pytest.raises(ValueError, match=r"unknown record fields \['label'\]"):
        make_record("1", "q", "a", label="x")


def test_a_bad_record_in_a_table_names_its_origin(picture: str) -> None:
    with pytest.raises(RecordError, match=r"^a\.json, row 3: chain"):
        records_to_dataset([{**full_record(picture), "chain": [""]}])


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RecordError("a.json", 4, "why")))
    assert (error.file, error.row, error.reason, str(error)) == ("a.json", 4, "why", "a.json, row 4: why")
    assert str(RecordError("a.json", None, "cut")) == "a.json, whole file: cut"


def test_the_report_lists_the_first_ten_and_counts_the_rest() -> None:
    report = RecordReport()
    report.good()
    for row in range(12):
        report.bad("a.json", row, f"reason {row}")
    report.skipped("blacklist")
    report.skipped("blacklist")
    lines = report.summary().splitlines()
    assert lines[0] == "1 good rows, 12 bad rows (92.31% bad)"
    assert lines[1] == "  skipped on request: 2 (blacklist)"
    assert lines[2:12] == [f"  a.json, row {row}: reason {row}" for row in range(10)]
    assert lines[12:] == ["  and 2 more"]


def test_the_run_stops_above_the_share_and_warns_below(caplog: pytest.LogCaptureFixture) -> None:
    report = RecordReport(max_bad_share=0.01)
    for _ in range(99):
        report.good()
    with caplog.at_level(logging.WARNING):
        report.check()
        assert not caplog.records
        report.bad("a.json", 7, "no picture")
        report.check()  # exactly 1 %
    assert "a.json, row 7: no picture" in caplog.text
    report.bad("a.json", 8, "no chain")
    with pytest.raises(RecordShareError, match=r"(?s)max_bad_share=0.01; .*2 bad.*row 7: no pic.*row 8: no chain"):
        report.check()
    report.check(max_bad_share=0.02)


def test_skipped_rows_do_not_count_as_bad() -> None:
    report = RecordReport(max_bad_share=0.0)
    report.skipped("filter")
    report.check()
    assert report.bad_share == 0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_the_share_must_be_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="max_bad_share must be between 0 and 1"):
        RecordReport(max_bad_share=share)


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['trainers'] = package = types.ModuleType('trainers')\n"  # the parent may import torch
        "package.__path__ = ['trainers']\n"
        "import trainers.data\n"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
