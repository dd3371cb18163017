"""Questions with stepwise rationales: their records, from files and generated, and wrong options."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.step_tasks import NUM_GRAPHS, read_task
from tests.tiny import tiny_images
from trainers.data.graphs import SMALL_GRAPHS, solve_graph_question
from trainers.data.records import RecordReport


def gsm8k_file(folder: Path, number: int = 9) -> Path:
    path = folder / "gsm8k.txt"
    path.write_text("".join(f"How many are {i} and 1?||<<{i}+1={i + 1}>> ok##{i + 1}\n" for i in range(number)))
    return path


def test_records_of_files(tmp_path: Path) -> None:
    tiny_images(1)[0].save(tmp_path / "a.png")
    row = {"id": "m", "question": "Which?", "choices": ["ice", "fire"], "answer": "B", "rationale": "It burns. So.",
           "image": "a.png", "domain": "science"}  # fmt: skip
    (tmp_path / "m3cot.json").write_text(json.dumps([row, {**row, "id": "n", "image": None}, {**row, "answer": "Z"}]))
    report = RecordReport(0.5)
    (record,) = read_task("m3cot", tmp_path / "m3cot.json", report=report)
    assert (record["answer"], record["meta"]["domain"], record["steps"]) == ("B", "science", ["It burns", "So."])
    assert (report.num_good, report.num_bad, report.skip_reasons["row without image"]) == (1, 1, 1)
    (tmp_path / "prosqa.json").write_text(json.dumps([{"question": "Is A b?", "steps": ["x"], "answer": "A is b."}]))
    assert read_task("prosqa", tmp_path / "prosqa.json")[0]["answer"] == "A is b."
    every = read_task("gsm8k", gsm8k_file(tmp_path))
    assert [record["answer"] for record in every] == [str(i + 1) for i in range(9)]
    drawn = read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=1)
    rows = [record["meta"]["row"] for record in drawn]
    assert rows == sorted(set(rows)) and len(rows) == 4 and rows != [0, 1, 2, 3]
    assert drawn == read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=1)
    assert drawn != read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=3)


def test_graphs_are_generated() -> None:
    records = read_task("graphs", num=3, seed=5, **SMALL_GRAPHS)
    assert [record["id"] for record in records] == [f"graph-test-5-{i}" for i in range(3)]
    assert all(solve_graph_question(record["question"]) == record["answer"] for record in records)
    assert read_task("graphs", split="validation", num=1)[0]["meta"]["split"] == "validation"
    assert NUM_GRAPHS == len(read_task("graphs", **SMALL_GRAPHS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mmvp"}, "unknown task 'mmvp'; choose one of .'m3cot', 'scienceqa'"),
        ({"task": "m3cot"}, "task 'm3cot' needs data_path"),
        ({"task": "graphs", "data_path": "x.json"}, "data_path='x.json': graphs are generated.*'prosqa'"),
        ({"task": "graphs", "image_folder": "x"}, "image_folder='x': graphs are generated"),
        ({"task": "graphs", "num": 0}, "num=0 must be at least 1"),
        ({"task": "gsm8k", "num": 10}, "num=10 of 9 records"),
        ({"task": "gsm8k", "split": "test"}, "split='test': gsm8k has none"),
        ({"task": "gsm8k", "image_folder": "x"}, "image_folder='x': gsm8k has none"),
        ({"task": "gsm8k", "num_nodes": 9}, r"\['num_nodes'\]: sizes of generated graphs, and gsm8k is read"),
        ({"task": "gsm8k", "number": 0}, "has no record for gsm8k"),
        ({"task": "prosqa", "data_path": "gone.json"}, "gone.json"),
    ],
)
def test_wrong_options_of_reading(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    task, number = options.pop("task"), options.pop("number", 9)
    if task == "gsm8k":
        options["data_path"] = gsm8k_file(tmp_path, number)
    with pytest.raises(ValueError, match=message):
        read_task(task, **options)
