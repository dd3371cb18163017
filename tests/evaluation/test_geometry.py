"""Geometry of latents on sets whose shape is known, and against loops."""

import numpy as np
import pytest

from evaluation.causal import geometry
from evaluation.causal.geometry import (
    across_cosine,
    adjacent_cosine,
    centre,
    covariance_eigenvalues,
    eta_squared,
    oracle_measures,
    spectrum,
    trajectory_geometry,
    within_cosine,
)

RNG = np.random.default_rng(0)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_cosines_are_those_of_loops() -> None:
    slots = [RNG.normal(size=(k, 6)) for k in (3, 1, 4)]
    within = [np.mean([cosine(a, b) for i, a in enumerate(each) for j, b in enumerate(each) if i != j])
              for each in slots if len(each) > 1]  # fmt: skip
    adjacent = [
        np.mean([cosine(a, b) for a, b in zip(each, each[1:], strict=False)]) for each in slots if len(each) > 1
    ]
    assert within_cosine(slots) == pytest.approx(np.mean(within))
    assert adjacent_cosine(slots) == pytest.approx(np.mean(adjacent))
    rows = RNG.normal(size=(5, 6))
    pairs = [cosine(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    assert across_cosine(rows) == pytest.approx(np.mean(pairs))


def test_centred_trajectories_have_mean_zero_at_each_number() -> None:
    slots = [RNG.normal(size=(k, 4)) + 7 for k in (2, 3, 3)]
    centred = centre(slots)
    for number in range(3):
        mean = np.mean([each[number] for each in centred if len(each) > number], axis=0)
        assert np.allclose(mean, 0)


def test_spectrum_of_known_covariances() -> None:
    flat = spectrum(np.ones(10))
    assert flat["participation_ratio"] == pytest.approx(10) and flat["effective_rank"] == pytest.approx(10)
    assert (flat["rank90"], flat["rank95"], flat["rank99"]) == (9, 10, 10)
    assert spectrum(np.array([5.0, 0, 0]))["participation_ratio"] == 1
    assert spectrum(np.zeros(3))["effective_rank"] == 0
    two = spectrum(np.array([3.0, 1.0]))
    assert two["participation_ratio"] == pytest.approx(16 / 10)
    rows = RNG.normal(size=(500, 3)) * [3, 1, 0.1]
    expected = np.sort(np.linalg.eigvalsh(np.cov(rows.T, bias=True)))[::-1]
    assert np.allclose(covariance_eigenvalues(rows), expected)


def test_variance_that_labels_explain() -> None:
    labels = np.repeat([0, 1], 50)
    assert eta_squared(np.c_[labels, labels].astype(float), labels) == pytest.approx(1)
    assert eta_squared(RNG.normal(size=(100, 3)), labels) < 0.1
    assert eta_squared(np.ones((4, 2)), np.arange(4)) == 0


def test_oracles_that_are_met_and_a_collapse() -> None:
    oracles = [RNG.normal(size=(2, 8)) for _ in range(20)]
    met = oracle_measures([each + 0.01 for each in oracles], oracles)
    assert met["nn_identity"] == 1 and met["oracle_cosine"] > 0.99 and met["self_preference"] == 0
    fallen = oracle_measures([np.ones((2, 8)) + RNG.normal(size=(2, 8)) * 0.01 for _ in oracles], oracles)
    assert fallen["self_preference"] == 1 and fallen["nn_identity"] <= 0.15


def test_a_whole_report_and_its_alerts() -> None:
    spread = [RNG.normal(size=(4, 32)) for _ in range(60)]
    groups = ["a" if number % 2 else "b" for number in range(60)]
    tokens, visual = RNG.normal(size=(100, 32)), RNG.normal(size=(50, 32)) * 20
    found = trajectory_geometry(spread, token_embeddings=tokens, visual=visual, groups=groups)
    assert found["states"] == 240 and found["alerts"] == [] and len(found["eigenvalues"]) == 32
    assert abs(found["norm_log_ratio_token"]) < 0.1 and found["norm_log_ratio_visual"] == pytest.approx(
        -np.log(20), abs=0.1
    )
    assert np.asarray(found["cosine_matrix"]).shape == (60, 60)
    assert abs(found["same_group_cosine"] - found["other_group_cosine"]) < 0.1
    line = RNG.normal(size=32)
    fallen = trajectory_geometry([line * RNG.uniform(9, 11, size=(3, 1)) for _ in range(40)], token_embeddings=tokens)
    assert fallen["across_cosine_raw"] == pytest.approx(1) and fallen["participation_ratio"] == pytest.approx(1)
    assert [alert.split(":")[0] for alert in fallen["alerts"]] == ["collapse", "scale"]
    assert set(geometry.ALERTS) == {
        "across_cosine_centred",
        "participation_ratio",
        "norm_log_ratio",
        "self_preference",
    }


def test_consistency_under_perturbations() -> None:
    base = RNG.normal(size=(3, 16))
    assert geometry.consistency([base, base * 2, base]) == pytest.approx(1)
    assert abs(geometry.consistency([RNG.normal(size=(3, 16)) for _ in range(30)])) < 0.1


@pytest.mark.parametrize(
    ("slots", "message"),
    [([], "no trajectory"), ([np.zeros((0, 3))], r"slots\[0\] has shape \(0, 3\)"),
     ([np.ones((1, 3)), np.ones((1, 4))], r"slots\[1\] has shape \(1, 4\); give \(K, 3\)"),
     ([np.full((1, 2), np.nan)], r"slots\[0\] has a value that is not finite")],
)  # fmt: skip
def test_bad_input(slots: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory_geometry(slots)
