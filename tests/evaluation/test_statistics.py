"""Tests of the statistics: published and closed-form values, brute force, and refusals."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from evaluation.statistics import mcnemar_exact, paired_bootstrap_difference, wilson_interval


# Newcombe 1998, table I, method 3 (score interval without continuity correction), four digits as printed.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(1, 2), (3, 10), (57, 100), (999, 1000)])
def test_wilson_ends_are_where_the_score_test_turns(successes: int, n: int, confidence: float) -> None:
    """The definition: at the ends p0, |p - p0| / sqrt(p0 (1 - p0) / n) = z; found by bisection."""
    p = successes / n

    def tail(p0: float) -> float:
        return math.erfc(abs(p - p0) / math.sqrt(p0 * (1 - p0) / n) / math.sqrt(2))

    def bisect(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if tail(middle) > 1 - confidence else (inside, middle)
        return inside

    interval = wilson_interval(successes, n, confidence)
    assert interval.low == pytest.approx(bisect(p, 1e-12), abs=1e-9)
    assert interval.high == pytest.approx(bisect(p, 1 - 1e-12), abs=1e-9)


def test_wilson_at_the_borders() -> None:
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0
    assert wilson_interval(0, 7).high == pytest.approx(z2 / (7 + z2))
    for successes in range(8):
        here, mirrored = wilson_interval(successes, 7), wilson_interval(7 - successes, 7)
        assert here.low == pytest.approx(1 - mirrored.high)


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "n is 0"),
        (-1, 5, 0.95, "successes is -1"),
        (6, 5, 0.95, "successes is 6"),
        (1, 5, 95, "confidence is 95"),
    ],
)
def test_wilson_refuses(successes: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, n, confidence)


def exact_bootstrap_means(differences: list[int]) -> np.ndarray:
    """All n ** n equally likely resamples."""
    return np.array([sum(sample) / len(sample) for sample in itertools.product(differences, repeat=len(differences))])


@pytest.mark.parametrize("a", [(1, 1, 1, 0, 1, 0), (1, 0, 0, 0, 0, 0)])
def test_bootstrap_matches_the_enumeration_of_all_resamples(a: tuple[int, ...]) -> None:
    b = (0, 1, 0, 0, 1, 0)
    means = exact_bootstrap_means([x - y for x, y in zip(a, b, strict=True)])
    for confidence in (0.7, 0.95):
        tail = (1 - confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        # The means are few: the test can tell only if the quantiles do not sit on a step (error of a share: 0.001).
        for near in (tail - 0.004, tail + 0.004):
            assert tuple(np.quantile(means, [near, 1 - near])) == (low, high)
        result = paired_bootstrap_difference(a, b, num_resamples=200_000, confidence=confidence)
        assert result == pytest.approx((np.mean(a) - np.mean(b), low, high))


def test_bootstrap_matches_drawing_items_one_by_one() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.random(400) < 0.7).astype(int), (rng.random(400) < 0.6).astype(int)
    drawn = rng.integers(0, 400, size=(20_000, 400))
    low, high = np.quantile((a - b)[drawn].mean(axis=1), [0.025, 0.975])
    result = paired_bootstrap_difference(a, b, num_resamples=20_000)
    assert result.low == pytest.approx(low, abs=0.004)
    assert result.high == pytest.approx(high, abs=0.004)
    # The spread of the mean of 400 differences, from their variance.
    assert (result.high - result.low) / (2 * 1.96) == pytest.approx(np.std(a - b) / 20, rel=0.04)


def test_bootstrap_of_real_values_matches_drawing_items_one_by_one() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=50), rng.normal(size=50)
    low, high = np.quantile((a - b)[rng.integers(0, 50, size=(40_000, 50))].mean(axis=1), [0.025, 0.975])
    result = paired_bootstrap_difference(a, b, num_resamples=40_000)
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.02)


def test_bootstrap_repeats_with_its_seed_and_pairs_the_items() -> None:
    rng = np.random.default_rng(0)
    a = (rng.random(200) < 0.5).astype(int)
    assert paired_bootstrap_difference(a, a) == (0.0, 0.0, 0.0)
    b = np.roll(a, 1)
    assert paired_bootstrap_difference(a, b, seed=3) == paired_bootstrap_difference(a, b, seed=3)
    assert paired_bootstrap_difference(a, b, seed=3, num_resamples=500) != paired_bootstrap_difference(
        a, b, seed=4, num_resamples=500
    )
    forth, back = paired_bootstrap_difference(a, 1 - a, seed=3), paired_bootstrap_difference(1 - a, a, seed=3)
    assert forth.difference == pytest.approx(-back.difference)


def test_bootstrap_in_chunks_covers_every_resample() -> None:
    """Many distinct values make several chunks; each resample must be filled in."""
    a = np.arange(3000) / 7.0 + 100.0
    result = paired_bootstrap_difference(a, np.zeros(3000), num_resamples=3000, confidence=0.999)
    spread = a.std() / math.sqrt(3000)
    assert abs(result.low - a.mean()) < 5 * spread
    assert abs(result.high - a.mean()) < 5 * spread


def naive_mcnemar(only_a: int, only_b: int) -> Fraction:
    """Sum of the probabilities of all outcomes at most as likely as the observed one, under a fair coin."""
    m = only_a + only_b
    outcomes = [Fraction(math.comb(m, k), 2**m) for k in range(m + 1)]
    return sum((outcome for outcome in outcomes if outcome <= outcomes[only_a]), Fraction(0))


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    return [1] * (both + only_a) + [0] * (only_b + neither), [1] * both + [0] * only_a + [1] * only_b + [0] * neither


@pytest.mark.parametrize("only_a", range(8))
@pytest.mark.parametrize("only_b", range(8))
def test_mcnemar_matches_the_sum_over_all_outcomes(only_a: int, only_b: int) -> None:
    result = mcnemar_exact(*answers(3, only_a, only_b, 2))
    assert result == (pytest.approx(float(naive_mcnemar(only_a, only_b)), rel=1e-15), only_a, only_b)


def test_mcnemar_known_values() -> None:
    assert mcnemar_exact(*answers(50, 9, 1, 40)).p_value == 22 / 1024
    assert mcnemar_exact(*answers(50, 0, 5, 40)).p_value == 2 / 32
    assert mcnemar_exact(*answers(50, 4, 4, 40)).p_value == 1.0
    assert mcnemar_exact(*answers(50, 0, 0, 40)) == (1.0, 0, 0)
    assert mcnemar_exact([True, False], [False, False]) == (1.0, 1, 0)


def test_mcnemar_is_right_for_many_items() -> None:
    """2 ** 6000 is no float: compared with a sum in logarithms."""
    only_a, only_b = 3120, 2880
    m = only_a + only_b
    logs = [
        math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) - m * math.log(2) for k in range(only_b + 1)
    ]
    expected = 2 * math.fsum(map(math.exp, logs))
    assert mcnemar_exact(*answers(0, only_a, only_b, 0)).p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1], "a has 2 items and b has 1"),
        ([], [], "a has shape"),
        ([[1, 0]], [[1, 0]], "a has shape"),
        ([1, 0], [1, float("nan")], r"b\[1\] is not a finite number"),
    ],
)
def test_paired_tests_refuse(a: list, b: list, message: str) -> None:
    for test in (paired_bootstrap_difference, mcnemar_exact):
        with pytest.raises(ValueError, match=message):
            test(a, b)


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"b\[2\] is 0.5"):
        mcnemar_exact([1, 0, 1], [1, 0, 0.5])
    with pytest.raises(ValueError, match="num_resamples is 0"):
        paired_bootstrap_difference([1], [0], num_resamples=0)
    with pytest.raises(ValueError, match="confidence is 1"):
        paired_bootstrap_difference([1], [0], confidence=1)
