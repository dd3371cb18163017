"""Equivalence, power and correction against closed forms, and the rates at which the tests err."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from evaluation.paired_tests import equivalence_test, holm, minimum_detectable_effect, tango_z


def test_the_score_statistic_is_wald_with_the_variance_of_the_hypothesis() -> None:
    """Without a difference in the hypothesis q is the mean of both shares: z is McNemar's (b - c) / sqrt(b + c)."""
    assert tango_z(15, 5, 100, 0.0) == pytest.approx(10 / math.sqrt(20))
    assert tango_z(5, 15, 100, 0.0) == pytest.approx(-10 / math.sqrt(20))


def test_the_restricted_share_maximises_the_likelihood() -> None:
    only_a, only_b, n, d = 9, 4, 80, 0.05
    a, b = 2 * n, -only_a - only_b + (2 * n - only_a + only_b) * d
    share = (math.sqrt(b * b + 4 * a * only_b * d * (1 - d)) - b) / (2 * a)

    def likelihood(q: float) -> float:
        return only_a * math.log(q + d) + only_b * math.log(q) + (n - only_a - only_b) * math.log(1 - 2 * q - d)

    assert likelihood(share) > max(likelihood(share - 1e-4), likelihood(share + 1e-4))
    z = (only_a - only_b - n * d) / math.sqrt(n * (2 * share + d * (1 - d)))
    assert tango_z(only_a, only_b, n, d) == pytest.approx(z)


def test_no_difference_is_equivalence_only_with_enough_items() -> None:
    """Without discordant items q is the margin: z = sqrt(n m / (1 + m)) where m is 0.02."""
    for n, equal in ((20, False), (50, False), (130, False), (150, True), (300, True)):
        found = equivalence_test(0, 0, n, 0.02)
        z = n * 0.02 / math.sqrt(n * (2 * 0.02 - 0.02 * 1.02))
        assert found.p_value == pytest.approx(1 - NormalDist().cdf(z), abs=1e-12)
        assert found.equivalent is equal, n


def test_equivalence_is_symmetric_and_fails_for_a_difference() -> None:
    assert equivalence_test(7, 3, 500, 0.02).p_value == pytest.approx(equivalence_test(3, 7, 500, 0.02).p_value)
    assert not equivalence_test(30, 2, 500, 0.02).equivalent
    assert equivalence_test(30, 2, 500, 0.2).equivalent


def test_equivalence_is_claimed_rarely_at_the_margin() -> None:
    """Two accuracies that differ by the margin are called equal in 5 % of samples, give or take sampling."""
    rng = np.random.default_rng(0)
    for n in (200, 500, 1_000):
        samples = rng.multinomial(n, [0.05, 0.03, 0.92], size=4_000)  # only a, only b: two points
        claimed = np.mean([equivalence_test(a, b, n, 0.02).equivalent for a, b, _ in samples])
        assert claimed <= 0.062, (n, claimed)
    samples = rng.multinomial(5_000, [0.04, 0.04, 0.92], size=200)
    assert np.mean([equivalence_test(a, b, 5_000, 0.02).equivalent for a, b, _ in samples]) > 0.95


def test_smallest_effects_of_the_specification() -> None:
    known = {191: 6.4, 300: 5.1, 697: 3.4, 800: 3.1, 1500: 2.3, 1901: 2.0}
    assert {n: round(minimum_detectable_effect(0.10, n), 1) for n in known} == known


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 0.02), "n=0"),
        ((3, 3, 5, 0.02), "only_a=3, only_b=3 of n=5"),
        ((0, 0, 9, 2.0), "margin is 2.0; give a share"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equivalence_test(*arguments)
    with pytest.raises(ValueError, match="discordant=1.2"):
        minimum_detectable_effect(1.2, 10)
