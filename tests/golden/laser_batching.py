"""LASER golden vectors: batch plans, length estimates, resize table (method card, section 5)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.golden.conftest import each, golden_dir, golden_json
from tests.golden.laser_data import COLLATOR, EXAMPLES, tokenizer
from tests.tiny import tiny_processor
from trainers import LatentSFTCollator
from trainers.data.dynamic_batching import BalancedBatches, ReferenceBatches, reference_batches, reference_skips
from trainers.data.length_journal import ReferenceRows, SourceRow
from trainers.data.lengths import reference_length, smart_resize
from trainers.data.llava import record_from_llava
from trainers.data.records import RecordError
from trainers.sample_lengths import SampleLengths

FOLDER = golden_dir("laser")
PLANS: list[dict[str, Any]] = golden_json(FOLDER, "dynamic_batching.json", {}).get("cases", [])
DATA: dict[str, Any] = golden_json(FOLDER, "data.json", {})
LENGTHS: list[dict[str, Any]] = DATA.get("precomputed_lengths", [])
BUDGET: dict[str, int] = DATA.get("pixel_budget", {})


def planned_lengths(case: dict[str, Any]) -> list[int]:
    """Lengths by index; one that is missing in the file counts as 0."""
    missing = set(case.get("drop_keys", []))
    return [0 if index in missing else length for index, length in enumerate(case["lengths"])]


def plan(case: dict[str, Any], rank: int, worker: int, epoch: int, unloadable: Any = ()) -> list[list[int]]:
    workers = case["num_workers"]
    options = (planned_lengths(case), case["token_cap"], case["max_batch_size"], case["seed"])
    return reference_batches(*options, epoch, rank * workers + worker, case["world_size"] * workers, unloadable)


@each("case", PLANS, ids=lambda case: case["name"])
def test_plan(case: dict[str, Any]) -> None:
    unloadable = {*case.get("bad", []), *case.get("none", [])}
    for part in case["plan"]:
        rank, worker = part["rank"], part["worker"]
        counts = [len(plan(case, rank, other, 0)) for other in range(case["num_workers"])]
        skips = reference_skips(counts, case.get("resume", 0) * case.get("ga", 1))
        assert skips[worker] == part["skip"]
        for epoch, expected in enumerate(part["epochs"]):
            found = plan(case, rank, worker, epoch, unloadable)
            assert found[skips[worker] if epoch == 0 else 0 :] == expected, f"rank {rank} {worker} epoch {epoch}"


@each("case", [case for case in PLANS if not {"bad", "none", "resume"} & set(case)], ids=lambda case: case["name"])
def test_plan_as_the_trainer_reads_it(case: dict[str, Any]) -> None:
    """The sampler of a run yields each worker's epochs one after the other, the workers and the ranks in turn."""
    world, workers = case["world_size"], case["num_workers"]
    streams = {(p["rank"], p["worker"]): [batch for epoch in p["epochs"] for batch in epoch] for p in case["plan"]}
    each_worker = min(map(len, streams.values()))
    batches = list(
        ReferenceBatches(
            planned_lengths(case), case["token_cap"], case["max_batch_size"], world, case["seed"], workers,
            each_worker * workers,
        )
    )  # fmt: skip
    for (rank, worker), expected in streams.items():
        assert batches[rank::world][worker::workers] == expected[:each_worker]


@each("case", PLANS, ids=lambda case: case["name"])
def test_the_balanced_plan_takes_the_same_samples(case: dict[str, Any]) -> None:
    lengths, cap, world = planned_lengths(case), case["token_cap"], case["world_size"]
    left_out = {index for index, length in enumerate(lengths) if not 0 < length <= cap // 8 * 8}
    batches = BalancedBatches(lengths, cap, case["max_batch_size"], world, case["seed"], excluded=left_out)
    assert len(batches) % world == 0
    assert sorted(index for batch in batches for index in batch) == sorted(set(range(len(lengths))) - left_out)


@each("case", DATA.get("smart_resize", []), ids=lambda case: f"{case['width']}x{case['height']}")
def test_resized_image(case: dict[str, int]) -> None:
    height, width = smart_resize(case["height"], case["width"], case["min_pixels"], case["max_pixels"])
    assert (height, width) == (case["resized_height"], case["resized_width"])
    assert height * width // 784 == case["tokens"]


def test_one_side_too_long() -> None:
    with pytest.raises(ValueError, match="an image of 26x5226 pixels: one side is more than 200 times the other"):
        smart_resize(5226, 26, 3136, 50176)


def write_images(folder: Path, size: tuple[int, int]) -> None:
    """The pictures that the table of lengths names: one size, each in another format."""
    image = Image.new("RGB", size, (200, 30, 60))
    for name in ("p.png", "j.jpg", "g.gif", "m.bmp", "w.webp", "t.tiff"):
        image.save(folder / name)
    image.save(folder / "pj.jpg", progressive=True)
    image.save(folder / "wl.webp", lossless=True)


@each("case", LENGTHS, ids=lambda case: case.get("image_file") or case["note"])
def test_precomputed_length(case: dict[str, Any], tmp_path: Path) -> None:
    write_images(tmp_path, tuple(case["image_size_wh"]))
    value = case.get("sample") or {"image": [case["image_file"]], "conversations": case["conversations"]}
    row = SourceRow(0, "data.json", 0, str(tmp_path), "data", value)
    count = ReferenceRows(tokenizer(), **BUDGET)
    if case.get("error"):
        with pytest.raises(RecordError, match="data.json, row 0: the estimate fails on this record"):
            count(row)
    else:
        assert count(row) == reference_length(value, tokenizer(), tmp_path, **BUDGET) == case["length"]


@each("collator", [COLLATOR] if COLLATOR and EXAMPLES else [], ids=lambda _: "batch")
def test_batch_with_images(collator: dict[str, Any], tmp_path: Path) -> None:
    """The whole collator, with pictures of the published grids: ids, labels, mask, grids, patches, exact lengths."""
    samples = [EXAMPLES[position] for position in collator["sample_positions"]]
    sizes: dict[str, tuple[int, int]] = {}
    for example in samples:
        names = example["sample"]["image"]
        names = [names] if isinstance(names, str) else names
        for name, (_, rows, columns) in zip(names, example["image_grid_thw"], strict=True):
            sizes[name] = (columns * 14, rows * 14)
    for name, size in sizes.items():
        Image.new("RGB", size, (9, 99, 199)).save(tmp_path / name)
    processor = tiny_processor()
    processor.tokenizer = copy.deepcopy(tokenizer())
    processor.tokenizer.pad_token = tokenizer().convert_ids_to_tokens(collator["pad_token_id"])
    processor.image_processor.size = {"shortest_edge": BUDGET["min_pixels"], "longest_edge": BUDGET["max_pixels"]}
    collate = LatentSFTCollator(processor, pad_to_multiple_of=collator["pad_to_multiple_of"])
    records = [record_from_llava(e["sample"], "data.json", i, tmp_path) for i, e in enumerate(samples)]
    batch = collate(records)
    for name in ("input_ids", "labels", "attention_mask", "image_grid_thw"):
        assert batch[name].tolist() == collator[name], name
    assert len(batch["pixel_values"]) == collator["pixel_rows"]
    assert [record["meta"]["question_id"] for record in records] == collator["question_ids"]
    count = SampleLengths(collate)
    assert [count(record) for record in records] == collator["original_lengths"]
