"""Multiple-choice questions: both scores against known answers, the report, the published file, a model that runs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import evaluation.benchmarks.choices
from evaluation.benchmarks.choice_records import read_choices
from evaluation.benchmarks.choices import LINE_FIELDS, ChoiceReport, evaluate_choices, score_choices, write_choices
from evaluation.runner import Prediction, predict
from evaluation.statistics import wilson_interval
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.evaluation.choice_files import mmvp_rows, write_blink, write_mmstar, write_mmvp, write_vsp
from tests.latent import liven, tiny_latent_model
from trainers.data.answers_lavit import accuracy_lavit, count_learned_tokens
from trainers.data.records import Record
from trainers.tiny import build_tiny_processor

LEARNED = "<lvr1><lvr2><lvr3><lvr4>"


def said(records: list[Record], texts: list[str], raws: list[str] | None = None) -> list[Prediction]:
    raws = [f"{text}<|im_end|>" for text in texts] if raws is None else raws
    return [
        Prediction(record["id"], text, text, 4 * (i % 2), 10 + i, (), 0, 4 * (i % 2), raw)
        for i, (record, text, raw) in enumerate(zip(records, texts, raws, strict=True))
    ]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return read_choices("mmvp", write_mmvp(tmp_path))  # the right ones are a, b, a, b


def test_strict_and_published_scores(records: list[Record]) -> None:
    """The published rules see an e in "Yes"; strictly it is the option (a), and an article is none."""
    report = score_choices("x", "mmvp", records, said(records, ["Yes", "I see a b", "(a)", "It is closed."]))
    assert (report.answers, report.letters) == (["A", "", "A", ""], ["e", "b", "a", None])
    assert (report.correct, report.reference) == ([True, False, True, False], [False, True, True, False])
    assert (report.num_unanswered, report.reference_num_unanswered) == (2, 1)
    assert (report.accuracy, report.reference_accuracy) == (0.5, 0.5) and report.by_group() == {"mmvp": 0.5}
    pairs = [(p.raw, record["answer"]) for p, record in zip(report.predictions, records, strict=True)]
    published = accuracy_lavit(pairs)
    assert published["accuracy"] == 100 * report.reference_accuracy
    assert published["failed_extraction"] == report.reference_num_unanswered


def test_the_published_rules_read_the_learned_tokens_too(records: list[Record]) -> None:
    """Below ten characters any letter of a word counts: with the tokens in front the same word is longer."""
    for raw, letter in (("Yes<|im_end|>", "e"), (f"{LEARNED} Yes<|im_end|>", None), (f"{LEARNED} B", "b")):
        report = score_choices("x", "mmvp", records[:1], said(records[:1], ["Yes"], [raw]))
        assert report.letters == [letter] and report.answers == ["A"]


def test_groups_and_options_of_the_other_sets(tmp_path: Path) -> None:
    stars = read_choices("mmstar", write_mmstar(tmp_path / "mmstar"))  # A, B, C
    report = score_choices("x", "mmstar", stars, said(stars, ["up", "B: down", "D"]))
    assert report.correct == [True, True, False] and report.by_group() == {"c0": 0.5, "c1": 1.0}
    write_blink(tmp_path / "blink", "IQ_Test")
    spots = read_choices("blink", write_blink(tmp_path / "blink", "Counting"))  # B, C, each
    report = score_choices("x", "blink", spots, said(spots, ["(B)", "The answer is C.", "(A)", "D"]))
    assert report.by_group() == {"Counting": 1.0, "IQ_Test": 0.0} and report.answers == ["B", "C", "A", ""]
    mazes = read_choices("vsp", write_vsp(tmp_path / "vsp"))
    for text, plan, right in (("R, D, R, D", "R D R D", True), (r"\boxed{DOWN, RIGHT, RIGHT, DOWN}", "D R R D", True),
                              ("R R", "R R", False), ("(a)", "", False)):  # fmt: skip
        report = score_choices("x", "vsp", mazes, said(mazes, [text]))
        assert (report.answers, report.correct) == ([plan], [right])


def test_the_line_and_the_summary(records: list[Record]) -> None:
    report = score_choices("mmvp, latents learned", "mmvp", records, said(records, ["Yes", "(b)", "(b)", ""]))
    low, high = (100 * end for end in wilson_interval(2, 4))
    published = [100 * end for end in wilson_interval(1, 4)]
    assert report.line() == (
        f"{'mmvp, latents learned':<34} strict  50.0 % [{low:4.1f}, {high:4.1f}], no answer 1"
        f"  published rule  25.0 % [{published[0]:4.1f}, {published[1]:4.1f}], no answer 1"
        "  n=4  mmvp  50.0  latent steps 2.0 in 50.0 % of replies  AR steps 9.5"
    )
    summary = json.loads(json.dumps(report.summary()))
    assert (summary["accuracy"], summary["reference_accuracy"]) == (0.5, 0.25)
    assert (summary["num_unanswered"], summary["reference_num_unanswered"], summary["latent_usage"]) == (1, 1, 0.5)
    assert summary["predictions"][1] == {
        **vars(report.predictions[1]), "closed_by": [], "correct": True, "reference": True, "answer": "B",
        "letter": "b",
    }  # fmt: skip


def test_the_published_file(records: list[Record], tmp_path: Path) -> None:
    raws = [f"{LEARNED} (a)<|im_end|>", "(b)<|im_end|>", "", "\u00e9"]
    report = score_choices("x", "mmvp", records, said(records, ["(a)", "(b)", "", "\u00e9"], raws))
    path = tmp_path / "out" / "lines.jsonl"
    assert write_choices(path, records, report) == 4 and [each.name for each in path.parent.iterdir()] == [path.name]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [tuple(line) for line in lines] == [LINE_FIELDS] * 4 and "\u00e9" in path.read_text(encoding="utf-8")
    assert [line["model_output"] for line in lines] == raws and [line["lvr_count"] for line in lines] == [0, 4, 0, 4]
    assert [line["meta"] for line in lines] == mmvp_rows() and lines[1]["ground_truth"] == "(b)"
    assert lines[0]["prompt"] == records[0]["meta"]["prompt"] and lines[2]["id"] == "3"
    pairs = [(line["model_output"], line["ground_truth"]) for line in lines]
    assert accuracy_lavit(pairs)["accuracy"] == 100 * report.reference_accuracy
    with pytest.raises(ValueError, match="the report 'x' is of other records than these 3; give its own"):
        write_choices(path, records[:3], report)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4, "the file of before is whole"


def test_a_model_with_learned_tokens(records: list[Record]) -> None:
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    model = liven(tiny_latent_model(latent_method="lavit", **ids))
    reports: dict[str, ChoiceReport] = {}
    for strategy in ("learned", "off"):
        options: dict[str, Any] = {"max_new_tokens": 4, "latent_strategy": strategy}
        reports[strategy] = evaluate_choices("x", "mmvp", model, processor, records, batch_size=3, **options)
        assert reports[strategy].predictions == predict(model, processor, records, 3, **options)
    for strategy, laid_out in (("learned", 4), ("off", 0)):
        found = reports[strategy].predictions
        assert [p.num_latent_steps - laid_out for p in found] == [count_learned_tokens(p.raw) for p in found]
        assert [p.num_prefilled for p in found] == [laid_out] * 4 and not any("<lvr" in p.text for p in found)
        used = sum(p.num_latent_steps > 0 for p in found) / 4
        assert reports[strategy].latent_usage == used and (used == 1 or strategy == "off")
        assert reports[strategy].ar_steps == sum(p.num_tokens - laid_out for p in found) / 4 <= 4


def test_replies_that_nobody_can_read_are_loud(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for texts, is_loud in ((["what", "?", "who", "none"], True), (["what", "?", "who", "(b)"], False)):
        caplog.clear()
        monkeypatch.setattr(evaluation.benchmarks.choices, "predict", lambda *_, t=texts, **__: said(records, t))
        with caplog.at_level(logging.WARNING, logger="evaluation.benchmarks.choices"):
            evaluate_choices("x", "mmvp", None, None, records)
        assert ("no reply names an answer of mmvp; the first are ['what<|im_end|>', '?<" in caplog.text) == is_loud


def test_wrong_calls(records: list[Record]) -> None:
    with pytest.raises(ValueError, match="no records of mmvp; give at least one"):
        evaluate_choices("x", "mmvp", None, None, [])
    with pytest.raises(ValueError, match="unknown dataset 'gqa'"):
        evaluate_choices("x", "gqa", None, None, records)
    with pytest.raises(ValueError, match="4 records but 2 predictions; give one a record"):
        score_choices("x", "mmvp", records, said(records[:2], ["a", "b"]))
