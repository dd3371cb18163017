"""DMLR golden vectors through the protocols of the benchmarks: the published prompt around its thought block, answers,
the rule judge (card 2.2, 7.1)."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.benchmarks.registry import benchmark
from evaluation.runner import Prediction
from tests.golden.conftest import each
from tests.golden.dmlr_prompts import CASES, PROMPTS, name, processor, question, same_text
from tests.golden.dmlr_verify import shown, table
from tests.tiny import tiny_images
from trainers.data.records import Record, make_record

SETS = ("mathvista", "mathvision", "mm_math")
ASKED = [case for case in CASES if case["path"] == "dataset_messages" and case["prompt_idx"] == 0]


def record_of(asked: str, label: Any = "B") -> Record:
    return make_record("0", asked, label, tiny_images(1))


def said(text: str) -> Prediction:
    return Prediction("0", text, text, 0, 1, ())


def thought_block(case: dict[str, Any]) -> str:
    """The text of the file between the question and the end of the turn."""
    literals, number = PROMPTS["literals"], case["num_thought_tokens"]
    block = literals["thought_block"].replace("{N}", str(number)).replace("{Q}", question(case))
    block = block.replace("{PLACEHOLDERS}", literals["placeholder"] * number)
    return literals["thought_block_separator_after_dataset_message"] + block


@each("case", ASKED, ids=name)
def test_the_published_prompt_is_the_protocols_with_a_thought_block(case: dict[str, Any]) -> None:
    behind = PROMPTS["literals"]["generation_prompt"]
    for benchmark_name in SETS:
        protocol = benchmark(benchmark_name).protocol("dmlr")
        text = protocol.prompt(processor(), record_of(question(case)))
        assert text.endswith(f"<|im_end|>\n{behind}")
        turn = text.removesuffix(f"<|im_end|>\n{behind}")
        same_text(f"{turn}{thought_block(case)}<|im_end|>\n", case, "rendered")
        if "cot_text" in case:
            assert protocol.ask(record_of(question(case))) == case["cot_text"]


@each("case", ASKED, ids=name)
def test_the_strict_prompt_has_the_question_as_text(case: dict[str, Any]) -> None:
    record, bench = record_of(question(case)), benchmark("mathvista")
    published, strict = (bench.protocol(label).prompt(processor(), record) for label in ("dmlr", "dmlr_strict"))
    assert strict == published.replace(repr([question(case)]), question(case)) != published


@each("case", table("judge_answer"), ids=shown("output", "label"))
@pytest.mark.parametrize("set_name", SETS)
def test_rule_judge_of_the_protocol(case: dict[str, Any], set_name: str) -> None:
    protocol = benchmark(set_name).protocol("dmlr")
    assert protocol.score(record_of("?", case["label"]), said(case["output"])).correct is case["correct"]


@each("case", table("extract_answer"), ids=shown("text"))
def test_answer_of_the_protocol(case: dict[str, Any]) -> None:
    found = benchmark("mathvista").protocol("dmlr").score(record_of("?"), said(case["text"]))
    assert found.answer == (case["answer"] or None)
