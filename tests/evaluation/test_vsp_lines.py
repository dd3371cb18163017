"""Lines of VSP: maps of numbers, records, bad lines."""

from pathlib import Path

import pytest

from evaluation.benchmarks.vsp_lines import maze_of_map, read_vsp_lines
from tests.evaluation.choice_files import MAP, write_lines, write_vsp
from trainers.data.records import RecordError, RecordReport, RecordShareError


def test_maps() -> None:
    assert maze_of_map(str(MAP)).rows() == ("@_#", "___", "#_*")
    assert maze_of_map("@_\n_*").size == 2
    for wrong in ("[[1, 0], [0, 5]]", "[[1, 0], [0, 0]]", "[[1, 2, 0]]", "[1, 2]", "[[1", "?"):
        with pytest.raises((TypeError, ValueError)):
            maze_of_map(wrong)


def test_records(tmp_path: Path) -> None:
    (record,) = read_vsp_lines(write_vsp(tmp_path / "vsp"))
    assert (record["id"], record["answer"], record["question"]) == ("0", str(MAP), "Go.")
    assert record["images"] == [str(tmp_path / "vsp" / "0.png")] and record["choices"] is None
    lines = tmp_path / "vsp" / "test_direct.jsonl"
    assert record["meta"] == {"source": str(lines), "row": 0, "ds_name": "vsp", "maze": "@_#\n___\n#_*",
                              "prompt": "Go.", "item": {"map_id": 0}}  # fmt: skip
    moved = lines.rename(tmp_path / "test_direct.jsonl")
    with pytest.raises(RecordShareError, match="0.png' does not exist"):
        read_vsp_lines(moved)
    assert read_vsp_lines(moved, image_folder=tmp_path / "vsp")[0]["images"] == record["images"]
    row = {"image_input": "0.png", "text_input": "<image>\nGo.", "map_id": 7, "map_desc": "@_\n_*"}
    (marked,) = read_vsp_lines(write_lines(lines, [row]))
    assert (marked["question"], marked["meta"]["prompt"], marked["id"]) == ("Go.", "<image>\nGo.", "7")


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    folder = write_vsp(tmp_path / "vsp", [MAP, [[1, 0], [0, 0]], [[1, 5], [0, 2]], "nothing"])
    with (folder / "test_direct.jsonl").open("a") as file:
        file.write("{broken\n")
    report = RecordReport(1)
    assert len(read_vsp_lines(folder, report=report)) == 1 and report.num_bad == 4
    assert [error.row for error in report.first_bad] == [1, 2, 3, 4]
    assert all("map_desc is no maze" in str(error) for error in report.first_bad[:3])
    good = {"image_input": "0.png", "text_input": "Go.", "map_id": 9, "map_desc": MAP}
    rows = [
        good,
        {"image_input": "0.png", "text_input": "Go."},
        {**good, "text_input": " "},
        {**good, "text_input": 3},
    ]
    report = RecordReport(1)
    assert len(read_vsp_lines(write_lines(folder / "test_direct.jsonl", rows), report=report)) == 1
    messages = ["lacks the columns ['map_id', 'map_desc']", "no question", "needs the string 'text_input'"]
    assert all(text in str(error) for text, error in zip(messages, report.first_bad, strict=True))
    with pytest.raises(RecordError, match=r"whole file: lacks the columns \['map_id', 'map_desc'\]"):
        read_vsp_lines(write_lines(folder / "test_direct.jsonl", rows[1:]))
