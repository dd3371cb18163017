"""Two conditions on the same items: every number against one worked out by hand or by another way."""

import itertools
import math

import numpy as np
import pytest

from evaluation.paired_comparison import compare_paired
from evaluation.paired_tests import equivalence_test

FIRST = [True, True, True, False, False, True, False, False]
SECOND = [True, False, False, True, False, True, False, False]


def test_numbers_of_eight_items() -> None:
    """Only the first got two right, only the second one: McNemar is 2 (C(3,0) + C(3,1)) / 8 = 1."""
    found = compare_paired(FIRST, SECOND, range(8))
    assert (found.n, found.only_first, found.only_second) == (8, 2, 1)
    assert found.difference == pytest.approx(100 * (3 - 4) / 8)
    assert found.p_mcnemar == 1.0
    assert found.discordant == 3 / 8
    assert found.mde == pytest.approx(100 * 2.8 * math.sqrt(3 / 64))
    assert found.p_equivalence == equivalence_test(2, 1, 8, 0.02).p_value and not found.equivalent


def test_swapped_conditions_change_the_sign() -> None:
    one, other = compare_paired(FIRST, SECOND, range(8)), compare_paired(SECOND, FIRST, range(8))
    assert other.difference == -one.difference and (other.only_first, other.only_second) == (1, 2)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-9)


def test_the_interval_is_that_of_all_draws() -> None:
    """Three items of three clusters: 27 draws, each as likely; 1 in 27, above 2.5 %, is the lowest one thrice."""
    first, second = [True, False, False], [False, True, False]
    draws = [np.mean([[-1, 1, 0][i] for i in draw]) for draw in itertools.product(range(3), repeat=3)]
    found = compare_paired(first, second, "abc")
    ends = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(tuple(100 * ends)) == (-100, 100)


def test_clusters_are_drawn_together() -> None:
    """One cluster alone leaves nothing to draw: its mean is the interval."""
    found = compare_paired(FIRST, SECOND, ["one"] * 8)
    assert found.low == found.high == pytest.approx(found.difference)


def test_equal_replies_are_equivalent_when_there_are_enough() -> None:
    same = [True, False] * 150
    assert compare_paired(same, same, range(300)).equivalent
    assert not compare_paired(same[:50], same[:50], range(50)).equivalent
    assert not compare_paired(same, same, range(300), margin=0.5).equivalent


def test_the_bootstrap_over_clusters_has_a_say() -> None:
    """Ten clusters of 400 items, each better or worse by ten points: equal item by item, which the clusters deny."""
    clusters = [number // 400 for number in range(4000)]
    first = [cluster % 2 == 0 for cluster in clusters]
    second = [right != (number % 400 < 40) for number, right in enumerate(first)]
    alone, together = compare_paired(first, second, range(4000)), compare_paired(first, second, clusters)
    assert alone.difference == together.difference == 0
    assert alone.equivalent and not together.equivalent


@pytest.mark.parametrize(
    ("first", "second", "clusters", "message"),
    [
        ([], [], [], "at least one item"),
        ([True], [True, False], [0], "the same items"),
        ([True, False], [True, False], [0], "one cluster an item"),
        ([True], [True], [0], None),
    ],
)
def test_bad_lists(first: list[bool], second: list[bool], clusters: list[int], message: str | None) -> None:
    if message is None:
        assert compare_paired(first, second, clusters).difference == 0
        return
    with pytest.raises(ValueError, match=message):
        compare_paired(first, second, clusters)
