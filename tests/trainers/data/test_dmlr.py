r"""The data JSON of DMLR: reading with every bad row, empty and null solutions, slices, repairs, writing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainers.data.dmlr import choices_in, dmlr_row, read_dmlr, repaired, write_dmlr_json
from trainers.data.records import (
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    open_image,
    record_from_row,
    records_to_dataset,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file beside the image `img/a.png`."""
    (tmp_path / "img").mkdir()
    Image.new("RGB", (84, 56), "red").save(tmp_path / "img/a.png")

    def write(*rows: Any, name: str = "toy.json") -> Path:
        (tmp_path / name).write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
        return tmp_path / name

    return write


def row(**changes: Any) -> dict[str, Any]:
    value = {"prompt": "What is it?\n\nOptions:\nA. newt\nB. carp", "solution": "B. carp", "image_path": "img/a.png"}
    return {key: content for key, content in (value | changes).items() if content is not ...}


def read(path: Path, **options: Any) -> tuple[list[dict], RecordReport]:
    report = RecordReport(max_bad_share=1)
    return list(read_dmlr(path, report=report, **options)), report


def bad_row(path: Path, **options: Any) -> str:
    """The one bad row of a file, and that the others are read."""
    records, report = read(path, **options)
    assert report.num_bad == 1 and report.num_good == len(records)
    return str(report.first_bad[0])


# Reading


def test_a_row(write: Callable[..., Path], tmp_path: Path) -> None:
    facts = {"answer_text": "carp", "completion": "B", "ground_truth_text": "carp", "level": 3}
    (record,), report = read(write(row(idx=7, **facts)))
    assert report.num_good == 1
    assert record == make_record(
        id="toy-0",
        question="What is it?\n\nOptions:\nA. newt\nB. carp",
        answer="B. carp",
        images=[str(tmp_path / "img/a.png")],
        choices=["newt", "carp"],
        meta={
            "source": str(tmp_path / "toy.json"),
            "row": 0,
            "data_idx": 0,
            "ds_name": "toy",
            "image_path": "img/a.png",
            "idx": 7,
            "extra": facts,
        },
    )
    assert record_from_row(records_to_dataset([record], decode=False)[0]) == record
    lines = tmp_path / "toy.jsonl"
    lines.write_text("".join(json.dumps(row(idx=i)) + "\n" for i in range(2)))
    assert [each["meta"]["data_idx"] for each in read_dmlr(lines)] == [0, 1]


def test_images_begin_at_the_root(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the working directory, where another image of the name may be."""
    (tmp_path / "elsewhere/img").mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(tmp_path / "elsewhere/img/a.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(row())
    (first,), _ = read(path)
    (second,), _ = read(path, image_root=tmp_path / "elsewhere")
    assert [open_image(each["images"][0], each).size for each in (first, second)] == [(84, 56), (28, 28)]
    (absolute,), _ = read(write(row(image_path=str(tmp_path / "img/a.png"))), image_root=tmp_path / "elsewhere")
    assert absolute["images"] == first["images"]
    with pytest.raises(RecordError, match="'nowhere' does not exist"):
        read_dmlr(path, "nowhere")


@pytest.mark.parametrize("name", ["", None, ...])
def test_a_row_without_image_is_text_alone(name: Any, write: Callable[..., Path]) -> None:
    (record,), _ = read(write(row(image_path=name)))
    assert record["images"] == [] and record["meta"]["image_path"] == ""


@pytest.mark.parametrize(
    ("solution", "answer"), [(12, "12"), (0.5, "0.5"), (["1", "2"], "['1', '2']"), ("[0, 1]", "[0, 1]")]
)
def test_solutions_are_taken_as_text(solution: Any, answer: str, write: Callable[..., Path]) -> None:
    (record,), _ = read(write(row(solution=solution)))
    assert record["answer"] == answer
    assert record["meta"].get("solution") == (None if isinstance(solution, str) else solution)


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("What?\n\nOptions:\nA. newt\nB. carp\nC. robin", ["newt", "carp", "robin"]),
        ("On?\nOptions: A: A desk., B: A chair., C: The floor.", ["A desk.", "A chair.", "The floor."]),
        ("Hint: the option letter, e.g., A, B.\nQuestion: Q\nChoices:\n(A) 120°\n(B) 140°", ["120°", "140°"]),
        ("\\n Question: Is it?\nOptions: (a) Open (b) Closed\n", ["Open", "Closed"]),
        (r"Q <image1>\n Options: A. $3\sqrt{2}$, B. $\neq 6$, C. $4.5$", [r"$3\sqrt{2}$", r"$\neq 6$", "$4.5$"]),
        ("Options: A. one\nOptions: A. two B. three", ["two", "three"]),
        ("Which? A. one B. two", None),
        ("Options: A. one", None),
        ("Options: A. B. two", None),
        ("Options: B. one A. two", None),
        ("", None),
    ],
)
def test_choices_in_a_prompt(prompt: str, choices: list[str] | None) -> None:
    assert choices_in(prompt) == choices


def test_choices_of_the_field_come_first(write: Callable[..., Path]) -> None:
    records, _ = read(write(row(choices=["x", "y"]), row(choices=[]), row(choices="x"), row(prompt="Why?")))
    assert [each["choices"] for each in records] == [["x", "y"], ["newt", "carp"], ["newt", "carp"], None]
    assert records[2]["meta"]["extra"] == {"choices": "x"}


# Repairs


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (r"In \boxed{}. \n Question: Is it?" + "\n", "In \\boxed{}. \nQuestion: Is it?\n"),
        (r"Q\n<image1>\n Options: A", "Q\n<image1>\nOptions: A"),
        (r"$a \neq b$, $\nu$ \n\n $\nabla f$", "$a \\neq b$, $\\nu$ \n\n$\\nabla f$"),
        (r"a \\n & b", r"a \\n & b"),
        ("a\nb", "a\nb"),
    ],
)
def test_new_lines_of_two_characters(prompt: str, expected: str, write: Callable[..., Path]) -> None:
    assert repaired(prompt) == expected
    path = write(row(prompt=prompt))
    (mended,), _ = read(path)
    (kept,), _ = read(path, repair=False)
    assert (mended["question"], kept["question"]) == (expected, prompt)
    assert mended["meta"].get("prompt") == (prompt if prompt != expected else None) and "prompt" not in kept["meta"]


# Slices


def test_a_slice_keeps_the_positions_of_the_file(write: Callable[..., Path]) -> None:
    path = write(*(row(idx=100 + i) for i in range(5)))

    def positions(**options: int | None) -> list[int]:
        records, _ = read(path, **options)
        assert all(each["meta"]["row"] == each["meta"]["data_idx"] == each["meta"]["idx"] - 100 for each in records)
        return [each["meta"]["data_idx"] for each in records]

    assert positions(start_data_idx=1, end_data_idx=3) == [1, 2]
    assert positions(start_data_idx=3, end_data_idx=100) == positions(start_data_idx=3) == [3, 4]
    for start, end in ((5, None), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match=f"start_data_idx={start}, end_data_idx={end}: no row of the 5 of .*toy"):
            read_dmlr(path, start_data_idx=start, end_data_idx=end)
    for options in ({"start_data_idx": -1}, {"end_data_idx": 1.0}, {"start_data_idx": True}):
        with pytest.raises(ValueError, match=r"_data_idx=.* must be a position in the file, 0 or more"):
            read_dmlr(path, **options)


# Solutions that are not there


@pytest.fixture
def gaps(write: Callable[..., Path]) -> Path:
    """Rows 1, 2, 3 and 6 have no solution, row 4 says null."""
    empty = [row(solution=""), row(solution=" "), row(solution=...)]
    return write(row(), *empty, row(solution=None), row(), row(solution=""))


def test_empty_solutions_refuse_the_file(gaps: Path) -> None:
    with pytest.raises(RecordError, match=r"toy.json, whole file: 4 of 7 rows have an empty .*, rows 1-3, 6; repair"):
        read_dmlr(gaps)
    with pytest.raises(RecordError, match="1 of 2 rows have an empty solution.*, rows 6;"):
        read_dmlr(gaps, start_data_idx=5)
    assert [each["meta"]["data_idx"] for each in read_dmlr(gaps, start_data_idx=4, end_data_idx=6)] == [5]


def test_empty_and_null_solutions_are_skipped_or_kept(gaps: Path) -> None:
    records, report = read(gaps, empty_answers="skip")
    assert [each["meta"]["data_idx"] for each in records] == [0, 5]
    assert report.skip_reasons == {"solution is empty": 4, "solution is null": 1} and not report.num_bad
    records, report = read(gaps, empty_answers="keep", null_answers="keep")
    assert [each["answer"] for each in records] == ["B. carp", "", " ", "", "", "B. carp", ""]
    assert records[4]["meta"]["solution"] is None and "solution" not in records[1]["meta"]
    records, report = read(gaps, empty_answers="keep", null_answers="refuse")
    assert len(records) == 6 and "row 4: 'solution' is null; fill it in, or choose null" in str(report.first_bad[0])


def test_a_skipped_row_need_not_be_whole(write: Callable[..., Path]) -> None:
    path = write(row(), row(solution=None, image_path="gone.png"), row(solution="", image_path="gone.png"))
    _, report = read(path, empty_answers="skip")
    assert (report.num_good, report.num_bad, report.skip_reasons.total()) == (1, 0, 2)


# Bad rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "row 1: a row must be an object with columns, got 'text'"),
        (row(prompt=3), "row 1: 'prompt' must be a string, got 3"),
        (row(prompt=None), "row 1: 'prompt' must be a string, got None"),
        (row(prompt=" "), "row 1: 'prompt' is empty or missing"),
        (row(prompt=...), "row 1: 'prompt' is empty or missing"),
        (row(solution={"a": 1}), "row 1: 'solution' must be text, a number or a list, got {'a': 1}"),
        (row(solution=True), "row 1: 'solution' must be text, a number or a list, got True"),
        (row(idx=[1]), "row 1: 'idx' must be a number or a string, got [1]"),
        (row(image_path=5), "row 1: 'image_path' must be a path or empty, got 5"),
        (row(image_path="img/b.png"), "img/b.png' does not exist; check image_root, or the row"),
        (
            row(image_path="https://example.com/a.png"),
            "row 1: 'image_path' is the URL 'https://example.com/a.png'; fet",
        ),
    ],
)
def test_bad_rows(value: Any, message: str, write: Callable[..., Path]) -> None:
    path = write(row(), value, row())
    assert message in bad_row(path)
    with pytest.raises(RecordShareError, match="max_bad_share=0.01"):
        list(read_dmlr(path))


def test_images_that_do_not_open(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "img/text.png").write_text("no picture")
    Image.radial_gradient("L").save(tmp_path / "img/whole.png")
    whole = (tmp_path / "img/whole.png").read_bytes()
    (tmp_path / "img/cut.png").write_bytes(whole[: len(whole) // 2])
    text, cut = row(image_path="img/text.png"), row(image_path="img/cut.png")
    assert "toy.json, row 1: image " in bad_row(write(row(), text)) and "cannot be read" in bad_row(write(row(), text))
    path = write(row(), cut)
    assert len(read(path)[0]) == 2, "its head is that of a picture"
    assert "row 1: image " in bad_row(path, check="content") and "cut.png' cannot" in bad_row(path, check="content")


def test_equal_idx_refuse_the_file(write: Callable[..., Path]) -> None:
    with pytest.raises(RecordError, match="toy.json, row 3: idx 5 is also that of row 1; was a file joined to itself"):
        read_dmlr(write(row(), row(idx=5), row(), row(idx=5)))
    assert len(read(write(row(idx=5), row(idx="5"), row(), row()))[0]) == 4


def test_files_that_cannot_be_read(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="gone.json, whole file: the file does not exist"):
        read_dmlr(tmp_path / "gone.json")
    path = write(row())
    path.write_text(path.read_text()[:-5])
    with pytest.raises(RecordError, match="not valid JSON at line 1"):
        read_dmlr(path)
    with pytest.raises(ValueError, match="no row of the 0"):
        read_dmlr(write())


@pytest.mark.parametrize("option", ["empty_answers", "null_answers", "check"])
def test_unknown_options(option: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=f"unknown {option} 'ask'; choose one of"):
        read_dmlr(write(row()), **{option: "ask"})


# Writing


def test_rows_come_back_as_they_were(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        row(idx=0, choices=["newt", "carp"], answer_text="carp"),
        row(prompt=r"\n Question: x", solution=3),
        row(solution=None, image_path=""),
        row(solution="", completion="(b)", idx="third"),
        row(choices=["other", "than listed"]),
    ]
    records, _ = read(write(*rows), empty_answers="keep", null_answers="keep")
    assert records[1]["question"] == "\nQuestion: x"
    assert write_dmlr_json(records, tmp_path / "again.json") == 5
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    inside = tmp_path / "deep/again.json"
    write_dmlr_json(records, inside)
    assert json.loads(inside.read_text())[0]["image_path"] == str(tmp_path / "img/a.png"), "outside the root"
    write_dmlr_json(records, inside, image_root=tmp_path)
    assert json.loads(inside.read_text()) == rows


def test_what_was_changed_is_written(write: Callable[..., Path], tmp_path: Path) -> None:
    (record,), _ = read(write(row(prompt=r"\n Question: x", solution=3)))
    record |= {"question": "y", "answer": "4", "choices": ["p", "q"]}
    assert dmlr_row(record, ("f", 0), tmp_path) == row(prompt="y", solution="4", choices=["p", "q"])


def test_records_of_other_readers(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20), "blue")
    records = [
        make_record("a", "Which?", "A", [picture], choices=["up", "down"], meta={"extra": {"level": 2}}),
        make_record("b", "Which?\nOptions: A. up B. down", "B", choices=["up", "down"]),
    ]
    path = tmp_path / "made/toy.json"
    assert write_dmlr_json(records, path) == 2
    assert json.loads(path.read_text()) == [
        {
            "prompt": "Which?",
            "level": 2,
            "choices": ["up", "down"],
            "solution": "A",
            "image_path": "toy/0.png",
            "idx": 0,
        },
        {"prompt": records[1]["question"], "solution": "B", "image_path": "", "idx": 1},
    ]
    back, _ = read(path, check="content")
    assert [each["choices"] for each in back] == [["up", "down"]] * 2
    assert open_image(back[0]["images"][0], back[0]).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(RecordError, match="toy.json, row 1: record 'c' has 2 images, a row holds one"):
        write_dmlr_json([records[1], make_record("c", "q", "a", [picture, picture])], path)
    assert len(json.loads(path.read_text())) == 2, "a file that fails is not written"
