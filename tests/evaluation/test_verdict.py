"""The rule of the verdict, its precedence, and how often it is wrong."""

from collections import Counter

import numpy as np
import pytest

from evaluation.causal.card_data import Effect
from evaluation.causal.effects import effects_of
from evaluation.causal.verdict import ROLES, verdict_of
from evaluation.paired_tests import equivalence_test, holm
from evaluation.statistics import mcnemar_exact
from tests.evaluation.condition_results import condition

NAMES = ("gauss_norm", "shuffle_items", "all⇸L", "markers_only", "no_span")


def effects(lost: dict[str, int], won: dict[str, int] | None = None, count: int = 1_000) -> dict:
    """Effects where each condition loses and wins so many of the items; three in five are right."""
    right = count * 3 // 5
    clean = [True] * right + [False] * (count - right)
    conditions = {"clean": condition("clean", clean)}
    for name in dict.fromkeys([*NAMES, *lost]):
        down, up = lost.get(name, 0), (won or {}).get(name, 0)
        edited = [False] * down + [True] * (right - down) + [True] * up + [False] * (count - right - up)
        conditions[name] = condition(name, edited)
    return effects_of(conditions, [str(number) for number in range(count)])


def label(lost: dict[str, int], won: dict[str, int] | None = None, **options: object) -> str:
    return verdict_of(effects(lost, won, **options)).label


def test_each_label() -> None:
    assert label({}) == "inert"
    assert label({"no_span": 100, "markers_only": 100}) == "presence"
    assert label({"gauss_norm": 100, "shuffle_items": 100, "no_span": 100}) == "content"
    assert label({}, {"no_span": 100}) == "harmful"
    assert label({"gauss_norm": 100}) == "undecided"  # another item's slots do as well
    assert label({}, count=50) == "undecided"


def test_harmful_comes_first_and_an_oracle_that_is_worse_is_no_content() -> None:
    lost = {"gauss_norm": 100, "shuffle_items": 100}
    assert label(lost, {"no_span": 100}) == "harmful"
    assert label({**lost, "oracle": 0}) == "content" and label({**lost, "oracle": 100}) == "undecided"


def test_the_sentence_of_an_undecided_card_says_what_is_open() -> None:
    found = verdict_of(effects({}, count=50))
    assert "gauss_norm, shuffle_items, all⇸L, markers_only, no_span neither different nor equivalent" in found.sentence
    assert verdict_of(effects({"gauss_norm": 100})).sentence.startswith("undecided: the premises of no verdict hold")
    some = effects({})
    del some["no_span"], some["markers_only"], some["all⇸L"]
    found = verdict_of(some)
    assert found.label == "undecided" and "lacks mask (all⇸L), empty (markers_only), off (no_span)" in found.sentence
    assert found.missing == ["mask (all⇸L)", "empty (markers_only)", "off (no_span)"]
    assert len(found.reasons) == 2 and "equivalent" in found.reasons[0]


def test_roles_have_stand_ins() -> None:
    some = effects({"shuffle_kv": 100, "gauss_norm": 100})
    assert verdict_of(some).label == "undecided"
    assert verdict_of(some, roles={"swap": "shuffle_kv"}).label == "content"
    assert set(ROLES) == {"noise", "swap", "mask", "empty", "off", "oracle"}


def effects_of_counts(lost: dict[str, int], won: dict[str, int], count: int) -> dict[str, Effect]:
    """What the verdict reads of an effect, from counts of discordant items."""
    found = {}
    for name in lost:
        down, up = int(lost[name]), int(won[name])
        p_value = mcnemar_exact([1] * down + [0] * up + [0], [0] * down + [1] * up + [0]).p_value
        equal = equivalence_test(down, up, count, 0.02)
        found[name] = Effect(
            name=name, n=count, accuracy=0, delta=100 * (up - down) / count, low=0, high=0, only_clean=down,
            only_condition=up, p_mcnemar=p_value, p_holm=p_value, discordant=(down + up) / count, flip=0, mde=0,
            margin=2, p_equivalence=equal.p_value, equivalent=equal.equivalent, parse_rate=100, parse_shift=0,
        )  # fmt: skip
    for effect, p_value in zip(found.values(), holm([each.p_mcnemar for each in found.values()]), strict=True):
        effect.p_holm = p_value
    return found


def test_effects_of_counts_are_those_of_conditions() -> None:
    lost, won = dict.fromkeys(NAMES, 20) | {"no_span": 60}, dict.fromkeys(NAMES, 10)
    for name, quick in effects_of_counts(lost, won, 1_000).items():
        full = effects(lost, won)[name]
        for field in ("n", "delta", "p_holm", "p_equivalence", "equivalent", "significant"):
            assert getattr(quick, field) == pytest.approx(getattr(full, field)), (name, field)


def simulated(shares: dict[str, tuple[float, float]], runs: int, count: int, seed: int) -> Counter:
    """Verdicts on samples where a condition loses and wins items with given shares, independently."""
    rng, found = np.random.default_rng(seed), Counter()
    for _ in range(runs):
        lost, won = {}, {}
        for name, (down, up) in shares.items():
            lost[name], won[name], _ = rng.multinomial(count, [down, up, 1 - down - up])
        found[verdict_of(effects_of_counts(lost, won, count)).label] += 1
    return found


RUNS = 1_000


def test_no_effect_is_rarely_called_one() -> None:
    """Equal accuracies with one item in ten discordant: no label that claims a difference in more than 5 %."""
    found = simulated(dict.fromkeys(NAMES, (0.05, 0.05)), RUNS, 1_000, seed=1)
    assert found["content"] + found["presence"] + found["harmful"] <= 0.05 * RUNS


def test_an_effect_at_the_margin_is_rarely_called_inert() -> None:
    """Slots whose loss costs exactly the margin of two points are not inert."""
    found = simulated(dict.fromkeys(NAMES, (0.03, 0.01)), RUNS, 1_000, seed=2)
    assert found["inert"] <= 0.05 * RUNS
    one = dict.fromkeys(NAMES, (0.0, 0.0)) | {"all⇸L": (0.03, 0.01)}
    assert simulated(one, RUNS, 1_000, seed=3)["inert"] <= 0.065 * RUNS  # 5 % and the sampling of 1,000 runs


def test_presence_is_rarely_claimed_where_noise_costs_the_margin() -> None:
    shares = dict.fromkeys(NAMES, (0.2, 0.02)) | {"gauss_norm": (0.03, 0.01)}
    assert simulated(shares, RUNS, 1_000, seed=4)["presence"] <= 0.065 * RUNS  # 5 % and the sampling of 1,000 runs


def test_large_effects_are_found() -> None:
    assert simulated(dict.fromkeys(NAMES, (0.2, 0.02)), 20, 500, seed=5) == {"content": 20}
    shares = dict.fromkeys(NAMES, (0.2, 0.02)) | {"gauss_norm": (0.001, 0.001), "shuffle_items": (0.001, 0.001)}
    assert simulated(shares, 20, 1_000, seed=6)["presence"] >= 19
