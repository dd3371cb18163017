"""The bootstrap over clusters against the plain one, and against a loop."""

import numpy as np
import pytest

from evaluation.cluster_bootstrap import bootstrap_mean, cluster_sums, resampled_means


def test_sums_and_sizes() -> None:
    sums, sizes = cluster_sums(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), ["b", "a", "b"])
    assert sums.tolist() == [[3.0, 4.0], [6.0, 8.0]] and sizes.tolist() == [1, 2]


def test_means_are_those_of_a_loop_over_drawn_clusters() -> None:
    values, clusters = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), ["x", "x", "y", "z", "z"]
    means = resampled_means(values, clusters, num_resamples=50, seed=3)[:, 0]
    drawn = np.random.default_rng((3, 0)).multinomial(3, np.full(3, 1 / 3), size=50)
    parts = {"x": [1.0, 0.0], "y": [1.0], "z": [1.0, 0.0]}
    for mean, counts in zip(means, drawn, strict=True):
        rows = [value for name, count in zip("xyz", counts, strict=True) for value in parts[name] * count]
        assert mean == pytest.approx(np.mean(rows))


def test_items_that_come_in_equal_pairs_have_the_wider_interval_of_half_the_items() -> None:
    rng = np.random.default_rng(1)
    once = rng.integers(0, 2, 200).astype(float)
    twice, pairs = np.repeat(once, 2), np.repeat(np.arange(200), 2)
    alone, paired = bootstrap_mean(once, range(200)), bootstrap_mean(twice, pairs)
    assert (paired.high - paired.low) == pytest.approx(alone.high - alone.low, abs=0.01)
    loose = bootstrap_mean(twice, range(400))
    assert (loose.high - loose.low) < 0.8 * (paired.high - paired.low)


def test_the_interval_is_that_of_the_normal_for_many_items() -> None:
    values = np.r_[np.ones(300), np.zeros(700)]
    found = bootstrap_mean(values, range(1_000))
    half = 1.96 * (0.3 * 0.7 / 1_000) ** 0.5
    assert found.mean == pytest.approx(0.3) and found.low == pytest.approx(0.3 - half, abs=0.002)
    assert found.high == pytest.approx(0.3 + half, abs=0.002)
    assert bootstrap_mean(values, range(1_000)) == found  # seeded


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="2 items and 1 clusters"):
        resampled_means([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="item 1 has a value that is not finite"):
        resampled_means([1.0, float("nan")], ["a", "b"])
