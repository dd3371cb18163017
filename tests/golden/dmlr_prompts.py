"""DMLR golden vectors: prompts and where their thought tokens stand (card 2.2, 2.3), and the data JSON (card 2.4)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from modeling_latent import LatentProcessor
from modeling_latent.search_prompts import SearchPrompt, published_prompt_field, search_prompt, search_prompts
from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.dmlr import read_dmlr, write_dmlr_json

FOLDER = golden_dir("dmlr")
PROMPTS: dict[str, Any] = golden_json(FOLDER, "prompts.json", {})
CASES: list[dict[str, Any]] = PROMPTS.get("cases", []) if (FOLDER / "model").is_dir() else []
DATASET = FOLDER / "results" / "toy_dataset.json"
ROWS: list[dict[str, Any]] = golden_json(FOLDER, "results/toy_dataset.json", [])
RUNS = ["single_process_results.json"] if ROWS and golden_json(FOLDER, "results/single_process_results.json") else []


@lru_cache
def processor() -> LatentProcessor:
    return LatentProcessor.from_pretrained(FOLDER / "model")


def image(case: dict[str, Any]) -> Image.Image | None:
    """An image with as many tokens as the prompt has; the ids do not show its content."""
    tokens = case["input_ids"].count(processor().image_token_id)
    side = processor().image_processor.patch_size * processor().image_processor.merge_size
    return Image.new("RGB", (side * tokens, side)) if tokens else None


def question(case: dict[str, Any]) -> str:
    return case["question_field"] if "question_field" in case else case["record"]["prompt"]


def prompt(case: dict[str, Any], **options: Any) -> SearchPrompt:
    arguments = {
        "num_thought_tokens": case["num_thought_tokens"],
        "mode": "reference",
        "prompt_index": case["prompt_idx"] if case["path"] == "dataset_messages" else None,
        "messages": case.get("messages"),
    }
    return search_prompt(processor(), question(case), image(case), **{**arguments, **options})


def fields(case: dict[str, Any], word: str) -> list[str]:
    """The fields of a case that hold a text, or its hash."""
    return [key for key in case if word in key]


def same_text(found: str, case: dict[str, Any], word: str) -> None:
    for key in fields(case, word):
        assert case[key] in (found, hashlib.sha256(found.encode()).hexdigest()), key


def name(case: dict[str, Any]) -> str:
    return "-".join(str(case[field]) for field in ("kind", "path", "prompt_idx", "num_thought_tokens"))


@each("case", CASES, ids=name)
def test_prompt(case: dict[str, Any]) -> None:
    found = prompt(case)
    ids, (start, end) = found.inputs["input_ids"][0], case["thought_idx"]
    assert ids.tolist() == case["input_ids"]
    assert found.thought_spans == [(start, end)]
    assert found.inputs["attention_mask"].all()
    after = processor().tokenizer(found.generation_prompt[0])["input_ids"]
    assert end == len(ids) - len(after) - 2, "the turn of the user ends with two tokens"
    assert ids[start:end].unique().tolist() == [processor().tokenizer.pad_token_id]


@each("case", [case for case in CASES if fields(case, "rendered")], ids=name)
def test_text(case: dict[str, Any]) -> None:
    found = prompt(case)
    same_text(found.text[0].removesuffix(found.generation_prompt[0]), case, "rendered")


@each("case", [case for case in CASES if fields(case, "results_prompt")], ids=name)
def test_prompt_field_of_result_files(case: dict[str, Any]) -> None:
    found = published_prompt_field(processor(), question(case), image(case) is not None, case["prompt_idx"])
    same_text(found, case, "results_prompt")


@each("case", [case for case in CASES if image(case) is None], ids=name)
def test_a_stock_tokenizer_gives_the_same_ids(case: dict[str, Any]) -> None:
    stock = AutoTokenizer.from_pretrained(FOLDER / "model")
    options = {"num_thought_tokens": case["num_thought_tokens"], "mode": "reference", "messages": case.get("messages")}
    found = search_prompt(stock, question(case), prompt_index=None, **options)
    assert found.inputs["input_ids"][0].tolist() == case["input_ids"]
    assert found.thought_spans == [tuple(case["thought_idx"])]


@each("case", [case for case in CASES if case["path"] == "dataset_messages"], ids=name)
def test_the_corrected_prompt_has_the_question_once_and_as_text(case: dict[str, Any]) -> None:
    asked, published, corrected = question(case), prompt(case).text[0], prompt(case, mode="paper").text[0]
    assert repr([asked]) in published and published.count(asked) >= 1
    assert corrected.count(asked) == 1 and repr([asked]) not in corrected
    pad = processor().tokenizer.pad_token * case["num_thought_tokens"]
    assert corrected[corrected.index(pad) :] == published[published.index(pad) :]


@each("case", [case for case in CASES if case["path"] == "list_messages"], ids=name)
def test_messages_stay_as_they_are(case: dict[str, Any]) -> None:
    before = repr(case["messages"])
    prompt(case)
    assert repr(case["messages"]) == before


@each("rows", [ROWS] if ROWS else [], ids=lambda _: "toy_dataset")
def test_data_json(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Texts as in the file, indices by position, and the file again."""
    records = list(read_dmlr(DATASET, repair=False))
    assert [record["question"] for record in records] == [row["prompt"] for row in rows]
    assert [record["answer"] for record in records] == [row["solution"] for row in rows]
    assert [record["meta"]["data_idx"] for record in records] == list(range(len(rows)))
    assert write_dmlr_json(records, tmp_path / "again.json", image_root=DATASET.parent) == len(rows)
    assert golden_json(tmp_path, "again.json") == rows


@each("run", RUNS)
def test_entries_of_a_run_are_records_of_its_slice(run: str) -> None:
    """The reference numbers a single process from the start of its slice, the library from the start of the file."""
    results = golden_json(FOLDER, f"results/{run}")
    start, end = (results["args"][f"{side}_data_idx"] for side in ("start", "end"))
    records = list(read_dmlr(DATASET, start_data_idx=start, end_data_idx=end, repair=False))
    assert [record["meta"]["data_idx"] for record in records][:1] == [start]
    for entry in results["entries"]:
        record = records[entry["data_idx"]]
        fields = record["question"], record["answer"], record["meta"]["image_path"]
        assert fields == (entry["question"], entry["ground_truth"], entry["image_path"])
        shown = published_prompt_field(
            processor(), record["question"], prompt_index=results["config"]["solver_prompt_idx"]
        )
        assert shown == entry["prompt"]


@each("case", CASES[:1], ids=name)
def test_rows_of_a_batch_are_single_rows_behind_padding(case: dict[str, Any]) -> None:
    cases = [other for other in CASES if other["path"] == case["path"]][:4]
    number = case["num_thought_tokens"]
    questions, images = [question(case) for case in cases], [image(case) for case in cases]
    options = {"num_thought_tokens": number, "mode": "reference"}
    batch = search_prompts(processor(), questions, images, **options)
    length = batch.inputs["input_ids"].shape[1]
    for row, (asked, picture) in enumerate(zip(questions, images, strict=True)):
        single = search_prompt(processor(), asked, picture, **options)
        ids = single.inputs["input_ids"][0]
        assert torch.equal(batch.inputs["input_ids"][row, -len(ids) :], ids)
        assert batch.inputs["attention_mask"][row].tolist() == [0] * (length - len(ids)) + [1] * len(ids)
        assert torch.equal(batch.thought_mask[row, -len(ids) :], single.thought_mask[0])
        assert batch.thought_mask[row].sum() == number
