"""The published schedule as `evaluation/naive_search.py` writes it: all published loops, step by step.

It is what the search is measured against (`examples/benchmark.py dmlr`), so it has to be that schedule.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import GenerationConfig

from evaluation.naive_search import NaiveSearch, naive_search, naive_search_answer
from tests.golden.conftest import each
from tests.golden.dmlr_search import LOOPS, META, STEPPED, close, model, options, prompt, tensors


def arguments(name: str) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    inputs = {key: value for key, value in prompt(name).items() if key != "mm_token_type_ids"}
    return inputs, tuple(META[name]["thought_idx"])


@cache
def naive(name: str) -> NaiveSearch:
    found = {key: value for key, value in options(name).items() if key not in ("mode", "num_thought_tokens")}
    generator = torch.Generator().manual_seed(found.pop("seed"))
    return naive_search(model("eager"), *arguments(name), generator=generator, **found)


@each("name", STEPPED)
def test_naive_rewards_and_thoughts(name: str) -> None:
    run = naive(name)
    close(torch.tensor([step.reward for step in run.steps]), tensors()[f"{name}/reward"], "reward")
    close(torch.stack([step.before for step in run.steps]), tensors()[f"{name}/thought_before"], "thought_rows")
    close(torch.stack([step.after for step in run.steps]), tensors()[f"{name}/thought_after"], "thought_rows")
    close(run.thoughts, tensors()[f"{name}/best_thought"], "thought_rows")
    assert run.best_step == META[name]["best_reward_step"]
    assert run.best_reward == pytest.approx(META[name]["best_reward"], abs=1e-4)


@each("name", STEPPED)
def test_naive_selections_and_what_is_fed(name: str) -> None:
    case, run = META[name], naive(name)
    for step, selected, row in zip(run.steps, case["selected_abs"], case["csv_rows"], strict=True):
        expected = {int(offset): places for offset, places in (selected or {}).items() if places}
        assert {offset: places for offset, places in step.selection.items() if places} == expected
        assert (int(step.is_new_best), -1 if step.budget is None else step.budget) == (
            row["is_new_best"],
            row["patch_budget"],
        )
    for step, codes in zip(run.steps, tensors()[f"{name}/region_src_fed"].tolist(), strict=True):
        assert step.fed == [code for code in codes if code != -99]


@each("name", STEPPED)
def test_naive_forwards_are_the_published_ones(name: str) -> None:
    """Two whole prompts a step, the vision tower in the first of each."""
    forwards, run = META[name]["loop_forwards"], naive(name)
    assert run.forwards == [forward["tokens"] for forward in forwards]
    assert run.vision_passes == sum(forward["vision"] for forward in forwards)


@each("name", LOOPS)
def test_naive_answer(name: str) -> None:
    case = META[name]
    config = {**model("eager").generation_config.to_dict(), **case.get("generation_config_overrides", {})}
    found = naive_search_answer(
        model("eager"),
        *arguments(name),
        naive(name).thoughts,
        generation_config=GenerationConfig(**config),
        max_new_tokens=case["hyper"]["max_new_tokens"],
    )
    assert found == tensors()[f"{name}/output_ids"].tolist()
