"""Geometry of latents: are they different within a trajectory and across items, of what rank and what scale.

Specification, section 4, after LVR (2509.24251), "What's Holding Back" (2605.18445) and ReaLVR. Arrays are float,
one `(K, hidden)` trajectory an item.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

TOP_EIGENVALUES, MATRIX_ITEMS, MOST_NEIGHBOURS = 64, 64, 4_096
# Above (or below) these a training log should say "collapse" (section 4.7).
ALERTS = {"across_cosine_centred": 0.9, "participation_ratio": 5.0, "norm_log_ratio": 1.0, "self_preference": 0.8}


def trajectory_geometry(
    slots: Sequence[np.ndarray],
    *,
    token_embeddings: np.ndarray | None = None,
    visual: np.ndarray | None = None,
    oracles: Sequence[np.ndarray] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All measures of a set of trajectories, as numbers and lists.

    Args:
        slots: of each item `(K, hidden)`, K of at least 1.
        token_embeddings: `(V, hidden)`, for scale and distance.
        visual: `(n, hidden)` image embeddings.
        oracles: of each item `(m, hidden)` target vectors.
        groups: of each item, its category, for cosines within and across categories.

    Raises:
        ValueError: no trajectory, an empty one, different sizes, or values that are not finite.
    """
    slots = checked_trajectories(slots)
    stacked, centred = np.concatenate(slots), np.concatenate(centre(slots))
    pooled = np.stack([each.mean(axis=0) for each in slots])
    pooled_centred = np.stack([each.mean(axis=0) for each in centre(slots)])
    eigenvalues = covariance_eigenvalues(centred)
    found: dict[str, Any] = {
        "items": len(slots),
        "states": len(stacked),
        **{f"within_cosine_{name}": value for name, value in _both(within_cosine, slots).items()},
        **{f"adjacent_cosine_{name}": value for name, value in _both(adjacent_cosine, slots).items()},
        "across_cosine_raw": across_cosine(pooled),
        "across_cosine_centred": across_cosine(pooled_centred),
        **spectrum(eigenvalues),
        "top3_share": top_dimension_share(stacked, 3),
        "eta2_item": eta_squared(stacked, np.repeat(np.arange(len(slots)), [len(each) for each in slots])),
        "eta2_number": eta_squared(stacked, np.concatenate([np.arange(len(each)) for each in slots])),
        "eigenvalues": eigenvalues[:TOP_EIGENVALUES].tolist(),
        "cosine_matrix": cosine_matrix(pooled[:MATRIX_ITEMS]).tolist(),
    }
    if groups is not None and len(set(groups)) > 1:
        found |= group_cosines(pooled, groups)
    if token_embeddings is not None:
        found |= _scale(stacked, token_embeddings, "token")
    if visual is not None and len(visual):
        found |= _scale(stacked, visual, "visual")
    if oracles is not None:
        found |= oracle_measures(slots, oracles)
    found["alerts"] = alerts(found)
    return found


def checked_trajectories(slots: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The trajectories as float64.

    Raises:
        ValueError: see [`trajectory_geometry`].
    """
    found = [np.asarray(each, dtype=np.float64) for each in slots]
    if not found:
        raise ValueError("no trajectory; geometry needs at least one item with latents")
    width = found[0].shape[-1]
    for number, each in enumerate(found):
        if each.ndim != 2 or not len(each) or each.shape[1] != width:
            raise ValueError(f"slots[{number}] has shape {each.shape}; give (K, {width}) with K of at least 1")
        if not np.isfinite(each).all():
            raise ValueError(f"slots[{number}] has a value that is not finite")
    return found


def centre(slots: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every latent minus the mean over the items of the latent with that number."""
    most = max(len(each) for each in slots)
    means = [np.mean([each[k] for each in slots if len(each) > k], axis=0) for k in range(most)]
    return [each - np.stack(means[: len(each)]) for each in slots]


def _both(measure: Any, slots: Sequence[np.ndarray]) -> dict[str, float]:
    return {"raw": measure(slots), "centred": measure(centre(slots))}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def cosine_matrix(rows: np.ndarray) -> np.ndarray:
    """`(n, n)` cosines of rows."""
    unit = _unit(rows)
    return unit @ unit.T


def within_cosine(slots: Sequence[np.ndarray]) -> float:
    """Mean cosine of two different latents of an item; NaN where no item has two."""
    values = []
    for each in slots:
        if len(each) > 1:
            matrix = cosine_matrix(each)
            values.append((matrix.sum() - np.trace(matrix)) / (len(each) * (len(each) - 1)))
    return _mean(values)


def adjacent_cosine(slots: Sequence[np.ndarray]) -> float:
    """Mean cosine of a latent and the next one; NaN where no item has two."""
    values = [(_unit(each[:-1]) * _unit(each[1:])).sum(axis=-1).mean() for each in slots if len(each) > 1]
    return _mean(values)


def across_cosine(pooled: np.ndarray) -> float:
    """Mean cosine of the rows `(items, hidden)` of two different items; NaN for one item."""
    count = len(pooled)
    if count < 2:
        return float("nan")
    total = _unit(pooled).sum(axis=0)
    own = (np.linalg.norm(_unit(pooled), axis=1) ** 2).sum()
    return float((total @ total - own) / (count * (count - 1)))


def group_cosines(pooled: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Mean cosines of items of the same and of different categories."""
    matrix, labels = cosine_matrix(pooled), np.asarray(groups)
    same = labels[:, None] == labels[None, :]
    other = ~np.eye(len(labels), dtype=bool)
    found = {"same_group_cosine": matrix[same & other], "other_group_cosine": matrix[~same]}
    return {name: float(values.mean()) for name, values in found.items() if values.size}


def covariance_eigenvalues(rows: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance of rows `(n, hidden)`, largest first, at most min(n, hidden)."""
    centred = rows - rows.mean(axis=0)
    return np.linalg.svd(centred, compute_uv=False) ** 2 / max(len(rows), 1)


def spectrum(eigenvalues: np.ndarray) -> dict[str, float]:
    """Rank90, Rank95, Rank99 (directions that hold that share of the variance), participation ratio
    `(sum l)^2 / sum l^2` and effective rank `exp(-sum p log p)`; 0 without variance."""
    total = eigenvalues.sum()
    if total <= 0:
        return dict.fromkeys(("rank90", "rank95", "rank99", "participation_ratio", "effective_rank"), 0.0)
    shares = eigenvalues / total
    held = np.cumsum(shares)
    ranks = {f"rank{level}": float(np.searchsorted(held, level / 100 - 1e-12) + 1) for level in (90, 95, 99)}
    positive = shares[shares > 0]
    return {
        **ranks,
        "participation_ratio": float(total**2 / (eigenvalues**2).sum()),
        "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())),
    }


def top_dimension_share(rows: np.ndarray, count: int) -> float:
    """Mean share of the squared norm of a row in its `count` largest dimensions."""
    squares = np.sort(rows**2, axis=1)[:, ::-1]
    return float((squares[:, :count].sum(axis=1) / np.maximum(squares.sum(axis=1), 1e-300)).mean())


def eta_squared(rows: np.ndarray, labels: np.ndarray) -> float:
    """Share of the variance of rows that a label explains (ANOVA, summed over dimensions); 0 without variance."""
    total = ((rows - rows.mean(axis=0)) ** 2).sum()
    if total <= 0:
        return 0.0
    mean = rows.mean(axis=0)
    between = sum(
        (labels == label).sum() * ((rows[labels == label].mean(axis=0) - mean) ** 2).sum() for label in set(labels)
    )
    return float(between / total)


def consistency(trajectories: Sequence[np.ndarray]) -> float:
    """RCS: mean cosine of the pooled trajectories of one item under perturbations (section 4.5)."""
    return across_cosine(np.stack([np.asarray(each, dtype=np.float64).mean(axis=0) for each in trajectories]))


def _scale(rows: np.ndarray, reference: np.ndarray, name: str) -> dict[str, float]:
    """Log-ratio of norms to the mean norm of a reference set, and cosine distance to the nearest of its vectors."""
    norm = np.linalg.norm(reference, axis=1).mean()
    ratios = np.log(np.maximum(np.linalg.norm(rows, axis=1), 1e-12) / max(norm, 1e-12))
    step = max(1, len(reference) // MOST_NEIGHBOURS)
    some = rows[:: max(1, len(rows) // 1_024)]
    nearest = (_unit(some) @ _unit(reference[::step]).T).max(axis=1)
    return {
        f"norm_log_ratio_{name}": float(ratios.mean()),
        f"norm_log_ratio_{name}_sd": float(ratios.std()),
        f"nearest_cosine_{name}": float(nearest.mean()),
    }


def oracle_measures(slots: Sequence[np.ndarray], oracles: Sequence[np.ndarray]) -> dict[str, float]:
    """Cosine to the own oracle, top-1 retrieval of it among all (`nn_identity`), and `self_preference`: how often
    another item's trajectory is nearer than the own oracle. Pooled vectors; needs two items.

    Raises:
        ValueError: another number of oracles than of items.
    """
    if len(slots) != len(oracles):
        raise ValueError(f"{len(oracles)} oracles for {len(slots)} items; give one an item")
    pooled = _unit(np.stack([each.mean(axis=0) for each in slots]))
    targets = _unit(np.stack([np.asarray(each, dtype=np.float64).mean(axis=0) for each in oracles]))
    to_oracles, own = pooled @ targets.T, (pooled * targets).sum(axis=1)
    found = {
        "oracle_cosine": float(own.mean()),
        "nn_identity": float((to_oracles.argmax(1) == np.arange(len(own))).mean()),
    }
    if len(pooled) > 1:
        others = cosine_matrix(pooled)
        np.fill_diagonal(others, -np.inf)
        found["self_preference"] = float((others.max(axis=1) > own).mean())
    return found


def alerts(found: dict[str, Any]) -> list[str]:
    """What says "collapse" (section 4.7)."""
    lines = []
    if found["across_cosine_centred"] > ALERTS["across_cosine_centred"]:
        lines.append(f"collapse: centred cosine across items {found['across_cosine_centred']:.2f}")
    if found["participation_ratio"] < ALERTS["participation_ratio"]:
        lines.append(f"collapse: participation ratio {found['participation_ratio']:.1f}")
    ratio = found.get("norm_log_ratio_token")
    if ratio is not None and abs(ratio) > ALERTS["norm_log_ratio"]:
        lines.append(f"scale: norms are exp({ratio:+.1f}) times those of token embeddings")
    if found.get("self_preference", 0.0) > ALERTS["self_preference"]:
        lines.append(f"collapse: nearer to other items than to the own oracle in {found['self_preference']:.0%}")
    return lines


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


__all__ = [
    "ALERTS",
    "across_cosine",
    "adjacent_cosine",
    "alerts",
    "centre",
    "consistency",
    "cosine_matrix",
    "covariance_eigenvalues",
    "eta_squared",
    "group_cosines",
    "oracle_measures",
    "spectrum",
    "top_dimension_share",
    "trajectory_geometry",
    "within_cosine",
]
