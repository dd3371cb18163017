"""Multiple-choice sets: rows to items to records for every set, and everything that can be wrong with a file."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_items import (
    INSTRUCTION,
    blink_item,
    letter_of,
    maze_of_map,
    mmstar_item,
    mmvp_item,
    options_in,
)
from evaluation.benchmarks.choice_records import NO_IMAGE, read_choices
from evaluation.benchmarks.choice_tasks import TASKS
from tests.evaluation.choice_files import (
    MAP,
    MMVP_COLUMNS,
    blink_rows,
    mmvp_rows,
    write_blink,
    write_lines,
    write_mmstar,
    write_mmvp,
    write_vsp,
    write_vstar,
)
from trainers.data.records import RecordError, RecordReport, RecordShareError, open_image

# Items: what the golden vectors do not hold ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("(a) Yes (b) No", ["Yes", "No"]),
        ("Which?\nOptions: A: up, B: down, and left, C: a (B) sign", ["up", "down, and left", "a (B) sign"]),
        ("What?\n(A) red\n(B) blue\nAnswer with A or B.", ["red", "blue"]),
        ("A. cold\nB. hot\nC. mild", ["cold", "hot", "mild"]),
        ("Is the letter (a) red?", None),
        ("(b) No (a) Yes", None),
        ("What is it? (A) (B) dog", None),
        ("", None),
    ],
)
def test_options_in_a_text(text: str, options: list[str] | None) -> None:
    assert options_in(text) == options


def test_letters_of_labels() -> None:
    labels = ["(a)", "A", " b. ", "(H)", "i", "AB", "neither", "", "()"]
    assert [letter_of(label) for label in labels] == ["A", "A", "B", "H", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("answer", "letter"), [("(D)", "D"), ("H", "H"), ("same", "A"), ("(same)", "(same)"), ("I", "I"), ("a", "a")]
)
def test_answers_of_blink(answer: str, letter: str) -> None:
    row = {**blink_rows("T")[0], "choices": ["same", "not"], "answer": answer}
    assert blink_item(row, "T").ground_truth == letter


def test_rows_without_choices_or_facts() -> None:
    row = {**blink_rows("T")[0], "choices": None, "prompt": None}
    item = blink_item(row, "T")
    assert item.choices is None and item.meta == {"task": "T", "choices": [], "num_images": 1}
    assert item.prompt == f"Which spot is nearer?\nOptions:\n{INSTRUCTION}"
    item = mmstar_item({"index": 7, "question": "Which? A: up, B: down", "answer": "A", "image": None})
    assert (item.id, item.images, item.choices) == ("7", [], None)
    assert item.meta == {"category": None, "l2_category": None, "source": None}
    assert mmvp_item({**mmvp_rows(1)[0], "Index": 3}, Path("x")).images == ["x/MMVP Images/3.jpg"]


def test_maps_of_vsp() -> None:
    assert maze_of_map(str(MAP)).rows() == ("@_#", "___", "#_*")
    assert maze_of_map("@_\n_*").size == 2
    for wrong in ("[[1, 0], [0, 5]]", "[[1, 0], [0, 0]]", "[[1, 2, 0]]", "[1, 2]", "[[1", "?"):
        with pytest.raises((TypeError, ValueError)):
            maze_of_map(wrong)


# Records ---------------------------------------------------------------------------------------------------------


def test_records_of_mmvp(tmp_path: Path) -> None:
    report = RecordReport()
    records = read_choices("mmvp", write_mmvp(tmp_path / "mmvp"), report=report)
    assert [record["id"] for record in records] == ["1", "2", "3", "4"] and report.num_good == 4
    first, row = records[0], mmvp_rows()[0]
    assert first["question"] == f"{row['Question']}\n(a) Yes (b) No\n{INSTRUCTION}" == first["meta"]["prompt"]
    assert (first["answer"], first["choices"], first["meta"]["item"]) == ("(a)", ["Yes", "No"], row)
    assert (first["meta"]["source"], first["meta"]["row"]) == (str(tmp_path / "mmvp" / "Questions.csv"), 0)
    assert open_image(first["images"][0], first).size == (80, 60)
    assert [r["id"] for r in read_choices("mmvp", tmp_path / "mmvp" / "Questions.csv", max_samples=2)] == ["1", "2"]


@pytest.mark.parametrize("decoded", [True, False])
def test_records_of_blink(decoded: bool, tmp_path: Path) -> None:
    """All images in order; a row without image is skipped and counted; the test split stands in for the validation."""
    write_blink(tmp_path, "IQ_Test", decoded=decoded)
    write_blink(tmp_path, "Counting", split="test")
    report = RecordReport()
    records = read_choices("blink", tmp_path, report=report)
    assert [r["id"] for r in records] == [f"val_{task}_{i}" for task in ("Counting", "IQ_Test") for i in range(2)]
    assert (report.num_good, report.num_bad, dict(report.skip_reasons)) == (4, 0, {NO_IMAGE: 2})
    one, two = records[2:]
    assert [len(one["images"]), len(two["images"])] == [1, 2]
    assert [open_image(image, two).size for image in two["images"]] == [(80, 60), (56, 56)]
    assert one["question"] == f"Which spot is nearer?\nOptions:\n(A) red\n(B) blue\n(C) green\n{INSTRUCTION}"
    assert two["question"] == "Which is nearer? \n(A) red\n(B) blue\n(C) green" and "<image>" in two["meta"]["prompt"]
    assert [one["answer"], two["answer"]] == ["B", "C"]
    assert two["meta"]["item"] == {"task": "IQ_Test", "choices": ["red", "blue", "green"], "num_images": 2}
    alone = read_choices("blink", tmp_path, "IQ_Test")
    assert alone == read_choices("blink", tmp_path / "IQ_Test", ["IQ_Test"]) == records[2:]
    assert alone == read_choices("blink", tmp_path / "IQ_Test" / "val-00000-of-00001.parquet")
    order = read_choices("blink", tmp_path, ["IQ_Test", "Counting"])
    assert [r["meta"]["ds_name"] for r in order] == ["IQ_Test"] * 2 + ["Counting"] * 2
    write_blink(tmp_path, "Counting", [{**blink_rows("new")[0], "idx": "val"}])
    assert [r["id"] for r in read_choices("blink", tmp_path, "Counting")] == ["val"], "the validation split is first"


def test_records_of_mmstar(tmp_path: Path) -> None:
    records = read_choices("mmstar", write_mmstar(tmp_path))
    assert records == read_choices("mmstar", tmp_path / "mmstar.parquet")
    assert [(r["id"], r["answer"]) for r in records] == [("0", "A"), ("1", "B"), ("2", "C")]
    assert records[0]["choices"] == ["up", "down", "left", "none, really"]
    assert records[0]["question"].endswith(f"really\n{INSTRUCTION}")
    assert records[1]["meta"]["item"] == {"category": "c1", "l2_category": "sub", "source": "toy"}
    assert open_image(records[1]["images"][0], records[1]).size == (56, 56)


def test_records_of_vstar_and_vsp(tmp_path: Path) -> None:
    first, second = read_choices("vstar", write_vstar(tmp_path / "vstar"))
    assert (second["id"], second["answer"], second["choices"]) == ("1", "B", ["wood", "stone"])
    assert second["meta"]["item"] == {"category": "c1"} and second["images"][0].endswith("direct/1.jpg")
    assert first["question"] == first["meta"]["prompt"] and INSTRUCTION not in first["question"]
    (record,) = read_choices("vsp", write_vsp(tmp_path / "vsp"))
    assert (record["id"], record["answer"], record["question"]) == ("0", str(MAP), "Go.")
    assert record["meta"]["maze"] == "@_#\n___\n#_*"
    moved = (tmp_path / "vsp" / "test_direct.jsonl").rename(tmp_path / "test_direct.jsonl")
    with pytest.raises(RecordShareError, match="0.png' does not exist"):
        read_choices("vsp", moved)
    assert read_choices("vsp", moved, image_folder=tmp_path / "vsp")[0]["images"][0].endswith("vsp/0.png")


# Bad input -------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, rows: list[dict[str, str]], **options: Any) -> RecordReport:
    report = RecordReport(max_bad_share=1)
    records = read_choices("mmvp", write_mmvp(tmp_path, rows), report=report, **options)
    assert len(records) == report.num_good
    return report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Correct Answer": "(c)"}, r"row 1: the ground truth '\(c\)' is not one of the letters 'AB' of the choices"),
        ({"Correct Answer": "hidden"}, "the ground truth 'hidden' is not one of the letters 'AB'.*validation split"),
        ({"Options": "none"}, "no error"),  # nothing is known of the choices: A to D
        ({"Options": "none", "Correct Answer": "E"}, "the ground truth 'E' is not one of the letters 'ABCD'"),
    ],
)
def test_wrong_labels_are_counted(change: dict[str, str], message: str, tmp_path: Path) -> None:
    rows = mmvp_rows()
    report = broken(tmp_path, [rows[0], {**rows[1], **change}, *rows[2:]])
    if message == "no error":
        assert report.num_good == 4
        return
    assert (report.num_good, report.num_bad) == (3, 1)
    with pytest.raises(RecordError, match=message):
        raise report.first_bad[0]
    with pytest.raises(RecordShareError, match=message):
        read_choices("mmvp", tmp_path)


def test_missing_and_damaged_images_are_counted(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    (tmp_path / "MMVP Images" / "2.jpg").unlink()
    report = RecordReport(1)
    assert [record["id"] for record in read_choices("mmvp", tmp_path, report=report)] == ["1", "3", "4"]
    assert "row 1: image file " in str(report.first_bad[0]) and "2.jpg' does not exist" in str(report.first_bad[0])
    rows = blink_rows("T")
    rows[0]["image_1"] = {"bytes": b"none", "path": None}
    report = RecordReport(1)
    assert len(read_choices("blink", write_blink(tmp_path, "T", rows), report=report)) == 1
    assert "row 0: the bytes of 'image' are no picture" in str(report.first_bad[0]) and report.skip_reasons[NO_IMAGE]


def test_missing_columns_are_a_fault_of_the_file(tmp_path: Path) -> None:
    write_mmvp(tmp_path, columns=[name for name in MMVP_COLUMNS if name != "Options"])
    with pytest.raises(
        RecordError, match=r"Questions.csv, whole file: lacks the columns \['Options'\], it has .'Index"
    ):
        read_choices("mmvp", tmp_path)
    write_vstar(tmp_path / "v")
    lines = [{"image": "direct/0.jpg", "text": "x"}]
    with pytest.raises(RecordError, match=r"whole file: lacks the columns \['label', 'category', 'question_id'\]"):
        read_choices("vstar", write_lines(tmp_path / "v" / "test_questions.jsonl", lines))


def test_rows_that_are_not_as_published(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    with (tmp_path / "Questions.csv").open("a") as file:
        file.write("5,too,few\r\n6,a,b,c,d\r\n")
    report = RecordReport(1)
    assert len(read_choices("mmvp", tmp_path, report=report)) == 4 and report.num_bad == 2
    assert all("more or fewer fields than names" in str(error) for error in report.first_bad)
    folder = write_vsp(tmp_path / "vsp", [MAP, [[1, 0], [0, 0]], [[1, 5], [0, 2]], "nothing"])
    rows = [{"image_input": "0.png", "text_input": text, "map_id": 9, "map_desc": MAP} for text in (" ", 3)]
    with (folder / "test_direct.jsonl").open("a") as file:
        file.write("{broken\n")
    report = RecordReport(1)
    assert len(read_choices("vsp", folder, report=report)) == 1 and report.num_bad == 4
    assert [error.row for error in report.first_bad] == [1, 2, 3, 4]
    assert all("map_desc is no maze" in str(error) for error in report.first_bad[:3])
    rows += [{**rows[0], "text_input": "Go."}, {"image_input": "0.png", "text_input": "Go."}]
    report = RecordReport(1)
    read_choices("vsp", write_lines(folder / "test_direct.jsonl", rows[2:] + rows[:2]), report=report)
    messages = ["lacks the columns", "no image or no question", "needs the string 'text_input'"]
    assert all(text in str(error) for text, error in zip(messages, report.first_bad, strict=True))


def test_rows_of_blink_that_are_not_as_published(tmp_path: Path) -> None:
    row = {**blink_rows("T")[0], "image_1": "x.png"}
    changes = [{"answer": None}, {"image_1": 3}, {"choices": "red"}, {"prompt": None}]
    report = RecordReport(1)
    write_lines(tmp_path / "rows.jsonl", [{**row, **change} for change in changes])
    with pytest.raises(ValueError, match="has no record for blink: 0 good rows, 4 bad rows"):
        read_choices("blink", tmp_path / "rows.jsonl", report=report)
    messages = ["needs the string 'answer'", "must be a path, a picture", "choices must be a list, got 'red'", "x.png"]
    assert all(text in str(error) for text, error in zip(messages, report.first_bad, strict=True))


def test_meta_of_mmstar_that_is_no_json(tmp_path: Path) -> None:
    row = {"index": 0, "question": "Which?", "answer": "A", "image": "x.png", "meta_info": "{cut"}
    with pytest.raises(RecordShareError, match="row 0: the row is not as published .*; repair it"):
        read_choices("mmstar", write_lines(tmp_path / "rows.jsonl", [row]) / "rows.jsonl")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("gqa", {}, "unknown dataset 'gqa'; choose one of .'mmvp', 'blink', 'mmstar', 'vstar', 'vsp'"),
        ("mmvp", {"task_name": "IQ_Test"}, r"task_name=\['IQ_Test'\]: mmvp has no tasks; leave it out"),
        ("blink", {"task_name": "IQ"}, "unknown task_name 'IQ'; choose one of .'IQ_Test'"),
        ("mmvp", {"max_samples": 0}, "max_samples=0 must be at least 1"),
        ("mmvp", {"image_folder": "gone"}, "image_folder 'gone' does not exist"),
        ("mmstar", {}, r"none of the files \['mmstar.parquet'\] is here; check data_root"),
    ],
)
def test_wrong_options(dataset: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    write_blink(tmp_path, "IQ_Test")
    with pytest.raises(ValueError, match=message):
        read_choices(dataset, tmp_path, **options)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="gone, whole file: neither a file nor a folder; check data_root"):
        read_choices("mmvp", tmp_path / "gone")
    with pytest.raises(RecordError, match=r"none of the files .* is in the folder of a task here; check data_root"):
        read_choices("blink", tmp_path)
    (tmp_path / "Questions.csv").write_bytes(
        "Index,Question,Options,Correct Answer\n1,caf\xe9,x,y\n".encode("latin-1")
    )
    with pytest.raises(RecordError, match="Questions.csv, whole file: not a readable table"):
        read_choices("mmvp", tmp_path)
    (tmp_path / "mmstar.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(RecordError, match="not a readable parquet file"):
        read_choices("mmstar", tmp_path)
    (tmp_path / "Questions.csv").write_text(",".join(MMVP_COLUMNS) + "\n")
    with pytest.raises(ValueError, match="has no record for mmvp: 0 good rows, 0 bad rows"):
        read_choices("mmvp", tmp_path)


def test_every_set_has_files_columns_and_a_scorer() -> None:
    assert set(TASKS) == {"mmvp", "blink", "mmstar", "vstar", "vsp"}
    for task in TASKS.values():
        assert task.files and task.texts and not set(task.texts) & set(task.others)
