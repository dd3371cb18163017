"""Prediction files in the published layouts, and the merge of ranks: against entries written out by hand."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.registry import benchmark
from evaluation.harness.published_outputs import (
    PUBLISHED_FORMS,
    laser_path,
    merge_ranks,
    merged_summary,
    write_published,
)
from evaluation.harness.variants import Asked
from evaluation.runner import Prediction, predict
from evaluation.search_store import ENTRY_FIELDS
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.evaluation.choice_files import mmvp_rows, write_blink, write_mmstar, write_mmvp, write_vsp, write_vstar
from tests.evaluation.evaluation_parts import asked as letters_asked
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images
from trainers.data.answers_lavit import count_learned_tokens
from trainers.data.predictions import read_m3cot_predictions, read_scienceqa_predictions
from trainers.tiny import build_tiny_processor

WRITERS: dict[str, Callable[[Path], Path]] = {
    "mmvp": write_mmvp,
    "mmstar": write_mmstar,
    "vstar": write_vstar,
    "vsp": write_vsp,
    "blink": lambda folder: write_blink(folder, "Counting"),
}


def read(name: str, folder: Path, protocol: str) -> Asked:
    bench = benchmark(name)
    return Asked(bench, bench.protocol(protocol), bench.read(WRITERS[name](folder / name)))


def said(given: Asked, raw: str = "<|lvr|>(B)<|im_end|>", text: str = "(B)") -> list[Prediction]:
    return [Prediction(record["id"], text, text, 4, 9, (), raw=raw) for record in given.records]


def written(form: str, given: Asked, folder: Path, **options: str) -> Any:
    path = write_published(form, folder / "out" / "file", "org/model", given, said(given, **options))
    return path.read_text(encoding="utf-8")


def test_lines_of_lavit(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in written("lavit", read("mmvp", tmp_path, "lavit"), tmp_path).splitlines()]
    asked = "Answer with the option letter from the given choices directly."
    assert rows == [
        {"id": row["Index"], "prompt": f"{row['Question']}\n{row['Options']}\n{asked}",
         "ground_truth": row["Correct Answer"], "model_output": "<|lvr|>(B)<|im_end|>", "lvr_count": 4, "meta": row}
        for row in mmvp_rows()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "truths", "metas"),
    [
        ("blink", ["B", "C"],
         [{"task": "Counting", "choices": ["red", "blue", "green"], "num_images": number} for number in (1, 2)]),
        ("mmstar", ["A", "B", "C"],
         [{"category": f"c{i % 2}", "l2_category": "sub", "source": "toy"} for i in range(3)]),
        ("vstar", ["A", "B"], [{"category": "c0"}, {"category": "c1"}]),
        ("vsp", ["[[1, 0, -1], [0, 0, 0], [-1, 0, 2]]"], [{"map_id": 0}]),
    ],
)  # fmt: skip
def test_facts_of_lavit_lines(name: str, truths: list[str], metas: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in written("lavit", read(name, tmp_path, "lavit"), tmp_path).splitlines()]
    assert [row["ground_truth"] for row in rows] == truths and [row["meta"] for row in rows] == metas


def test_learned_tokens_are_counted(tmp_path: Path) -> None:
    """Those laid out are no part of the output, and are counted with those that the model wrote itself."""
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    model = liven(tiny_latent_model(latent_method="lavit", **ids))
    given = read("mmvp", tmp_path, "lavit")
    for strategy, laid_out in (("learned", 4), ("off", 0)):
        prompt = partial(given.protocol.prompt, processor)
        options = {"latent_strategy": strategy, "max_new_tokens": 4, "prompt": prompt}
        predictions = predict(model, processor, given.records, **options)
        path = write_published("lavit", tmp_path / strategy, "m", given, predictions)
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert row["lvr_count"] - laid_out == count_learned_tokens(row["model_output"])


def test_entries_of_lvr(tmp_path: Path) -> None:
    """The letter is the label; a category where the set has some."""
    mmvp = json.loads(written("lvr", read("mmvp", tmp_path, "lvr"), tmp_path))
    assert mmvp[1] == {"id": "2", "prediction": ["(B)"], "label": "B"}
    vstar = json.loads(written("lvr", read("vstar", tmp_path, "lvr"), tmp_path))
    assert vstar[1] == {"id": "1", "prediction": ["(B)"], "label": "B", "category": "c1"}
    blink = json.loads(written("lvr", read("blink", tmp_path, "lvr"), tmp_path))
    assert [entry["category"] for entry in blink] == ["Counting"] * 2


def test_results_of_dmlr(tmp_path: Path) -> None:
    given = letters_asked(number=3)  # gold answers A, B, A
    found = json.loads(written("dmlr", given, tmp_path, raw="B"))
    assert list(found) == ["model", "dataset", "accuracy", "correct", "total", "config", "args", "entries"]
    assert (found["model"], found["dataset"], found["correct"], found["total"]) == ("org/model", "letters", 1, 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert [tuple(entry) for entry in found["entries"]] == [ENTRY_FIELDS] * 3
    assert [entry["is_correct"] for entry in found["entries"]] == [False, True, False]
    second = found["entries"][1]
    assert (second["data_idx"], second["answer"], second["ground_truth"]) == (1, "B", "B")
    assert second["question"] == given.records[1]["question"] and second["model_output"] == "(B)"


def rows_of(name: str) -> list[dict[str, Any]]:
    kinds = {
        "m3cot": {"answer": "B", "rationale": "It is cold. So.", "domain": "science", "topic": "physics"},
        "scienceqa": {"answer": 1, "lecture": "Ice is cold.", "solution": None, "subject": "natural science"},
    }
    shared = {"choices": ["ice", "fire"], "question": "Which is hot?", **kinds[name]}
    return [{**shared, "id": f"r{i}", "image": f"{i}.png"} for i in range(2)]


@pytest.mark.parametrize("name", ["m3cot", "scienceqa"])
def test_predictions_of_ivtlr(name: str, tmp_path: Path) -> None:
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows_of(name)))
    bench = benchmark(name)
    given = Asked(bench, bench.protocol("ivtlr"), bench.read(tmp_path / "rows.json"))
    reply = "Therefore, the answer is B"
    written("ivtlr", given, tmp_path, text=reply)
    path = tmp_path / "out" / "file"
    if name == "scienceqa":
        assert read_scienceqa_predictions(path) == {0: 1, 1: 1}
    else:
        lines = read_m3cot_predictions(path)
        assert [line["messages"] for line in lines] == [
            [given.protocol.ask(record), reply] for record in given.records
        ]
        assert [(line["id"], line["domain"], line["answer"]) for line in lines] == [
            ("r0", "science", "B"),
            ("r1", "science", "B"),
        ]


@pytest.mark.parametrize(
    ("options", "instruction", "expected"),
    [
        ({"latent_strategy": "dynamic", "max_latent_steps": 8}, True,
         "decoding_by_dynamic_max8_with_inst/run_ck/dynamic.json"),
        ({"latent_strategy": "dynamic"}, False, "decoding_by_dynamic/run_ck/dynamic.json"),
        ({"latent_strategy": "fixed", "num_latent_steps": 4}, False, "decoding_by_steps/run_ck/steps004.json"),
        ({"latent_strategy": "dynamic", "max_latent_steps": 4, "repetition_exit": True}, True,
         "decoding_by_dynamic_max4_with_inst_rep_exit/run_ck/dynamic.json"),
    ],
)  # fmt: skip
def test_folders_of_laser(options: dict[str, Any], instruction: bool, expected: str) -> None:
    assert laser_path("out", "mmstar", "runs/run/ck", options, instruction) == Path("out/mmstar") / expected


def test_wrong_forms(tmp_path: Path) -> None:
    given = letters_asked(number=1)
    with pytest.raises(ValueError, match="unknown form of predictions 'coco'; choose one of .*'laser'"):
        write_published("coco", tmp_path / "x", "m", given, said(given))
    with pytest.raises(ValueError, match="no published form of prediction files of letters"):
        write_published("ivtlr", tmp_path / "x", "m", given, said(given))
    assert not list(tmp_path.iterdir()) and len(set(PUBLISHED_FORMS)) == 5


# Ranks


def entry(name: str, reply: str, label: str = "A", **more: str) -> dict[str, Any]:
    return {"id": name, "question": "q (a) Yes (b) No", "prediction": [reply], "label": label, **more}


def ranks(folder: Path, *parts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, part in enumerate(parts):
        (folder / f"steps004_rank{rank}.json").write_text(json.dumps(part), encoding="utf-8")
    return folder / "steps004.json"


def test_ranks_are_joined_in_their_order(tmp_path: Path) -> None:
    parts = [[entry(f"{rank}-{i}", "A") for i in range(2)] for rank in range(11)]
    path = ranks(tmp_path, *parts)
    found = merge_ranks(path, 11)
    assert [each["id"] for each in found] == [f"{rank}-{i}" for rank in range(11) for i in range(2)]
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize(
    ("parts", "number", "message"),
    [
        ([[entry("a", "A")]], 2, r"lacks \['steps004_rank1.json'\] of 2; finish these ranks"),
        ([[entry("a", "A")]] * 3, 2, "steps004_rank2.json is a further rank than the 2"),
        ([[entry("a", "A")]], 0, "lacks ranks of 0"),
        ([{"a": 1}], 1, "holds dict in place of a list of entries"),
        ([[entry("a", "A"), {"id": "b"}]], 1, "rank0.json, entry 1: needs prediction and label"),
    ],
)
def test_ranks_that_cannot_be_merged(parts: list[Any], number: int, message: str, tmp_path: Path) -> None:
    path = ranks(tmp_path, *parts)
    with pytest.raises(ValueError, match=message):
        merge_ranks(path, number)
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "entries", "lines"),
    [
        ("mmstar", [entry("1", "<answer>A</answer>", category="x"), entry("2", "<answer>B</answer>")],
         ["Accuracy: 1/2 = 50.00%", "Unknown: 0/1 = 0.00%", "x: 1/1 = 100.00%"]),
        ("mmvp", [entry("1", "<answer>yes</answer>", "(a)"), entry("2", "<answer>no</answer>", "(a)")],
         ["Accuracy: 1/2 = 50.00%"]),
        ("hallusionbench", [entry("1", "<answer>incorrect</answer>", "1"), entry("2", "<answer>no</answer>", "1")],
         ["Accuracy: 1/2 = 50.00%"]),
        ("vsr", [entry("1", "<answer>right</answer>", "yes")], ["Accuracy: 1/1 = 100.00%"]),
        ("cub", [entry("1", "<answer>(B)</answer>", "(b)")], ["Accuracy: 1/1 = 100.00%"]),
    ],
)  # fmt: skip
def test_summary_by_the_scorer_of_the_benchmark(name: str, entries: list[dict], lines: list[str]) -> None:
    assert merged_summary(entries, name) == lines


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="no entries"):
        merged_summary([])
