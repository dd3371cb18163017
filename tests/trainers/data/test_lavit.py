"""The training JSON of LaViT: reading with every bad row, where its paths lead, writing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trainers.data.lavit import lavit_row, read_lavit, resolve_feature_path, write_lavit_json
from trainers.data.records import (
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    record_from_row,
    records_to_dataset,
)
from trainers.data.teacher_signals import image_fingerprint, load_teacher_signals

GRID, WIDTH = (2, 3), 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A published data set: an image, and the signals of one sample."""
    for name in ("images", "features/vtop", "features/trajectories", "metadata"):
        (tmp_path / "data" / name).mkdir(parents=True)
    Image.new("RGB", (84, 56), "red").save(tmp_path / "data/images/a.png")
    signals(tmp_path, "sample_000007")
    return tmp_path


def signals(
    root: Path, name: str, tokens: int = 6, width: int = WIDTH, concept: float = 1, attention: Any = 1
) -> None:
    values = torch.full((tokens, width), concept, dtype=torch.bfloat16)
    torch.save(values, root / f"data/features/vtop/{name}_v_top_layer.pth")
    steps = [{"p_t": attention if isinstance(attention, list) else [attention] * tokens}]
    (root / f"data/features/trajectories/{name}_attention.json").write_text(json.dumps({"steps": steps}))


def row(name: str = "sample_000007", **changes: Any) -> dict[str, Any]:
    value = {
        "question": "What is it?",
        "ground_truth_enriched": "a kite",
        "image_relative_path": "a.png",
        "v_top_path_abs": f"data/features/vtop/{name}_v_top_layer.pth",
        "attention_path_abs": f"data/features/trajectories/{name}_attention.json",
        "question_id": 7,
        "dataset": "gqa",
        "split": "train",
        **changes,
    }
    return {key: content for key, content in value.items() if content is not None}


@pytest.fixture
def write(root: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = root / "data/metadata/lavit.json"
        path.write_text(json.dumps({"results": list(rows)}), encoding="utf-8")
        return path

    return write


def read(path: Path, **options: Any) -> tuple[list[dict], RecordReport]:
    report = RecordReport()
    return list(read_lavit(path, path.parents[1] / "images", report=report, **options)), report


# Reading


@pytest.mark.parametrize("check", ["content", "files"])
def test_a_row_becomes_a_record(write: Callable[..., Path], root: Path, check: str) -> None:
    path = write(row())
    (record,), report = read(path, check=check)
    assert (record["id"], record["question"], record["answer"]) == ("gqa-train-7", "What is it?", "a kite")
    assert record["images"] == [str(root / "data/images/a.png")]
    features = root / "data/features"
    assert record["teacher"] == {
        "concept": {"path": str(features / "vtop/sample_000007_v_top_layer.pth"), "key": None},
        "attention": {
            "path": str(features / "trajectories/sample_000007_attention.json"),
            "key": None,
            "step": 0,
        },
        "grid": None,
        "image": 0,
        "image_sha256": None,
    }
    assert record["meta"] == {
        "source": str(path),
        "row": 0,
        "index": 0,
        "ds_name": "lavit",
        "question_id": 7,
        "dataset": "gqa",
        "split": "train",
        "image_name": "a.png",
    }
    assert (report.num_good, report.num_bad) == (1, 0)
    loaded = load_teacher_signals(record_from_row(records_to_dataset([record], decode=False)[0]), concept_size=WIDTH)
    assert loaded.attention.tolist() == [1] * 6 and loaded.concept.shape == (6, WIDTH)


def test_the_answer_may_be_empty_and_the_id_unknown(write: Callable[..., Path]) -> None:
    (first, second), _ = read(
        write(row(ground_truth_enriched=None), row(question_id=None, ground_truth_enriched="", dataset=None))
    )
    assert (first["answer"], second["answer"], second["id"]) == ("", "", "lavit-1")


def test_the_first_rows_are_read(write: Callable[..., Path]) -> None:
    path = write(*(row(question_id=number) for number in range(4)), {"broken": True})
    assert [record["meta"]["question_id"] for record in read(path, max_samples=3)[0]] == [0, 1, 2]
    assert read(path, max_samples=0)[0] == []
    assert read(path)[1].num_bad == 1


def test_signals_that_are_not_needed_are_not_looked_at(write: Callable[..., Path]) -> None:
    path = write(row(attention_path_abs="data/none.json"), row(attention_path_abs=None))
    records, report = read(path, need=("concept",))
    assert report.num_bad == 0 and records[1]["teacher"]["attention"] is None
    assert read(path)[1].num_bad == 2
    assert len(read(write(row(v_top_path_abs="data/none.pth")), need=())[0]) == 1


@pytest.mark.parametrize(
    ("name", "image_root", "folder", "expected"),
    [
        ("/x/a.pth", "/r/data/images", "/f", "/x/a.pth"),
        ("data/v/a.pth", "/r/data/images", "/f", "/r/data/v/a.pth"),
        ("data/v/a.pth", "/r/data/images/more", None, "/r/data/v/a.pth"),
        ("data/v/a.pth", "/r/data/images/s/data/images", None, "/r/data/images/s/data/v/a.pth"),
        ("data/v/a.pth", "/data/images", None, "/data/v/a.pth"),
        ("data/v/a.pth", "/r/pictures", "/f", "/f/data/v/a.pth"),
        ("v/a.pth", "/r/data/images", "/f", "/f/v/a.pth"),
    ],
)
def test_feature_paths(name: str, image_root: str, folder: str | None, expected: str) -> None:
    assert resolve_feature_path(name, image_root, folder) == expected


def test_the_image_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert resolve_feature_path("data/v/a.pth", "images") == str(tmp_path / "data/v/a.pth")


def test_a_relative_path_without_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="'v/a.pth' is relative.*pass v_top_dir and attention_dir"):
        resolve_feature_path("v/a.pth", "/r/data/images")


def test_folders_of_the_signals(write: Callable[..., Path], root: Path) -> None:
    names = {"v_top_path_abs": "sample_000007_v_top_layer.pth", "attention_path_abs": "sample_000007_attention.json"}
    folders = {"v_top_dir": root / "data/features/vtop", "attention_dir": root / "data/features/trajectories"}
    records, report = read(write(row(**names)), **folders)
    assert len(records) == 1, report.summary()


def test_an_image_is_not_taken_from_the_working_directory(
    write: Callable[..., Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "data/images/a.png").rename(root / "a.png")
    monkeypatch.chdir(root)
    assert "does not exist" in read(write(row()))[1].first_bad[0].reason


# Bad rows


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "a row must be an object"),
        (row(question_id=[1]), "'question_id' must be a number or a string, got [1]"),
        (row(question=None), "record 'gqa-train-7': a row needs the string 'question'"),
        (row(question=" "), "record 'gqa-train-7': question is empty"),
        (row(question="Say <lvr2>"), "the question contains the learned token <lvr2>"),
        (row(ground_truth_enriched="<lvr> b"), "the answer contains the learned token <lvr>"),
        (row(ground_truth_enriched=["b"]), "needs the string 'ground_truth_enriched'"),
        (row(image_relative_path="none.png"), "record 'gqa-train-7': image file"),
        (row(image_relative_path=""), "the row has no image"),
        (row(image_relative_path=None), "needs the string 'image_relative_path'"),
        (row(v_top_path_abs=None), "v_top_path_abs is missing, so there is no concept to learn"),
        (row(attention_path_abs=""), "attention_path_abs is missing, so there is no attention to learn"),
        (row(v_top_path_abs=["a"]), "'v_top_path_abs' must be a path"),
        (row(v_top_path_abs="v/a.pth"), "v_top_path_abs: the path 'v/a.pth' is relative"),
        (row("sample_000008"), "record 'gqa-train-7': v_top_path_abs: file"),
        (row(attention_path_abs="data/none.json"), "attention_path_abs: file"),
        (row(record_fields=["a"]), "'record_fields' must be an object"),
        (row(record_fields={"images": []}), "'record_fields' must be an object"),
        (row(record_fields={"boxes": [{"image": 0, "xyxy": [2, 2, 3, 3]}]}), "is not {'image': index"),
    ],
)
def test_bad_rows(write: Callable[..., Path], value: Any, reason: str) -> None:
    records, report = read(write(row(), value), check="files")
    assert (len(records), report.num_bad) == (1, 1)
    assert report.first_bad[0].row == 1 and reason in report.first_bad[0].reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"concept": math.nan}, "values NaN or infinite"),
        ({"attention": [0.0] * 6}, "sums to zero"),
        ({"attention": [-1.0] * 6}, "negative weight"),
        ({"attention": [1.0] * 5}, "tokens"),
        ({"width": 5}, "5 wide, not 4"),
    ],
)
def test_the_content_of_signals_is_checked(
    write: Callable[..., Path], root: Path, changes: dict[str, Any], reason: str
) -> None:
    signals(root, "bad", **changes)
    path = write(row(), row("bad", question_id="x"))
    records, report = read(path, concept_size=WIDTH)
    assert (len(records), report.num_bad) == (1, 1)
    assert report.first_bad[0].row == 1
    assert "record 'gqa-train-x'" in report.first_bad[0].reason and reason in report.first_bad[0].reason
    assert len(read(path, check="files")[0]) == 2


def test_a_damaged_file_of_signals_is_a_bad_row(write: Callable[..., Path], root: Path) -> None:
    (root / "data/features/vtop/sample_000007_v_top_layer.pth").write_bytes(b"cut")
    assert "cannot be read" in read(write(row()))[1].first_bad[0].reason


def test_another_image_than_at_extraction_is_a_bad_row(write: Callable[..., Path], root: Path) -> None:
    with Image.open(root / "data/images/a.png") as image:
        same = image_fingerprint(image)
    other = row(record_fields={"teacher": {"image_sha256": "0" * 64}})
    records, report = read(write(row(record_fields={"teacher": {"image_sha256": same}}), other))
    assert (len(records), report.num_bad) == (1, 1) and "is not the one" in report.first_bad[0].reason
    grid = row(record_fields={"teacher": {"grid": [2, 2]}})
    assert "grid of 2x2" in read(write(grid))[1].first_bad[0].reason


def test_too_many_bad_rows_stop_the_run(write: Callable[..., Path], root: Path) -> None:
    records = read_lavit(write(row(), row("none")), root / "data/images")
    assert next(records)["answer"] == "a kite"
    with pytest.raises(RecordShareError, match="row 1: record 'gqa-train-7'"):
        next(records)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1, 2]", "a training JSON is"), ('{"records": []}', "a training JSON is"), ('{"results": [', "not JSON")],
)
def test_a_file_of_another_kind_is_refused(root: Path, text: str, reason: str) -> None:
    path = root / "data/metadata/other.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=reason):
        read(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"check": "all"}, "unknown check 'all'"),
        ({"need": ["vtop"]}, "unknown signal in need 'vtop'"),
        ({"max_samples": -1}, "max_samples must be 0 or more rows, got -1"),
    ],
)
def test_wrong_options(write: Callable[..., Path], root: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_lavit(write(row()), root, **options)


def test_missing_files(write: Callable[..., Path], root: Path) -> None:
    with pytest.raises(RecordError, match="the file does not exist"):
        read_lavit(root / "none.json", root)
    with pytest.raises(RecordError, match="image_folder .* does not exist"):
        read_lavit(write(row()), root / "none")


# Writing


def test_what_is_written_is_read_back(write: Callable[..., Path], root: Path) -> None:
    (record,), _ = read(write(row()))
    box = {"image": 0, "xyxy": [0.1, 0.2, 0.3, 0.4]}
    teacher = {**record["teacher"], "grid": [2, 3]}
    changed = {**record, "boxes": [box], "choices": ["a kite", "a bird"], "steps": ["Look."], "teacher": teacher}
    path = root / "new/lavit.json"
    assert write_lavit_json([changed, record], path, root / "data/images") == 2
    stored = json.loads(path.read_text())["results"]
    assert "record_fields" not in stored[1] and stored[1]["image_relative_path"] == "a.png"
    assert list(stored[1]) == [
        *("question_id", "dataset", "split", "question", "ground_truth_enriched", "image_relative_path"),
        *("v_top_path_abs", "attention_path_abs"),
    ]
    back = list(read_lavit(path, root / "data/images"))
    for written, found in zip((changed, record), back, strict=True):
        assert {**found, "meta": None} == {**written, "meta": None}
    assert [p.name for p in path.parent.iterdir()] == ["lavit.json"]


def test_rows_of_the_file_are_written_as_they_are(root: Path) -> None:
    path = root / "lavit.json"
    assert write_lavit_json([row(question="Wo\u00df?", more=1)], path) == 1
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == [row(question="Wo\u00df?", more=1)]
    with pytest.raises(RecordError, match="row 1: a row needs the string 'attention_path_abs'"):
        write_lavit_json([row(), row(attention_path_abs=None)], path)
    assert len(json.loads(path.read_text(encoding="utf-8"))["results"]) == 1


def test_an_image_outside_the_root_keeps_its_path(write: Callable[..., Path], root: Path) -> None:
    (record,), _ = read(write(row()))
    name = str(root / "data/images/a.png")
    assert lavit_row(record)["image_relative_path"] == name
    assert lavit_row(record, root / "other")["image_relative_path"] == name
    assert lavit_row(record, root)["image_relative_path"] == "data/images/a.png"


def test_what_the_format_cannot_hold_is_refused(write: Callable[..., Path], root: Path) -> None:
    (record,), _ = read(write(row()))
    teacher = record["teacher"]
    save_file({"c": torch.ones(4)}, root / "s.safetensors")
    shard = {"path": str(root / "s.safetensors"), "key": "c"}
    second_step = {**teacher["attention"], "step": 1}
    for change, reason in [
        ({"images": []}, "needs one image that is a file"),
        ({"images": [Image.new("RGB", (2, 2))]}, "needs one image that is a file"),
        ({"teacher": None}, "the concept must be in a file of its own, got None"),
        ({"teacher": {**teacher, "concept": shard}}, "the concept must be in a file of its own"),
        ({"teacher": {**teacher, "attention": {"values": [1.0]}}}, "the attention must be in a file of its own"),
        ({"teacher": {**teacher, "attention": second_step}}, "the attention must be in a file of its own"),
    ]:
        with pytest.raises(RecordError, match=f"row 0: record 'gqa-train-7': {reason}"):
            write_lavit_json([{**record, **change}], root / "new.json")
    assert not list(root.glob("new.json*"))
    with pytest.raises(RecordError, match="record 'x'"):
        lavit_row(make_record("x", "q", "a"))
