"""IVT-LR golden vectors through the protocols of the benchmarks: prompts of training and of the published evaluation,
what stands behind the latents, both scorers (card 2.2, 2.3, 6.3, 7); Coconut's questions (card 11.2)."""

from __future__ import annotations

from typing import Any

from evaluation.benchmarks.registry import benchmark
from evaluation.benchmarks.step_benchmarks import step_protocol, text_behind
from evaluation.runner import Prediction
from tests.golden.conftest import each
from tests.golden.ivtlr_data import (
    CHAMELEON,
    COCONUT,
    QWEN,
    SLOT,
    STAGES,
    m3cot,
    named,
    scienceqa,
    tokenizer,
)
from trainers.data.prosqa import read_prosqa
from trainers.data.records import Record, make_record

HEAD, ROLE = "[Question]:{", "\nassistant\n"


def said(text: str) -> Prediction:
    return Prediction("0", text, text, 0, 1, ())


@each("case", QWEN.get("records", []), ids=named)
def test_prompts_of_m3cot(case: dict[str, Any]) -> None:
    record, _ = m3cot(case)
    bench = benchmark("m3cot")
    for label in ("default", "ivtlr"):
        assert bench.protocol(label).prompt(tokenizer(), record) == case["prompt_text"]
        published = step_protocol("m3cot", label, prompt="published_inference")
        assert published.prompt(tokenizer(), record) == case["infer_full_text"].replace(SLOT, "")
        assert published.ask(record) == case["infer_user_prompt"]
    reply = "".join(bench.protocol("ivtlr").gold_reply(bench.gold(record))) + tokenizer().eos_token
    assert tokenizer().encode(reply, add_special_tokens=False) == case["answer_ids"]


@each("case", CHAMELEON.get("records", []), ids=named)
def test_prompts_of_scienceqa(case: dict[str, Any]) -> None:
    record, bench, label = scienceqa(case), benchmark("scienceqa"), "ivtlr_chameleon"
    asked = bench.protocol(label).prompt(tokenizer(), record)
    assert asked.replace("<image>", "<IMAGE_RUN>") == case["prompt_text_without_image_run"]
    asked = step_protocol("scienceqa", label, prompt="published_inference").prompt(tokenizer(), record)
    # the processor of the published script writes the tokens around the image
    assert asked.replace("<s><racm3:break><image><eoss>", "<image>") == case["infer_prompt"].replace(SLOT, "")
    behind = text_behind("scienceqa", label, prompt="published_inference")
    assert tokenizer().encode(behind, add_special_tokens=False) == [CHAMELEON["token_ids"]["sep"]]
    reply = "".join(bench.protocol(label).gold_reply(bench.gold(record))) + tokenizer().eos_token
    assert tokenizer().encode(reply, add_special_tokens=False) == case["answer_ids"]


@each("case", COCONUT.get("records", []), ids=named)
def test_prompts_of_coconut(case: dict[str, Any]) -> None:
    (record,) = read_prosqa([case["raw"]])
    for name in ("gsm8k", "prosqa", "prontoqa", "graphs"):
        protocol = benchmark(name).protocol("coconut")
        ids = tokenizer().encode(protocol.prompt(tokenizer(), record), **protocol.processor_options)
        assert ids == case["question_ids"]
        reply = "".join(protocol.gold_reply(benchmark(name).gold(record))) + tokenizer().eos_token
        assert tokenizer().encode(reply, add_special_tokens=False) == case["answer_ids"]


# Scorers


def asked_in(whole: str, gold: str) -> tuple[Record, str]:
    """The record whose published prompt a decoded output begins with, and its new text."""
    before, _, text = whole.partition(ROLE)
    question, _, options = before.partition(HEAD)[2].partition("}\n[Options]:\n")
    choices = [line.partition("{")[2].removesuffix("}") for line in options.splitlines()[:-1]]
    return make_record("0", question, gold, choices=choices), text


@each("case", STAGES.get("answers_m3cot", []), ids=lambda case: f"{case['decoded_full_text'][-30:]}-{case['gt']}")
def test_score_of_m3cot(case: dict[str, Any]) -> None:
    record, text = asked_in(case["decoded_full_text"], case["gt"])
    protocol = step_protocol("m3cot", "ivtlr", prompt="published_inference")
    assert f"{protocol.ask(record)}{ROLE}{text}" in case["decoded_full_text"]  # the record is the one that was asked
    assert protocol.score(record, said(text)).correct is case["correct"]


@each("case", STAGES.get("answers_scienceqa", []), ids=lambda case: case["text"][:40])
def test_score_of_scienceqa(case: dict[str, Any]) -> None:
    """Right for the option that was extracted, and for no other."""
    for label in ("ivtlr", "ivtlr_chameleon"):
        protocol = benchmark("scienceqa").protocol(label)
        for gold in range(5):
            record = make_record("0", "?", str(gold), choices=["a", "b", "c", "d", "e"])
            right, answer = protocol.score(record, said(case["text"]))
            assert right is (case["extracted"] == gold)
            assert answer == (None if case["extracted"] < 0 else str(case["extracted"]))
