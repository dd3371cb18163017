"""M3CoT and ScienceQA: rows of files, tables and repositories to records, and what makes a row bad."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from trainers.data.m3cot import read_m3cot
from trainers.data.records import (
    Record,
    RecordError,
    RecordReport,
    RecordShareError,
    open_image,
    record_from_row,
    records_to_dataset,
)
from trainers.data.scienceqa import read_scienceqa


def png(picture: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (picture or Image.new("RGB", (6, 4), (1, 2, 3))).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    return tmp_path


def m3cot(**changes: Any) -> dict[str, Any]:
    return {
        "id": "physics-1",
        "category": "c",
        "image_id": "i-1",
        "question": "Which is hot? ",
        "choices": ["ice", " fire "],
        "context": "ignored",
        "answer": "B",
        "rationale": "Ice is cold. Fire is hot.",
        "split": "train",
        "image": "a.png",
        "domain": "science",
        "topic": "physics",
        **changes,
    }


def scienceqa(**changes: Any) -> dict[str, Any]:
    return {
        "image": "a.png",
        "question": "Which is hot?",
        "choices": ["ice", "fire"],
        "answer": 1,
        "hint": "ignored",
        "subject": "natural science",
        "topic": "physics",
        "lecture": "Fire burns.",
        "solution": "So it is hot.",
        **changes,
    }


SETS = {"m3cot": (read_m3cot, m3cot), "scienceqa": (read_scienceqa, scienceqa)}


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if name.endswith("l") else json.dumps(rows), encoding="utf-8")
    return path


def read(reader: Callable[..., Any], source: Any, *args: Any, **options: Any) -> tuple[list[Record], RecordReport]:
    report = RecordReport()
    return list(reader(source, *args, report=report, **options)), report


def test_row_of_m3cot(folder: Path) -> None:
    (record,), report = read(read_m3cot, write(folder, [m3cot()]))
    assert (record["id"], record["question"], record["answer"]) == ("physics-1", "Which is hot? ", "B")
    assert (record["choices"], record["steps"]) == (["ice", " fire "], ["Ice is cold", "Fire is hot."])
    assert record["images"] == [str(folder / "a.png")]
    assert record["meta"] == {
        "source": str(folder / "data.jsonl"),
        "row": 0,
        "index": 0,
        "position": 0,
        "answer_index": 1,
        "ds_name": "data",
        "domain": "science",
        "topic": "physics",
        "category": "c",
        "image_id": "i-1",
        "split": "train",
    }
    assert report.num_good == 1


def test_row_of_scienceqa(folder: Path) -> None:
    (record,), _ = read(read_scienceqa, write(folder, [scienceqa()], "data.json"))
    assert (record["id"], record["answer"], record["choices"]) == ("data-0", "1", ["ice", "fire"])
    assert record["steps"] == ["Fire burns", "So it is hot."]
    assert (record["meta"]["answer_index"], record["meta"]["subject"]) == (1, "natural science")
    (record,), _ = read(read_scienceqa, write(folder, [scienceqa(lecture="", solution=None)]))
    assert record["steps"] == ["1"]


def test_number_of_steps(folder: Path) -> None:
    text = "a. b. c. d. e"
    for reader, row in ((read_m3cot, m3cot(rationale=text)), (read_scienceqa, scienceqa(lecture="", solution=text))):
        path = write(folder, [row])
        steps = [
            read(reader, path, **options)[0][0]["steps"] for options in ({}, {"max_steps": 2}, {"max_steps": None})
        ]
        assert steps == [["a. b", "c. d", "e"], ["a. b. c", "d. e"], list("abcde")]


@pytest.mark.parametrize("name", SETS)
def test_rows_without_image(folder: Path, name: str) -> None:
    reader, row = SETS[name]
    path = write(folder, [row(image=None), row(id="2"), row(image=""), row(id="4", image=None), row(id="5")])
    records, report = read(reader, path)
    assert [(record["meta"]["row"], record["meta"]["position"]) for record in records] == [(1, 0), (4, 1)]
    assert (report.num_bad, dict(report.skip_reasons)) == (0, {"row without image": 3})
    assert "skipped on request: 3 (row without image)" in report.summary()
    records, report = read(reader, path, without_image="refuse")
    assert (len(records), report.num_bad) == (2, 3)
    assert "data.jsonl, row 0: the row has no image; remove it, or read with without_image='skip'" in report.summary()
    records, report = read(reader, path, without_image="keep")
    assert [len(record["images"]) for record in records] == [0, 1, 0, 0, 1] and report.num_bad == 0
    with pytest.raises(ValueError, match="unknown without_image 'drop'; choose one of skip, refuse, keep"):
        reader(path, without_image="drop")


def test_a_bad_row_counts_as_a_position(folder: Path) -> None:
    """The published index counts rows with an image, whatever else is wrong with them."""
    for reader, row in SETS.values():
        records, _ = read(reader, write(folder, [row(), row(image="none.png"), row(choices=[]), row(id="z")]))
        assert [record["meta"]["position"] for record in records] == [0, 3]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("form", ["list", "lines", "parquet", "table", "folder", "rows"])
def test_the_same_records_from_every_source(folder: Path, name: str, form: str) -> None:
    reader, row = SETS[name]
    rows = [row(id="0"), row(id="1", image=None)]
    features = Features({**Dataset.from_list(rows).features, "image": ImageFeature()})
    table = Dataset.from_list(
        [{**value, "image": value["image"] and str(folder / "a.png")} for value in rows], features
    )
    args: list[str] = []
    source: Any = rows
    if form == "parquet":
        source = folder / "data.parquet"
        table.to_parquet(source)
    elif form in ("list", "lines"):
        source = write(folder, rows, "data.json" if form == "list" else "data.jsonl")
    elif form == "table":
        source = table
    elif form == "folder":
        source, args = folder / "repository", ["validation"]
        source.mkdir()
        table.to_parquet(source / "validation.parquet")
    records, report = read(reader, source, *args, image_folder=folder)
    (record,) = records
    assert report.num_good == 1 and dict(report.skip_reasons) == {"row without image": 1}
    expected, _ = read(reader, write(folder, rows))
    fields = ("question", "answer", "choices", "steps")
    assert [record[field] for field in fields] == [expected[0][field] for field in fields]
    assert open_image(record["images"][0], record).getpixel((0, 0)) == (1, 2, 3)
    (row_of_table,) = records_to_dataset(records, decode=False)
    again = record_from_row(row_of_table)
    assert again["meta"] == record["meta"] and open_image(again["images"][0], again).size == (6, 4)


BAD_ROWS = {
    "m3cot-answer outside": (m3cot(answer="C"), "answer 'C' is not one of the letters 'AB' of its choices"),
    "m3cot-answer of two letters": (m3cot(answer="AB"), "answer 'AB' is not one of the letters 'AB'"),
    "m3cot-answer in lower case": (m3cot(answer="b"), "answer 'b' is not one of the letters"),
    "m3cot-answer empty": (m3cot(answer=" "), "answer is empty; repair or remove the row"),
    "m3cot-answer missing": (m3cot(answer=None), "a row needs the string 'answer', got None"),
    "m3cot-question empty": (m3cot(question=" "), "question is empty"),
    "m3cot-question a number": (m3cot(question=7), "a row needs the string 'question', got 7"),
    "m3cot-no choices": (m3cot(choices=[]), "choices are empty; repair or remove the row"),
    "m3cot-choices missing": (m3cot(choices=None), "choices are empty"),
    "m3cot-empty choice": (m3cot(choices=["a", ""]), r"choices must be a list of non-empty strings or None, got \["),
    "m3cot-choices a text": (m3cot(choices="ab"), "choices must be a list of non-empty strings or None, got 'ab'"),
    "m3cot-rationale a list": (m3cot(rationale=["a"]), r"'rationale' must be text or empty, got \['a'\]"),
    "m3cot-image missing": (m3cot(image="none.png"), r"image file '.*none\.png' does not exist; check image_folder"),
    "m3cot-image a number": (m3cot(image=3), "'image' must be a path, a picture or empty, got 3"),
    "m3cot-latent token": (m3cot(question="a <|latent|>"), r"contains the token <\|latent\|>; remove it"),
    "m3cot-image token": (m3cot(rationale="<image> shows."), "contains the token <image>"),
    "m3cot-damaged": ('{"question": "a', "line 2 .* is not one JSON object"),
    "m3cot-not an object": ("[1]", r"a row must be an object with columns, got \[1\]"),
    "scienceqa-answer outside": (scienceqa(answer=2), "answer 2 is not the index of one of the 2 choices"),
    "scienceqa-answer negative": (scienceqa(answer=-1), "answer -1 is not the index"),
    "scienceqa-answer a letter": (scienceqa(answer="B"), "'answer' must be the index of a choice, got 'B'"),
    "scienceqa-answer a switch": (scienceqa(answer=True), "'answer' must be the index of a choice, got True"),
    "scienceqa-question empty": (scienceqa(question=""), "question is empty"),
    "scienceqa-no choices": (scienceqa(choices=[]), "choices are empty"),
    "scienceqa-lecture a number": (scienceqa(lecture=3), "'lecture' must be text or empty, got 3"),
    "scienceqa-latent token": (scienceqa(solution="<|latent-patch|>"), r"contains the token <\|latent-patch\|>"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_left_out_and_named(folder: Path, case: str) -> None:
    (reader, row), (bad, reason) = SETS[case.split("-")[0]], BAD_ROWS[case]
    path = write(folder, [row(id="1"), bad, row(id="3")])
    records, report = read(reader, path)
    assert [record["meta"]["row"] for record in records] == [0, 2]
    with pytest.raises(RecordShareError, match=rf"(?s)data\.jsonl, row 1: .*{reason}"):
        report.check()
    with pytest.raises(RecordShareError, match=r"1 bad rows"):
        list(reader(path))


@pytest.mark.parametrize(
    ("name", "row"), [("m3cot", {"rationale": " "}), ("m3cot", {"rationale": None}), ("scienceqa", {"lecture": " ",
     "solution": None})],
)  # fmt: skip
def test_rows_without_steps(folder: Path, name: str, row: dict[str, Any]) -> None:
    reader, make = SETS[name]
    path = write(folder, [make(**row), make(id="2")])
    records, report = read(reader, path)
    assert [record["steps"] for record in records][0] == ([] if name == "m3cot" else ["1"]) and report.num_bad == 0
    records, report = read(reader, path, require_steps=True)
    assert [record["meta"]["row"] for record in records] == [1]
    assert "data.jsonl, row 0: the row has n" in report.summary() and "require_steps=False" in report.summary()


def test_a_picture_that_is_none_costs_its_row(folder: Path) -> None:
    cut = png(Image.linear_gradient("L"))[:200]
    table = Dataset.from_list(
        [{**m3cot(), "image": {"bytes": data, "path": None}} for data in (png(), b"nothing", cut)],
        Features(
            {**Dataset.from_list([m3cot()]).features, "image": {"bytes": Value("binary"), "path": Value("string")}}
        ),
    )
    pictures = table.cast_column("image", ImageFeature())
    pictures.to_parquet(folder / "data.parquet")
    for source in (table, pictures, folder / "data.parquet"):
        records, report = read(read_m3cot, source)
        assert "row 1: the bytes of 'image' are no picture" in report.summary()
        first, cut = records
        assert open_image(first["images"][0], first).size == (6, 4)
        with pytest.raises(RecordError, match="row 2: .*cannot be read"):
            open_image(cut["images"][0], cut)


def test_pictures_and_addresses_are_images(folder: Path) -> None:
    picture = Image.new("RGB", (3, 3))
    records, _ = read(read_m3cot, [m3cot(image=picture), m3cot(image="https://host.example/a.png")])
    assert [record["images"][0] for record in records] == [picture, "https://host.example/a.png"]


def test_sources_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, [m3cot()])
    for missing in (folder / "none.jsonl", "none", "data/none.json"):
        with pytest.raises(RecordError, match="the file does not exist"):
            read_m3cot(missing)
    with pytest.raises(ValueError, match=r"split='train' with the file .*; a file has no parts"):
        read_m3cot(path, "train")
    with pytest.raises(ValueError, match="split='test' chooses a part of a repository"):
        read_m3cot([m3cot()], "test")
    with pytest.raises(ValueError, match=r"the table has the parts \['train'\]; pass one of them"):
        read_m3cot(DatasetDict({"train": Dataset.from_list([m3cot()])}))
    with pytest.raises(ValueError, match=r"is a repository or folder of tables; say which part, e\.g\. split='train'"):
        read_m3cot("name/of-a-set")
    with pytest.raises(RecordError, match="image_folder '.*none' does not exist"):
        read_m3cot(path, image_folder=folder / "none")
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RecordError, match=r"bad\.parquet, whole file: not a readable parquet file"):
        list(read_m3cot(folder / "bad.parquet"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: (_ for _ in ()).throw(ValueError("no such part")))
    with pytest.raises(RecordError, match="name/of-a-set, whole file: the part 'test' cannot be loaded"):
        read_m3cot("name/of-a-set", "test")


def test_a_repository_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def load(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([m3cot(image=os.fspath(folder / "a.png"))])

    monkeypatch.setattr("datasets.load_dataset", load)
    (record,), _ = read(read_m3cot, "LightChen2333/M3CoT", "test")
    assert asked == [("LightChen2333/M3CoT", "test")]
    assert record["meta"]["source"] == "LightChen2333/M3CoT[test]"


def test_transparent_parts_take_the_colour_of_the_background() -> None:
    record = m3cot()
    picture = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert open_image(picture, record).getpixel((0, 0)) == (10, 20, 30)
    assert open_image(picture, record, background="white").getpixel((0, 0)) == (255, 255, 255)
    opaque = Image.new("RGB", (2, 2), (10, 20, 30))
    assert open_image(opaque, record, background="white").getpixel((0, 0)) == (10, 20, 30)
