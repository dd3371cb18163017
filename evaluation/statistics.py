"""Statistics for accuracies: the interval of one, the difference of two on the same items.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927; Newcombe,
"Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998 (method 3); McNemar,
Psychometrika 1947, in the exact binomial form; Efron and Tibshirani, "An Introduction to the Bootstrap", 1993
(percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A confidence interval: lower and upper end."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of `a - b` over the items with its bootstrap interval."""

    difference: float
    low: float
    high: float


class McNemarResult(NamedTuple):
    """Two-sided exact p-value, and how many items only `a` and only `b` got right."""

    p_value: float
    only_a: int
    only_b: int


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, without continuity correction.

    With p = successes / n and z the normal quantile of (1 + confidence) / 2, the ends are

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n).

    Unlike the normal interval it stays in 0..1 and has a width at 0 and n successes.

    Example: `wilson_interval(81, 263)` is (0.2553, 0.3662), as in Newcombe's table I.

    Raises:
        ValueError: n below 1, successes outside 0..n, confidence outside 0..1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an interval needs at least one item")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} of {n}; use 0 to n")
    z = NormalDist().inv_cdf((1 + _checked_confidence(confidence)) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(low, high)


def paired_bootstrap_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Mean difference of two conditions measured on the same items, with a percentile bootstrap interval.

    Items are drawn with replacement, both measurements of an item together; the interval lies between the quantiles
    (1 - confidence) / 2 and (1 + confidence) / 2 of the resampled means of a - b. Drawing n items is drawing how
    often each distinct value of a - b comes up, a multinomial with the observed shares, so 0/1 data cost the same
    for any number of items.

    Args:
        a, b: `[items]`, usually 0/1 correctness, same items in the same order.
        num_resamples: number of bootstrap resamples.
        seed: of numpy's default generator; the same seed gives the same interval.
        confidence: of the interval.

    Raises:
        ValueError: different lengths, no items, values that are not finite, `num_resamples` below 1.
    """
    first, second = _paired(a, b)
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; use at least 1")
    tail = (1 - _checked_confidence(confidence)) / 2
    values, counts = np.unique(first - second, return_counts=True)
    n = len(first)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    chunk = max(1, 4_000_000 // len(values))
    for begin in range(0, num_resamples, chunk):
        end = min(begin + chunk, num_resamples)
        means[begin:end] = rng.multinomial(n, counts / n, size=end - begin) @ values / n
    low, high = np.quantile(means, [tail, 1 - tail])
    return PairedDifference(float((first - second).mean()), float(low), float(high))


def mcnemar_exact(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> McNemarResult:
    """McNemar's exact test that two conditions are right equally often on the same items.

    Only items on which the two differ count. If neither is better, the number k that only one of them got right is
    binomial with m = only_a + only_b and 1/2, so with k = min(only_a, only_b)

        p = min(1, 2 * sum_{i=0}^{k} C(m, i) / 2^m),

    and p = 1 when they never differ. Computed in integers: exact for every m.

    Args:
        a, b: `[items]`, 0 or 1 (or booleans), same items in the same order.

    Raises:
        ValueError: different lengths, no items, a value that is not 0 or 1.
    """
    first, second = _paired(a, b)
    for name, values in [("a", first), ("b", second)]:
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if len(wrong):
            raise ValueError(f"{name}[{wrong[0]}] is {values[wrong[0]]}; McNemar's test needs 0 or 1")
    only_a, only_b = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    m = only_a + only_b
    term = total = 1
    for i in range(min(only_a, only_b)):
        term = term * (m - i) // (i + 1)
        total += term
    return McNemarResult(min(1.0, 2 * total / 2**m), only_a, only_b)


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; use a value between 0 and 1, e.g. 0.95")
    return confidence


def _paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 `[items]`, checked."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for name, values in [("a", first), ("b", second)]:
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{name} has shape {values.shape}; give one value an item, at least one item")
        if not np.isfinite(values).all():
            raise ValueError(f"{name}[{np.flatnonzero(~np.isfinite(values))[0]}] is not a finite number")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} items and b has {len(second)}; paired tests need the same items")
    return first, second
