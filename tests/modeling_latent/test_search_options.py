"""Options of the search: defaults of the two modes, values that are refused, and what follows from them."""

from typing import Any

import pytest
import torch

from modeling_latent.latent_strategies import LATENT_OPTIONS
from modeling_latent.search_options import SEARCH_OPTIONS, search_settings
from modeling_latent.search_rewards import REWARD_ROWS, REWARDS, confidence

PAPER = {"num_thought_tokens": 4, "sigma": 0.1, "lr": 1e-3, "max_num_steps": 15, "sigma_decay": 0.95,
         "num_selected_patches": 16, "initial_patch_count": 2, "patch_increment": 2, "seed": 42,
         "inject_in_decode": True, "reward_rows": "thoughts", "num_noise_samples": 1, "baseline": "none"}  # fmt: skip
PUBLISHED = {"num_thought_tokens": 8, "sigma": 20.0, "lr": 5e-3, "max_num_steps": 20, "sigma_decay": 0.95,
             "num_selected_patches": None, "initial_patch_count": None, "patch_increment": 0, "seed": 42,
             "inject_in_decode": False, "reward_rows": "thoughts_and_end", "reward_top_k": 10,
             "reward_threshold": -1.0, "visual_insert_stride": 1, "visual_injection_start_step": 0,
             "visual_injection_interval": 1, "visual_only": False, "use_auto_grad": False}  # fmt: skip


@pytest.mark.parametrize(("mode", "expected"), [("paper", PAPER), ("reference", PUBLISHED)])
def test_defaults(mode: str, expected: dict[str, Any]) -> None:
    """Of the paper's appendix, and of the published command line."""
    found = search_settings(mode=mode)
    assert {name: getattr(found, name) for name in expected} == expected and found.mode == mode
    assert vars(search_settings(mode=mode, **dict.fromkeys(expected)))["sigma"] == found.sigma, "None is a default"


def test_the_mode_is_the_paper_s() -> None:
    assert search_settings().mode == search_settings(mode=None).mode == "paper"


def test_every_option_is_an_option_of_generate() -> None:
    for name, option in SEARCH_OPTIONS.items():
        assert LATENT_OPTIONS[name].help == option.help and len(option.help) > 10
        assert LATENT_OPTIONS[name].default is None, "which leaves it to the mode"
        assert LATENT_OPTIONS[name].saved == (name not in ("thought_mask", "seed"))
        for mode in ("paper", "reference"):
            default = getattr(option, mode)
            assert option.check(name, default) == default


@pytest.mark.parametrize("name", list(REWARDS))
def test_rewards_by_name(name: str) -> None:
    found = search_settings(reward=name)
    assert found.reward.function is REWARDS[name].function
    assert found.reward_rows == found.reward.rows == REWARDS[name].rows
    for rows in REWARD_ROWS:
        found = search_settings(reward=name, reward_rows=rows)
        assert found.reward_rows == found.reward.rows == rows


def test_a_reward_of_the_caller_reads_logits_alone() -> None:
    found = search_settings(reward=lambda logits: logits.mean((1, 2)), reward_rows="answer")
    assert found.reward.function(torch.ones(2, 1, 5), 10).tolist() == [1.0, 1.0] and found.reward.rows == "answer"
    assert search_settings(reward=confidence).reward_rows == "thoughts"


def test_schedules() -> None:
    """A cap of 0 is no image token, as published it is no cap."""
    paper = search_settings(num_selected_patches=0).schedule
    assert not any(paper.injects(step) for step in range(1000))
    published = search_settings(mode="reference", num_selected_patches=0).schedule
    assert published.cap is None and published.injects(0) and published.first_budget() is None
    one = search_settings(visual_injection_start_step=2, visual_injection_interval=3, visual_insert_stride=2).schedule
    assert [step for step in range(9) if one.injects(step)] == [2, 5, 8] and list(one.offsets(5)) == [0, 2, 4]
    assert (one.cap, one.initial, one.increment) == (16, 2, 2)


def test_generators() -> None:
    first, second = search_settings(seed=5).generators(2)
    assert first is not second and first.initial_seed() == second.initial_seed() == 5
    assert [each.initial_seed() for each in search_settings(seed=(1, 2)).generators(2)] == [1, 2]
    own = torch.Generator().manual_seed(9)
    assert search_settings(seed=own).generators(2) == [own, own]
    mixed = search_settings(seed=[own, 3]).generators(2)
    assert mixed[0] is own and mixed[1].initial_seed() == 3
    with pytest.raises(ValueError, match="seed has 3 entries for 2 prompts; give one, or one per prompt"):
        search_settings(seed=[1, 2, 3]).generators(2)


AT_LEAST = ("num_thought_tokens", "reward_top_k", "num_noise_samples", "visual_insert_stride")
FROM_ZERO = ("max_num_steps", "thought_token_id", "num_selected_patches", "initial_patch_count", "patch_increment",
             "visual_injection_start_step", "visual_injection_interval")  # fmt: skip
WHOLE = [({name: bad}, f"{name}={bad!r} must be an integer of at least 1") for name in AT_LEAST for bad in (0, 1.5)]
WHOLE += [
    ({name: bad}, f"{name}={bad!r} must be an integer of at least 0") for name in FROM_ZERO for bad in (-1, True)
]
NUMBERS = [({name: bad}, f"{name}={bad!r} must be a number above 0") for name in ("lr", "sigma", "sigma_decay")
           for bad in (0, -1.0, float("nan"), float("inf"), "1", True)]  # fmt: skip
FLAGS = [({name: 1}, f"{name}=1 must be True or False")
         for name in ("relative_sigma", "use_auto_grad", "visual_only", "inject_in_decode")]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    *WHOLE,
    *NUMBERS,
    *FLAGS,
    ({"sigmas": 1.0}, r"the search does not read \['sigmas'\]; its options are \['mode'"),
    ({"mode": "fast"}, r"mode='fast' is unknown; choose one of \['paper', 'reference'\]"),
    ({"num_thought_tokens": 0}, "for none decode without the search"),
    ({"sigma": 0.0}, "without noise there is no estimate"),
    ({"reward_threshold": float("nan")}, "reward_threshold=nan must be a number; 0 or less never stops early"),
    ({"reward_threshold": "0.5"}, "reward_threshold='0.5' must be a number"),
    ({"reward": "entropy"}, "reward='entropy' is unknown; choose one of .*'answer_entropy'.*or a callable on logits"),
    ({"reward_rows": "all"}, "reward_rows='all' is unknown; choose one of .*'thoughts_and_end'"),
    ({"baseline": "median"}, r"baseline='median' is unknown; choose one of \['none', 'mean', 'antithetic'\]"),
    ({"seed": 1.0}, "seed=1.0 must be an integer or a torch.Generator, or one for each prompt"),
    ({"seed": True}, "seed=True must be an integer or a torch.Generator"),
    ({"seed": []}, r"seed=\[\] must be an integer or a torch.Generator"),
    ({"seed": [1, "2"]}, "seed=.* must be an integer or a torch.Generator"),
    ({"thought_mask": [[1]]}, r"thought_mask must be a tensor \(batch, length\), true where the thought tokens stand"),
    ({"thought_mask": torch.ones(3)}, r"thought_mask must be a tensor \(batch, length\)"),
    ({"baseline": "mean"}, "baseline='mean' with num_noise_samples=1: the mean of one is itself; take 2 or more"),
    ({"baseline": "antithetic", "num_noise_samples": 3}, "num_noise_samples=3: samples are pairs; take an even numb"),
    ({"baseline": "antithetic"}, "num_noise_samples=1: samples are pairs"),
    ({"mode": "reference", "inject_in_decode": True}, "inject_in_decode=True with mode='reference'.*or take mode='pa"),
    ({"mode": "reference", "use_auto_grad": True, "num_noise_samples": 2}, "use_auto_grad=True moves nothing in mode"),
    ({"use_auto_grad": True, "baseline": "mean", "num_noise_samples": 2}, "baseline='mean' is of the score-function"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:70])
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search_settings(**options)
