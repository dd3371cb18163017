"""Two conditions on the same items: everything that is said about their difference, in one place."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from .cluster_bootstrap import resampled_means
from .paired_tests import equivalence_test, minimum_detectable_effect
from .statistics import mcnemar_exact

ALPHA = 0.05


class PairedComparison(NamedTuple):
    """Second condition minus the first, in points (0-100).

    Args:
        n: items.
        difference, low, high: of the accuracies, with the 95 % interval of the paired bootstrap over clusters.
        only_first, only_second: items that only one of them got right.
        p_mcnemar: exact two-sided p-value.
        discordant: share of items on which they differ.
        mde: smallest difference that McNemar's test would find with 80 % power, points.
        margin: points within which accuracies count as equal.
        p_equivalence: larger p-value of the two one-sided tests; where clusters have several items, the bootstrap
            over clusters has to agree.
    """

    n: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_mcnemar: float
    discordant: float
    mde: float
    margin: float
    p_equivalence: float

    @property
    def equivalent(self) -> bool:
        """Whether the accuracies differ by less than the margin, at 5 %."""
        return self.p_equivalence < ALPHA


def compare_paired(
    first: Sequence[bool],
    second: Sequence[bool],
    clusters: Sequence[Hashable],
    margin: float = 2.0,
    seed: int = 0,
) -> PairedComparison:
    """Compare what two conditions got right.

    Args:
        first, second: `[items]`, in the same order.
        clusters: `[items]`, what items that are not independent share.
        margin: of equivalence, points.
        seed: of the bootstrap.

    Raises:
        ValueError: no items, or lists of different length.
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    found, n = mcnemar_exact(before, after), len(before)
    resampled = 100 * resampled_means(after - before, clusters, seed=seed)[:, 0]
    low, high = np.quantile(resampled, [0.025, 0.975])
    discordant = (found.only_a + found.only_b) / n
    p_equal = equivalence_test(found.only_a, found.only_b, n, margin / 100).p_value
    if len(set(clusters)) < n:
        shares = ((resampled <= -margin).sum() + 1, (resampled >= margin).sum() + 1)
        p_equal = max(p_equal, max(shares) / (len(resampled) + 1))
    return PairedComparison(
        n=n,
        difference=100 * float((after - before).mean()),
        low=float(low),
        high=float(high),
        only_first=found.only_a,
        only_second=found.only_b,
        p_mcnemar=found.p_value,
        discordant=discordant,
        mde=minimum_detectable_effect(discordant, n),
        margin=margin,
        p_equivalence=float(p_equal),
    )


__all__ = ["ALPHA", "PairedComparison", "compare_paired"]
