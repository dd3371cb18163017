"""GRPO_latent: replay against the rollout, the published loss, credit for latents."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.grpo_parts import (
    build,
    eager_model,
    latent_mask,
    naive_logps,
    policy_logps,
    recorded_logps,
    rollout,
    trained_mask,
)
from trainers.grpo_replay import Replay
from trainers.grpo_trainer import LatentGRPOTrainer
from trainers.losses.grpo_latent import gaussian_latent_logps

HEADS = [{}, {"latent_head": "simple"}, {"latent_head": "simple", "latent_head_timing": "reference"}]
MEAN = {"latent_policy": "gaussian", "latent_policy_sigma": 0.5}


# Replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", HEADS, ids=["no head", "head", "head as published"])
def test_at_step_0_the_ratio_to_the_rollout_is_1(fields: dict, tmp_path: Path) -> None:
    """Several spans at different places, prompts of different length, with and without image."""
    trainer = build(tmp_path, eager_model(**fields))
    batch, rolled = recorded_logps(trainer, groups=6)
    mask, latents = batch["tool_mask"].bool() & batch["completion_mask"].bool(), latent_mask(batch)
    assert torch.equal(mask, trained_mask(batch))
    starts = {latents[row].int().argmax().item() for row in latents.any(1).nonzero()[:, 0]}
    behind = latents.cumsum(1) > 0
    assert len(starts) > 2 and (latents.sum(1) > 2).any() and (mask & behind).sum() > 10
    ratio = (policy_logps(trainer, batch) - rolled).exp()[mask]
    assert (ratio - 1).abs().max().item() < 1e-5
    alone = naive_logps(trainer.accelerator.unwrap_model(trainer.model), batch)
    assert (alone - rolled)[mask].abs().max().item() < 1e-5


def test_without_replay_the_ratio_is_not_1(tmp_path: Path) -> None:
    trainer = build(tmp_path, latent_replay=False)
    batch, rolled = recorded_logps(trainer)
    mask, behind = trained_mask(batch), latent_mask(batch).cumsum(1) > 0
    ratio = (policy_logps(trainer, batch) - rolled).exp()
    assert (ratio - 1)[mask & behind].abs().max().item() > 1e-2
    assert (ratio - 1)[mask & ~behind].abs().max().item() < 1e-5


def test_reference_of_equal_weights_gives_no_kl_and_shuffled_micro_batches_are_the_same(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_iterations=2, gradient_accumulation_steps=3)
    torch.manual_seed(3)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    trainer._prepare_inputs(rows)
    batches = trainer._buffered_inputs
    assert len(batches) == 3 and any(batch["replay_index"].ge(0).any() for batch in batches)
    for batch in batches:
        assert set(batch["num_images"]) == {0, 1}
        logps, mask = policy_logps(trainer, batch), trained_mask(batch)
        for name in ("old", "ref"):
            assert (logps - batch[f"{name}_per_token_logps"])[mask].abs().max().item() < 1e-5
        difference = batch["ref_per_token_logps"] - logps
        assert (difference.exp() - difference - 1)[mask].abs().max().item() < 1e-6
        assert (naive_logps(trainer.accelerator.unwrap_model(trainer.model), batch) - logps)[mask].abs().max() < 1e-5


def test_reference_is_a_copy_that_stays(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    kept = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    again = rollout(trainer)
    mask = trained_mask(again)
    assert (naive_logps(kept, again) - again["ref_per_token_logps"])[mask].abs().max().item() < 1e-5
    assert (policy_logps(trainer, again) - again["ref_per_token_logps"]).abs().max().item() > 1e-2


def test_beta_0_keeps_no_reference(tmp_path: Path) -> None:
    trainer = build(tmp_path, beta=0.0)
    assert trainer.ref_model is None and "ref_per_token_logps" not in rollout(trainer)


# The loss --------------------------------------------------------------------------------------------------------


def published_loss(batch: dict[str, Any], logps: torch.Tensor, loss_type: str, length: int) -> torch.Tensor:
    """Card, section 4.4, steps 5 and 6, with epsilon 0.2 and beta 0.04."""
    mask, advantages = trained_mask(batch), batch["advantages"][:, None]
    ratio = (logps - batch["old_per_token_logps"]).exp()
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    difference = batch["ref_per_token_logps"] - logps
    terms = (terms + 0.04 * (difference.exp() - difference - 1)) * mask
    if loss_type == "bnpo":
        return terms.sum() / mask.sum()
    if loss_type == "grpo":
        return (terms.sum(1) / mask.sum(1)).mean()
    return terms.sum() / (len(mask) * length)


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dr_grpo"])
def test_the_defaults_are_the_published_loss(loss_type: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type=loss_type, num_iterations=2)
    batch = rollout(trainer)
    generator = torch.Generator().manual_seed(1)
    for name in ("old", "ref"):  # far enough that some ratios are clipped
        values = batch[f"{name}_per_token_logps"]
        batch[f"{name}_per_token_logps"] = values + 0.3 * torch.randn(values.shape, generator=generator)
    model = trainer.accelerator.unwrap_model(trainer.model)
    want = published_loss(batch, naive_logps(model, batch), loss_type, 16)
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-3, atol=1e-5, msg=name)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("policy", ["none", "gaussian"])
def test_the_other_losses_give_gradients(loss_type: str, policy: str, tmp_path: Path) -> None:
    level = "sequence" if loss_type == "luspo" else "token"
    credit = MEAN if policy == "gaussian" else {}
    trainer = build(tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2, **credit)
    batch = rollout(trainer, 2)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    norm = trainer.model.lm_head.weight.grad.norm()
    assert loss.isfinite() and 0 < norm < float("inf")


def test_no_gradient_reaches_the_recorded_latents(tmp_path: Path) -> None:
    trainer = build(tmp_path, eager_model(latent_head="simple"))
    batch = rollout(trainer)
    assert not batch["replay_vectors"].requires_grad
    trainer._compute_loss(trainer.model, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.latent_head.parameters())
    assert trainer.model.model.language_model.norm.weight.grad.any()


@pytest.mark.parametrize("options", [{"train_start_token": False}, {"mask_truncated_completions": True}])
def test_what_the_loss_leaves_out(options: dict, tmp_path: Path) -> None:
    trainer = build(tmp_path, **options)
    batch = rollout(trainer)
    mask = batch["tool_mask"] * batch["completion_mask"]
    start, eos = trainer.processing_class.latent_start_token_id, trainer.processing_class.tokenizer.eos_token_id
    is_start = (batch["completion_ids"] == start) & batch["completion_mask"].bool()
    if "train_start_token" in options:
        assert is_start.any() and not mask[is_start].any() and mask.any()
    else:
        ended = (batch["completion_ids"] == eos).any(1)
        assert ended.any() and not ended.all()
        assert torch.equal(mask.any(1), ended)
        shortest = trainer._metrics["train"]["completions/min_length"][-1]
        assert shortest == 0 and trainer._metrics["train"]["completions/clipped_ratio"][-1] < 1


# Credit for latents ----------------------------------------------------------------------------------------------


def head_gradient(trainer: LatentGRPOTrainer, batch: dict[str, Any]) -> float:
    """Norm of the gradient at the latent head, which only latent positions can reach."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return sum(float(p.grad.norm()) for p in trainer.model.latent_head.parameters() if p.grad is not None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_latents_are_trained_only_with_the_gaussian_policy(reduction: str, tmp_path: Path) -> None:
    model = eager_model(latent_head="simple")
    options = {"latent_noise": 0.2, "beta": 0.0}
    plain = build(tmp_path, copy.deepcopy(model), **options)
    assert head_gradient(plain, rollout(plain)) == 0
    credit = {**MEAN, "latent_policy_reduction": reduction}
    trainer = build(tmp_path, copy.deepcopy(model), **options, **credit)
    batch = rollout(trainer)
    assert head_gradient(trainer, batch) > 0
    assert batch["tool_mask"].bool()[latent_mask(batch)].all()
    quiet = build(tmp_path, copy.deepcopy(model), beta=0.0, **credit)  # a = mu: the first update gives them nothing
    assert head_gradient(quiet, rollout(quiet)) < 1e-4 * head_gradient(trainer, batch)


def test_gaussian_credit_has_the_value_of_the_formula(tmp_path: Path) -> None:
    """Loss of a batch with an old policy and a reference, from the log-likelihoods themselves."""
    trainer = build(tmp_path, eager_model(latent_head="simple"), latent_noise=0.3, num_iterations=2, **MEAN)
    batch = rollout(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for parameter in model.latent_head.parameters():
            parameter.mul_(1.05)
    mask, replay = latent_mask(batch), Replay.from_batch(batch)
    prompt, length = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    trainer._batch, values = None, {}
    trainer._scored_means = []
    text = policy_logps(trainer, batch)  # also keeps the means
    means = {"now": trainer._scored_means[-1], "old": replay.old_means, "ref": replay.ref_means}
    for name, states in means.items():
        packed = gaussian_latent_logps(replay.vectors, states, 0.5)
        values[name] = replay.dense(packed, length, prompt)
    full = {"now": text, "old": batch["old_per_token_logps"], "ref": batch["ref_per_token_logps"]}
    full = {name: torch.where(mask, values[name], logps) for name, logps in full.items()}
    both = dict(batch, old_per_token_logps=full["old"], ref_per_token_logps=full["ref"])
    ratio = (full["now"] - full["old"]).exp()
    assert (ratio - 1)[mask].abs().max() > 1e-3
    trained = batch["tool_mask"] * batch["completion_mask"]
    advantages = both["advantages"][:, None]
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gap = full["ref"] - full["now"]
    want = ((terms + 0.04 * (gap.exp() - gap - 1)) * trained).sum() / trained.sum()
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), want, rtol=1e-5, atol=1e-6)
