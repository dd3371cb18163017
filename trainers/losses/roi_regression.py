"""ROI regression: the hidden state that predicts a latent is trained toward the embedding of a region's image token.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251.

A row is one latent position `p`. It is fed the embedding of an image token of the region; the final-norm hidden state
one position earlier, at `p - 1`, is what would be fed there at inference, so it is regressed on that embedding. A
model with a latent head feeds `head(h)` and is regressed on that ([`apply_latent_head`]).

| topic | paper | reference code | here |
|---|---|---|---|
| scale of `mse` | sum over the hidden size | mean over the hidden size | mean (the weight 0.1 belongs to it) |
| average | over the latents | over the latents of the micro-batch | both; `row_average="example"`: by sample |
| no latent | | NaN, or a crash | 0, with its graph |
| target | | not detached (the tower is frozen) | not detached; pass `targets.detach()` for a trained merger |

The functions know no model and no trainer. Hidden states meet no LM head here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .rows import select_rows

IGNORE_INDEX = -100
REGRESSION_LOSSES = ("mse", "mae", "cosine")
ROW_AVERAGES = ("flat", "example")
_COSINE_EPS = 1e-8


def _require(ok: bool, option: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{option}={value!r} is not valid: {remedy}.")


@dataclass(frozen=True)
class RoiRegressionOptions:
    """Options of the ROI regression. A wrong value raises `ValueError` with the option, the value and the remedy.

    Args:
        loss_type (`str`, defaults to `"mse"`): `"mse"`, `"mae"` or `"cosine"`, see [`regression_rows`].
        row_average (`str`, defaults to `"flat"`): Mean over all latents of the batch, as in the reference code, so
            that a long region weighs more; or `"example"`: mean over the latents of each sample, then over samples.

    Example:
        >>> RoiRegressionOptions(loss_type="l2")
        Traceback (most recent call last):
        ValueError: loss_type='l2' is not valid: choose one of mse, mae, cosine.
    """

    loss_type: str = "mse"
    row_average: str = "flat"

    def __post_init__(self) -> None:
        losses, averages = ", ".join(REGRESSION_LOSSES), ", ".join(ROW_AVERAGES)
        _require(self.loss_type in REGRESSION_LOSSES, "loss_type", self.loss_type, f"choose one of {losses}")
        _require(self.row_average in ROW_AVERAGES, "row_average", self.row_average, f"choose one of {averages}")


@dataclass(frozen=True, eq=False)
class RoiRows:
    """The latents of a batch in row-major order (`N` rows). All on one device.

    Attributes:
        batch_index (`torch.Tensor` of shape `(N,)`): Sequence of each row.
        position (`torch.Tensor` of shape `(N,)`): Position `p` of the latent; what predicts it is at `p - 1`.
        sample_index (`torch.Tensor` of shape `(N,)`): Sample of each row, numbered from 0: the sequence, unless
            several samples are packed into one.
        num_samples (`int`): Above the largest sample number.
        shape (`tuple[int, int]`): `(B, S)` of the batch.
    """

    batch_index: torch.Tensor
    position: torch.Tensor
    sample_index: torch.Tensor
    num_samples: int
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.position.shape[0]

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, S, D)` at the positions that predict the latents: `(N, D)`."""
        return select_rows(states, self.shape, self.batch_index, self.position - 1)


def find_roi_rows(latent_mask: torch.Tensor, sample_ids: torch.Tensor | None = None) -> RoiRows:
    """Find the rows of a batch from where its latents are. On an accelerator this synchronises once.

    Args:
        latent_mask (`torch.Tensor` of shape `(B, S)`, bool): Positions fed by a latent, usually
            `input_ids == latent_token_id`.
        sample_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Number of the sample of each position, from 0 in
            each sequence, when several samples are packed into one sequence.

    Raises:
        ValueError: If `latent_mask` is not a 2-D bool tensor, position 0 of a sequence is a latent (nothing predicts
            it), or `sample_ids` has another shape or a number outside 0 to S - 1.

    Example:
        >>> rows = find_roi_rows(torch.tensor([[7, 3, 9, 9, 5], [3, 9, 5, 0, 0]]) == 9)
        >>> rows.batch_index.tolist(), rows.position.tolist()
        ([0, 0, 1], [2, 3, 1])
    """
    if latent_mask.dim() != 2 or latent_mask.dtype != torch.bool:
        shape = tuple(latent_mask.shape)
        raise ValueError(f"latent_mask has shape {shape} and dtype {latent_mask.dtype}: give bool (batch, length).")
    if sample_ids is not None and sample_ids.shape != latent_mask.shape:
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, expected {tuple(latent_mask.shape)}.")
    batch, length = latent_mask.shape
    flat = latent_mask.flatten().nonzero()[:, 0]
    batch_index, position = flat // max(length, 1), flat % max(length, 1)
    if bool((position == 0).any()):
        row = batch_index[position == 0][0].item()
        raise ValueError(f"position 0 of row {row} is a latent: a start token before it has to predict it.")
    if sample_ids is None:
        return RoiRows(batch_index, position, batch_index, batch, (batch, length))
    sample = sample_ids.flatten()[flat].long()
    if bool(((sample < 0) | (sample >= length)).any()):
        raise ValueError(f"sample_ids of the latents must be 0 to {length - 1}: number the samples in each sequence.")
    sample_index = batch_index * length + sample  # one number for a pair (sequence, sample)
    return RoiRows(batch_index, position, sample_index, batch * length, (batch, length))


def mask_latent_labels(labels: torch.Tensor, input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Labels `(B, S)` for the cross-entropy term: a copy with -100 where `input_ids` holds one of `token_ids`.

    `token_ids` are the latent token and, in the variants with a learned end vector, the latent-end token, whose
    positions are fed by vectors too (card, section 4.1). In the plain variants the latent-end token is trained.

    Example:
        >>> ids = torch.tensor([[3, 9, 9, 4, 5]])
        >>> mask_latent_labels(ids, ids, [9]).tolist()
        [[3, -100, -100, 4, 5]]
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(input_ids.shape)}.")
    fed = torch.isin(input_ids, torch.tensor(list(token_ids), device=input_ids.device))
    return labels.masked_fill(fed, IGNORE_INDEX)


def roi_token_index(
    region_index: torch.Tensor, region_counts: torch.Tensor, image_token_counts: torch.Tensor
) -> torch.Tensor:
    """Where the targets lie in the image embeddings of a whole batch (card, section 4.1).

    Made for the collator: integers on the CPU, checked here. In the forward,
    `image_embeds.index_select(0, index)` are the targets `(N, H)`, and what the latent positions are fed.

    Args:
        region_index (`torch.Tensor` of shape `(N,)`): Image tokens of all regions, sequence by sequence in the order
            of the latents, each counted from the first image token of its own sequence.
        region_counts (`torch.Tensor` of shape `(B,)`): Latents of each sequence; they add up to `N`.
        image_token_counts (`torch.Tensor` of shape `(B,)`): Image tokens of each sequence.

    Returns:
        `torch.Tensor` of shape `(N,)`: rows of the batch's image embeddings.

    Raises:
        ValueError: If the counts do not fit, or an index lies outside the image tokens of its own sequence.

    Example:
        >>> roi_token_index(torch.tensor([0, 3, 1]), torch.tensor([2, 1]), torch.tensor([4, 2])).tolist()
        [0, 3, 5]
    """
    if region_counts.shape != image_token_counts.shape:
        raise ValueError(
            f"region_counts has {region_counts.shape[0]} sequences and image_token_counts "
            f"{image_token_counts.shape[0]}: give one number a sequence."
        )
    if int(region_counts.sum()) != region_index.shape[0]:
        raise ValueError(
            f"region_counts adds up to {int(region_counts.sum())}, region_index has {region_index.shape[0]} entries: "
            "every latent needs one image token."
        )
    sequence = torch.repeat_interleave(torch.arange(len(region_counts), device=region_index.device), region_counts)
    limit = image_token_counts[sequence]
    outside = (region_index < 0) | (region_index >= limit)
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"row {int(sequence[row])}: image token {int(region_index[row])} of a region, but the row has "
            f"{int(limit[row])} image tokens: map the box with the grid of the image as it was processed."
        )
    offset = image_token_counts.cumsum(0) - image_token_counts
    return region_index + offset[sequence]


def apply_latent_head(
    hidden_states: torch.Tensor, rows: RoiRows, head: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """Hidden states with `head(h)` where a latent is predicted: the head's timing in training (card, section 4.1).

    The head is applied to the outputs that will be fed, at `p - 1` of every latent `p`; the last latent of a region
    stays raw, so that the LM head reads a plain hidden state there. In the variant with a learned end vector the
    latent-end positions count as latents: give `find_roi_rows` both.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, H)`): Final-norm output of the backbone; not changed.
        rows (`RoiRows`): Where the latents are.
        head: The latent head, a map of `(..., H)`; `None` returns `hidden_states` itself.

    Returns:
        `torch.Tensor` of shape `(B, S, H)`.
    """
    if head is None:
        return hidden_states
    states = head(rows.select(hidden_states)).to(hidden_states.dtype)
    return hidden_states.index_put((rows.batch_index, rows.position - 1), states)


@dataclass(frozen=True, eq=False)
class RegressionOutput:
    """Result of a regression loss, all 0-dim tensors on the device of the inputs.

    `loss = loss_sum / loss_count`, 0 where the count is 0. Over micro-batches and ranks add the sums and the counts,
    then divide; means of parts do not add up.

    Attributes:
        loss: Mean loss, float32 (float64 for float64 inputs). Exactly 0, with its graph, when there are no rows.
        loss_sum: Sum of the row losses (`row_average="example"`: of the samples' means), with gradient.
        loss_count: Rows, or samples that have rows.
        cosine_sum: Sum over the rows of the cosine of state and target, without gradient, whatever the loss.
        num_rows: Rows.
    """

    loss: torch.Tensor
    loss_sum: torch.Tensor
    loss_count: torch.Tensor
    cosine_sum: torch.Tensor
    num_rows: torch.Tensor


def _loss_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def regression_rows(states: torch.Tensor, targets: torch.Tensor, loss_type: str) -> torch.Tensor:
    """Loss of each row between `states` and `targets` `(N, H)`: `(N,)`, float32 or better.

    `mse`: mean over `H` of the squared difference. `mae`: mean over `H` of the absolute difference. `cosine`: one
    minus the cosine, with 1e-8 as the smallest norm. Gradients flow into both sides.

    Raises:
        ValueError: If the shapes differ, or for an unknown loss.
    """
    if states.dim() != 2 or states.shape != targets.shape:
        raise ValueError(
            f"states has shape {tuple(states.shape)}, targets {tuple(targets.shape)}: give one target (H,) for each "
            "hidden state that predicts a latent."
        )
    _require(loss_type in REGRESSION_LOSSES, "loss_type", loss_type, f"choose one of {', '.join(REGRESSION_LOSSES)}")
    dtype = _loss_dtype(states)
    states, targets = states.to(dtype), targets.to(dtype)
    if loss_type == "cosine":
        return 1 - F.cosine_similarity(states, targets, dim=-1, eps=_COSINE_EPS)
    difference = states - targets
    return (difference.square() if loss_type == "mse" else difference.abs()).mean(-1)


def regression_output(
    row_loss: torch.Tensor,
    states: torch.Tensor,
    targets: torch.Tensor,
    rows: RoiRows | None = None,
    row_average: str = "flat",
) -> RegressionOutput:
    """Average row losses `(N,)`, over all rows or sample by sample (which needs `rows`)."""
    num_rows = torch.full((), row_loss.shape[0], device=row_loss.device)
    loss_sum, count = row_loss.sum(), num_rows
    if row_average == "example":
        per_sample = row_loss.new_zeros(rows.num_samples).index_add_(0, rows.sample_index, torch.ones_like(row_loss))
        loss_sum, count = (row_loss / per_sample[rows.sample_index]).sum(), (per_sample > 0).sum()
    with torch.no_grad():
        cosine_sum = F.cosine_similarity(states.to(row_loss), targets.to(row_loss), dim=-1, eps=_COSINE_EPS).sum()
    return RegressionOutput(loss_sum / count.clamp(min=1), loss_sum, count, cosine_sum, num_rows)


def roi_regression_loss(
    states: torch.Tensor, targets: torch.Tensor, rows: RoiRows, options: RoiRegressionOptions | None = None
) -> RegressionOutput:
    """ROI regression between the states that predict latents and their targets (card, section 4.1).

    Args:
        states (`torch.Tensor` of shape `(N, H)`): `rows.select(hidden_states)`, through the latent head if the model
            has one; any float type, used in float32.
        targets (`torch.Tensor` of shape `(N, H)`): Image embeddings of the regions (see [`roi_token_index`]).
        rows (`RoiRows`): From `find_roi_rows`.
        options (`RoiRegressionOptions`, *optional*): The loss.

    Returns:
        `RegressionOutput`.

    Raises:
        ValueError: If the number of targets is not the number of latents, or the hidden sizes differ.

    Example:
        >>> rows = find_roi_rows(torch.tensor([[7, 3, 9, 9, 5]]) == 9)
        >>> output = roi_regression_loss(torch.zeros(2, 4), torch.tensor([[1.0] * 4, [3.0] * 4]), rows)
        >>> output.loss.item(), output.loss_sum.item(), output.loss_count.item()
        (5.0, 10.0, 2)
    """
    options = options or RoiRegressionOptions()
    if states.shape[0] != len(rows):
        raise ValueError(f"states has {states.shape[0]} rows, the batch {len(rows)} latents: pass rows.select(...).")
    row_loss = regression_rows(states, targets, options.loss_type)
    return regression_output(row_loss, states, targets, rows, options.row_average)
