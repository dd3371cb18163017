"""The page of benchmarks says what the registry holds."""

import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_protocols import PUBLISHED
from evaluation.benchmarks.page import ALONE, GROUPS_AND_CLUSTERS, benchmark_table
from evaluation.benchmarks.registry import BENCHMARKS, benchmark
from tests.evaluation.choice_files import ROWS, table
from tests.hub import ROOT
from tests.test_readme import blocks, python_problems

TEXT = (ROOT / "hub_configs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_page_has_the_table_row_by_row() -> None:
    shown = re.search(r"<!-- benchmarks: begin -->\n(.*)\n<!-- benchmarks: end -->", TEXT, re.DOTALL)
    assert shown and shown[1].splitlines() == benchmark_table()


def test_a_row_has_what_the_benchmark_has() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in benchmark_table()[2:]}
    assert list(rows) == list(BENCHMARKS) == list(GROUPS_AND_CLUSTERS)
    assert rows["mmvp"] == (
        "| `mmvp` | MMVP | `MMVP/MMVP`, `lmms-lab-eval/MMVP` | `Index`, `Question`, `Options`, `Correct Answer` | "
        "`default`, `laser`, `laser_plain`, `lvr`, `lavit`, `dmlr`, `dmlr_strict` | none | the pair |"
    )
    assert rows["mazes"].startswith("| `mazes` | Mazes (generated) | generated |  | `default`, `laser`, ")
    assert rows["cub"].startswith("| `cub` | CUB | a local file | `image`, ")


def test_what_is_alone_has_no_cluster_that_is_shared(tmp_path: Path) -> None:
    """Two questions that differ in nothing but their ids, each with a picture of its own."""
    for name, (_, cluster) in GROUPS_AND_CLUSTERS.items():
        bench = benchmark(name)
        if name not in ROWS:
            assert (bench.cluster is None) == (cluster == ALONE), name
            continue
        key = next((key for key in ("idx", "index", "Index", "question_id") if key in ROWS[name]), "id")
        rows: list[dict[str, Any]] = [{**ROWS[name], key: value} for value in (3, 4)]
        if name in ("vsr", "cub"):
            rows = [{**row, "image": {**row["image"], "path": "a.png"}} for row in rows]
        first, second = bench.read(table(tmp_path / name / "rows.parquet", *rows))
        assert (bench.cluster(first) != bench.cluster(second)) == (cluster == ALONE), name


@pytest.mark.parametrize("name", sorted({name for bench in BENCHMARKS.values() for name in bench.protocols}))
def test_every_protocol_is_explained(name: str) -> None:
    assert f"`{name}`" in TEXT.split("## Protocols")[1]


def test_files_and_methods_of_the_page() -> None:
    assert set(PUBLISHED) <= {name for bench in BENCHMARKS.values() for name in bench.protocols}
    found = blocks(TEXT)
    assert [block.language for block in found] == ["python"]
    assert not [problem for block in found for problem in python_problems(block.text)]
