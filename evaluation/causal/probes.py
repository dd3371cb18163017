"""Probes: what can be read from latents, and what follows a donor's (specification, section 5)."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

MOST_DIMENSIONS = 64
STRENGTHS = (0.01, 0.1, 1.0)


@contextmanager
def _unconverged_is_fine() -> Iterator[None]:
    """A probe is a bound: a fit that is cut off after its iterations is one, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@_unconverged_is_fine()
def answer_probe(features: np.ndarray, labels: Sequence[str], folds: int = 5, seed: int = 0) -> dict[str, float]:
    """Can a linear classifier read a label from latents? L2 logistic regression on standardised features (at most 64
    principal components), its strength chosen inside the training folds (PRISM axis 1).

    Args:
        features: `(n, d)`.
        labels: of each row; every label at least `folds` times.
        folds: of the stratified cross-validation.
        seed: of folds and shuffled labels.

    Returns:
        `accuracy` and `cross_entropy` (nats) on held-out folds, `mi_nats` = H(Y) - cross-entropy (a lower bound on
        the mutual information, may be negative), `majority`, and `shuffled`, the accuracy with shuffled labels.

    Raises:
        ValueError: one label, a label of fewer rows than folds, or another number of labels than rows.
    """
    labels = np.asarray(labels)
    names, counts = np.unique(labels, return_counts=True)
    if len(features) != len(labels) or len(names) < 2 or counts.min() < folds:
        found = dict(zip(names.tolist(), counts.tolist(), strict=True))
        raise ValueError(
            f"{len(features)} rows and labels {found}: a probe needs a label a row, two labels, each in {folds} rows "
            "or more"
        )
    shares = counts / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    accuracy, loss = _cross_validated(features, labels, folds, seed)
    shuffled = np.random.default_rng(seed).permutation(labels)
    return {
        "accuracy": accuracy,
        "cross_entropy": loss,
        "mi_nats": entropy - loss,
        "majority": float(shares.max()),
        "shuffled": _cross_validated(features, shuffled, folds, seed)[0],
    }


def _cross_validated(features: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> tuple[float, float]:
    """Accuracy and cross-entropy over held-out folds."""
    right, losses = [], []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels):
        model = _fitted(features[train], labels[train], seed)
        probs = model.predict_proba(features[test])
        own = probs[np.arange(len(test)), np.searchsorted(model.classes_, labels[test])]
        right += (model.predict(features[test]) == labels[test]).tolist()
        losses += (-np.log(np.maximum(own, 1e-12))).tolist()
    return float(np.mean(right)), float(np.mean(losses))


def _fitted(features: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    """A classifier whose strength does best on a fifth of the rows given."""
    inner = StratifiedKFold(
        min(5, int(np.unique(labels, return_counts=True)[1].min())), shuffle=True, random_state=seed
    )
    train, test = next(iter(inner.split(features, labels)))
    scores = [
        _model(c, train).fit(features[train], labels[train]).score(features[test], labels[test]) for c in STRENGTHS
    ]
    best = STRENGTHS[int(np.argmax(scores))]
    return _model(best, features).fit(features, labels)


def _model(strength: float, rows: Sequence[Any]) -> Any:
    size = max(1, min(MOST_DIMENSIONS, len(rows) - 1))
    return make_pipeline(StandardScaler(), _Components(size), LogisticRegression(C=strength, max_iter=200))


class _Components(PCA):
    """Principal components, as many as the features have at most."""

    def fit(self, rows: np.ndarray, labels: Any = None) -> "_Components":
        self.n_components = min(self.n_components, *rows.shape)
        return super().fit(rows, labels)

    def fit_transform(self, rows: np.ndarray, labels: Any = None) -> np.ndarray:
        self.n_components = min(self.n_components, *rows.shape)
        return super().fit_transform(rows, labels)


def cluster_agreement(features: np.ndarray, labels: Sequence[str], seed: int = 0) -> float:
    """Adjusted Rand index of k-means clusters, as many as labels, with the labels: 0 for chance, 1 for the same."""
    count = len(set(labels))
    clusters = KMeans(count, n_init=5, random_state=seed).fit_predict(np.asarray(features, dtype=np.float64))
    return float(adjusted_rand_score(list(labels), clusters))


def logit_lens(
    logits: torch.Tensor,
    gold: int | None = None,
    end: int | None = None,
    prior: torch.Tensor | None = None,
    top: int = 5,
) -> dict[str, Any]:
    """What states would say: `softmax(W_U norm(h))` of each, given the logits.

    Args:
        logits: `(K, V)` of the states.
        gold: id of the gold answer's first token.
        end: id of the end marker.
        prior: `(V,)` subtracted first: the item-mean logits, because a constant direction can own the top.
        top: number of ids.

    Returns:
        `ids` and `probs` `[K][top]`, `entropy` `[K]` in nats, `gold_rank` `[K]` from 1, `end_mass` `[K]`.
    """
    logits = logits.float() if prior is None else logits.float() - prior.float()
    logs = logits.log_softmax(dim=-1)
    best = logs.exp().topk(min(top, logits.shape[-1]), dim=-1)
    found: dict[str, Any] = {
        "ids": best.indices.tolist(),
        "probs": best.values.tolist(),
        "entropy": (-(logs.exp() * logs).nan_to_num(0.0).sum(dim=-1)).tolist(),
    }
    if gold is not None:
        found["gold_rank"] = ((logits > logits[:, gold : gold + 1]).sum(dim=-1) + 1).tolist()
    if end is not None:
        found["end_mass"] = logs[:, end].exp().tolist()
    return found


def causal_transfer(
    donor_answers: Sequence[str | None],
    clean: Sequence[str | None],
    edited: Sequence[str | None],
    sham: Sequence[str | None] | None = None,
) -> dict[str, float]:
    """How often the answer moves to the donor's when its latents are put in (section 5.5), in points.

    Args:
        donor_answers: what the donor answers.
        clean, edited: answers without and with the donor's latents.
        sham: answers with the item's own latents put in, which are taken off; default: the clean ones.
    """
    base = clean if sham is None else sham
    hits = [float(own is not None and own == donor) for own, donor in zip(edited, donor_answers, strict=True)]
    none = [float(own is not None and own == donor) for own, donor in zip(base, donor_answers, strict=True)]
    return {
        "donor_answer_lift": 100 * float(np.mean(hits) - np.mean(none)),
        "donor_answer_rate": 100 * float(np.mean(hits)),
    }


def pair_consistency(
    first: Sequence[str | None], second: Sequence[str | None], gold: Sequence[str], other_gold: Sequence[str]
) -> dict[str, float]:
    """Counterfactual pairs (section 5.6), in per cent: both views right, answers that change, strict flips (both right
    where the gold answer changes) and false flips (the answer changes where the gold one does not).

    Args:
        first, second: answers on the image and on its edited view.
        gold, other_gold: the right ones.
    """
    changes = np.array([one != two for one, two in zip(gold, other_gold, strict=True)])
    moved = np.array([one != two for one, two in zip(first, second, strict=True)])
    right = np.array([a == g and b == h for a, b, g, h in zip(first, second, gold, other_gold, strict=True)])

    def share(values: np.ndarray) -> float:
        return 100 * float(values.mean()) if len(values) else float("nan")

    return {"both_right": share(right), "change_rate": share(moved), "strict_flips": share(right[changes]),
            "false_flips": share(moved[~changes])}  # fmt: skip


__all__ = ["answer_probe", "causal_transfer", "cluster_agreement", "logit_lens", "pair_consistency"]
