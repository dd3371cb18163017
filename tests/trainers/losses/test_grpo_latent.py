"""Masks of GRPO_latent token by token in plain Python, metrics, and the Gaussian credit for latents."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch.distributions import Normal

from trainers.losses import grpo_latent
from trainers.losses.grpo_latent import (
    completion_mask_until_eos,
    completion_metrics,
    gaussian_latent_log_ratio,
    gaussian_latent_logps,
    group_reward_std,
    put_latent_logps,
    reference_loss_mask,
    sampled_token_mask,
    span_mask,
)

START, END, EOS, LATENT = 3, 5, 2, 9


# Masks -----------------------------------------------------------------------------------------------------------


def naive_loss_mask(prompt: list[int], completion: list[int]) -> list[bool]:
    """The reference's scan, one token at a time, over prompt and completion up to its first EOS."""
    mask, inside, ended = [], False, False
    for place, token in enumerate(prompt + completion):
        inside = True if token == START else False if token == END else inside
        if place >= len(prompt):
            mask.append(not inside and not ended)
            ended = ended or token == EOS
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_reference_mask_equals_the_scan(seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.tensor([START, END, EOS, 6, 7])[torch.multinomial(torch.tensor([1.0, 1, 0.3, 2, 2]), 120, True)]
    prompt, completion = ids.view(8, 15).split([4, 11], dim=1)
    mask, _ = completion_mask_until_eos(completion, EOS)
    got = reference_loss_mask(prompt, completion, mask, START, END)
    want = [naive_loss_mask(p, c) for p, c in zip(prompt.tolist(), completion.tolist(), strict=True)]
    assert got.tolist() == want


def test_an_eos_inside_a_region_ends_nothing() -> None:
    ids = torch.tensor([[7, START, EOS, 6, END, 8, EOS, 0]])  # readable latents: 2 of them, one says EOS
    latent = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]]).bool()
    mask, terminated = completion_mask_until_eos(ids, EOS, latent)
    assert mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]] and terminated.all()
    assert sampled_token_mask(mask, latent).int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 0]]
    published, _ = completion_mask_until_eos(ids, EOS)
    assert published.sum() == 3


def test_several_eos_tokens_and_none() -> None:
    mask, terminated = completion_mask_until_eos(torch.tensor([[6, 1, 2], [6, 6, 6], [2, 0, 0]]), [1, 2])
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]] and terminated.tolist() == [True, False, True]
    assert (mask & terminated[:, None]).any(1).tolist() == [True, False, True]


def test_forced_tokens_and_the_start_token_can_be_left_out() -> None:
    ids = torch.tensor([[START, LATENT, LATENT, END, 8, EOS]])
    latent, forced = ids == LATENT, (ids == START) | (ids == END)
    mask, _ = completion_mask_until_eos(ids, EOS, latent)
    assert sampled_token_mask(mask, latent).int().tolist() == [[1, 0, 0, 1, 1, 1]]
    assert sampled_token_mask(mask, latent, forced_mask=forced).int().tolist() == [[0, 0, 0, 0, 1, 1]]
    without = sampled_token_mask(mask.long(), latent.long(), ids, START, train_start_token=False)
    assert without.int().tolist() == [[0, 0, 0, 1, 1, 1]]


def test_bad_masks_are_refused() -> None:
    mask = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"latent_mask has shape \(2, 3\), expected \(2, 4\)"):
        sampled_token_mask(mask, torch.ones(2, 3))
    with pytest.raises(ValueError, match="train_start_token=False needs completion_ids and start_id"):
        sampled_token_mask(mask, mask, train_start_token=False)
    with pytest.raises(ValueError, match="two different ids"):
        span_mask(mask.long(), START, START)


# Metrics ---------------------------------------------------------------------------------------------------------


def test_lengths_without_a_terminated_completion() -> None:
    metrics = completion_metrics(torch.ones(2, 3), torch.zeros(2))
    assert metrics["completions/clipped_ratio"] == 1 and metrics["completions/mean_terminated_length"] == 0
    assert metrics["completions/min_length"] == metrics["completions/max_length"] == 3


def test_groups_that_do_not_fill_the_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="num_generations=2 does not cut 3 rewards into groups"):
        group_reward_std(torch.zeros(3), 2)


# Gaussian credit ---------------------------------------------------------------------------------------------------


def vectors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    latents, states, old = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(3))
    return latents.requires_grad_(), states.requires_grad_(), old.requires_grad_()


@pytest.mark.parametrize("sigma", [0.3, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_likelihood_is_that_of_a_normal_distribution(sigma: float, reduction: str) -> None:
    """Up to its constant; the mean over the dimensions has the variance `H sigma^2`."""
    latents, states, _ = vectors()
    scale = sigma * (latents.shape[-1] ** 0.5 if reduction == "mean" else 1)
    peak = Normal(states, scale).log_prob(states)
    want = (Normal(states, scale).log_prob(latents) - peak).sum(-1)
    got = gaussian_latent_logps(latents, states, sigma, reduction)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), states)
    torch.testing.assert_close(grad, (latents - states).detach() / scale**2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ratio_is_the_difference_of_the_likelihoods(reduction: str) -> None:
    latents, states, old = vectors()
    options = {"sigma": 1.5, "reduction": reduction}
    want = gaussian_latent_logps(latents, states, **options) - gaussian_latent_logps(latents, old, **options)
    got = gaussian_latent_log_ratio(latents, states, old, **options)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want.sum(), states)[0]
    got.sum().backward()
    torch.testing.assert_close(states.grad, wanted)
    assert latents.grad is None and old.grad is None  # what was recorded is data
    without_noise = gaussian_latent_log_ratio(latents, states, None, **options)
    torch.testing.assert_close(without_noise, gaussian_latent_logps(latents, states, **options))


def test_gradient_is_exact_in_the_numerical_sense() -> None:
    latents, states, old = vectors()
    fixed, fixed_old = latents.detach(), old.detach()
    assert torch.autograd.gradcheck(lambda s: gaussian_latent_logps(fixed, s, 0.7), (states,))
    assert torch.autograd.gradcheck(lambda s: gaussian_latent_log_ratio(fixed, s, fixed_old, 0.7), (states,))


def test_credit_vanishes_at_the_recorded_latent_and_follows_the_advantage_elsewhere() -> None:
    torch.manual_seed(0)
    mean = torch.randn(4, 64, requires_grad=True)
    same = gaussian_latent_log_ratio(mean.detach(), mean, None, sigma=0.1)
    assert not same.any() and not torch.autograd.grad(same.sum(), mean)[0].any()
    noisy = mean.detach() + 0.1 * torch.randn_like(mean)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    ratio = gaussian_latent_log_ratio(noisy, mean, mean.detach(), sigma=0.1).exp()
    assert torch.equal(ratio, torch.ones(4))  # on policy
    step = -torch.autograd.grad(-(ratio * advantages).sum(), mean)[0]
    toward = (step * (noisy - mean.detach())).sum(-1)
    assert (toward[:2] > 0).all() and (toward[2:] < 0).all()


def test_far_latents_stay_finite() -> None:
    latents = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    states = torch.zeros(1, 4096, requires_grad=True)
    for old in (None, torch.full_like(latents, -300.0)):
        log_ratio = gaussian_latent_log_ratio(latents, states, old, sigma=0.01, reduction="sum")
        assert log_ratio.dtype == torch.float32 and log_ratio.abs().item() == 20
        (grad,) = torch.autograd.grad(log_ratio.exp().sum(), states)
        assert torch.isfinite(grad).all() and not grad.any()
    logps = gaussian_latent_logps(latents, states, sigma=0.01)
    assert torch.isfinite(logps).all() and logps.dtype == torch.float32


def test_equal_means_give_ratio_one_however_far_the_latent_is() -> None:
    latents, mean = torch.full((1, 8), 1e4), torch.linspace(-1, 1, 8)[None]
    assert gaussian_latent_log_ratio(latents, mean, mean.clone(), sigma=1e-3, reduction="sum").item() == 0


def test_latent_values_take_the_places_of_latents() -> None:
    tokens, mask = torch.full((2, 3), -7.0), torch.tensor([[0, 1, 0], [0, 0, 1]])
    latents = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double().requires_grad_()
    merged = put_latent_logps(tokens, latents, mask)
    assert merged.tolist() == [[-7, 2, -7], [-7, -7, 6]] and merged.dtype == tokens.dtype
    merged.sum().backward()
    assert torch.equal(latents.grad, mask.double())


@pytest.mark.parametrize("sigma", [0, -1.0, math.inf, math.nan, True, "1"])
def test_wrong_deviations_are_refused(sigma: object) -> None:
    with pytest.raises(ValueError, match="sigma=.* is not valid: give a number above 0"):
        gaussian_latent_logps(torch.zeros(1, 2), torch.zeros(1, 2), sigma)


def test_wrong_options_are_refused() -> None:
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="reduction='max' is not valid: choose one of mean, sum"):
        gaussian_latent_logps(zeros, zeros, 1.0, "max")
    with pytest.raises(ValueError, match=r"states has shape \(2, 2\), expected \(1, 2\)"):
        gaussian_latent_logps(zeros, torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match="old_states has shape"):
        gaussian_latent_log_ratio(zeros, zeros, torch.zeros(1, 3), 1.0)
    with pytest.raises(ValueError, match="max_log_ratio=0 is not valid"):
        gaussian_latent_log_ratio(zeros, zeros, None, 1.0, max_log_ratio=0)


def test_docstrings() -> None:
    assert doctest.testmod(grpo_latent).failed == 0
