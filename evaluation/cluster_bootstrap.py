"""Paired bootstrap over clusters: items that share an image, a pair or a question are drawn together.

Source: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8; percentile interval.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
_CHUNK = 10_000_000  # entries of a matrix of draws, 80 MB


class BootstrapMean(NamedTuple):
    """Mean with its percentile interval."""

    mean: float
    low: float
    high: float


def cluster_sums(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sums `(clusters, columns)` and sizes `(clusters,)` of the rows `(items, columns)` of each cluster."""
    _, index = np.unique(np.asarray([str(each) for each in clusters]), return_inverse=True)
    sizes = np.bincount(index)
    sums = np.stack([np.bincount(index, weights=column) for column in values.T], axis=1)
    return sums, sizes


def resampled_means(
    values: Sequence[Sequence[float]] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Means `(resamples, columns)` of values `(items, columns)` with clusters drawn with replacement.

    Raises:
        ValueError: no items, another number of clusters than items, or a value that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} items and {len(clusters)} clusters: give one cluster an item, at least one")
    if not np.isfinite(values).all():
        raise ValueError(f"item {int(np.argwhere(~np.isfinite(values))[0][0])} has a value that is not finite")
    sums, sizes = cluster_sums(values, clusters)
    count, means = len(sizes), []
    step = max(1, _CHUNK // count)
    for begin in range(0, num_resamples, step):
        drawn = _draws(count, begin, min(begin + step, num_resamples), seed)
        means.append((drawn @ sums) / (drawn @ sizes.astype(np.float64))[:, None])
    return np.concatenate(means)


@lru_cache(maxsize=4)
def _draws(count: int, begin: int, end: int, seed: int) -> np.ndarray:
    """How often each of `count` clusters is drawn in the resamples from `begin` to `end`: the same for every mean of
    so many clusters, and dear, so that the last ones are kept."""
    rng = np.random.default_rng((seed, begin))
    return rng.multinomial(count, np.full(count, 1 / count), size=end - begin).astype(np.float64)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapMean:
    """Mean of one value an item with its percentile interval."""
    means = resampled_means(np.asarray(values, dtype=np.float64), clusters, num_resamples, seed)[:, 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return BootstrapMean(float(np.mean(values)), float(low), float(high))


__all__ = ["NUM_RESAMPLES", "BootstrapMean", "bootstrap_mean", "cluster_sums", "resampled_means"]
