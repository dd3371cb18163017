"""Attention alignment: value by value in plain Python beside the tensor form, targets, keys, and what is refused."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from trainers.losses import attention_alignment
from trainers.losses.attention_alignment import (
    AttentionAlignmentOptions,
    attention_alignment_loss,
    attention_log_scores,
    first_positions_keys,
)

REMEDY = "set attention_loss_weight: 0 for what the published code does"
REFERENCE = AttentionAlignmentOptions.reference()
OPTIONS = [
    AttentionAlignmentOptions(),
    AttentionAlignmentOptions(top_k=3),
    AttentionAlignmentOptions(top_k=None),
    AttentionAlignmentOptions(top_k=3, normalise=False),
    REFERENCE,
]


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows of 7, 4 and 2 keys; some values of the teacher are 0, and some are equal."""
    torch.manual_seed(0)
    keys = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    target = (torch.rand(3, 7, dtype=dtype) * 5).round() / 5 * keys
    target[1, :2] = 0.6
    return torch.randn(3, 7, dtype=dtype, requires_grad=True), target, keys


def naive_rows(
    scores: torch.Tensor, target: torch.Tensor, keys: torch.Tensor, options: AttentionAlignmentOptions
) -> list[torch.Tensor]:
    """Loss of each row, in the words of sections 4.3 and 4.7 of the card."""
    losses = []
    for s, t, mask in zip(scores, target.tolist(), keys.tolist(), strict=True):
        s, t = [x for x, k in zip(s, mask, strict=True) if k], [x for x, k in zip(t, mask, strict=True) if k]
        kept = sorted(range(len(t)), key=lambda j: (-t[j], j))[: options.top_k]
        t = [x if j in kept else 0.0 for j, x in enumerate(t)]
        total = sum(t) if options.normalise else 1.0
        t = [x / total for x in t]
        log_sum = sum(x.exp() for x in s).log()
        losses.append(sum(x * math.log(x) - x * (y - log_sum) for x, y in zip(t, s, strict=True) if x > 0))
    return losses


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_naive_form(options: AttentionAlignmentOptions) -> None:
    scores, target, keys = batch()
    output = attention_alignment_loss(scores, target, keys, options)
    want = sum(naive_rows(scores, target, keys, options)) / 3
    torch.testing.assert_close(output.loss, want)
    got, wanted = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (output.loss, want))
    torch.testing.assert_close(got, wanted)
    assert got[keys].abs().max() > 1e-2 and not got[~keys].any()
    assert output.count.item() == 3
    torch.testing.assert_close(output.kl_sum, 3 * want)


def test_rows_of_a_batch_are_as_alone_whatever_stands_in_the_padding() -> None:
    scores, target, keys = batch()
    noisy = torch.where(keys, scores, float("nan"))
    whole = attention_alignment_loss(noisy, target, keys)
    assert torch.isfinite(torch.autograd.grad(whole.loss, scores, retain_graph=True)[0]).all()
    alone = []
    for row, length in enumerate(keys.sum(1).tolist()):
        part = (tensor[row : row + 1, :length] for tensor in (scores, target, keys))
        alone.append(attention_alignment_loss(*part))
    torch.testing.assert_close(sum(part.loss * part.count for part in alone) / whole.count, whole.loss)
    for name in ("entropy_sum", "overlap_sum", "kl_sum"):
        torch.testing.assert_close(sum(getattr(part, name) for part in alone), getattr(whole, name))


def test_equal_scores_and_targets_have_no_loss_and_full_overlap() -> None:
    _, target, keys = batch()
    options = AttentionAlignmentOptions(top_k=None)
    output = attention_alignment_loss(torch.log(target.clamp(min=1e-300)) + 3, target, keys, options)
    assert output.loss.abs() < 1e-12
    torch.testing.assert_close(output.overlap_sum.item(), 3.0)
    share = target / target.sum(1, keepdim=True)
    torch.testing.assert_close(output.entropy_sum, -torch.xlogy(share, share).sum())
    assert not output.entropy_sum.requires_grad and not output.overlap_sum.requires_grad


def test_of_equal_values_the_first_are_kept() -> None:
    """In any number of repetitions, and beyond the sizes at which sorting changes its ways."""
    target = torch.full((1, 300), 0.5)
    target[0, 200] = 1.0
    kept = attention_alignment._keep_largest(target, 8)
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 200]
    scores, keys = torch.randn(1, 300), torch.ones(1, 300, dtype=torch.bool)
    losses = {attention_alignment_loss(scores, target, keys).loss.item() for _ in range(5)}
    assert len(losses) == 1


def test_reference_targets_scale_the_loss_and_normalised_ones_do_not() -> None:
    scores, target, keys = batch()
    for options, same in ((AttentionAlignmentOptions(), True), (REFERENCE, False)):
        once, twice = (attention_alignment_loss(scores, factor * target, keys, options).loss for factor in (1, 2))
        assert torch.allclose(once, twice) == same


def test_no_gradient_reaches_the_target() -> None:
    scores, target, keys = batch()
    target.requires_grad_()
    assert torch.autograd.grad(attention_alignment_loss(scores, target, keys).loss, target, allow_unused=True) == (
        None,
    )


def test_no_rows_give_zero_with_its_graph() -> None:
    scores = torch.randn(0, 4, requires_grad=True)
    output = attention_alignment_loss(scores, torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    assert output.loss.item() == 0 and output.count.item() == 0 and output.loss.requires_grad


def test_half_precision_is_computed_in_float32() -> None:
    scores, target, keys = batch(torch.float32)
    output = attention_alignment_loss(scores.bfloat16(), target, keys)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, attention_alignment_loss(scores.bfloat16().float(), target, keys).loss)


def test_a_target_of_zeros_is_refused_by_row_but_not_as_published() -> None:
    scores, target, keys = batch()
    target[1] = 0
    for options in OPTIONS[:-1]:
        with pytest.raises(ValueError, match="row 1: the target sums to zero"):
            attention_alignment_loss(scores, target, keys, options)
    output = attention_alignment_loss(scores, target, keys, REFERENCE)
    target[1] = torch.rand(7) * keys[1]
    rows = naive_rows(scores, target, keys, REFERENCE)
    torch.testing.assert_close(output.kl_sum, rows[0] + rows[2])
    torch.testing.assert_close(output.loss, (rows[0] + rows[2]) / 3)


def test_another_number_of_values_than_keys_is_refused() -> None:
    scores, target, keys = batch()
    with pytest.raises(ValueError, match=rf"scores has shape \(3, 7\), target \(3, 6\).*{REMEDY}"):
        attention_alignment_loss(scores, target[:, :6], keys)
    target[2, 3] = 0.1
    with pytest.raises(ValueError, match=rf"row 2 has 2 keys, and its target has values at other places.*{REMEDY}"):
        attention_alignment_loss(scores, target, keys)
    keys[0] = False
    with pytest.raises(ValueError, match=f"row 0 has no image token to look at.*{REMEDY}"):
        attention_alignment_loss(scores, target, keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
@pytest.mark.parametrize("options", [AttentionAlignmentOptions(), REFERENCE], ids=str)
def test_targets_that_are_no_attention_are_refused(value: float, options: AttentionAlignmentOptions) -> None:
    scores, target, keys = batch()
    target[2, 1] = value
    with pytest.raises(ValueError, match="row 2: the target is negative or not finite somewhere"):
        attention_alignment_loss(scores, target, keys, options)


def test_bad_options_and_masks_are_refused() -> None:
    scores, target, keys = batch()
    with pytest.raises(ValueError, match="keys has shape .* give bool"):
        attention_alignment_loss(scores, target, keys.long())
    with pytest.raises(ValueError, match=r"top_k=True is not valid: give an integer of at least 1"):
        AttentionAlignmentOptions(top_k=True)
    with pytest.raises(ValueError, match="normalise=1 is not valid"):
        AttentionAlignmentOptions(normalise=1)
    with pytest.raises(ValueError, match=r"give \(R, N\)"):
        attention_log_scores(scores[0], keys[0])


# The two other ways to scores and keys ------------------------------------------------------------------------------


def test_own_attention_is_renormalised_over_the_image() -> None:
    """Scale of a row's weights and weights beside its keys do not matter; gradients reach the weights."""
    _, target, keys = batch()
    weights = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    logs = attention_log_scores(weights, keys)
    share = weights * keys / (weights * keys).sum(1, keepdim=True)
    torch.testing.assert_close(logs.exp(), share)
    options = AttentionAlignmentOptions(top_k=None)
    wanted = target / target.sum(1, keepdim=True)
    want = (torch.xlogy(wanted, wanted) - wanted * share.clamp(min=1e-30).log()).sum() / 3
    got = attention_alignment_loss(logs, target, keys, options).loss
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][keys].any()
    scaled = attention_log_scores(weights * torch.tensor([[0.1], [1.0], [7.0]]), keys)
    torch.testing.assert_close(scaled, logs)


def test_weights_of_zero_stay_finite() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    keys = torch.ones(2, 3, dtype=torch.bool)
    loss = attention_alignment_loss(attention_log_scores(weights, keys), torch.rand(2, 3) + 0.1, keys).loss
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, weights)[0]).all()


def test_the_first_positions_are_the_published_keys() -> None:
    states = torch.randn(2, 9, 4)
    found, keys = first_positions_keys(states, torch.tensor([6, 6]))
    assert torch.equal(found, states[:, :6]) and keys.shape == (2, 6) and keys.all()


def test_a_length_mismatch_raises_where_the_published_code_counts_zero() -> None:
    states, mask = torch.randn(2, 9, 4), torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    with pytest.raises(ValueError, match=rf"row 0 has 10 values .* 9 tokens.*attention_keys: image.*{REMEDY}"):
        first_positions_keys(states, torch.tensor([10, 10]))
    with pytest.raises(ValueError, match=rf"row 1 has 8 values .* 7 tokens.*{REMEDY}"):
        first_positions_keys(states, torch.tensor([8, 8]), mask)
    with pytest.raises(ValueError, match=rf"row 1 has 4 values of the teacher, row 0 6: .*{REMEDY}"):
        first_positions_keys(states, torch.tensor([6, 4]), mask)
    assert first_positions_keys(states, torch.tensor([7, 7]), mask)[0].shape == (2, 7, 4)


def test_docstrings() -> None:
    assert doctest.testmod(attention_alignment).failed == 0
