"""Choice and yes/no sets: every file format with the published columns, what protocols ask and read, and bad files."""

import base64
import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.choice_sets import CHOICE_SETS
from evaluation.benchmarks.registry import ALIASES, BENCHMARKS, benchmark
from evaluation.runner import Prediction
from tests.tiny import tiny_images, tiny_processor
from trainers.data.records import RecordError, RecordReport, RecordShareError, open_image

LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(number: int = 0) -> bytes:
    data = io.BytesIO()
    tiny_images(4)[number].save(data, "png")
    return data.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def delimited(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def image(number: int = 0) -> dict[str, Any]:
    return {"bytes": png(number), "path": None}


HALLUSION = {"question": "Is it red?", "gt_answer": "1", "category": "VD", "subcategory": "chart", "set_id": "0",
             "figure_id": "1", "question_id": "2"}  # fmt: skip
HRBENCH = {"index": 3, "question": "What is it?", "A": "cat", "B": "dog", "C": "cow", "D": "pig", "answer": "B",
           "category": "single", "cycle_category": "x"}  # fmt: skip
SEED = {"question_id": "s1", "question": "What is shown?", "choice_A": "a1", "choice_B": "b1", "choice_C": "c1",
        "choice_D": "d1", "answer": "C", "data_id": "text_rich/1.png", "question_image_type": "Chart"}  # fmt: skip


def asked(bench: Benchmark, record: dict, protocol: str = "default") -> str:
    """What the user says: the prompt without the template."""
    prompt = bench.protocol(protocol).prompt(tiny_processor(), record)
    assert prompt.count("<|image_pad|>") == len(record["images"])
    assert bench.protocol(protocol).ask(record) in prompt
    return bench.protocol(protocol).ask(record)


def read(bench: Benchmark, record: dict, text: str, protocol: str = "default") -> tuple[bool, str | None]:
    return tuple(bench.protocol(protocol).score(record, Prediction("", text, text, 0, 1, (), raw=text)))


def test_blink_has_a_folder_a_task_and_up_to_four_pictures(tmp_path: Path) -> None:
    row = {"idx": "val_Counting_1", "question": "How many?", "choices": ["0", "3"], "answer": "(B)", "prompt": None}
    pictures = {"image_1": image(0), "image_2": image(1), "image_3": None, "image_4": None}
    parquet(tmp_path / "Counting" / "val-00000-of-00001.parquet", [{**row, **pictures}])
    parquet(tmp_path / "Jigsaw" / "val-00000-of-00001.parquet", [{**row, "idx": "val_Jigsaw_1", "image_1": image(2)}])
    bench = benchmark("BLINK")
    first, second = bench.read(tmp_path)
    assert first["answer"] == "B" and first["choices"] == ["0", "3"] and len(first["images"]) == 2
    assert [bench.group(each) for each in (first, second)] == ["Counting", "Jigsaw"]
    assert asked(bench, first) == f"How many?\nA. 0\nB. 3{LETTER}" and bench.answers(first) == ("A", "B")
    assert [each["id"] for each in bench.read(tmp_path, tasks=["Jigsaw"])] == ["val_Jigsaw_1"]
    with pytest.raises(RecordError, match=r"has no folder of the tasks \['IQ_Test'\]"):
        bench.read(tmp_path, tasks=["IQ_Test"])
    with pytest.raises(ValueError, match="unknown tasks 'Puzzles'; choose one of"):
        bench.read(tmp_path, tasks=["Puzzles"])


@pytest.mark.parametrize("form", ["file", "harness"])
def test_mmvp_as_published_and_its_copy(form: str, tmp_path: Path) -> None:
    row = {"Index": "3", "Question": "Is the door open?", "Options": "(a) Yes (b) No", "Correct Answer": "(b)"}
    if form == "file":
        delimited(tmp_path / "Questions.csv", [row])
        (tmp_path / "MMVP Images").mkdir()
        (tmp_path / "MMVP Images" / "3.jpg").write_bytes(png())
    else:
        parquet(tmp_path / "train-00000-of-00001.parquet", [{**row, "image": image()}])
    bench = benchmark("mmvp")
    (record,) = bench.read(tmp_path)
    assert record["answer"] == "B" and record["choices"] == ["Yes", "No"]
    assert bench.cluster(record) == "1"  # the pair of 3 and 4
    assert asked(bench, record) == f"Is the door open?\nA. Yes\nB. No{LETTER}"
    assert asked(bench, record, "lvr").startswith("Is the door open?\nOptions:\nA. Yes B. No")
    assert read(bench, record, "No") == (True, "B") and read(bench, record, "Yes.") == (False, "A")
    assert read(bench, record, "maybe") == (False, None)
    assert open_image(record["images"][0], record).size == tiny_images(1)[0].size


def test_hr_bench_has_base64_pictures_in_parquet_and_tsv(tmp_path: Path) -> None:
    bench, encoded = benchmark("hrbench4k"), base64.b64encode(png(2)).decode()
    rows = [{**HRBENCH, "image": encoded}, {**HRBENCH, "index": 4, "A": "dog", "B": "cat", "answer": "A",
                                            "image": f"data:image/png;base64,{encoded}"}]  # fmt: skip
    delimited(tmp_path / "hr_bench_4k.tsv", rows)
    parquet(tmp_path / "more" / "hr_bench_4k.parquet", rows)
    for folder in (tmp_path, tmp_path / "more"):
        first, second = bench.read(folder)
        assert open_image(first["images"][0], first).size == tiny_images(3)[2].size
        assert bench.cluster(first) == bench.cluster(second)  # two cycles of one question
        assert asked(bench, first) == f"What is it?\nA. cat\nB. dog\nC. cow\nD. pig{LETTER}"
        assert read(bench, first, "<answer>B</answer>", "laser") == (True, "B")
    delimited(tmp_path / "hr_bench_4k.tsv", [{**HRBENCH, "image": "x" * 2_000 + "!"}])
    with pytest.raises(RecordShareError, match="the picture is no base64 text"):
        bench.read(tmp_path)


def test_seed_bench_has_its_pictures_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "SEED-Bench-2-plus-text-rich.json").write_text(json.dumps([SEED]))
    with zipfile.ZipFile(tmp_path / "text_rich.zip", "w") as packed:
        packed.writestr("text_rich/1.png", png(1))
    bench = benchmark("SEED-Bench-2-Plus")
    (record,) = bench.read(tmp_path)
    assert bench.group(record) == "Chart" and record["answer"] == "C"
    assert open_image(record["images"][0], record).size == tiny_images(2)[1].size
    (copy,) = bench.read(parquet(tmp_path / "copy" / "test.parquet", [{**SEED, "image": image()}]))
    assert asked(bench, copy) == asked(bench, record) == f"What is shown?\nA. a1\nB. b1\nC. c1\nD. d1{LETTER}"


def test_yes_and_no(tmp_path: Path) -> None:
    bench = benchmark("hallusion")
    (record,) = bench.read(parquet(tmp_path / "image.parquet", [{**HALLUSION, "image": image()}]))
    assert record["answer"] == "Yes" and bench.answers(record) == ("Yes", "No") and bench.gold(record) == "Yes"
    assert asked(bench, record) == "Is it red?\nPlease answer Yes or No." and bench.cluster(record) == "VD-chart-0"
    assert read(bench, record, "It is not red, no.") == (False, "No") and read(bench, record, "Yes") == (True, "Yes")
    assert read(bench, record, "unknown", "laser") == (False, "No")  # the published substrings
    assert read(bench, record, "unknown") == (False, None)
    vsr = {"image": image(), "caption": "The cat is on the mat.", "label": 0, "relation": "on"}
    (statement,) = benchmark("vsr").read(parquet(tmp_path / "vsr.parquet", [vsr]))
    assert statement["answer"] == "No" and "The cat is on the mat." in asked(benchmark("vsr"), statement)
    cub = {"image": image(), "question": "Which bird?", "choices": ["crow", "gull"], "answer": "gull"}
    (bird,) = benchmark("cub").read(parquet(tmp_path / "cub.parquet", [cub]))
    assert bird["answer"] == "B"


def test_options_inside_the_question(tmp_path: Path) -> None:
    star = {"index": 7, "question": "What?\nOptions: A: one, B: two, C: three, D: four", "answer": "B",
            "category": "math", "l2_category": "geometry", "image": image()}  # fmt: skip
    bench = benchmark("mmstar")
    (record,) = bench.read(parquet(tmp_path / "mmstar.parquet", [star]))
    assert asked(bench, record) == star["question"] + LETTER and len(record["choices"]) == 4
    text = f"What is it? (A) red (B) blue{LETTER}"
    line = {"image": "direct/1.jpg", "text": text, "label": "A", "category": "direct_attributes", "question_id": 1}
    (tmp_path / "direct").mkdir()
    (tmp_path / "direct" / "1.jpg").write_bytes(png())
    (tmp_path / "test_questions.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = benchmark("v*").read(tmp_path / "test_questions.jsonl")
    assert found["answer"] == "A" and asked(benchmark("vstar"), found) == text  # once
    assert asked(benchmark("vstar"), found, "lvr") == text + LETTER  # published: twice
    assert asked(benchmark("vstar"), found, "lavit") == text


# Bad input --------------------------------------------------------------------------------------------------------


def test_empty_sets_missing_columns_and_labels(tmp_path: Path) -> None:
    bench = benchmark("hallusionbench")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match=r"empty.json has no record for hallusionbench"):
        bench.read(tmp_path / "empty.json")
    path = parquet(tmp_path / "a.parquet", [{"question": "?", "image": image()}])
    with pytest.raises(
        RecordError, match=r"a.parquet, whole file: lacks the columns \['gt_answer'\], it has \['question', 'image'\]"
    ):
        bench.read(path)
    bad = parquet(tmp_path / "b.parquet", [{**HALLUSION, "image": image(), "gt_answer": "2"}])
    with pytest.raises(RecordShareError, match="gt_answer must be 0 or 1, got '2'"):
        bench.read(bad)
    outside = parquet(tmp_path / "c.parquet", [{**HRBENCH, "answer": "E", "image": base64.b64encode(png()).decode()}])
    with pytest.raises(RecordShareError, match=r"row 0: the answer 'E' is not one of \['A', 'B', 'C', 'D'\]"):
        benchmark("hrbench8k").read(outside)
    report = RecordReport(1.0)
    rows = [{**HALLUSION, "image": image()}, {**HALLUSION, "image": image(), "gt_answer": "2"}]
    assert len(bench.read(parquet(tmp_path / "d.parquet", rows), report=report)) == 1 and report.num_bad == 1


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no table of mmvp"):
        benchmark("mmvp").read(tmp_path)
    with pytest.raises(RecordError, match="none.parquet"):
        benchmark("mmvp").read(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="cub has no public source; give the folder or file"):
        benchmark("cub").read()
    with pytest.raises(ValueError, match="unknown benchmark 'mmvpp'; choose one of"):
        benchmark("mmvpp")
    with pytest.raises(ValueError, match="unknown protocol 'lvr'; choose one of"):
        benchmark("vsr").protocol("lvr")
    with pytest.raises(ValueError, match="max_samples=0 must be at least 1"):
        benchmark("mmvp").read(tmp_path, max_samples=0)
    with pytest.raises(ValueError, match=r"tasks=\['x'\]: mmvp has no tasks"):
        benchmark("mmvp").read(tmp_path, tasks=["x"])


def test_the_registry() -> None:
    assert set(CHOICE_SETS) < set(BENCHMARKS) and len(BENCHMARKS) == 21
    assert all(name in BENCHMARKS for name in ALIASES.values())
    same = {"HR-Bench 4K": "hrbench4k", "hrbench8k": "hrbench8k", "V*": "vstar", "V*Bench": "vstar", "MMVP ": "mmvp",
            "SEED-Bench-2-Plus": "seedbench2plus", "seedbench_2_plus": "seedbench2plus", "Math_Vista": "mathvista",
            "MATH-Vision": "mathvision", "MM-Math": "mm_math", "mmmath": "mm_math", "HallusionBench": "hallusionbench",
            "V-Star": "vstar", "HRBench": "hrbench4k"}  # fmt: skip
    assert {name: benchmark(name).name for name in same} == same
    for bench in BENCHMARKS.values():
        assert bench.protocol().name == "default" and all(name == each.name for name, each in bench.protocols.items())
        for protocol in bench.protocols.values():
            assert protocol.gold_reply("X").content == "X" and protocol.max_new_tokens > 0, bench.name
