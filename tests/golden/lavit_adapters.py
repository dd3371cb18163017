"""LaViT golden vectors: rows of the evaluation's data sets as they are asked, with their meta (card 7.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_items import ChoiceItem, blink_item, mmstar_item, mmvp_item
from evaluation.benchmarks.choice_sets import record_of_choice
from evaluation.benchmarks.registry import benchmark
from evaluation.harness.published_outputs import lavit_line
from evaluation.runner import Prediction
from tests.evaluation.choice_files import encoded
from tests.golden.conftest import each, golden_dir, golden_json
from tests.tiny import tiny_images
from trainers.data.records import RecordError
from trainers.data.sources import SkippedRow

ADAPTERS: dict[str, Any] = golden_json(golden_dir("lavit"), "answers.json", {}).get("adapters", {})


def mmvp(row: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> ChoiceItem:
    """From a folder that is found from the path that the item is to have."""
    return mmvp_item(row, "" if wanted is None else Path(wanted["image"]).parents[1])


def blink(row: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> ChoiceItem:
    return blink_item(row, "" if wanted is None else wanted["meta"]["task"])


def mmstar(row: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> ChoiceItem:
    return mmstar_item(row)


ASK: dict[str, Callable[..., ChoiceItem]] = {"mmvp": mmvp, "blink": blink, "mmstar": mmstar}


def shown(item: ChoiceItem) -> str:
    """The images in the form of the file: a path, or their number."""
    (*more, last) = item.images
    if not more and last.lower().endswith((".jpg", ".jpeg", ".png")):
        return last
    return f"{len(item.images)} image{'s' if more else ''}"


@each("name", [name for name in ADAPTERS if name in ASK])
def test_rows_are_asked_as_published(name: str) -> None:
    case, ask = ADAPTERS[name], ASK[name]
    wanted = {entry["id"]: entry for entry in case["output"]}
    asked = [item for row in case["input"] if (item := ask(row, wanted.get(ask(row, None).id))).images]
    found = [
        {"id": item.id, "image": shown(item), "prompt": item.prompt, "ground_truth": item.ground_truth,
         "meta": item.meta}
        for item in asked
    ]  # fmt: skip
    assert found == case["output"]


@each("name", [name for name in ADAPTERS if name in ASK])
def test_prediction_lines(name: str, tmp_path: Path) -> None:
    """What the harness writes for the same rows. A row whose answer is no option is refused here, as one without
    image is passed over, and published code scores it as wrong."""
    (picture,) = tiny_images(1)
    rows = [
        {
            key: {"bytes": encoded(picture), "path": None} if value == "image bytes" else value
            for key, value in row.items()
        }
        for row in ADAPTERS[name]["input"]
    ]
    if name == "mmvp":
        (tmp_path / "MMVP Images").mkdir()
        for row in rows:
            picture.save(tmp_path / "MMVP Images" / f"{row['Index']}.jpg")
    wanted = {entry["id"]: entry for entry in ADAPTERS[name]["output"]}
    protocol, refused, written = benchmark(name).protocol("lavit"), [], []
    for number, row in enumerate(rows):
        try:
            record = record_of_choice(name, row, "rows", number, tmp_path, "Toy" if name == "blink" else "")
        except (RecordError, SkippedRow):
            refused.append(row)
            continue
        line = lavit_line(record, Prediction(record["id"], "A", "A", 4, 5, (), raw="A"), protocol)
        written.append({key: line[key] for key in ("id", "prompt", "ground_truth", "meta")})
    assert [row["answer"] for row in refused] == (["A", "neither"] if name == "blink" else [])
    assert written == [
        {key: wanted[line["id"]][key] for key in ("id", "prompt", "ground_truth", "meta")} for line in written
    ]
    assert len(written) == len(rows) - len(refused) > 0


@each("names", [sorted(ADAPTERS)] if ADAPTERS else [], ids=lambda _: "all")
def test_every_data_set_of_the_file_is_tested(names: list[str]) -> None:
    unknown = sorted(set(names) - set(ASK))
    if unknown:
        pytest.fail(f"no adapter is compared with the vectors of {unknown}; add it to ASK")
