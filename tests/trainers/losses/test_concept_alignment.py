"""Concept alignment: value by value in plain Python beside the tensor form, invariances, and bad input."""

from __future__ import annotations

import doctest

import pytest
import torch

from trainers.losses import concept_alignment
from trainers.losses.concept_alignment import concept_alignment_loss


def naive_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Row by row, in the words of section 4.2 of the card."""
    losses = []
    for u, rows in zip(predicted, target, strict=True):
        c = sum(rows) / len(rows) if rows.dim() == 2 else rows
        norms = [sum(x * x for x in v) ** 0.5 for v in (u, c)]
        norms = [norm if norm > 1e-8 else 1e-8 for norm in norms]
        losses.append(1 - sum(a * b for a, b in zip(u, c, strict=True)) / (norms[0] * norms[1]))
    return sum(losses) / len(losses)


def batch(pooled: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randn(4, 5, dtype=dtype) if pooled else torch.randn(4, 3, 5, dtype=dtype)
    return torch.randn(4, 5, dtype=dtype, requires_grad=True), target


@pytest.mark.parametrize("pooled", [True, False])
def test_equals_the_naive_form(pooled: bool) -> None:
    predicted, target = batch(pooled)
    output, want = concept_alignment_loss(predicted, target), naive_loss(predicted, target)
    torch.testing.assert_close(output.loss, want)
    got, wanted = (torch.autograd.grad(loss, predicted)[0] for loss in (output.loss, want))
    torch.testing.assert_close(got, wanted)
    assert got.abs().max() > 1e-3 and output.count.item() == 4
    torch.testing.assert_close(output.cosine_sum, (4 * (1 - want)).detach())
    assert not output.cosine_sum.requires_grad


def test_padding_and_scale_of_a_target_change_nothing() -> None:
    predicted, target = batch(pooled=False)
    want = concept_alignment_loss(predicted, target).loss
    padded = torch.cat([target, torch.zeros(4, 6, 5, dtype=target.dtype)], 1)
    scales = torch.tensor([1e-3, 0.5, 3.0, 1e4], dtype=target.dtype)[:, None]
    for same in (padded, target * scales[..., None], target.mean(1), target.mean(1) * scales):
        torch.testing.assert_close(concept_alignment_loss(predicted, same).loss, want)


def test_a_target_of_zeros_gives_one_and_no_gradient() -> None:
    predicted, _ = batch(pooled=True)
    output = concept_alignment_loss(predicted, torch.zeros(4, 5))
    assert output.loss.item() == 1 and not torch.autograd.grad(output.loss, predicted)[0].any()


def test_losses_and_counts_add_up_over_micro_batches() -> None:
    predicted, target = batch(pooled=False)
    whole = concept_alignment_loss(predicted, target)
    parts = [concept_alignment_loss(predicted[i:j], target[i:j]) for i, j in ((0, 1), (1, 4))]
    assert [part.count.item() for part in parts] == [1, 3]
    torch.testing.assert_close(sum(part.loss * part.count for part in parts) / whole.count, whole.loss)


def test_no_rows_give_zero_with_its_graph() -> None:
    predicted = torch.randn(0, 5, requires_grad=True)
    output = concept_alignment_loss(predicted, torch.zeros(0, 5))
    assert output.loss.item() == 0 and output.count.item() == 0 and output.loss.requires_grad
    output.loss.backward()


def test_half_precision_is_computed_in_float32() -> None:
    predicted, target = (tensor.bfloat16() for tensor in batch(pooled=False, dtype=torch.float32))
    output = concept_alignment_loss(predicted, target)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, concept_alignment_loss(predicted.float(), target.float()).loss)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (4, 3, 6), (5,), (4, 2, 2, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target \(\d.*concept_head_size"):
        concept_alignment_loss(torch.zeros(4, 5), torch.zeros(*shape))


def test_docstrings() -> None:
    assert doctest.testmod(concept_alignment).failed == 0
