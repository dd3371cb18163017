"""Tests for two conditions on the same items beyond a difference: equivalence, power, several conditions at once.

Sources: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 1998 (score test); Schuirmann, J. Pharmacokinetics and Biopharmaceutics 1987 (two
one-sided tests); Holm, Scandinavian Journal of Statistics 1979.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class EquivalenceResult(NamedTuple):
    """Larger p-value of the two one-sided tests, and whether it is below alpha."""

    p_value: float
    equivalent: bool


def tango_z(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Score statistic of Tango for the hypothesis that the accuracies of a and b differ by `difference`.

    With the share q of items that only b gets right, estimated under the hypothesis,

        z = (only_a - only_b - n d) / sqrt(n (2 q + d (1 - d))).

    Unlike a Wald statistic it is defined without discordant items and does not call few items equal.

    Args:
        only_a, only_b: items that only one of them got right.
        n: items.
        difference: in shares, e.g. 0.02 for two points.
    """
    a, b = 2 * n, -only_a - only_b + (2 * n - only_a + only_b) * difference
    c = -only_b * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share + difference * (1 - difference))
    gap = only_a - only_b - n * difference
    if variance <= 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(variance)


def equivalence_test(only_a: int, only_b: int, n: int, margin: float, alpha: float = 0.05) -> EquivalenceResult:
    """Two one-sided score tests that two accuracies differ by less than a margin.

    Args:
        only_a, only_b: items that only one of the conditions got right.
        n: items.
        margin: in shares, above 0 and below 1.
        alpha: level of each test.

    Example: no discordant item says "equal within two points" for 300 items (p = 0.007), not for 50 (p = 0.16).

    Raises:
        ValueError: no items, more discordant items than items, or a margin outside 0..1.
    """
    if n < 1 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise ValueError(f"only_a={only_a}, only_b={only_b} of n={n}: give counts of at least one item")
    if not 0 < margin < 1:
        raise ValueError(f"margin is {margin}; give a share between 0 and 1, e.g. 0.02 for two points")
    normal = NormalDist()
    above = 1 - normal.cdf(min(tango_z(only_a, only_b, n, -margin), 40.0))  # not as much worse as the margin
    below = normal.cdf(max(tango_z(only_a, only_b, n, margin), -40.0))
    p_value = max(above, below)
    return EquivalenceResult(p_value, p_value < alpha)


def minimum_detectable_effect(discordant: float, n: int) -> float:
    """Smallest difference that McNemar's test finds with 80 % power at 5 %: 2.8 sqrt(d / n), in points.

    Args:
        discordant: share d of items on which the two differ.
        n: items.

    Example: `minimum_detectable_effect(0.10, 191)` is 6.4 (V*).

    Raises:
        ValueError: no items, or a share outside 0..1.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(f"discordant={discordant}, n={n}: give a share in 0..1 and at least one item")
    return 100 * 2.8 * math.sqrt(discordant / n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


__all__ = ["EquivalenceResult", "equivalence_test", "holm", "minimum_detectable_effect", "tango_z"]
