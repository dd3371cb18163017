"""Length files: what they keep, which data set they belong to, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny import tiny_processor
from trainers.data.lengths import (
    BadRow,
    LengthTable,
    content_hash,
    load_lengths,
    row_fingerprint,
    save_lengths,
    tokenizer_hash,
)
from trainers.data.llava import read_source, write_llava
from trainers.data.records import Record, RecordError, make_record, record_to_row, records_to_dataset

SETTINGS = {"min_pixels": 3136, "max_pixels": 50176, "latent_form": "chain"}


def table(**changes: Any) -> LengthTable:
    values = {
        "lengths": [12, 0, 7],
        "bad": {1: BadRow("data.json", 1, "no chain")},
        "settings": SETTINGS,
        "fingerprints": ["a" * 16, None, "c" * 16],
    }
    return LengthTable(**{**values, **changes})


def edited(path: Path, **changes: Any) -> Path:
    """A length file with some of its entries changed."""
    save_lengths(table(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def name(position: int) -> str:
    return f"row {position} of the data"


def records(*questions: str) -> list[Record]:
    return [
        make_record(f"r{i}", text, "A", [Image.new("RGB", (30, 30))], chain=["b"]) for i, text in enumerate(questions)
    ]


# The file ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    save_lengths(table(), path)
    assert load_lengths(path) == table(path=str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.json"]
    assert json.loads(path.read_text())["count"] == 3


def test_the_published_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"0": 12, "3": 9, "1": 0}))
    found = load_lengths(path)
    assert (found.lengths, found.formula, found.fingerprints, found.settings) == ([12, 0, 0, 9], "published", None, {})
    assert found.bad.keys() == {1, 2}
    assert "gives 0" in found.bad[1].reason and "has no length for it" in found.bad[2].reason


WRONG_FILES: list[tuple[dict[str, Any], str]] = [
    ({"lengths": [12, 0, -4]}, "row 2: the length -4 is negative"),
    ({"lengths": [0, 0, 7]}, "row 0: the length 0 is 0, and the row is not among the bad ones"),
    ({"lengths": [12, 0, 7.5]}, "row 2: the length 7.5 is not an integer"),
    ({"lengths": [12, 0, True]}, "row 2: the length True is not an integer"),
    ({"lengths": [12, 0, "7"]}, "row 2: the length '7' is not an integer"),
    ({"lengths": [12, 0]}, "count=3 for 2 lengths and 3 fingerprints; the file was cut or edited"),
    ({"lengths": None}, "lengths, fingerprints or bad are missing"),
    ({"fingerprints": ["b" * 16, None, "c" * 16]}, "content_hash does not fit the fingerprints"),
    ({"version": 2}, "version=2 of the format, this reads 1"),
    ({"format": "other"}, "not a length file: neither format='latent-lengths' nor an object of index to length"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_FILES, ids=lambda value: str(value)[:40])
def test_damaged_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "lengths.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_lengths(path)
    assert str(path) in str(error.value) and "examples/precompute_lengths.py" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": 5, "1": -2}', "row 1: the length -2 is negative"),
        ('{"0": 5, "1": null}', "row 1: the length None is not an integer"),
        ('{"0": 5, ', "not a length file"),
        ("[5, 6]", "not a length file"),
        ("{}", "not a length file"),
    ],
)
def test_damaged_published_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lengths.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_lengths(tmp_path / "lengths.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="none.json, whole file: the file does not exist"):
        load_lengths(tmp_path / "none.json")


# The data set -----------------------------------------------------------------------------------------------------


def test_lengths_are_found_for_a_part_of_the_data() -> None:
    whole = table(lengths=[4, 5, 6], bad={}, fingerprints=["a", "b", "c"])
    assert whole.of_rows([(2, "c"), (0, "a")], name) == ([6, 4], {})
    lengths, bad = table().of_rows([(2, "c" * 16), (1, None)], name)
    assert lengths == [7, 0] and bad == {1: BadRow("data.json", 1, "no chain")}


def test_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="is of another data set, or older: row 1 of the data differs from row 2"):
        table(path="x.json").of_rows([(0, "a" * 16), (2, "d" * 16)], name)
    with pytest.raises(ValueError, match="x.json is of another data set: it has 3 lengths, and none for row 0 of"):
        table(path="x.json").of_rows([(3, "d" * 16)], name)


@pytest.mark.parametrize(("rows", "refused"), [(100, False), (99, False), (98, True), (101, True)])
def test_a_published_file_must_have_as_many_rows(rows: int, refused: bool) -> None:
    published = LengthTable([9] * 100, formula="published", path="x.json")
    pairs = [(index, "f") for index in range(rows)]
    if refused:
        with pytest.raises(
            ValueError, match=f"x.json is of another data set: it has 100 lengths, the data set has {rows}"
        ):
            published.of_rows(pairs, name)
    else:
        assert published.of_rows(pairs, name) == ([9] * rows, {})


def test_other_settings_are_refused() -> None:
    table().check_settings(SETTINGS)
    table(settings={}).check_settings(SETTINGS)
    with pytest.raises(ValueError, match="lengths were counted with max_pixels=50176, this run has max_pixels=100"):
        table().check_settings({**SETTINGS, "max_pixels": 100})


# Fingerprints -----------------------------------------------------------------------------------------------------


def test_a_row_keeps_its_fingerprint_in_every_form(tmp_path: Path) -> None:
    write_llava(records("What?", "Where?"), tmp_path / "a" / "data.json", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    here = list(read_source(tmp_path / "a" / "data.json"))
    prints = [row_fingerprint(record) for record in here]
    assert len(set(prints)) == 2
    assert [row_fingerprint(record) for record in read_source(tmp_path / "b" / "data.json")] == prints
    assert [row_fingerprint(record_to_row(record)) for record in here] == prints
    stored = records_to_dataset(here).with_format("arrow")[:].to_pylist()
    assert [row_fingerprint(row) for row in stored] == prints


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Who?"},
        {"answer": "B"},
        {"chain": ["c"]},
        {"images": ["x/1.png"]},
        {"images": []},
        {"chain": None},
    ],
    ids=str,
)
def test_what_a_row_says_changes_its_fingerprint(change: dict[str, Any]) -> None:
    (record,) = records("What?")
    record["images"] = ["y/0.png"]
    assert row_fingerprint({**record, **change}) != row_fingerprint(record)
    assert row_fingerprint({**record, "images": ["z/0.png"], "boxes": []}) == row_fingerprint(record)


def test_hashes() -> None:
    assert content_hash(["a", None]) != content_hash(["a", "-", None]) != content_hash(["a"])
    tokenizer = tiny_processor().tokenizer
    before = tokenizer_hash(tokenizer)
    assert before == tokenizer_hash(tiny_processor().tokenizer)
    tokenizer.add_tokens("<|more|>")
    assert tokenizer_hash(tokenizer) != before
