"""Rows of the search over thought tokens in `examples/benchmark.py`: both sides find the same, and every row runs.

No time is asserted. That the naive side is the published schedule is tested on its vectors (`tests/golden`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import benchmark_search
from evaluation.benchmark_search import (
    QUICK,
    SCRIPT,
    SIZES,
    STEPS,
    THOUGHTS,
    compare,
    question_of,
    run_search,
    search_rise,
    their_search,
)
from evaluation.naive_search import naive_search, naive_search_answer
from evaluation.speed_table import ROWS, Settings
from tests.examples.test_benchmark import table

SETTINGS = Settings(repeats=1, quick=True)
FRESH = {"search_memory"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_selected_patches": None, "initial_patch_count": None},
        {"num_selected_patches": 3, "visual_only": True, "visual_insert_stride": 2},
        {"visual_injection_start_step": 1, "visual_injection_interval": 2},
        {"reward_threshold": 1.0, "use_auto_grad": True},
    ],
)
def test_both_sides_find_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_search, "SCRIPT", {**SCRIPT, **options})
    _, ours = run_search(SETTINGS)
    theirs = their_search(SETTINGS)
    assert compare(ours, theirs) < 1e-5
    torch.testing.assert_close(ours.thoughts[0], theirs.thoughts, atol=1e-5, rtol=1e-5)
    assert len(theirs.steps) == (1 if "reward_threshold" in options else 3)


def test_what_the_published_schedule_runs() -> None:
    """Two whole prompts a step, with copies in the second one, and the vision tower once a step."""
    run = their_search(SETTINGS)
    prompt = question_of(SETTINGS).sizes.prompt
    copies = [sum(map(len, step.selection.values())) for step in run.steps]
    assert run.forwards == [tokens for count in copies for tokens in (prompt, prompt + count)]
    assert run.vision_passes == len(run.steps) == 3 and copies[0] == THOUGHTS


@pytest.mark.parametrize("field", ["reward", "selection", "budget"])
def test_refuses_to_compare_different_searches(field: str) -> None:
    theirs = their_search(SETTINGS)
    last = theirs.steps[theirs.best_step]
    wrong = {"reward": last.reward + 2e-4, "selection": {0: [3]}, "budget": 99}[field]
    theirs.steps[theirs.best_step] = replace(last, **{field: wrong})
    with pytest.raises(RuntimeError, match="the searches compared do not find the same"):
        compare(run_search(SETTINGS)[1], theirs)


def test_refuses_to_compare_different_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_search, "naive_search_answer", lambda *_, **__: [0] * QUICK.answer)
    with pytest.raises(RuntimeError, match="the answers compared differ"):
        benchmark_search.answer_time(SETTINGS)


def test_naive_answer_writes_what_stock_decoding_writes() -> None:
    """With the thought tokens as they are the answer is that of the prompt with plain positions."""
    question = question_of(SETTINGS)
    thoughts = question.eager.get_input_embeddings()(question.inputs["input_ids"][question.thought_mask])
    found = naive_search_answer(question.eager, question.inputs, question.span, thoughts, max_new_tokens=3)
    _, ours = run_search(SETTINGS, max_num_steps=0)
    assert torch.equal(ours.thoughts[0], thoughts) and len(found) == 3


def test_naive_side_refuses_what_was_never_published() -> None:
    question = question_of(SETTINGS)
    options = {"max_num_steps": 1, "lr": 0.1, "sigma": 1.0, "generator": torch.Generator()}
    with pytest.raises(ValueError, match="attn_implementation='sdpa' returns no attention weights"):
        naive_search(question.stock, question.inputs, question.span, **options)
    twice = {"input_ids": question.inputs["input_ids"].repeat(2, 1)}
    with pytest.raises(ValueError, match="2 rows; the published schedule takes one"):
        naive_search(question.eager, twice, question.span, **options)


def test_sizes_of_the_full_rows_are_those_of_the_bar() -> None:
    assert SIZES.prompt >= 450 and (SIZES.hidden_size, SIZES.num_layers, SIZES.vocab_size) == (512, 8, 32_000)
    assert (THOUGHTS, STEPS, benchmark_search.SPEED_BAR) == (2, 15, 8)
    assert "num_noise_samples" not in SCRIPT and benchmark_search.REWARD_TOLERANCE == 1e-4


def test_rows_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table([name for name in ROWS["dmlr"] if name not in FRESH], tmp_path / "table.json", capsys, "dmlr")
    assert [row["at_least"] for row in rows] == [True, True]
    assert "same decisions" in rows[0]["name"] and "answer" in rows[1]["name"]
    assert rows[0]["details"]["largest_difference_of_rewards"] < 1e-4 and rows[0]["details"]["steps"] == 3


def test_paper_mode_is_timed_when_asked_for() -> None:
    lines = benchmark_search.search_time(Settings(repeats=1, quick=True, paper=True))
    assert [line.bar for line in lines] == [8, None, None]
    assert [line.name.split(",")[-1] for line in lines[1:]] == [f" K = {k} / published schedule" for k in (1, 8)]


@pytest.mark.parametrize("arm", ["naive 0", "ours 0", "ours 8"])
def test_a_search_in_a_process_of_its_own(arm: str) -> None:
    assert search_rise(SETTINGS, arm) >= 0


@pytest.mark.slow
def test_rows_in_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = table(["search_memory"], tmp_path / "table.json", capsys, "dmlr")
    assert line["unit"] == "MiB" and "memory of the search, ours" in line["name"]
