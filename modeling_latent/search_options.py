"""Options of the search over latents (`search_latent.py`): names and defaults of the paper and of the published code.

Source: DMLR, arXiv 2512.12623; the flags of its published script keep their names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from .search_patches import PatchSchedule
from .search_rewards import REWARD_ROWS, REWARDS, SearchReward

MODES = ("paper", "reference")
BASELINES = ("none", "mean", "antithetic")
NEVER = 2**62


@dataclass(frozen=True)
class SearchOption:
    """An option of the search.

    Args:
        paper, reference: default in the two modes: of the paper's appendix, and of the published script.
        check: `(name, value) -> value`, raises `ValueError`.
        help: one line.
    """

    paper: Any
    reference: Any
    check: Callable[[str, Any], Any]
    help: str


def _whole(minimum: int, remedy: str = "", optional: bool = False) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}{remedy}")
        return value

    return check


def _number(lowest: float, inclusive: bool = False, remedy: str = "") -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        fits = not isinstance(value, bool) and isinstance(value, int | float)
        if not fits or not (value >= lowest if inclusive else value > lowest) or value == float("inf"):
            raise ValueError(
                f"{name}={value!r} must be a number {'from' if inclusive else 'above'} {lowest:g}{remedy}"
            )
        return float(value)

    return check


def _any_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{name}={value!r} must be a number; 0 or less never stops early")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def _choice(*allowed: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}")
        return value

    return check


def _reward(name: str, value: Any) -> Any:
    if not callable(value) and value not in REWARDS:
        raise ValueError(
            f"{name}={value!r} is unknown; choose one of {list(REWARDS)}, or a callable on logits (N, rows, V)"
        )
    return value


def _seed(name: str, value: Any) -> Any:
    one = isinstance(value, int | torch.Generator) and not isinstance(value, bool)
    many = isinstance(value, list | tuple) and value and all(isinstance(each, int | torch.Generator) for each in value)
    if not (one or many):
        raise ValueError(f"{name}={value!r} must be an integer or a torch.Generator, or one for each prompt")
    return value


def _mask(name: str, value: Any) -> Any:
    if value is not None and not (torch.is_tensor(value) and value.dim() == 2):
        raise ValueError(f"{name} must be a tensor (batch, length), true where the thought tokens stand")
    return value


SEARCH_OPTIONS: dict[str, SearchOption] = {
    "mode": SearchOption("paper", "paper", _choice(*MODES), "'paper', or 'reference': what the published code does"),
    "num_thought_tokens": SearchOption(
        4, 8, _whole(1, "; for none decode without the search"), "number of thought tokens"
    ),
    "thought_mask": SearchOption(None, None, _mask, "where they stand in the prompt; else behind it"),
    "thought_token_id": SearchOption(None, None, _whole(0, optional=True), "id that they are laid out with"),
    "max_num_steps": SearchOption(15, 20, _whole(0), "steps of the search; 0: the thought tokens as they are"),
    "lr": SearchOption(1e-3, 5e-3, _number(0), "step size of the thought tokens"),
    "sigma": SearchOption(
        0.1, 20.0, _number(0, remedy=": without noise there is no estimate"), "standard deviation of the noise"
    ),
    "sigma_decay": SearchOption(0.95, 0.95, _number(0), "its factor a step"),
    "relative_sigma": SearchOption(False, False, _flag, "sigma in units of the RMS of the first thought tokens"),
    "reward_threshold": SearchOption(-1.0, -1.0, _any_number, "stops a row whose reward reaches it; 0 or less: never"),
    "reward_top_k": SearchOption(10, 10, _whole(1), "tokens that the published rewards read"),
    "reward": SearchOption("confidence", "published_confidence", _reward, "name, or a callable on logits"),
    "reward_rows": SearchOption(None, None, _choice(None, *REWARD_ROWS), "rows that it reads; default: of the reward"),
    "num_noise_samples": SearchOption(1, 1, _whole(1), "noise samples a step, in one batch"),
    "baseline": SearchOption("none", "none", _choice(*BASELINES), "'mean' of the samples, or 'antithetic' pairs"),
    "use_auto_grad": SearchOption(False, False, _flag, "Adam on the reward's gradient (published: moves nothing)"),
    "num_selected_patches": SearchOption(16, None, _whole(0, optional=True), "most image tokens of a thought token"),
    "initial_patch_count": SearchOption(2, None, _whole(0, optional=True), "image tokens at the beginning"),
    "patch_increment": SearchOption(2, 0, _whole(0), "how many more after an improvement"),
    "visual_insert_stride": SearchOption(1, 1, _whole(1), "every so many-th thought token gets image tokens"),
    "visual_injection_start_step": SearchOption(0, 0, _whole(0), "first step with image tokens"),
    "visual_injection_interval": SearchOption(1, 1, _whole(0), "every so many-th step from there on"),
    "visual_only": SearchOption(
        False, False, _flag, "begin at the mean image embedding (published: copies are final states)"
    ),
    "inject_in_decode": SearchOption(True, False, _flag, "the image tokens stay in the prompt of the answer"),
    "seed": SearchOption(42, 42, _seed, "of the noise, one for all rows or one each; generators are used up in turn"),
}


def search_settings(**given: Any) -> SimpleNamespace:
    """Options of a search, checked, with the defaults of their mode; `None` is a default.

    Returns:
        A namespace with one attribute per option, `reward` a [`SearchReward`], `schedule` a [`PatchSchedule`], and
        `generators(batch)`, a generator of noise for each row.

    Raises:
        ValueError: an unknown option, a value out of range, or options that contradict each other; names option,
            value and remedy.
    """
    unknown = [name for name in given if name not in SEARCH_OPTIONS]
    if unknown:
        raise ValueError(f"the search does not read {unknown}; its options are {list(SEARCH_OPTIONS)}")
    mode = SEARCH_OPTIONS["mode"].check("mode", given.get("mode") or "paper")
    values = SimpleNamespace()
    for name, option in SEARCH_OPTIONS.items():
        value = given.get(name)
        setattr(values, name, option.check(name, getattr(option, mode) if value is None else value))
    values.mode = mode
    _check_together(values)
    named = isinstance(values.reward, str)
    reward = REWARDS[values.reward] if named else SearchReward(_plain(values.reward), "thoughts")
    values.reward_rows = values.reward_rows or reward.rows
    values.reward = replace(reward, rows=values.reward_rows)
    values.schedule = _schedule(values)
    values.generators = lambda batch: _generators(values.seed, batch)
    return values


def _plain(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda logits, top_k: function(logits)


def _check_together(values: SimpleNamespace) -> None:
    samples = values.num_noise_samples
    if values.baseline == "mean" and samples < 2:
        raise ValueError(
            f"baseline='mean' with num_noise_samples={samples}: the mean of one is itself; take 2 or more"
        )
    if values.baseline == "antithetic" and samples % 2:
        raise ValueError(
            f"baseline='antithetic' with num_noise_samples={samples}: samples are pairs; take an even number"
        )
    if values.mode == "reference":
        if values.inject_in_decode:
            raise ValueError(
                "inject_in_decode=True with mode='reference': the published code decodes without image tokens; leave "
                "it out, or take mode='paper'"
            )
        if samples > 1 and values.use_auto_grad:
            raise ValueError(
                "use_auto_grad=True moves nothing in mode='reference'; leave it out, or num_noise_samples"
            )
    if values.use_auto_grad and values.baseline != "none":
        raise ValueError(
            f"baseline={values.baseline!r} is of the score-function estimate; leave it out with use_auto_grad"
        )


def _schedule(values: SimpleNamespace) -> PatchSchedule:
    """In paper mode no image token at all with `num_selected_patches=0`; the published code means no cap by it."""
    cap, without = values.num_selected_patches, values.mode == "paper" and values.num_selected_patches == 0
    return PatchSchedule(
        cap=cap or None,
        initial=values.initial_patch_count or None,
        increment=values.patch_increment,
        stride=values.visual_insert_stride,
        start=NEVER if without else values.visual_injection_start_step,
        interval=values.visual_injection_interval,
    )


def _generators(seed: Any, batch: int) -> list[torch.Generator]:
    """A generator of noise for each row: of a seed each row has its own, a generator is shared and goes on."""
    seeds = list(seed) if isinstance(seed, list | tuple) else [seed] * batch
    if len(seeds) != batch:
        raise ValueError(f"seed has {len(seeds)} entries for {batch} prompts; give one, or one per prompt")
    return [each if isinstance(each, torch.Generator) else torch.Generator().manual_seed(each) for each in seeds]


__all__ = ["BASELINES", "MODES", "SEARCH_OPTIONS", "SearchOption", "search_settings"]
