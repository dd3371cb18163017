"""Stop losses of LVR: which positions are rows, one column of the head, and the end vector."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from trainers.losses import mode_switch
from trainers.losses.mode_switch import (
    end_token_logits,
    find_mode_switch_rows,
    latent_end_loss,
    mode_switch_loss,
)

START, LATENT, LATENT_END, END = 3, 9, 4, 5
TOKENS = {"start_id": START, "latent_id": LATENT, "end_id": END}
IDS = torch.tensor([[7, 3, 9, 9, 5, 3, 5, 8], [0, 0, 3, 9, 9, 9, 5, 8]])


def test_rows_are_start_and_latents_and_the_last_one_is_the_target() -> None:
    rows = find_mode_switch_rows(IDS, **TOKENS)
    found = list(zip(rows.batch_index.tolist(), rows.position.tolist(), rows.target.tolist(), strict=True))
    want = [(0, 1, False), (0, 2, False), (0, 3, True), (0, 5, True)]
    want += [(1, 2, False), (1, 3, False), (1, 4, False), (1, 5, True)]
    assert found == want


def test_a_region_that_is_cut_off_has_no_target() -> None:
    cut = torch.tensor([[7, 3, 9, 9], [3, 9, 0, 0]])
    mask = (cut != 0).long()
    rows = find_mode_switch_rows(cut, **TOKENS, attention_mask=mask)
    assert rows.position.tolist() == [1, 2, 0] and not rows.target.any()
    published = find_mode_switch_rows(cut, **TOKENS, reference=True)
    assert published.position.tolist() == [1, 2, 3, 0, 1] and not published.target.any()


def test_a_layout_that_cannot_be_learned_is_refused() -> None:
    ids = torch.tensor([[7, 3, 9, 9, 5, 8], [3, 9, 9, LATENT_END, 5, 8]])
    with pytest.raises(ValueError, match="row 1: the region that ends at position 2 is closed by token 4") as error:
        find_mode_switch_rows(ids, **TOKENS)
    assert "latent_end_in_text=False" in str(error.value)
    assert find_mode_switch_rows(ids, **TOKENS, reference=True).target.tolist() == [False, False, True] + [False] * 3
    with pytest.raises(ValueError, match="three different ids"):
        find_mode_switch_rows(ids, START, LATENT, LATENT)


@pytest.mark.parametrize("bias", [False, True])
def test_one_column_of_the_head_gives_the_loss_of_all_logits(bias: bool) -> None:
    torch.manual_seed(0)
    rows = find_mode_switch_rows(IDS, **TOKENS)
    tensors = [torch.randn(2, 8, 6), torch.randn(11, 6), torch.randn(11)]
    hidden, weight, offset = (t.double().requires_grad_() for t in tensors)
    leaves = [hidden, weight, *([offset] if bias else [])]
    logits = end_token_logits(rows.select(hidden), weight, END, offset if bias else None)
    output = mode_switch_loss(logits, rows.target)
    full = F.linear(hidden, weight, offset if bias else None)[rows.batch_index, rows.position, END]
    want = F.binary_cross_entropy_with_logits(full, rows.target.double())
    torch.testing.assert_close(output.loss, want)
    got, wanted = torch.autograd.grad(output.loss, leaves), torch.autograd.grad(want, leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert got[1].abs().sum(-1).nonzero().flatten().tolist() == [END]
    says = full > 0
    assert output.hit_count == (says & rows.target).sum() and output.false_count == (says & ~rows.target).sum()
    assert output.num_rows == 8 and output.num_ends == 3
    torch.testing.assert_close(output.loss_sum / output.num_rows, output.loss)


def test_the_targets_can_be_learned() -> None:
    """A linear reading of states that tell the last latent apart finds every end and leaves no region early."""
    torch.manual_seed(0)
    rows = find_mode_switch_rows(IDS, **TOKENS)
    states = torch.randn(len(rows), 4)
    states[:, 0] = rows.target.float() * 2 - 1
    weight = torch.zeros(11, 4, requires_grad=True)
    for _ in range(200):
        loss = mode_switch_loss(end_token_logits(states, weight, END), rows.target).loss
        weight.data -= 1.0 * torch.autograd.grad(loss, weight)[0]
    output = mode_switch_loss(end_token_logits(states, weight, END), rows.target)
    assert output.hit_count == output.num_ends == 3 and output.false_count == 0


def test_a_batch_without_regions_gives_zero_with_its_graph() -> None:
    ids = torch.tensor([[7, 8, 8, 1]])
    rows = find_mode_switch_rows(ids, **TOKENS)
    hidden, weight, vector = (torch.randn(*s, requires_grad=True) for s in [(1, 4, 6), (11, 6), (6,)])
    switch = mode_switch_loss(end_token_logits(rows.select(hidden), weight, END), rows.target)
    end = latent_end_loss(hidden[0, :0], vector)
    assert switch.loss.item() == 0 and switch.num_rows == 0 and end.loss.item() == 0 and end.loss_count == 0
    (switch.loss + end.loss).backward()
    assert all(t.grad is not None and not t.grad.any() for t in (hidden, weight, vector))


@pytest.mark.parametrize("loss_type", ["mse", "mae", "cosine"])
def test_end_vector_trains_both_sides(loss_type: str) -> None:
    torch.manual_seed(0)
    states, vector = torch.randn(3, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    output = latent_end_loss(states, vector, loss_type)
    forms = {
        "mse": F.mse_loss(states, vector.expand(3, 6)),
        "mae": F.l1_loss(states, vector.expand(3, 6)),
        "cosine": 1 - F.cosine_similarity(states, vector, dim=-1).mean(),
    }
    want = forms[loss_type]
    torch.testing.assert_close(output.loss, want)
    for got, wanted in zip(
        torch.autograd.grad(output.loss, [states, vector]), torch.autograd.grad(want, [states, vector]), strict=True
    ):
        assert got.any()
        torch.testing.assert_close(got, wanted)
    assert output.loss_count == output.num_rows == 3


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target \(2,\)"):
        mode_switch_loss(torch.zeros(3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"end_vector \(5,\)"):
        latent_end_loss(torch.zeros(3, 6), torch.zeros(5))
    with pytest.raises(ValueError, match="pass the rows' own batch"):
        find_mode_switch_rows(IDS, **TOKENS).select(torch.zeros(2, 7, 4))


def test_docstrings() -> None:
    assert doctest.testmod(mode_switch).failed == 0
