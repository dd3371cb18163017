"""Where rows of the choice sets come from: folders, files, repositories; rows that are not as published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from evaluation.benchmarks.choice_benchmarks import OTHER_TASK
from evaluation.benchmarks.choice_sets import BLINK_TASKS, CHOICE_SETS, NO_IMAGE
from evaluation.benchmarks.registry import benchmark
from tests.evaluation.choice_files import (
    MMVP_COLUMNS,
    ROWS,
    blink_rows,
    mmvp_rows,
    table,
    write_blink,
    write_lines,
    write_mmstar,
    write_mmvp,
    write_vstar,
)
from tests.tiny import tiny_images
from trainers.data.records import RecordError, RecordReport, RecordShareError, open_image

# Folders and files


@pytest.mark.parametrize("decoded", [True, False])
def test_blink_as_published(decoded: bool, tmp_path: Path) -> None:
    """All images in order; a row without image is skipped and counted; the test split stands in for the validation."""
    write_blink(tmp_path, "IQ_Test", decoded=decoded)
    write_blink(tmp_path, "Counting", split="test")
    bench, report = benchmark("blink"), RecordReport()
    records = bench.read(tmp_path, report=report)
    assert [r["id"] for r in records] == [f"val_{task}_{i}" for task in ("Counting", "IQ_Test") for i in range(2)]
    assert (report.num_good, report.num_bad, dict(report.skip_reasons)) == (4, 0, {NO_IMAGE: 2})
    one, two = records[2:]
    assert [open_image(each, two).size for each in two["images"]] == [(80, 60), (56, 56)] and len(one["images"]) == 1
    assert [one["answer"], two["answer"]] == ["B", "C"]
    alone = bench.read(tmp_path, tasks=["IQ_Test"])
    assert alone == bench.read(tmp_path / "IQ_Test") == records[2:]
    assert alone == bench.read(tmp_path / "IQ_Test" / "val-00000-of-00001.parquet")
    order = bench.read(tmp_path, tasks=["IQ_Test", "Counting", "IQ_Test"])
    assert [bench.group(r) for r in order] == ["IQ_Test"] * 2 + ["Counting"] * 2
    write_blink(tmp_path, "Counting", [{**blink_rows("new")[0], "idx": "val"}])
    (first,) = bench.read(tmp_path, tasks=["Counting"])
    assert (first["id"], bench.group(first)) == ("val", "Counting"), "the validation split is first"
    (again,) = bench.read(tmp_path / "Counting")
    assert bench.group(again) == "Counting", "the name of the folder"
    with pytest.raises(RecordError, match=r"has no folder of the tasks \['Art_Style'"):
        bench.read(tmp_path.parent)


def test_a_file_of_several_tasks(tmp_path: Path) -> None:
    rows = [{**ROWS["blink"], "idx": f"val_{task}_1"} for task in ("Counting", "Multi-view_Reasoning", "Jigsaw")]
    bench, report, path = benchmark("blink"), RecordReport(), table(tmp_path / "all.parquet", *rows)
    assert [bench.group(each) for each in bench.read(path)] == ["Counting", "Multi-view_Reasoning", "Jigsaw"]
    (found,) = bench.read(path, tasks=["Jigsaw"], report=report)
    assert bench.group(found) == "Jigsaw" and report.skip_reasons == {OTHER_TASK: 2}
    path = table(tmp_path / "named.parquet", {**ROWS["blink"], "idx": "1", "sub_task": "IQ_Test"})
    assert [bench.group(each) for each in bench.read(path)] == ["IQ_Test"]
    path = table(tmp_path / "plain.parquet", {**ROWS["blink"], "idx": "1"})
    assert [bench.group(each) for each in bench.read(path)] == ["BLINK"]
    assert [bench.group(each) for each in bench.read(path, tasks=["Jigsaw"])] == ["Jigsaw"]


def test_mmstar_vstar_and_mmvp_as_published(tmp_path: Path) -> None:
    records = benchmark("mmstar").read(write_mmstar(tmp_path / "mmstar"))
    assert records == benchmark("mmstar").read(tmp_path / "mmstar" / "mmstar.parquet")
    assert [(r["id"], r["answer"]) for r in records] == [("0", "A"), ("1", "B"), ("2", "C")]
    assert records[0]["choices"] == ["up", "down", "left", "none, really"]
    assert open_image(records[1]["images"][0], records[1]).size == (56, 56), "plain bytes"
    _, second = benchmark("vstar").read(write_vstar(tmp_path / "vstar"))
    assert second["images"] == [str(tmp_path / "vstar" / "direct" / "1.jpg")]
    assert second["question"] == "Of what?\n(A) wood\n(B) stone" and second["choices"] == ["wood", "stone"]
    mmvp = benchmark("mmvp").read(write_mmvp(tmp_path / "mmvp"))
    assert [benchmark("mmvp").cluster(each) for each in mmvp] == ["0", "0", "1", "1"]
    moved = (tmp_path / "mmvp" / "Questions.csv").rename(tmp_path / "Questions.csv")
    assert [each["images"] for each in benchmark("mmvp").read(moved, image_folder=tmp_path / "mmvp")] == [
        each["images"] for each in mmvp
    ]


# Repositories


@pytest.mark.parametrize("name", ["mmvp", "seedbench2plus", "vstar"])
def test_repositories_of_files_are_fetched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tables are no tables to `load_dataset`, and their pictures are beside them."""
    if name == "seedbench2plus":
        written = tmp_path / "hub"
        (written / "text_rich").mkdir(parents=True)
        tiny_images(1)[0].save(written / "text_rich" / "1.png")
        row = {key: value for key, value in ROWS[name].items() if key != "image"}
        write_lines(written / "SEED-Bench-2-plus-text-rich.json", [row])
    else:
        written = {"mmvp": write_mmvp, "vstar": write_vstar}[name](tmp_path / "hub")
    asked = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options["repo_type"], tuple(options["allow_patterns"])))
        return str(written)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    bench, entry = benchmark(name), CHOICE_SETS[name]
    assert bench.read() == bench.read(bench.sources[0]) == bench.read(written)
    assert asked == [(bench.sources[0], "dataset", entry.fetched)] * 2
    files = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    from huggingface_hub.utils import filter_repo_objects

    needed = {"seedbench2plus": ["SEED-Bench-2-plus-text-rich.json"]}.get(name, sorted(files))
    assert sorted(filter_repo_objects(files, allow_patterns=list(entry.fetched))) == needed


@pytest.mark.parametrize(
    ("name", "source", "calls"),
    [
        ("mmvp", "lmms-lab-eval/MMVP", [("lmms-lab-eval/MMVP", None, "train")]),
        ("mmstar", None, [("Lin-Chen/MMStar", None, "val")]),
        ("seedbench2plus", "doolayer/SEED-Bench-2-Plus", [("doolayer/SEED-Bench-2-Plus", None, "test")]),
        ("hallusionbench", None, [("lmms-lab/HallusionBench", None, "image")]),
        ("hrbench4k", None, [("DreamMr/HR-Bench", "hrbench_version_split", "hrbench_4k")]),
        ("hrbench8k", None, [("DreamMr/HR-Bench", "hrbench_version_split", "hrbench_8k")]),
        ("vstar", "lmms-lab-encoder/vstar-bench", [("lmms-lab-encoder/vstar-bench", None, "test")]),
        ("blink", None, [("BLINK-Benchmark/BLINK", task, "val") for task in BLINK_TASKS]),
    ],
)
def test_repositories_of_tables(
    name: str, source: str | None, calls: Sequence[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(repository: str, config: str | None = None, split: str | None = None) -> datasets.Dataset:
        asked.append((repository, config, split))
        row = ROWS[name] if config is None or name != "blink" else {**ROWS[name], "idx": "x"}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = benchmark(name).read(source)
    assert asked == list(calls) and len(records) == len(calls)
    if name == "blink":
        assert [benchmark("blink").group(each) for each in records] == list(BLINK_TASKS)


def test_a_repository_that_cannot_be_fetched() -> None:
    with pytest.raises(RecordError, match=r"MMVP/MMVP, whole file: cannot be fetched .*pass its folder as data_root"):
        benchmark("mmvp").read()


# Bad rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Correct Answer": "(c)"}, r"row 1: the answer 'C' is not one of \['A', 'B'\]; repair the row"),
        ({"Correct Answer": "hidden"}, r"the answer 'hidden' is not one of \['A', 'B'\].*take the validation split"),
        ({"Options": "none"}, None),  # nothing is known of the choices: A to D
        ({"Options": "none", "Correct Answer": "E"}, r"the answer 'E' is not one of \['A', 'B', 'C', 'D'\]"),
        ({"Index": "first"}, "row 1: the row is not as published"),
        ({"Question": " "}, "row 1: the question is empty or no text"),
    ],
)
def test_wrong_rows_are_counted(change: dict[str, str], message: str | None, tmp_path: Path) -> None:
    rows, report = mmvp_rows(), RecordReport(max_bad_share=1)
    write_mmvp(tmp_path, [rows[0], {**rows[1], **change}, *rows[2:]])
    found = benchmark("mmvp").read(tmp_path, report=report)
    assert len(found) == report.num_good == (4 if message is None else 3)
    if message is not None:
        with pytest.raises(RecordError, match=message):
            raise report.first_bad[0]
        with pytest.raises(RecordShareError, match=message):
            benchmark("mmvp").read(tmp_path)


def test_missing_and_damaged_images_are_counted(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    (tmp_path / "MMVP Images" / "2.jpg").unlink()
    report = RecordReport(1)
    assert [each["id"] for each in benchmark("mmvp").read(tmp_path, report=report)] == ["1", "3", "4"]
    assert "row 1: image file " in str(report.first_bad[0]) and "2.jpg' does not exist" in str(report.first_bad[0])
    rows = blink_rows("Jigsaw")
    rows[0]["image_1"] = {"bytes": b"none", "path": None}
    report = RecordReport(1)
    assert len(benchmark("blink").read(write_blink(tmp_path, "Jigsaw", rows), report=report)) == 1
    assert "row 0: the bytes of 'image' are no picture" in str(report.first_bad[0]) and report.skip_reasons[NO_IMAGE]


def test_rows_of_blink_that_are_not_as_published(tmp_path: Path) -> None:
    row = {**blink_rows("Jigsaw")[0], "image_1": "x.png"}
    changes = [{"answer": None}, {"image_1": 3}, {"choices": "red"}, {"choices": None}, {"choices": ["x"] * 27}, {}]
    report = RecordReport(1)
    write_lines(tmp_path / "rows.jsonl", [{**row, **change} for change in changes])
    with pytest.raises(ValueError, match="has no record for blink: 0 good rows, 6 bad rows"):
        benchmark("blink").read(tmp_path / "rows.jsonl", report=report)
    messages = ["answer 'None' is not one of", "must be a path, a picture", "choices must be a list, got 'red'",
                "not as published", "27 choices are more than there are letters", "x.png"]  # fmt: skip
    assert all(text in str(error) for text, error in zip(messages, report.first_bad, strict=True))
    (tmp_path / "rows.jsonl").write_text('{cut\n[1]\n{"idx": "1"}\n')
    with pytest.raises(ValueError, match="0 good rows, 3 bad rows") as caught:
        benchmark("blink").read(tmp_path / "rows.jsonl", report=RecordReport(1))
    assert "a row must be an object" in str(caught.value) and "the row lacks the columns" in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    with (tmp_path / "Questions.csv").open("a") as file:
        file.write("5,too,few\r\n6,a,b,c,d\r\n")
    report = RecordReport(1)
    assert len(benchmark("mmvp").read(tmp_path, report=report)) == 4 and report.num_bad == 2
    assert all("more or fewer fields than names" in str(error) for error in report.first_bad)
    write_mmvp(tmp_path, columns=[name for name in MMVP_COLUMNS if name != "Options"])
    with pytest.raises(RecordError, match=r"Questions.csv, whole file: lacks the columns \['Options'\], it has .'Ind"):
        benchmark("mmvp").read(tmp_path)
    (tmp_path / "Questions.csv").write_bytes(
        "Index,Question,Options,Correct Answer\n1,caf\xe9,x,y\n".encode("latin-1")
    )
    with pytest.raises(RecordError, match="Questions.csv, whole file: not a readable table"):
        benchmark("mmvp").read(tmp_path)
    (tmp_path / "Questions.csv").write_text(",".join(MMVP_COLUMNS) + "\n")
    with pytest.raises(ValueError, match="has no record for mmvp: 0 good rows, 0 bad rows"):
        benchmark("mmvp").read(tmp_path)
    (tmp_path / "mmstar.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(RecordError, match="not a readable parquet file"):
        benchmark("mmstar").read(tmp_path)
    with pytest.raises(ValueError, match="image_folder 'gone' does not exist"):
        benchmark("mmvp").read(tmp_path, image_folder="gone")
