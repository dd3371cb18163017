"""LVR golden vectors: published rewards, their discovery, and the letters of the evaluation (card, 4.6 and 7)."""

from __future__ import annotations

import pytest

from evaluation.benchmarks.registry import benchmark
from evaluation.runner import Prediction
from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.answers import LETTER_INSTRUCTION, score_letter_lvr
from trainers.data.records import make_record
from trainers.reward_loading import discover_rewards
from trainers.rewards import accuracy_reward, format_reward

FOLDER = golden_dir("lvr")
TABLES: dict = golden_json(FOLDER, "rewards.json", {})


@each("row", TABLES.get("training", []), ids=lambda row: row["completion"])
def test_training_rewards(row: dict) -> None:
    completions = [[{"role": "assistant", "content": row["completion"]}]]
    assistant = [{"role": "assistant", "content": row["solution"]}]
    assert format_reward(completions, assistant=assistant) == [row["format_reward"]]
    pytest.importorskip("math_verify", reason="accuracy_reward needs math-verify")
    assert accuracy_reward(completions, assistant=assistant) == [row["accuracy_reward"]]


@each("row", TABLES.get("evaluation", []), ids=lambda row: f"{row['response']}={row['label']}")
def test_letters_of_the_evaluation(row: dict) -> None:
    assert score_letter_lvr(row["response"], row["label"]) is row["correct"]


@each("row", TABLES.get("evaluation", []), ids=lambda row: f"{row['response']}={row['label']}")
def test_letters_through_the_protocol(row: dict) -> None:
    said = Prediction("", row["response"], row["response"], 0, 4, (), raw="")
    for name in ("vstar", "mmvp", "blink"):
        found = benchmark(name).protocol("lvr").score(make_record("0", "?", row["label"]), said)
        assert found.correct is row["correct"], name


@each("order", [TABLES["discovery_order"]] if TABLES else [])
def test_discovery_order(order: list[str]) -> None:
    found = [function.__name__ for function in discover_rewards("trainers.rewards")]
    assert [name for name in found if name in order] == order


@each("instruction", [TABLES["task_instruction"]] if TABLES else [])
def test_instruction(instruction: str) -> None:
    assert instruction == LETTER_INSTRUCTION
