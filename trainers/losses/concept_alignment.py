"""Concept alignment: the state behind a model's latent tokens predicts what a teacher saw in the image.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129.

A row is one sample. The final-norm hidden state at its last latent token goes through the model's concept head; the
cosine between the outcome and the mean of the teacher's states at the image tokens is to be 1.

| topic | paper | reference code | here |
|---|---|---|---|
| target | last layer, "interacts with the question" | before the final norm; no question in it | as the code |
| pooling | mean over the image | mean over the student's patches and the batch's padding | mean, here or before |
| target of zeros | | what a missing file gives: loss 1, no gradient | the same; readers refuse such files |

Only the direction of the mean counts, so zero rows that pad a target, and its scale, change nothing. The function
knows no model and no trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_COSINE_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class ConceptAlignment:
    """Result of the concept loss, all 0-dim tensors on the device of the inputs.

    Over micro-batches and ranks add `loss * count` and the counts, then divide; means of parts do not add up.

    Attributes:
        loss: Mean over the rows of one minus the cosine, float32 (float64 for float64 inputs). Exactly 0, with its
            graph, when there are no rows.
        count: Rows.
        cosine_sum: Sum of the cosines, without gradient.
    """

    loss: torch.Tensor
    count: torch.Tensor
    cosine_sum: torch.Tensor


def concept_alignment_loss(predicted: torch.Tensor, target: torch.Tensor) -> ConceptAlignment:
    """One minus the cosine of prediction and teacher, mean over the rows (card of LaViT, section 4.2).

    Args:
        predicted (`torch.Tensor` of shape `(R, D)`): What the concept head makes of the state at the last latent
            token; any float type, used in float32. `D` is the teacher's width.
        target (`torch.Tensor` of shape `(R, D)` or `(R, M, D)`): The teacher's mean, or its states, of which the mean
            over `M` is taken.

    Returns:
        `ConceptAlignment`. Each norm counts as 1e-8 at least, so a target of zeros gives loss 1 and no gradient.

    Raises:
        ValueError: If the numbers of rows or the widths differ.

    Example:
        >>> states = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> out = concept_alignment_loss(torch.eye(2), states)
        >>> out.loss.item(), out.count.item(), out.cosine_sum.item()
        (0.5, 2, 1.0)
    """
    if (
        predicted.dim() != 2
        or target.dim() not in (2, 3)
        or target.shape[0] != predicted.shape[0]
        or target.shape[-1] != predicted.shape[-1]
    ):
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}, target {tuple(target.shape)}: give (R, D) and (R, D) or "
            "(R, M, D) with the same D; a head for a teacher of another width is another concept_head_size"
        )
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    target = target.to(dtype)
    pooled = target.mean(1) if target.dim() == 3 else target
    cosine = F.cosine_similarity(predicted.to(dtype), pooled, dim=-1, eps=_COSINE_EPS)
    count = torch.full((), predicted.shape[0], device=predicted.device)
    return ConceptAlignment((1 - cosine).sum() / count.clamp(min=1), count, cosine.detach().sum())


__all__ = ["ConceptAlignment", "concept_alignment_loss"]
