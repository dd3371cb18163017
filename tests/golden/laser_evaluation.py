"""LASER golden vectors of its evaluation: queries, prediction files, ranks and their merge (method card, 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_sets import record_of_choice
from evaluation.benchmarks.registry import benchmark
from evaluation.harness.published_outputs import (
    laser_path,
    laser_record,
    merge_ranks,
    merged_summary,
    published_shards,
)
from evaluation.runner import Prediction
from tests.golden.conftest import each, golden_dir, golden_json
from tests.tiny import tiny_images
from trainers.data.records import Record, make_record

EVALUATION: dict[str, Any] = golden_json(golden_dir("laser"), "evaluation.json", {})
PROMPTS: dict[str, Any] = EVALUATION.get("prompts", {})
PROTOCOLS = {"instruction": "laser", "plain": "laser_plain"}
REPLY = "<answer>A</answer>"  # what the published run of the vectors was made to say
# Rows that the file describes in words.
DESCRIBED: dict[str, list[dict[str, Any]]] = {
    "mmvp": [
        {"Index": "1", "Question": "Is the x open?", "Options": "(a) Yes (b) No", "Correct Answer": "(a)"},
        {"Index": "2", "Question": "Is it day?", "Options": "(a) Day (b) Night", "Correct Answer": "(b)"},
    ],
    "seedbench2plus": [
        {"question_id": "text_rich_1_1", "question": "What does the x chart show?", "choice_A": "a1", "choice_B": "b1",
         "choice_C": "c1", "choice_D": "d1", "answer": "C", "data_id": "text_rich/1.png",
         "question_image_type": "Chart"}
    ],
    "hrbench": [
        {"index": 0, "question": "What is on the x?", "A": "cat", "B": "dog", "C": "cow", "D": "pig", "answer": "A",
         "category": "single", "image": "i"},
        {"index": 1, "question": "What is on the x?", "A": "dog", "B": "cat", "C": "pig", "D": "cow", "answer": "B",
         "category": "cross", "image": "i"},
    ],
}  # fmt: skip


def registered(name: str) -> str:
    return "hrbench4k" if name == "hrbench" else name


def records_of(name: str, folder: Path) -> list[Record]:
    """The rows of a set as records; their images, which the file only names, are tiny ones."""
    (picture,) = tiny_images(1)
    for path in ("i", "i1", "i2", "i3", "text_rich/1.png", "MMVP Images/1.jpg", "MMVP Images/2.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path, "PNG")
    rows = EVALUATION["source_rows"][name]
    rows = DESCRIBED[name] if isinstance(rows, str) else rows
    task = "Counting" if name == "blink" else ""
    return [record_of_choice(registered(name), row, "rows.json", i, folder, task) for i, row in enumerate(rows)]


@each("case", list(PROMPTS))
def test_queries_and_prediction_files(case: str, tmp_path: Path) -> None:
    name, _, kind = case.partition("|")
    protocol, wanted = benchmark(registered(name)).protocol(PROTOCOLS[kind]), PROMPTS[case]
    records = records_of(name, tmp_path)
    queries = [{"n_images": len(record["images"]), "text": protocol.ask(record)} for record in records]
    assert queries == [{key: asked[key] for key in ("n_images", "text")} for asked in wanted["inputs"]]
    said = [Prediction(record["id"], REPLY, REPLY, 0, 4, (), raw=REPLY) for record in records]
    written = [laser_record(*pair, protocol) for pair in zip(records, said, strict=True)]
    assert written == wanted["records"]
    right = [protocol.score(*pair).correct for pair in zip(records, said, strict=True)]
    assert f"{sum(right)}/{len(right)} = {100 * sum(right) / len(right):.2f}%" == wanted["accuracy_line"]
    options = {"latent_strategy": "dynamic", "max_latent_steps": 8}
    assert [laser_path("", name, "run/checkpoint", options).name] == wanted["output_file"]


# Replies


def scored(name: str, response: str, truth: str = "A", question: str = "?", options: str = "") -> tuple:
    """What the protocols of a set read in a reply; they read alike."""
    record = make_record("0", question, truth)
    record["meta"] = {"fields": {"Options": options}}
    said = Prediction("", "", "", 0, 4, (), raw=response)  # the text without special tokens is not what is read
    found = {tuple(benchmark(name).protocol(protocol).score(record, said)) for protocol in PROTOCOLS.values()}
    (one,) = found
    return one


@each("case", EVALUATION.get("letter", []), ids=lambda case: case["response"][:40])
def test_letters_through_the_protocols(case: dict[str, Any]) -> None:
    for name in ("blink", "mmstar", "seedbench2plus", "hrbench4k", "hrbench8k"):
        assert scored(name, case["response"])[1] == (case["extracted"] or None), name


@each("case", EVALUATION.get("mmvp", []), ids=lambda case: case["response"][:40] + case["question"][-20:])
def test_letters_of_mmvp_through_the_protocols(case: dict[str, Any]) -> None:
    question, _, options = case["question"].partition(" ")
    assert scored("mmvp", case["response"], "A", question, options)[1] == (case["extracted"] or None)
    right = case["extracted"] == "A"
    assert scored("mmvp", case["response"], "(a)", question, options)[0] is right


@each("case", EVALUATION.get("yes_no", []), ids=lambda case: case["response"][:40])
def test_yes_and_no_through_the_protocols(case: dict[str, Any]) -> None:
    answer = {1: "Yes", 0: "No", -1: None}[case["extracted"]]
    assert scored("hallusionbench", case["response"], "Yes") == (answer == "Yes", answer)


TRUTHS = {
    "letter_ground_truth": "mmstar",
    "yes_no_ground_truth": "hallusionbench",
    "yes_no_relaxed": "vsr",
    "choice_relaxed": "cub",
}


@each(
    "name,case",
    [(name, case) for table, name in TRUTHS.items() for case in EVALUATION.get(table, [])],
    ids=lambda value: value if isinstance(value, str) else f"{value['response'][:30]}={value['ground_truth']}",
)
def test_scores_through_the_protocols(name: str, case: dict[str, Any]) -> None:
    assert scored(name, case["response"], case["ground_truth"])[0] is case["correct"]


# Files of several processes


@each("case", EVALUATION.get("shards", []), ids=lambda case: f"{case['n']} on {case['world_size']}")
def test_split_into_ranks(case: dict[str, Any]) -> None:
    assert case["seed"] == 42
    assert published_shards(case["n"], case["world_size"]) == case["ranks"]


@each("merge", [EVALUATION["merge"]] if "merge" in EVALUATION else [], ids=lambda _: "all")
def test_merge_of_ranks(merge: dict[str, Any], tmp_path: Path) -> None:
    """The published script passes over the missing rank with a warning; here it has to be there."""
    options = {"latent_strategy": "dynamic", "max_latent_steps": 8}
    target = laser_path(tmp_path, "mmstar", "runs/run_v1/checkpoint-320", options)
    assert target.parent.relative_to(tmp_path).as_posix() == merge["relative_dir"]
    target.parent.mkdir(parents=True)
    missing = [name for name, rows in merge["rank_files"].items() if rows is None]
    for name, rows in merge["rank_files"].items():
        if rows is not None:
            (target.parent / name).write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=missing[0]):
        merge_ranks(target, len(merge["rank_files"]))
    assert not target.exists()
    (target.parent / missing[0]).write_text("[]", encoding="utf-8")
    rows = merge_ranks(target, len(merge["rank_files"]))
    assert [row["id"] for row in rows] == merge["merged_order"]
    assert json.loads(target.read_text(encoding="utf-8")) == rows
    assert merged_summary(rows, "mmstar") == merge["summary"]
