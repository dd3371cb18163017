"""IVT-LR and Coconut golden vectors: items of every stage, evaluation prompts, collated batches (card 2.4, 11.2)."""

from __future__ import annotations

import re
from typing import Any

from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.staged_text import StagedExample
from trainers.data.stages import StageLayout, StageTokens, expand_stage, pad_to_first_latent, stage_prompt

FOLDER = golden_dir("ivtlr")
STAGES: dict[str, Any] = golden_json(FOLDER, "stages.json", {})
QWEN, CHAMELEON, COCONUT = (STAGES.get(name, {}) for name in ("qwen_m3cot", "chameleon_scienceqa", "coconut"))
IGNORED = -100


def tokens_of(part: dict[str, Any]) -> StageTokens:
    ids = part["token_ids"]
    return StageTokens(ids["latent"], start=ids["start"], end=ids["end"])


def example_of(record: dict[str, Any]) -> StagedExample:
    question = record["question"]["ids"] if "question" in record else record["question_ids"]
    return StagedExample(question, record["steps_ids"], record["answer_ids"])


def layout_of(case: dict[str, Any]) -> StageLayout:
    """The options of a case, under their names there; the defaults are those of the published IVT-LR script."""
    names = {"max_latent_stage": 5, "pad_latent_to_max": True, "markers": False, "no_cot": False}
    given = {name: case.get(name, default) for name, default in names.items()}
    return StageLayout(**given, latents_per_step=case.get("c_thought", 1))


def name_of(case: dict[str, Any]) -> str:
    options = [f"{key}{int(case[key])}" for key in ("stage", "max_latent_stage", "c_thought") if key in case]
    switches = [key for key in ("pad_latent_to_max", "markers", "no_cot") if case.get(key)]
    return "-".join([*options, *switches, f"record{case.get('record', 's')}"])


def expanded(part: dict[str, Any], case: dict[str, Any]) -> dict[str, list[int]]:
    return expand_stage(example_of(part["records"][case["record"]]), case["stage"], layout_of(case), tokens_of(part))


def check_masked(part: dict[str, Any], found: dict[str, list[int]], number: int) -> None:
    assert found["labels"][:number] == [IGNORED] * number
    assert found["labels"][number:] == found["input_ids"][number:]


@each("case", QWEN.get("stages", []), ids=name_of)
def test_items_of_a_stage_with_expanded_images(case: dict[str, Any]) -> None:
    found = expanded(QWEN, case)
    assert found["input_ids"] == case["input_ids"]
    check_masked(QWEN, found, case["n_masked_labels"])
    slot = QWEN["token_ids"]["latent"]
    assert [i for i, token in enumerate(found["input_ids"]) if token == slot] == case["latent_positions"]


@each("case", CHAMELEON.get("stages", []), ids=name_of)
def test_items_of_a_stage_whose_image_run_was_taken_out(case: dict[str, Any]) -> None:
    """The run of image tokens is part of the question: it moves what is behind it."""
    found = expanded(CHAMELEON, case)
    assert found["input_ids"] == case["ids"]
    run = case["total_length_with_image_run"] - len(case["ids"])
    check_masked(CHAMELEON, found, case["n_masked_labels_with_image_run"] - run)
    slot = CHAMELEON["token_ids"]["latent"]
    places = [i + run for i, token in enumerate(found["input_ids"]) if token == slot]
    assert places == case["latent_positions"]


@each("case", COCONUT.get("train", []), ids=name_of)
def test_items_of_coconut(case: dict[str, Any]) -> None:
    found = expanded(COCONUT, case)
    assert found == {"input_ids": case["input_ids"], "labels": case["labels"]}


@each("case", COCONUT.get("eval", []), ids=name_of)
def test_evaluation_prompts_of_coconut(case: dict[str, Any]) -> None:
    example = example_of(COCONUT["records"][case["record"]])
    assert stage_prompt(example, case["stage"], layout_of(case), tokens_of(COCONUT)) == case["input_ids"]


def collated(part: dict[str, Any], records: list[int], stage: int, layout: StageLayout) -> dict[str, Any]:
    items = [expand_stage(example_of(part["records"][i]), stage, layout, tokens_of(part)) for i in records]
    return pad_to_first_latent(items, part["token_ids"]["latent"], part["token_ids"]["pad"])


def in_the_case(case: dict[str, Any], found: dict[str, Any]) -> None:
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert found[name] == case[name], name


@each("case", QWEN.get("collated", []), ids=lambda case: f"stage{case['stage']}-{case['records']}")
def test_collated_batches(case: dict[str, Any]) -> None:
    in_the_case(case, collated(QWEN, case["records"], case["stage"], StageLayout()))


@each("case", COCONUT.get("collated", []), ids=name_of)
def test_collated_batches_of_coconut(case: dict[str, Any]) -> None:
    """All records, with the options that the manifest names for these batches."""
    text = re.search(r"collated batches \((.*?)\)", golden_json(FOLDER, "manifest.json")["stages"]["coconut"])[1]
    options = dict(re.findall(r"(c_thought|max_latent_stage|pad_latent_to_max) (\w+)", text))
    layout = StageLayout(
        max_latent_stage=int(options["max_latent_stage"]),
        pad_latent_to_max=options["pad_latent_to_max"] == "true",
        latents_per_step=int(options["c_thought"]),
        markers="with markers" in text,
    )
    records = list(range(len(case["input_ids"])))
    in_the_case(case, collated(COCONUT, records, case["stage"], layout))
