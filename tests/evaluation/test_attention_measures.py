"""Measures of attention on maps made by hand."""

import numpy as np
import pytest
import torch

from evaluation.causal.attention_measures import (
    gradient_saliency,
    mass,
    patch_entropy,
    pointing_game,
    rank_correlation,
    region_enrichment,
    salient_patches,
    top_heads,
    top_mass_iou,
)


def test_mass_is_not_renormalised_and_entropy_is() -> None:
    weights = np.array([[0.1, 0.1, 0.2], [0.0, 0.0, 0.0], [0.0, 0.3, 0.0]])
    assert mass(weights).tolist() == pytest.approx([0.4, 0.0, 0.3])
    shares = np.array([0.25, 0.25, 0.5])
    assert patch_entropy(weights).tolist() == pytest.approx([-(shares * np.log(shares)).sum(), 0.0, 0.0])
    assert patch_entropy(np.full((1, 8), 0.01))[0] == pytest.approx(np.log(8))
    assert salient_patches(np.array([1.0, 1.0, 1.0, 3.0])) == 1


def test_a_region_against_windows_of_its_size() -> None:
    heat = np.full((3, 4), 0.5)
    heat[0:2, 0:2] = 2.0
    region = np.zeros((3, 4), dtype=bool)
    region[0:2, 0:2] = True
    assert region_enrichment(heat, region) == pytest.approx(2.0 / 0.5)  # only the windows of columns 2 and 3 are clear
    assert np.isnan(region_enrichment(heat, np.ones((3, 4), dtype=bool)))
    assert np.isnan(region_enrichment(heat, np.zeros((3, 4), dtype=bool)))
    assert pointing_game(heat, region) and not pointing_game(heat, ~region)


def test_overlap_with_the_patches_that_hold_half() -> None:
    heat = np.array([[4.0, 3.0], [2.0, 1.0]])
    region = np.array([[True, False], [True, False]])
    assert top_mass_iou(heat, region, 0.5) == pytest.approx(1 / 3)  # 4 + 3 hold half: one of them in the region
    assert top_mass_iou(heat, region, 0.4) == pytest.approx(1 / 2)


def test_ranks_with_ties_and_heads() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10.0, 20.0, 20.0, 30.0])
    assert rank_correlation(first, second) == pytest.approx(1) and rank_correlation(first, -second) == pytest.approx(
        -1
    )
    assert np.isnan(rank_correlation(first, np.ones(4)))
    assert top_heads(np.array([[0.1, 0.9], [0.5, 0.2]]), 2) == [(0, 1, 0.9), (1, 0, 0.5)]


def test_saliency_is_weight_times_gradient() -> None:
    weights = [torch.tensor([0.2, 0.8], requires_grad=True), torch.tensor([0.5], requires_grad=True)]
    loss = 3 * weights[0][0] - weights[0][1] ** 2
    saliency = gradient_saliency(weights, loss)
    assert saliency[0].tolist() == pytest.approx([0.6, 0.8 * 1.6]) and saliency[1].tolist() == [0.0]
