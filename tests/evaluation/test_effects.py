"""Effects of conditions against numbers worked out by hand."""

import math

import pytest

from evaluation.causal.effects import comparisons_of, effects_of
from tests.evaluation.condition_results import condition

CLEAN = [True] * 60 + [False] * 40
IDS = [str(number) for number in range(100)]


def test_accuracy_discordant_items_and_flips() -> None:
    edited = [False] * 10 + [True] * 50 + [True] * 4 + [False] * 36  # ten lost, four won
    effect = effects_of({"clean": condition("clean", CLEAN), "zero": condition("zero", edited)}, IDS)["zero"]
    assert (effect.n, effect.accuracy, effect.delta) == (100, 54.0, pytest.approx(-6.0))
    assert (effect.only_clean, effect.only_condition) == (10, 4) and effect.discordant == pytest.approx(0.14)
    assert effect.p_mcnemar == pytest.approx(2 * sum(math.comb(14, k) for k in range(5)) / 2**14)
    assert effect.flip == pytest.approx(0.14)  # the answer of these items is another one
    assert effect.mde == pytest.approx(100 * 2.8 * math.sqrt(0.14 / 100))
    assert effect.low < -6 < effect.high and not effect.equivalent


def test_items_that_a_condition_does_not_apply_to_are_left_out() -> None:
    zero = condition("zero", [False] * 100, applied=[True] * 20 + [False] * 80)
    effects = effects_of({"clean": condition("clean", CLEAN), "zero": zero,
                          "none": condition("none", CLEAN, applied=[False] * 100)}, IDS)  # fmt: skip
    assert effects["zero"].n == 20 and effects["zero"].delta == -100 and "none" not in effects


def test_log_probabilities_options_and_gold_option() -> None:
    clean = condition("clean", [True, True], gold_log_prob=[math.log(0.8), math.log(0.8)],
                      option_log_probs=[[math.log(0.8), math.log(0.2)]] * 2)  # fmt: skip
    edited = condition("zero", [True, True], gold_log_prob=[math.log(0.4), math.log(0.8)],
                       option_log_probs=[[math.log(0.4), math.log(0.6)], [math.log(0.8), math.log(0.2)]],
                       first_token_kl=[0.3, 0.1])  # fmt: skip
    effect = effects_of({"clean": clean, "zero": edited}, ["a", "b"])["zero"]
    assert effect.u == pytest.approx(math.log(2) / 2) and effect.u_per_token == pytest.approx(math.log(2) / 4)
    assert effect.delta_p_gold == pytest.approx((-0.4 + 0) / 2)
    kl = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    assert effect.kl_options == pytest.approx(kl / 2) and effect.kl_first == pytest.approx(0.2)


def test_recovery_and_when_it_is_undefined() -> None:
    off = [True] * 20 + [False] * 80
    half = [True] * 40 + [False] * 60
    effects = effects_of({"clean": condition("clean", CLEAN), "no_span": condition("no_span", off),
                          "markers_only": condition("markers_only", half)}, IDS)  # fmt: skip
    assert effects["markers_only"].recovery == pytest.approx(0.5)
    assert effects["markers_only"].recovery_low < 0.5 < effects["markers_only"].recovery_high
    assert effects["no_span"].recovery == pytest.approx(0.0)
    small = effects_of({"clean": condition("clean", CLEAN), "zero": condition("zero", half)}, IDS, base=CLEAN)
    assert small["zero"].recovery is None  # the clean run gains nothing over the base


def test_a_shift_of_the_parse_rate_is_shown_on_what_both_parsed() -> None:
    clean = condition("clean", CLEAN)
    answers = [None] * 30 + list(clean.answers[30:])
    edited = condition("zero", [False] * 30 + CLEAN[30:], answers=answers)
    effect = effects_of({"clean": clean, "zero": edited}, IDS)["zero"]
    assert effect.parse_rate == 70 and effect.parse_shift == pytest.approx(-30)
    assert effect.delta == pytest.approx(-30) and effect.delta_parsed == 0


def test_holm_over_the_card_and_clusters() -> None:
    edited = [False] * 8 + [True] * 52 + [False] * 40
    conditions = {"clean": condition("clean", CLEAN), "a": condition("a", edited), "b": condition("b", edited),
                  "c": condition("c", CLEAN)}  # fmt: skip
    effects = effects_of(conditions, IDS)
    assert effects["a"].p_mcnemar == pytest.approx(2 / 2**8)
    assert effects["a"].p_holm == pytest.approx(3 * 2 / 2**8) and effects["a"].significant
    assert effects["c"].p_holm == 1 and not effects["c"].significant
    shared = effects_of(conditions, [str(number // 10) for number in range(100)])
    assert shared["a"].low < effects["a"].low  # ten clusters


def test_named_comparisons() -> None:
    conditions = {
        "clean": condition("clean", CLEAN),
        "oracle": condition("oracle", [True] * 70 + [False] * 30),
        "oracle_wrong": condition("oracle_wrong", [True] * 50 + [False] * 50, applied=[True] * 80 + [False] * 20),
    }
    found = comparisons_of(conditions, IDS)
    assert found["oracle headroom"]["difference"] == pytest.approx(10) and found["content effect"]["n"] == 80
    assert found["content effect"]["difference"] == pytest.approx(25) and "presence effect" not in found
