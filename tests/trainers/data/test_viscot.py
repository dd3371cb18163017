"""Visual-CoT: the three layouts, the published order, the two boxes of a raw row, every bad row."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainers.data.records import RecordError, RecordReport, RecordShareError, record_from_row, records_to_dataset
from trainers.data.viscot import read_viscot, record_from_viscot, shuffled_order
from trainers.data.viscot_boxes import boxes_agree

REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
SIZE = (200, 100)  # of the image, so its square begins 50 pixels above it
BOX, FRACTIONS = [20, 10, 120, 60], "[0.100, 0.300, 0.600, 0.550]"


def talk(*values: str) -> list[dict[str, str]]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def raw(box: Any = BOX, told: str = FRACTIONS, question: str = "<image>\nWho?" + REQUEST, **changes: Any) -> dict:
    value = {
        "image": ["cot/a.png", f"cot/a.png###{box}"],
        "conversations": talk(question, told, "<image>", "A girl."),
        "question_id": 7,
        "dataset": "gqa",
        "split": "train",
        **changes,
    }
    return {name: content for name, content in value.items() if content is not None}


def formatted(**changes: Any) -> dict:
    value = {
        "image": ["cot/a.png"],
        "conversations": talk("<image>\nWho?", "<lvr>\n<answer> A girl. </answer>"),
        "bboxes": [[0.1, 0.1, 0.6, 0.6]],
        "question_id": "q7",
        "dataset": "gqa",
        "split": "train",
        **changes,
    }
    return {name: content for name, content in value.items() if content is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "cot").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE).save(tmp_path / "images" / "cot" / name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "data.json") -> Path:
        path = folder / name
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows), encoding="utf-8")
        return path

    return write


def read(path: Path, **options: Any) -> tuple[list[dict], RecordReport]:
    report = RecordReport()
    return list(read_viscot(path, path.parent / "images", report=report, **options)), report


# Layouts


@pytest.mark.parametrize(("name", "layout"), [("data.json", "raw"), ("data.jsonl", "auto"), ("data.json", "mixed")])
def test_a_raw_row(write: Callable[..., Path], folder: Path, name: str, layout: str) -> None:
    (record,), report = read(write([raw()], name), layout=layout)
    assert (record["id"], record["question"], record["answer"]) == ("data-0", "Who?", "A girl.")
    assert record["images"] == [str(folder / "images" / "cot" / "a.png")]
    assert record["boxes"] == [{"image": 0, "xyxy": [0.1, 0.1, 0.6, 0.6]}]
    assert record["meta"] == {
        "source": str(folder / name),
        "row": 0,
        "index": 0,
        "ds_name": "data",
        "question_id": 7,
        "dataset": "gqa",
        "split": "train",
        "layout": "raw",
        "image_name": "cot/a.png",
        "ignored_turns": 0,
    }
    assert (report.num_good, report.num_bad) == (1, 0)
    assert record_from_row(records_to_dataset([record], decode=False)[0])["boxes"] == record["boxes"]


def test_a_request_with_reasoning_is_cut_too(write: Callable[..., Path]) -> None:
    question = "<image>\nWho is it? Please think step by step and provide the bounding box coordinate of\nthe region."
    (record,), _ = read(write([raw(question=question)]))
    assert record["question"] == "Who is it?"


@pytest.mark.parametrize("layout", ["formatted", "auto", "mixed"])
def test_a_formatted_row(write: Callable[..., Path], layout: str) -> None:
    plain = formatted(image="cot/b.png", bboxes=None, conversations=talk("q", "<lvr>\nno tags ", "more", "said"))
    (first, second), report = read(write([formatted(), plain]), layout=layout)
    assert (first["question"], first["answer"]) == ("Who?", "A girl.")
    assert first["boxes"] == [{"image": 0, "xyxy": [0.1, 0.1, 0.6, 0.6]}]
    assert (first["meta"]["layout"], first["meta"]["question_id"]) == ("formatted", "q7")
    assert (second["question"], second["answer"], second["boxes"]) == ("q", "no tags", None)
    assert second["meta"]["ignored_turns"] == 2
    assert report.num_bad == 0


def test_a_mixture_is_read_row_by_row(write: Callable[..., Path]) -> None:
    rows = [
        {"id": "1", "conversations": talk("1 + 1?", "2")},
        {"id": "2", "image": "cot/b.png", "conversations": talk("Why?\n<image>", "So.", "And?", "So so.")},
        raw(),
        {"id": "3", "image": ["cot/a.png", "cot/b.png"], "conversations": talk("<image><image>Same?", "No.")},
        {"id": "4", "image": "", "conversations": talk("2 + 2?", "4")},
    ]
    records, report = read(write(rows), layout="mixed")
    assert [(r["question"], r["answer"], r["meta"]["layout"]) for r in records] == [
        ("Why?", "So.", "plain"),
        ("Who?", "A girl.", "raw"),
    ]
    assert [r["meta"]["index"] for r in records] == [1, 2]
    assert report.skip_reasons == {"row without image": 2, "row with several images": 1}
    assert report.num_bad == 0


def test_the_first_of_several_images_is_used_in_the_formatted_layout(write: Callable[..., Path]) -> None:
    (record,), _ = read(write([formatted(image=["cot/b.png", "cot/a.png"])]), layout="formatted")
    assert record["meta"]["image_name"] == "cot/b.png"


def test_a_crop_without_the_turns_of_a_region_is_a_plain_row(write: Callable[..., Path]) -> None:
    (record,), _ = read(write([raw(conversations=talk("<image>\nWho?", "A girl."))]))
    assert (record["question"], record["answer"], record["boxes"]) == ("Who?", "A girl.", None)


def test_an_image_may_be_a_url_when_the_row_has_its_size() -> None:
    image = ["https://x/a.png", f"https://x/a.png###{BOX}"]
    record = record_from_viscot(raw(image=image, width=SIZE[0], height=SIZE[1]), "data.json", 0)
    assert record["boxes"] == [{"image": 0, "xyxy": [0.1, 0.1, 0.6, 0.6]}]
    with pytest.raises(RecordError, match="size of 'https://x/a.png' is not known; fetch it, or add 'width'"):
        record_from_viscot(raw(image=image), "data.json", 0)


# Order


def test_rows_are_shuffled_before_they_are_chosen(write: Callable[..., Path]) -> None:
    rows = [formatted(question_id=number) for number in range(9)]
    rows[shuffled_order(9, 5)[2]] = {"broken": True}
    path = write(rows)
    records, report = read(path, seed=5, start_idx=1, max_samples=3)
    order = shuffled_order(9, 5)
    assert sorted(order) == list(range(9)) and order != list(range(9))
    assert [record["meta"]["question_id"] for record in records] == [order[1], order[3]]
    assert [record["meta"]["row"] for record in records] == [order[1], order[3]]
    assert [record["id"] for record in records] == [f"data-{order[1]}", f"data-{order[3]}"]
    assert report.num_bad + sum(report.skip_reasons.values()) == 1
    assert [record["meta"]["row"] for record in read(path, max_samples=2, start_idx=7)[0]] == [7, 8]
    assert read(path, max_samples=0)[0] == [] and read(path, start_idx=20, seed=5)[0] == []


# Boxes


@pytest.mark.parametrize(
    ("size", "pixels", "fractions", "agree"),
    [
        ((200, 100), [20, 10, 120, 60], [0.1, 0.3, 0.6, 0.55], True),  # of the square
        ((100, 200), [10, 20, 60, 120], [0.3, 0.1, 0.55, 0.6], True),
        ((200, 100), [20, 10, 120, 60], [0.1, 0.1, 0.6, 0.6], True),  # of the image
        ((200, 100), [20, 10, 120, 60], [0.1, 0.3, 0.6, 0.6], False),  # one axis each way
        ((100, 200), [10, 20, 60, 120], [0.1, 0.1, 0.55, 0.6], False),
        ((200, 200), [20, 10, 120, 60], [0.1, 0.05, 0.6, 0.3], True),
        ((1000, 1000), [500, 500, 600, 600], [0.5, 0.503, 0.6, 0.6], True),  # three decimals and whole pixels
        ((1000, 1000), [500, 500, 600, 600], [0.5, 0.504, 0.6, 0.6], False),
    ],
)
def test_two_boxes_agree(size: tuple[int, int], pixels: list[int], fractions: list[float], agree: bool) -> None:
    assert boxes_agree(pixels, fractions, size) is agree


def test_boxes_over_the_border_can_be_clipped(write: Callable[..., Path]) -> None:
    path = write([raw(box=[20, 10, 201, 60], told="[0.1, 0.3, 1.0, 0.55]")])
    assert read(path, outside="clip")[0][0]["boxes"] == [{"image": 0, "xyxy": [0.1, 0.1, 1.0, 0.6]}]
    assert "reaches outside the image" in read(path)[1].first_bad[0].reason


BAD_BOXES = [
    (raw(box=[40, 10, 120, 60]), "differ in an image of 200x100 pixels"),
    (raw(box="[20, 10, 120]"), "is not a box of four numbers"),
    (raw(told="[0.1, 0.3, 0.6, no]"), "is not a box of four numbers"),
    (raw(told="it is on the left"), "1 boxes in 'image' but 0 in the second turn 'it is on the left'"),
    (raw(told=f"{FRACTIONS} {FRACTIONS}"), "1 boxes in 'image' but 2"),
    (raw(box=[20, 10, 20, 60], told="[0.1, 0.3, 0.1, 0.55]"), "0 <= x0 < x1 <= 1"),
    (raw(box=[120, 10, 20, 60], told="[0.6, 0.3, 0.1, 0.55]"), "reversed"),
    (formatted(bboxes=[[0.1, 0.1, 0.1, 0.6]]), "0 <= x0 < x1 <= 1"),
    (formatted(bboxes=[[20, 10, 120, 60]]), "in pixels"),
    (formatted(bboxes=[["a", 0, 1, 1]]), "not a list of four numbers"),
    (formatted(bboxes="none"), "'bboxes' must be a list"),
]


@pytest.mark.parametrize(("value", "reason"), BAD_BOXES)
def test_bad_boxes(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, value: dict[str, Any], reason: str
) -> None:
    path = write([formatted(), value])
    records, report = read(path)
    assert (len(records), report.num_bad) == (1, 1)
    assert report.first_bad[0].row == 1 and reason in report.first_bad[0].reason
    with caplog.at_level(logging.WARNING):
        records, report = read(path, bad_boxes="drop")
    assert report.num_bad == 0 and records[1]["boxes"] is None and records[0]["boxes"]
    assert reason in records[1]["meta"]["dropped_boxes"]
    assert "1 rows are read without their boxes, the first is row 1" in caplog.text


def test_a_damaged_image_cannot_be_compared(write: Callable[..., Path], folder: Path) -> None:
    (folder / "images" / "cot" / "a.png").write_bytes(b"no picture")
    _, report = read(write([raw()]))
    assert "cannot be read" in report.first_bad[0].reason


# Bad rows


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "must be a JSON object"),
        (raw(image=["cot/none.png", f"cot/none.png###{BOX}"]), "does not exist; check image_folder"),
        (raw(image=7), "'image' must be a path or a list of paths"),
        (raw(image=["cot/a.png", 7]), "'image' must be a path or a list of paths"),
        (raw(question_id=[1]), "'question_id' must be a number or a string, got [1]"),
        (raw(conversations=None), "'conversations' must be a list"),
        (raw(conversations=talk("only one turn")), "needs 2 turns"),
        (raw(conversations=[{"from": "gpt", "value": "x"}] * 4), "a raw row needs 4 turns"),
        (raw(question="<image>\nWho? Show me."), "must end with 'Please provide the bounding box"),
        (raw(question="<image>\n" + REQUEST), "question is empty"),
        (formatted(conversations=talk("<image>\nWho?", "<answer> </answer>")), "answer is empty"),
        (formatted(conversations=talk("<image>\nWho?", "<lvr>")), "answer is empty"),
    ],
)
def test_bad_rows(write: Callable[..., Path], value: Any, reason: str) -> None:
    records, report = read(write([formatted(), value]))
    assert (len(records), report.num_bad) == (1, 1)
    assert report.first_bad[0].row == 1 and reason in report.first_bad[0].reason


@pytest.mark.parametrize(
    ("layout", "value", "reason"),
    [
        ("raw", formatted(), "a raw row needs 4 turns"),
        ("raw", raw(image="cot/a.png"), "0 boxes in 'image' but 1"),
        ("raw", raw(image=["cot/b.png", f"cot/a.png###{BOX}"]), "must have one image, got ['cot/b.png', 'cot/a.png']"),
        ("formatted", formatted(image=None), "must have one image, got []"),
    ],
)
def test_rows_of_another_layout_are_bad(
    write: Callable[..., Path], layout: str, value: dict[str, Any], reason: str
) -> None:
    records, report = read(write([value]), layout=layout)
    assert records == [] and reason in report.first_bad[0].reason


def test_a_damaged_line_costs_a_row(write: Callable[..., Path]) -> None:
    path = write([formatted(), formatted()], "data.jsonl")
    path.write_text(path.read_text() + '{"image": ', encoding="utf-8")
    records, report = read(path, seed=5)
    assert len(records) == 2 and report.first_bad[0].row == 2


def test_too_many_bad_rows_stop_the_run(write: Callable[..., Path], folder: Path) -> None:
    records = read_viscot(write([formatted(), formatted(image="cot/none.png")]), folder / "images")
    assert next(records)["answer"] == "A girl."
    with pytest.raises(RecordShareError, match="row 1: image file .*none.png"):
        next(records)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "new"}, "unknown layout 'new'"),
        ({"outside": "keep"}, "unknown outside 'keep'"),
        ({"bad_boxes": "keep"}, "unknown bad_boxes 'keep'"),
        ({"start_idx": -1}, "start_idx must be 0 or more rows, got -1"),
        ({"max_samples": -2}, "max_samples must be 0 or more rows, got -2"),
    ],
)
def test_wrong_options(write: Callable[..., Path], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_viscot(write([formatted()]), **options)


def test_missing_files(write: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(RecordError, match="the file does not exist"):
        read_viscot(folder / "none.json")
    with pytest.raises(RecordError, match="image_folder .* does not exist"):
        read_viscot(write([formatted()]), folder / "none")
