"""Data sets of DMLR by name: rows as published to questions and answers, files and tables, slices, wrong input."""

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, Features, Image, List, Value

from evaluation.benchmarks.choice_items import INSTRUCTION
from evaluation.benchmarks.search_items import math_vision_item, math_vista_item, mmstar_item, mmvp_item
from evaluation.benchmarks.search_tasks import NO_IMAGE, SEARCH_TASKS, read_search, record_from_search
from tests.evaluation.choice_files import encoded, mmvp_rows, write_mmstar, write_mmvp
from tests.tiny import tiny_images
from trainers.data.answers_dmlr import score_dmlr
from trainers.data.dmlr import choices_in, read_dmlr, write_dmlr_json
from trainers.data.records import RecordError, RecordReport, RecordShareError, open_image

TEXT, NUMBER = Value("string"), Value("int64")
FEATURES = {
    "hallusion": {"category": TEXT, "subcategory": TEXT, "visual_input": TEXT, "set_id": TEXT, "figure_id": TEXT,
                  "question_id": TEXT, "question": TEXT, "gt_answer": TEXT, "image": Image()},
    "math_vision": {"id": TEXT, "question": TEXT, "options": List(TEXT), "image": TEXT, "decoded_image": Image(),
                    "answer": TEXT, "level": NUMBER, "subject": TEXT},
    "math_vista": {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": Image(), "choices": List(TEXT),
                   "unit": TEXT, "precision": Value("float64"), "answer": TEXT, "question_type": TEXT,
                   "answer_type": TEXT, "metadata": {"source": TEXT}, "query": TEXT},
    "scienceqa": {"image": Image(), "question": TEXT, "choices": List(TEXT), "answer": NUMBER, "hint": TEXT,
                  "subject": TEXT},
}  # fmt: skip


def picture() -> dict[str, Any]:
    return {"bytes": encoded(tiny_images(1)[0]), "path": None}


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A row with the published columns."""
    rows = {
        "hallusion": {
            "category": "VS", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "1",
            "question_id": "2", "question": "Is the left bar taller?", "gt_answer": "0", "image": picture(),
        },
        "math_vision": {
            "id": "7", "question": "How long is the cut?\n<image1>", "options": ["$3$", r"$\sqrt{6}$"],
            "image": "images/7.jpg", "decoded_image": picture(), "answer": "B", "level": 2, "subject": "geometry",
        },
        "math_vista": {
            "pid": "9", "question": "What is ∠Q?", "image": "images/9.jpg", "decoded_image": picture(),
            "choices": ["120°", "140°"], "unit": None, "precision": None, "answer": "120°",
            "question_type": "multi_choice", "answer_type": "text", "metadata": {"source": "toy"},
            "query": "Hint: Give the letter.\nQuestion: What is ∠Q?\nChoices:\n(A) 120°\n(B) 140°",
        },
        "scienceqa": {
            "image": picture(), "question": "Which is a fish?", "choices": ["carp", "newt", "robin"], "answer": 0,
            "hint": "Look.", "subject": "natural science",
        },
        "mm_math": {
            "question": "Find $x$.", "file_name": "1.png", "solution": r"So $x=\frac{1}{2}$, \boxed{\frac{1}{2}}.",
            "year": "eight", "difficult": "easy", "knowledge": "angles", "image": picture(),
        },
    }  # fmt: skip
    return {**rows[name], **changes}


TABLES = tuple(FEATURES)


def write_table(name: str, path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), Features(FEATURES[name])).to_parquet(path)
    return path


def write_mm_math(folder: Path, *rows: dict[str, Any], packed: bool = True) -> Path:
    """The lines beside the archive of the pictures 1.png and 2.png, or beside the pictures."""
    inner = folder / "MM_Math"
    inner.mkdir(parents=True)
    lines = [{key: value for key, value in each.items() if key != "image"} for each in rows]
    (inner / "MM_Math.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [encoded(image) for image in tiny_images(2)]
    if packed:
        with zipfile.ZipFile(inner / "MM_Math.zip", "w") as archive:
            for number, content in enumerate(data, 1):
                archive.writestr(f"MM_Math/{number}.png", content)
    else:
        (inner / "images").mkdir()
        for number, content in enumerate(data, 1):
            (inner / f"images/{number}.png").write_bytes(content)
    return folder


# Rows


@pytest.mark.parametrize(
    ("name", "question", "answer", "choices", "id"),
    [
        (
            "hallusion",
            "Answer the question based on the image. Give Yes or No and put it inside \\boxed{}.\n"
            "Question: Is the left bar taller?",
            "\\boxed{No}",
            None,
            "VS-chart-0-1-2",
        ),
        (
            "math_vision",
            "Give the result in the form \\boxed{your answer}.\nQuestion: How long is the cut?\n<image1>\n"
            r"Options: A. $3$, B. $\sqrt{6}$",
            r"B. $\sqrt{6}$",
            ["$3$", r"$\sqrt{6}$"],
            "7",
        ),
        (
            "math_vista",
            "Hint: Give the letter.\nQuestion: What is ∠Q?\nChoices:\n(A) 120°\n(B) 140°",
            "A. 120°",
            ["120°", "140°"],
            "9",
        ),
        (
            "scienceqa",
            "Which is a fish?\n\nOptions:\nA. carp\nB. newt\nC. robin",
            "A. carp",
            ["carp", "newt", "robin"],
            "scienceqa-3",
        ),
        ("mm_math", "Find $x$.", r"\frac{1}{2}", None, "mm_math-3"),
    ],
)
def test_rows(name: str, question: str, answer: str, choices: list[str] | None, id: str) -> None:
    record = record_from_search(name, row(name), "table", 3)
    assert (record["question"], record["answer"], record["choices"], record["id"]) == (question, answer, choices, id)
    assert choices_in(question) == choices, "the prompt lists them as the data JSON does"
    assert open_image(record["images"][0], record).size == (80, 60)
    assert [record["meta"][key] for key in ("source", "row", "ds_name")] == ["table", 3, name]
    extra = record["meta"]["extra"]
    assert extra.get("answer_text") == (choices and answer[3:])
    assert not {"prompt", "solution", "image_path", "idx"} & set(extra), "fields of the data JSON"


def test_columns_that_are_kept() -> None:
    extras = {name: record_from_search(name, row(name), "t", 0)["meta"]["extra"] for name in (*TABLES, "mm_math")}
    assert extras["hallusion"]["figure_id"] == "1" and extras["hallusion"]["visual_input"] == "1"
    assert extras["math_vision"] == {"answer_text": r"$\sqrt{6}$", "level": 2, "subject": "geometry",
                                     "image": "images/7.jpg"}  # fmt: skip
    assert extras["math_vista"]["metadata"] == {"source": "toy"} and "unit" not in extras["math_vista"]
    assert extras["scienceqa"] == {"answer_text": "carp", "hint": "Look.", "subject": "natural science"}
    assert extras["mm_math"]["worked_solution"] == row("mm_math")["solution"]


def test_other_forms_of_rows() -> None:
    value = record_from_search("hallusion", row("hallusion", gt_answer=1), "t", 0)
    assert value["answer"] == "\\boxed{Yes}"
    for options in ([], None, ["", " "]):
        free = math_vision_item(row("math_vision", options=options, answer="7"))
        assert (free.solution, free.choices) == ("\\boxed{7}", None) and "Options" not in free.prompt
    drawn = math_vision_item(row("math_vision", options=list("ABCDE"), answer="C"))
    assert drawn.solution == "C. C" and drawn.prompt.endswith("Options: A. A, B. B, C. C, D. D, E. E")
    free = math_vista_item(row("math_vista", choices=None, answer="12", query="What?"))
    assert (free.prompt, free.solution, free.choices) == ("What?", "12", None)
    several = r"First \boxed{3}, then \boxed{x = \boxed{4}}"
    assert record_from_search("mm_math", row("mm_math", solution=several), "t", 0)["answer"] == "4"
    assert mmstar_item(f"Which?\n{INSTRUCTION}", "b", None) == ("Which?", "B")
    assert mmvp_item({**mmvp_rows(1)[0], "Options": "yes or no"})[1] == "(a)"


@pytest.mark.parametrize("name", [*TABLES, "mm_math"])
def test_the_strict_judge_takes_the_answer_for_right(name: str) -> None:
    record = record_from_search(name, row(name), "t", 0)
    for said in (record["answer"], f"<answer>{record['answer']}</answer>"):
        assert score_dmlr(said, record["answer"])
    assert not score_dmlr("I do not know.", record["answer"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hallusion", {"gt_answer": "2"}, "t, row 4: the row is not as published (gt_answer must be 0 or 1, got '2')"),
        ("hallusion", {"question": None}, "a row needs the string 'question', got None"),
        ("hallusion", {"image": None}, "row 4: the row has no image"),
        ("hallusion", {"image": {"bytes": b"no", "path": None}}, "row 4: the bytes of 'image' are no picture"),
        ("math_vision", {"answer": "C"}, "the answer 'C' is none of the 2 choices ['$3$', "),
        ("math_vision", {"answer": "3"}, "the answer '3' is none of the 2 choices"),
        ("math_vision", {"options": [1, 2]}, "row 4: the row is not as published"),
        ("math_vista", {"answer": "130°"}, "the answer '130°' is none of the 2 choices"),
        ("math_vista", {"choices": "AB"}, "choices must be a list of texts, got 'AB'"),
        ("scienceqa", {"answer": 3}, "the answer 3 is none of the 3 choices"),
        ("scienceqa", {"answer": -1}, "the answer -1 is none of the 3 choices"),
        ("scienceqa", {"answer": "A"}, "the answer 'A' is none of the 3 choices"),
        ("scienceqa", {"choices": ["a", " "]}, "choices must be a list of texts"),
        ("mm_math", {"solution": "So 3."}, "the solution has no \\boxed{...} with an answer: 'So 3.'"),
        ("mm_math", {"solution": "\\boxed{3"}, "the solution has no \\boxed{...} with an answer"),
    ],
)
def test_wrong_rows(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        record_from_search(name, row(name, **changes), "t", 4)
    assert message in str(caught.value)


def test_wrong_names_and_missing_columns() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'mmstar'; choose one of .*'hallusion', .*'mm_math'"):
        record_from_search("mmstar", {}, "t", 0)
    value = row("scienceqa")
    del value["choices"]
    with pytest.raises(RecordError, match=r"row 0: the row lacks the columns \['choices'\], it has "):
        record_from_search("scienceqa", value, "t", 0)


# Tables


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_a_folder(name: str, tmp_path: Path) -> None:
    split = SEARCH_TASKS[name].split
    write_table(name, tmp_path / f"data/{split}-00000-of-00002.parquet", row(name), row(name))
    write_table(name, tmp_path / f"data/{split}-00001-of-00002.parquet", row(name))
    write_table(name, tmp_path / f"data/{split}other-00000-of-00001.parquet", row(name))
    records = read_search(name, tmp_path)
    assert [each["meta"]["data_idx"] for each in records] == [each["meta"]["row"] for each in records] == [0, 1, 2]
    assert records[0]["meta"]["source"] == str(tmp_path)
    assert open_image(records[2]["images"][0], records[2]).size == (80, 60)
    alone = tmp_path / f"data/{split}-00001-of-00002.parquet"
    (one,) = read_search(name, alone)
    assert one["question"] == records[2]["question"] and one["meta"]["source"] == str(alone)
    (renamed,) = read_search(name, write_table(name, tmp_path / "alone/some.parquet", row(name)).parent)
    assert renamed["answer"] == one["answer"]


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, split: str) -> Dataset:
        asked.append((repository, split))
        return Dataset.from_list([row(name)], Features(FEATURES[name]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read_search(name)
    task = SEARCH_TASKS[name]
    assert asked == [(task.repository, task.split)]
    assert record["meta"]["source"] == f"{task.repository}[{task.split}]"
    assert record["answer"] == record_from_search(name, row(name), "t", 0)["answer"]


def test_rows_of_scienceqa_without_image_are_no_part_of_the_set(tmp_path: Path) -> None:
    rows = [row("scienceqa", image=None), row("scienceqa"), row("scienceqa", image=None), row("scienceqa", answer=2)]
    path = write_table("scienceqa", tmp_path / "test-0.parquet", *rows)
    report = RecordReport()
    records = read_search("scienceqa", path, report=report)
    assert [(each["meta"]["data_idx"], each["meta"]["row"]) for each in records] == [(0, 1), (1, 3)]
    assert [each["answer"] for each in records] == ["A. carp", "C. robin"]
    assert (report.num_good, report.skip_reasons) == (2, {NO_IMAGE: 2})


def test_a_slice_keeps_positions(tmp_path: Path) -> None:
    rows = [row("hallusion", question=f"Q{i}") for i in range(4)]
    rows[1]["gt_answer"] = "?"
    path = write_table("hallusion", tmp_path / "image-0.parquet", *rows)
    report = RecordReport(1)
    records = read_search("hallusion", path, start_data_idx=1, end_data_idx=3, report=report)
    assert [(each["meta"]["data_idx"], each["question"][-2:]) for each in records] == [(2, "Q2")]
    assert report.num_bad == 1 and "row 1: the row is not as published" in str(report.first_bad[0])
    with pytest.raises(RecordShareError, match="gt_answer must be 0 or 1"):
        read_search("hallusion", path)
    with pytest.raises(
        ValueError, match="'hallusion' has no record from start_data_idx=4 to end_data_idx=None: 3 goo"
    ):
        read_search("hallusion", path, start_data_idx=4, report=RecordReport(1))
    for options in ({"start_data_idx": -1}, {"end_data_idx": 1.5}):
        with pytest.raises(ValueError, match="_data_idx=.* must be a position, 0 or more"):
            read_search("hallusion", path, **options)


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="gone, whole file: neither a file nor a folder; check data_root"):
        read_search("hallusion", tmp_path / "gone")
    with pytest.raises(RecordError, match=r"no table image-\*.parquet, in data/ neither, and 0 other tables"):
        read_search("hallusion", tmp_path)
    for other in "ab":
        write_table("hallusion", tmp_path / f"{other}.parquet", row("hallusion"))
    with pytest.raises(RecordError, match="and 2 other tables; name the file of hallusion as data_root"):
        read_search("hallusion", tmp_path)
    with pytest.raises(RecordError, match=r"a.parquet, whole file: lacks the columns \['query', .*check data_root"):
        read_search("math_vista", tmp_path / "a.parquet")
    with pytest.raises(RecordError, match=r"lmms-lab/HallusionBench.*the part 'image' cannot be loaded"):
        read_search("hallusion")


# Sets of files


def test_mmstar_and_mmvp(tmp_path: Path) -> None:
    records = read_search("mmstar", write_mmstar(tmp_path / "mmstar"), start_data_idx=1)
    assert [(each["answer"], each["meta"]["data_idx"]) for each in records] == [("B: down", 1), ("C: left", 2)]
    assert records[0]["question"] == "Which?\nOptions: A: up, B: down, C: left, D: none, really"
    assert records[0]["meta"]["extra"] == {"category": "c1", "l2_category": "sub", "source": "toy"}
    assert choices_in(records[0]["question"]) == records[0]["choices"]
    first, second = read_search("mmvp", write_mmvp(tmp_path / "mmvp"), end_data_idx=2)
    assert (first["answer"], second["answer"]) == ("(a) Yes", "(b) No")
    asked = "Solve the problem and put the FINAL CHOICE inside \\boxed{}.\nQuestion: Is the door open? \nOptions: "
    assert first["question"] == f"{asked}(a) Yes (b) No" and first["meta"]["extra"] == mmvp_rows()[0]
    (tmp_path / "mmvp/MMVP Images/2.jpg").unlink()
    report = RecordReport(1)
    found = read_search("mmvp", tmp_path / "mmvp", report=report)
    assert [each["meta"]["data_idx"] for each in found] == [0, 2, 3] and report.num_bad == 1


@pytest.mark.parametrize("packed", [True, False])
def test_mm_math(packed: bool, tmp_path: Path) -> None:
    second = row("mm_math", file_name="2.png", solution="\\boxed{145}")
    root = write_mm_math(tmp_path / "m", row("mm_math"), second, packed=packed)
    records = read_search("mm_math", root)
    assert [each["answer"] for each in records] == [r"\frac{1}{2}", "145"]
    assert [open_image(each["images"][0], each).size for each in records] == [(80, 60), (56, 56)]
    lines = root / "MM_Math/MM_Math.jsonl"
    again = read_search("mm_math", lines, start_data_idx=1)
    assert again == records[1:] and records[1]["meta"]["source"] == str(lines)
    report = RecordReport(1)
    lines.write_text(lines.read_text() + "broken\n" + json.dumps({**second, "image": 0, "file_name": "3.png"}) + "\n")
    assert len(read_search("mm_math", root, report=report)) == 2
    assert "row 2: line 3 " in str(report.first_bad[0]) and "3.png' does not exist" in str(report.first_bad[1])


def test_mm_math_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no MM_Math.jsonl; check data_root"):
        read_search("mm_math", tmp_path)
    root = write_mm_math(tmp_path / "m", row("mm_math"))
    (root / "MM_Math/MM_Math.zip").write_bytes(b"cut")
    with pytest.raises(RecordError, match="MM_Math.zip, whole file: not a readable archive"):
        read_search("mm_math", root)
    with pytest.raises(RecordError, match="gone, whole file: neither a file nor a folder"):
        read_search("mm_math", tmp_path / "gone")


@pytest.mark.parametrize("name", ["mmstar", "mmvp", "mm_math"])
def test_files_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match=f"{SEARCH_TASKS[name].repository}.*cannot be fetched .*folder as data_root"):
        read_search(name)
    written = {
        "mmstar": write_mmstar,
        "mmvp": write_mmvp,
        "mm_math": lambda folder: write_mm_math(folder, row("mm_math")),
    }[name](tmp_path / "hub")
    asked = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(written)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    records = read_search(name)
    patterns = list(SEARCH_TASKS[name].files)
    assert asked == [(SEARCH_TASKS[name].repository, {"repo_type": "dataset", "allow_patterns": patterns})]
    assert records == read_search(name, written)
    names = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    from huggingface_hub.utils import filter_repo_objects

    assert sorted(filter_repo_objects(names, allow_patterns=patterns)) == sorted(names), "all that is needed"


# Paths


def test_a_path_is_a_data_json(tmp_path: Path) -> None:
    """Records of a name, written to a file, are read by its path as the same questions."""
    table = write_table("scienceqa", tmp_path / "test-0.parquet", row("scienceqa"), row("scienceqa", answer=1))
    named = read_search("scienceqa", table)
    path = tmp_path / "out/scienceqa.json"
    write_dmlr_json(named, path)
    records = read_search(path)
    for found, record in zip(records, named, strict=True):
        assert all(found[key] == record[key] for key in ("question", "answer", "choices"))
        assert found["meta"]["extra"] == record["meta"]["extra"]
        assert open_image(found["images"][0], found).size == (80, 60)
    assert [each["meta"]["data_idx"] for each in read_search(str(path), start_data_idx=1)] == [1]
    moved = path.rename(tmp_path / "moved.json")
    assert read_search(moved, tmp_path / "out") == list(read_dmlr(moved, tmp_path / "out"))
    rows = json.loads(moved.read_text())
    rows[0]["solution"] = ""
    moved.write_text(json.dumps(rows))
    assert len(read_search(moved, tmp_path / "out", empty_answers="skip")) == 1


def test_what_is_neither_name_nor_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset='mathverse' is neither a file nor one of the names .'hallusion', "):
        read_search("mathverse")
    with pytest.raises(ValueError, match=r"\['check', 'repair'\]: options of a data JSON, and 'mmvp' is read as publ"):
        read_search("mmvp", tmp_path, repair=False, check="content")
