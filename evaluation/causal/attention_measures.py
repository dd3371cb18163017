"""Measures of attention maps: entropy, regions, overlap (specification, section 6).

Maps are post-softmax weights and are renormalised where a function says so.
"""

from collections.abc import Sequence

import numpy as np
import torch


def mass(weights: np.ndarray) -> np.ndarray:
    """`(...,)` sum over the keys `(..., keys)`, not renormalised."""
    return weights.sum(axis=-1)


def patch_entropy(weights: np.ndarray) -> np.ndarray:
    """`(...,)` entropy in nats over image patches `(..., n)`, renormalised; 0 for a row without mass."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros_like(weights, dtype=np.float64), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=-1)


def salient_patches(weights: np.ndarray, factor: float = 1.5) -> np.ndarray:
    """`(...,)` number of patches above `factor` times the mean of their row."""
    return (weights > factor * weights.mean(axis=-1, keepdims=True)).sum(axis=-1)


def region_enrichment(heat: np.ndarray, region: np.ndarray) -> float:
    """Attention on a region over the mean on background windows of its size.

    Args:
        heat: `(rows, columns)` weights of an image.
        region: `(rows, columns)` bool.

    Returns:
        The ratio. The windows are the region's bounding box moved over the image, those that touch the region left
        out, each with the mean of its patches; where none is left, or their mean is 0, NaN.
    """
    places = np.argwhere(region)
    if not len(places):
        return float("nan")
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0) + 1
    height, width = bottom - top, right - left
    windows = [
        heat[row : row + height, column : column + width].mean()
        for row in range(heat.shape[0] - height + 1)
        for column in range(heat.shape[1] - width + 1)
        if not region[row : row + height, column : column + width].any()
    ]
    if not windows or np.mean(windows) <= 0:
        return float("nan")
    return float(heat[region].mean() / np.mean(windows))


def pointing_game(heat: np.ndarray, region: np.ndarray) -> bool:
    """Whether the patch with most attention lies in the region `(rows, columns)`."""
    return bool(region.reshape(-1)[int(np.argmax(heat))])


def top_mass_iou(heat: np.ndarray, region: np.ndarray, share: float = 0.5) -> float:
    """Overlap (intersection over union) of the region with the fewest patches that hold a share of the attention."""
    order = np.argsort(heat, axis=None)[::-1]
    held = np.cumsum(heat.reshape(-1)[order])
    count = int(np.searchsorted(held, share * held[-1]) + 1)
    top = np.zeros(heat.size, dtype=bool)
    top[order[:count]] = True
    flat = region.reshape(-1)
    return float((top & flat).sum() / (top | flat).sum())


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two maps of the same shape; NaN where one is constant."""
    ranks = [_ranks(each.reshape(-1)) for each in (first, second)]
    if any(each.std() == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def top_heads(weights: np.ndarray, count: int = 5) -> list[tuple[int, int, float]]:
    """The heads with most mass, `(layer, head, mass)`: a mean over heads hides those that retrieve.

    Args:
        weights: `(layers, heads)` mass on the keys in question.
    """
    order = np.argsort(weights, axis=None)[::-1][:count]
    return [(int(index // weights.shape[1]), int(index % weights.shape[1]), float(weights.reshape(-1)[index]))
            for index in order]  # fmt: skip


def gradient_saliency(weights: Sequence[torch.Tensor], loss: torch.Tensor) -> list[torch.Tensor]:
    """|A · dloss/dA| of captured attention rows (of `capture_attention_rows` with gradients).

    Args:
        weights: of each layer, part of the graph of `loss`.
        loss: scalar, e.g. the cross-entropy of the answer.
    """
    grads = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return [
        torch.zeros_like(each) if grad is None else (each * grad).abs().detach()
        for each, grad in zip(weights, grads, strict=True)
    ]


__all__ = [
    "gradient_saliency",
    "mass",
    "patch_entropy",
    "pointing_game",
    "rank_correlation",
    "region_enrichment",
    "salient_patches",
    "top_heads",
    "top_mass_iou",
]
