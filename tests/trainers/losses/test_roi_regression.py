"""ROI regression: row by row in plain Python beside the tensor form, averages over parts, and bad input."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from modeling_latent.latent_heads import SimpleLatentHead
from tests.tiny import tiny_config
from trainers.losses import roi_regression
from trainers.losses.roi_regression import (
    REGRESSION_LOSSES,
    RoiRegressionOptions,
    apply_latent_head,
    find_roi_rows,
    mask_latent_labels,
    regression_rows,
    roi_regression_loss,
    roi_token_index,
)

LATENT = 9
IDS = torch.tensor([[7, 3, 9, 9, 5, 3, 9, 5], [3, 9, 9, 9, 9, 5, 8, 0], [7, 8, 6, 2, 1, 0, 0, 0]])
BY_SAMPLE = RoiRegressionOptions(row_average="example")


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    torch.manual_seed(seed)
    rows = find_roi_rows(IDS == LATENT)
    hidden = torch.randn(*IDS.shape, 6, dtype=dtype, requires_grad=True)
    targets = torch.randn(len(rows), 6, dtype=dtype, requires_grad=True)
    return rows, hidden, targets


def naive_loss(hidden: torch.Tensor, targets: torch.Tensor, options: RoiRegressionOptions) -> torch.Tensor:
    """Position by position, in the words of section 4.1 of the card."""
    remaining, samples = list(targets), []
    for b, ids in enumerate(IDS.tolist()):
        values = []
        for p, token in enumerate(ids):
            if token != LATENT:
                continue
            x, v = hidden[b, p - 1], remaining.pop(0)
            if options.loss_type == "mse":
                values.append(sum((x - v) ** 2) / len(x))
            elif options.loss_type == "mae":
                values.append(sum(abs(x - v)) / len(x))
            else:
                values.append(1 - sum(x * v) / (sum(x * x) ** 0.5 * sum(v * v) ** 0.5))
        if values:
            samples.append(values)
    if options.row_average == "example":
        return sum(sum(values) / len(values) for values in samples) / len(samples)
    return sum(sum(values) for values in samples) / sum(map(len, samples))


@pytest.mark.parametrize("loss_type", REGRESSION_LOSSES)
@pytest.mark.parametrize("row_average", ["flat", "example"])
def test_equals_the_naive_form(loss_type: str, row_average: str) -> None:
    rows, hidden, targets = batch()
    options = RoiRegressionOptions(loss_type, row_average)
    output = roi_regression_loss(rows.select(hidden), targets, rows, options)
    want = naive_loss(hidden, targets, options)
    torch.testing.assert_close(output.loss, want)
    for got, wanted in zip(
        torch.autograd.grad(output.loss, [hidden, targets]), torch.autograd.grad(want, [hidden, targets]), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    assert output.loss_count.item() == (7 if row_average == "flat" else 2) and output.num_rows.item() == 7
    cosine = F.cosine_similarity(rows.select(hidden), targets, dim=-1).sum()
    torch.testing.assert_close(output.cosine_sum, cosine.detach())


@pytest.mark.parametrize("options", [RoiRegressionOptions(), RoiRegressionOptions("cosine"), BY_SAMPLE])
def test_sums_and_counts_add_up_over_micro_batches(options: RoiRegressionOptions) -> None:
    rows, hidden, targets = batch()
    whole = roi_regression_loss(rows.select(hidden), targets, rows, options)
    parts = []
    for b in range(len(IDS)):
        part = find_roi_rows(IDS[b : b + 1] == LATENT)
        states = part.select(hidden[b : b + 1])
        parts.append(roi_regression_loss(states, targets[rows.batch_index == b], part, options))
    assert sum(part.loss_count for part in parts) == whole.loss_count
    torch.testing.assert_close(sum(part.loss_sum for part in parts) / whole.loss_count, whole.loss)


def test_packed_samples_weigh_as_unpacked_ones() -> None:
    rows, hidden, targets = batch()
    want = roi_regression_loss(rows.select(hidden), targets, rows, BY_SAMPLE)
    sample_ids = torch.arange(len(IDS)).repeat_interleave(IDS.shape[1])[None]
    packed = find_roi_rows(IDS.reshape(1, -1) == LATENT, sample_ids)
    states = packed.select(hidden.reshape(1, -1, hidden.shape[-1]))
    got = roi_regression_loss(states, targets, packed, BY_SAMPLE)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.loss_count == want.loss_count == 2


@pytest.mark.parametrize("loss_type", REGRESSION_LOSSES)
@pytest.mark.parametrize("row_average", ["flat", "example"])
def test_a_batch_without_latents_gives_zero_with_its_graph(loss_type: str, row_average: str) -> None:
    ids = torch.tensor([[7, 3, 5, 8]])
    rows = find_roi_rows(ids == LATENT)
    head = SimpleLatentHead(tiny_config().get_text_config())
    hidden = torch.randn(1, 4, 64, requires_grad=True)
    states = apply_latent_head(hidden, rows, head)
    options = RoiRegressionOptions(loss_type, row_average)
    output = roi_regression_loss(rows.select(states), hidden[0, :0], rows, options)
    assert output.loss.item() == 0 and output.loss_count.item() == 0
    output.loss.backward()
    assert not hidden.grad.any() and all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_head_is_written_where_a_latent_is_predicted_and_nowhere_else() -> None:
    rows, hidden, _ = batch(dtype=torch.float32)
    before = hidden.detach().clone()
    states = apply_latent_head(hidden, rows, lambda x: 2 * x)
    predicts = (IDS == LATENT).roll(-1, dims=1)
    assert torch.equal(states[predicts], 2 * hidden[predicts])
    assert torch.equal(states[~predicts], hidden[~predicts]) and torch.equal(hidden, before)
    states.sum().backward()
    assert torch.equal(hidden.grad[predicts], torch.full((7, 6), 2.0)) and (hidden.grad[~predicts] == 1).all()
    assert apply_latent_head(hidden, rows, None) is hidden


def test_half_precision_is_computed_in_float32() -> None:
    rows, hidden, targets = batch(dtype=torch.float32)
    half = roi_regression_loss(rows.select(hidden).bfloat16(), targets.bfloat16(), rows)
    want = roi_regression_loss(rows.select(hidden).bfloat16().float(), targets.bfloat16().float(), rows)
    assert half.loss.dtype == torch.float32 and torch.equal(half.loss, want.loss)
    assert apply_latent_head(hidden.bfloat16(), rows, torch.nn.Identity().float()).dtype == torch.bfloat16


def test_zero_vectors_have_a_finite_cosine() -> None:
    states = torch.zeros(2, 3, requires_grad=True)
    regression_rows(states, torch.ones(2, 3), "cosine").sum().backward()
    assert torch.isfinite(states.grad).all()


def test_labels_of_fed_positions() -> None:
    labels = IDS.masked_fill(IDS == 0, -100)
    masked = mask_latent_labels(labels, IDS, [LATENT, 5])
    fed = (IDS == LATENT) | (IDS == 5)
    assert (masked[fed] == -100).all() and torch.equal(masked[~fed], labels[~fed])


def test_bad_input_is_refused() -> None:
    rows, hidden, targets = batch()
    states = rows.select(hidden)
    with pytest.raises(ValueError, match="row_average='sample' is not valid: choose one of flat, example"):
        RoiRegressionOptions(row_average="sample")
    with pytest.raises(ValueError, match="position 0 of row 1 is a latent"):
        find_roi_rows(torch.tensor([[3, 9], [9, 5]]) == LATENT)
    with pytest.raises(ValueError, match="give bool"):
        find_roi_rows(IDS)
    with pytest.raises(ValueError, match="sample_ids of the latents must be 0 to 7"):
        find_roi_rows(IDS == LATENT, torch.full_like(IDS, 8))
    with pytest.raises(ValueError, match="pass the rows' own batch"):
        rows.select(hidden[:, 1:])
    with pytest.raises(ValueError, match=r"targets \(6, 6\)"):
        roi_regression_loss(states, targets[1:], rows)
    with pytest.raises(ValueError, match="states has 6 rows, the batch 7 latents"):
        roi_regression_loss(states[1:], targets[1:], rows)
    with pytest.raises(ValueError, match="loss_type='l1'"):
        regression_rows(states, targets, "l1")


@pytest.mark.parametrize(
    ("index", "counts", "tokens", "message"),
    [
        ([0, 4, 1], [2, 1], [4, 2], r"row 0: image token 4 of a region, but the row has 4 image tokens"),
        ([0, 1, -1], [2, 1], [4, 2], r"row 1: image token -1 of a region, but the row has 2 image tokens"),
        ([0, 1], [2, 1], [4, 2], "region_counts adds up to 3, region_index has 2 entries"),
        ([0, 1, 0], [2, 1], [4], "region_counts has 2 sequences and image_token_counts 1"),
    ],
)
def test_region_indices_outside_their_row_are_refused(index: list, counts: list, tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roi_token_index(torch.tensor(index), torch.tensor(counts), torch.tensor(tokens))


def test_docstrings() -> None:
    assert doctest.testmod(roi_regression).failed == 0
