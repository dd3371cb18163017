"""IVT-LR and Coconut golden vectors: records to steps, prompts and token ids; answers and scorers (card 2, 6.3, 7)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.answers_staged import extract_scienceqa, score_m3cot
from trainers.data.m3cot import record_from_m3cot
from trainers.data.prosqa import read_prosqa
from trainers.data.records import Record
from trainers.data.scienceqa import record_from_scienceqa
from trainers.data.staged_text import COCONUT_TOKENS, STAGED_FORMATS, encode_staged, question_text, user_text

FOLDER = golden_dir("ivtlr")
STAGES: dict[str, Any] = golden_json(FOLDER, "stages.json", {})
QWEN, CHAMELEON, COCONUT = (STAGES.get(name, {}) for name in ("qwen_m3cot", "chameleon_scienceqa", "coconut"))
PATCHES_PER_TOKEN = 4  # of the Qwen-VL families
IMAGE_RUN = "<IMAGE_RUN>"
CHAMELEON_IMAGE_TOKENS = 1024
SLOT = COCONUT_TOKENS["slot"]


@lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    made.add_tokens(list(COCONUT_TOKENS.values()), special_tokens=True)
    return made


def named(case: dict[str, Any]) -> str:
    return str(case["raw"].get("id") or case["raw"]["question"])[:40]


@each("part", [part for part in (QWEN, CHAMELEON, COCONUT) if part], ids=lambda part: str(len(part["records"])))
def test_latent_tokens_are_added_in_the_published_order(part: dict[str, Any]) -> None:
    ids = part["token_ids"]
    assert {role: ids[name] for role, name in (("start", "start"), ("end", "end"), ("slot", "latent"))} == {
        role: tokenizer().convert_tokens_to_ids(token) for role, token in COCONUT_TOKENS.items()
    }
    assert tokenizer().eos_token_id == ids["eos"]


# M3CoT, Qwen2-VL


def m3cot(case: dict[str, Any]) -> tuple[Record, int]:
    """The record with an image, and the number of its image tokens."""
    return record_from_m3cot({**case["raw"], "image": "https://image"}, "stages.json", 0), math.prod(
        case["grid"]
    ) // PATCHES_PER_TOKEN


@each("case", QWEN.get("records", []), ids=named)
def test_record_of_m3cot(case: dict[str, Any]) -> None:
    record, tokens = m3cot(case)
    assert record["steps"] == case["steps"]
    assert question_text(record, tokenizer(), "ivtlr-qwen") == case["prompt_text"]
    example = encode_staged(record, tokenizer(), "ivtlr-qwen", [tokens])
    assert example.question == case["question_ids"]
    assert example.steps == case["steps_ids"]
    assert example.answer == case["answer_ids"]
    assert example.num_dropped_steps == len(case["steps"]) - len(case["steps_ids"])
    assert example.after_latents == []


@each("case", QWEN.get("records", []), ids=named)
def test_published_inference_prompt_of_m3cot(case: dict[str, Any]) -> None:
    record, tokens = m3cot(case)
    options = {"prompt": "published_inference"}
    assert user_text(record, "ivtlr-qwen", **options) == case["infer_user_prompt"]
    text = question_text(record, tokenizer(), "ivtlr-qwen", **options)
    assert text == case["infer_full_text"].replace(SLOT, "")
    pad = tokenizer().convert_ids_to_tokens(QWEN["token_ids"]["image"])
    example = encode_staged(record, tokenizer(), "ivtlr-qwen", [tokens], **options)
    assert example.question == tokenizer().encode(text.replace(pad, pad * tokens), add_special_tokens=False)
    assert example.question != case["question_ids"]


# ScienceQA, Chameleon


def without_run(ids: list[int]) -> dict[str, Any]:
    """The ids in the form of the file: without the run of image tokens, and where it was."""
    image = CHAMELEON["token_ids"]["image"]
    start = ids.index(image)
    end = start + CHAMELEON_IMAGE_TOKENS
    assert set(ids[start:end]) == {image} and image not in ids[end:]
    return {"ids": ids[:start] + ids[end:], "image_run_start": start}


def scienceqa(case: dict[str, Any]) -> Record:
    return record_from_scienceqa({**case["raw"], "image": "https://image"}, "stages.json", 0)


@each("case", CHAMELEON.get("records", []), ids=named)
def test_record_of_scienceqa(case: dict[str, Any]) -> None:
    record = scienceqa(case)
    assert (record["steps"], record["answer"]) == (case["steps"], case["answer_str"])
    text = user_text(record, "ivtlr-chameleon", image_token=IMAGE_RUN)
    assert text == case["prompt_text_without_image_run"]
    example = encode_staged(record, tokenizer(), "ivtlr-chameleon", [CHAMELEON_IMAGE_TOKENS])
    assert without_run(example.question) == case["question"]
    assert example.steps == case["steps_ids"]
    assert example.answer == case["answer_ids"]
    assert example.num_dropped_steps == len(case["steps"]) - len(case["steps_ids"])


@each("case", CHAMELEON.get("records", []), ids=named)
def test_published_inference_prompt_of_scienceqa(case: dict[str, Any]) -> None:
    record, options = scienceqa(case), {"prompt": "published_inference"}
    style = STAGED_FORMATS["ivtlr-chameleon"].style(**options)
    before = style.opening + style.image.format(image="<image>")
    text = user_text(record, "ivtlr-chameleon", **options)
    assert text.startswith(before) and "<image>" + text.removeprefix(before) == case["infer_prompt"].replace(SLOT, "")
    example = encode_staged(record, tokenizer(), "ivtlr-chameleon", [CHAMELEON_IMAGE_TOKENS], **options)
    latents = [CHAMELEON["token_ids"]["latent"]] * case["infer_prompt"].count(SLOT)
    assert without_run([*example.question, *latents, *example.after_latents]) == case["infer_ids"]
    assert example.after_latents == [CHAMELEON["token_ids"]["sep"]]


# Coconut


@each("case", COCONUT.get("records", []), ids=named)
def test_record_of_coconut(case: dict[str, Any]) -> None:
    (record,) = read_prosqa([case["raw"]])
    for options in ({}, {"prompt": "published_inference"}):
        example = encode_staged(record, tokenizer(), "coconut", **options)
        assert example.question == case["question_ids"]
        assert example.steps == case["steps_ids"]
        assert example.answer == case["answer_ids"]


# Answers


@each("case", STAGES.get("answers_scienceqa", []), ids=lambda case: case["text"][:40])
def test_answer_of_scienceqa(case: dict[str, Any]) -> None:
    assert extract_scienceqa(case["text"], "reference") == case["extracted"]


@each("case", STAGES.get("answers_m3cot", []), ids=lambda case: f"{case['decoded_full_text'][-30:]}-{case['gt']}")
def test_answer_of_m3cot(case: dict[str, Any]) -> None:
    assert score_m3cot(case["decoded_full_text"], case["gt"], "reference") is case["correct"]


@each("part", [QWEN] if QWEN else [], ids=lambda _: "all")
def test_the_limit_is_an_option(part: dict[str, Any]) -> None:
    """Cut to a limit, kept whole without one."""
    record, tokens = m3cot(max(part["records"], key=lambda case: len(case["steps_ids"])))
    whole = encode_staged(record, tokenizer(), "ivtlr-qwen", [tokens], max_length=None)
    if len(whole.steps) < 2:
        pytest.skip("no record of this set has two steps")
    total = sum(map(len, [whole.question, *whole.steps, whole.answer]))
    cut = encode_staged(record, tokenizer(), "ivtlr-qwen", [tokens], max_length=total - 1)
    assert (
        cut.steps == whole.steps[: len(cut.steps)] and cut.num_dropped_steps == len(whole.steps) - len(cut.steps) > 0
    )
    assert (cut.question, cut.answer) == (whole.question, whole.answer)
