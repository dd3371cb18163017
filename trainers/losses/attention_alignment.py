"""Attention alignment: where in the image a model's latent tokens look is to be where a teacher looked.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129, there the trajectory loss.

A row is one sample: the score of each of its image tokens, either of a head (query from the state at the last latent
token, image states as keys) or of the model's own attention ([`attention_log_scores`]), and the teacher's attention on
the same image tokens. The loss is the Kullback-Leibler divergence of the scores' softmax from the target.

| topic | paper | reference code | here |
|---|---|---|---|
| keys | image tokens | the first `h * w` positions, whatever stands there | image tokens; [`first_positions_keys`] |
| grid of the target | image tokens | patches, four times as many | image tokens |
| target | distribution, 8 largest | values from 0 to 1 with any sum | the 8 largest, divided by their sum |
| more values than keys | | the exception is dropped: loss 0, on all real images | raises |

`AttentionAlignmentOptions.reference()` gives the reference code's target. All functions know no model and no trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_REMEDY = "set attention_loss_weight: 0 for what the published code does"


def _require(ok: bool, option: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{option}={value!r} is not valid: {remedy}.")


@dataclass(frozen=True)
class AttentionAlignmentOptions:
    """Options of the attention loss. A wrong value raises `ValueError` with the option, the value and the remedy.

    Args:
        top_k (`int`, *optional*, defaults to 8): Entries of a target that count: its largest ones, of equal ones those
            of lower index. `None`: all.
        normalise (`bool`, defaults to `True`): Whether a target is divided by its sum (after `top_k`). With `False`,
            as in the reference code, the loss grows with the sum of the target and is no divergence.

    Example:
        >>> AttentionAlignmentOptions(top_k=0)
        Traceback (most recent call last):
        ValueError: top_k=0 is not valid: give an integer of at least 1, or None for all entries.
    """

    top_k: int | None = 8
    normalise: bool = True

    def __post_init__(self) -> None:
        integer = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        ok = self.top_k is None or (integer and self.top_k >= 1)
        _require(ok, "top_k", self.top_k, "give an integer of at least 1, or None for all entries")
        _require(isinstance(self.normalise, bool), "normalise", self.normalise, "give True or False")

    @classmethod
    def reference(cls) -> AttentionAlignmentOptions:
        """Targets as the reference code takes them: dense, and not divided by their sum."""
        return cls(top_k=None, normalise=False)


@dataclass(frozen=True, eq=False)
class AttentionAlignment:
    """Result of the attention loss, all 0-dim tensors on the device of the inputs.

    `loss = kl_sum / count`, 0 without rows. Over micro-batches and ranks add sums and counts, then divide.

    Attributes:
        loss: Mean over the rows, float32 (float64 for float64 inputs). Exactly 0, with its graph, without rows.
        count: Rows.
        kl_sum: Sum over the rows, with gradient.
        entropy_sum: Sum of the entropies of the predicted distributions, in nats, without gradient.
        overlap_sum: Sum of what prediction and target (divided by its sum) have in common, `sum_j min(p_j, t_j)`, from
            0 to 1 a row, without gradient.
    """

    loss: torch.Tensor
    count: torch.Tensor
    kl_sum: torch.Tensor
    entropy_sum: torch.Tensor
    overlap_sum: torch.Tensor


def attention_alignment_loss(
    scores: torch.Tensor,
    target: torch.Tensor,
    keys: torch.Tensor,
    options: AttentionAlignmentOptions | None = None,
) -> AttentionAlignment:
    """`sum_j t_j (ln t_j - ln softmax(s)_j)` over the keys of a row, mean over the rows (card of LaViT, 4.3 and 4.7).

    On an accelerator the check of the targets synchronises once.

    Args:
        scores (`torch.Tensor` of shape `(R, N)`): Logits of the image tokens; any float type, used in float32.
        target (`torch.Tensor` of shape `(R, N)`): The teacher's attention, 0 or more; 0 where a row has no key.
        keys (`torch.Tensor` of shape `(R, N)`, bool): Which of the `N` places a row has; the others are padding, their
            scores are not read.
        options (`AttentionAlignmentOptions`, *optional*): What is made of the target.

    Returns:
        `AttentionAlignment`.

    Raises:
        ValueError: If shapes differ, a row has no key, or a target has values outside its row's keys, negative values,
            NaN, or none above 0; names the row. Only [`AttentionAlignmentOptions.reference`] lets a target of zeros
            pass: its loss is 0, as in the reference code, which puts zeros where a file is missing.

    Example:
        >>> keys = torch.tensor([[True, True, False]])
        >>> out = attention_alignment_loss(torch.zeros(1, 3), torch.tensor([[0.9, 0.1, 0.0]]), keys)
        >>> round(out.loss.item(), 4), round(out.overlap_sum.item(), 4)
        (0.3681, 0.6)
    """
    options = options or AttentionAlignmentOptions()
    if scores.dim() != 2 or scores.shape != target.shape:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}, target {tuple(target.shape)}: every key needs one value of the "
            f"teacher; resize the target to the grid of the keys, or {_REMEDY}."
        )
    if keys.shape != scores.shape or keys.dtype != torch.bool:
        raise ValueError(f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}: give bool of shape (R, N).")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    target = target.detach().to(dtype)
    _check_targets(target, keys, options)
    wanted = target if options.top_k is None else _keep_largest(target, options.top_k)
    share = wanted / wanted.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    wanted = share if options.normalise else wanted
    log_probs = scores.to(dtype).masked_fill(~keys, -torch.inf).log_softmax(1).masked_fill(~keys, 0.0)
    kl_sum = (torch.xlogy(wanted, wanted) - wanted * log_probs).sum()
    count = torch.full((), scores.shape[0], device=scores.device)
    with torch.no_grad():
        probs = log_probs.exp().masked_fill(~keys, 0.0)
        entropy_sum, overlap_sum = -(probs * log_probs).sum(), torch.minimum(probs, share).sum()
    return AttentionAlignment(kl_sum / count.clamp(min=1), count, kl_sum, entropy_sum, overlap_sum)


def _check_targets(target: torch.Tensor, keys: torch.Tensor, options: AttentionAlignmentOptions) -> None:
    """Refuse what gives no distribution, by row."""
    empty = ~keys.any(1)
    outside = (target.masked_fill(keys, 0.0) != 0).any(1)
    total = target.sum(1)
    wrong = (target < 0).any(1) | ~total.isfinite()
    zero = total == 0
    if options == AttentionAlignmentOptions.reference():
        zero = torch.zeros_like(zero)
    bad = empty | outside | wrong | zero
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    if empty[row]:
        raise ValueError(f"row {row} has no image token to look at: give every sample an image, or {_REMEDY}.")
    if outside[row]:
        raise ValueError(
            f"row {row} has {int(keys[row].sum())} keys, and its target has values at other places: resize the target "
            f"to the grid of the keys, or {_REMEDY}."
        )
    if wrong[row]:
        raise ValueError(f"row {row}: the target is negative or not finite somewhere; extract this sample anew.")
    raise ValueError(f"row {row}: the target sums to zero, so nothing can be aligned; extract this sample anew.")


def _keep_largest(target: torch.Tensor, top_k: int) -> torch.Tensor:
    """Zeros beside the `top_k` largest values of each row; of equal values those of lower index stay."""
    largest = target.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(target).scatter(1, largest, target.gather(1, largest))


def attention_log_scores(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The model's own attention as scores for [`attention_alignment_loss`]: divided by its sum over the keys, as log.

    Args:
        weights (`torch.Tensor` of shape `(R, N)`): Attention probabilities of a row's query on its image tokens, for
            instance the mean over layers and heads; 0 or more, with any sum. Gradients flow through.
        keys (`torch.Tensor` of shape `(R, N)`, bool): Which of the `N` places a row has.

    Returns:
        `torch.Tensor` of shape `(R, N)`: logs of a distribution over the keys, float32 (float64 for float64 inputs);
        minus infinity where there is no key.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> attention_log_scores(torch.tensor([[0.2, 0.2, 0.5]]), torch.tensor([[True, True, False]])).exp().tolist()
        [[0.5, 0.5, 0.0]]
    """
    if weights.dim() != 2 or keys.shape != weights.shape or keys.dtype != torch.bool:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, keys {tuple(keys.shape)} and dtype {keys.dtype}: give (R, N), "
            "keys as bool."
        )
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    logs = weights.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
    return logs.masked_fill(~keys, -torch.inf).log_softmax(1)


def first_positions_keys(
    hidden_states: torch.Tensor, lengths: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the reference code: the first positions of a sequence, as many as its image has patches.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, H)`): Final-norm states of a batch padded on the right.
        lengths (`torch.Tensor` of shape `(B,)`): Values of each target, `h * w` of the patch grid.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 at a row's own tokens; default: all are.

    Returns:
        States `(B, P, H)` and the mask `(B, P)` of keys for [`attention_alignment_loss`], here all true.

    Raises:
        ValueError: Where the reference code counts 0 instead, for the whole batch: an image has more patches than its
            sequence has tokens, as nearly all have, or the images of the batch differ in their number. Names the row.

    Example:
        >>> states, keys = first_positions_keys(torch.zeros(2, 9, 4), torch.tensor([6, 6]))
        >>> tuple(states.shape), tuple(keys.shape)
        ((2, 6, 4), (2, 6))
        >>> first_positions_keys(torch.zeros(1, 9, 4), torch.tensor([16]))
        Traceback (most recent call last):
        ValueError: row 0 has 16 values of the teacher and a sequence of 9 tokens: take image tokens as keys \
(attention_keys: image), or set attention_loss_weight: 0 for what the published code does.
    """
    counts = lengths.tolist()
    tokens = [hidden_states.shape[1]] * len(counts) if attention_mask is None else attention_mask.sum(1).tolist()
    for row, (count, length) in enumerate(zip(counts, tokens, strict=True)):
        if count > length:
            raise ValueError(
                f"row {row} has {count} values of the teacher and a sequence of {length} tokens: take image tokens as "
                f"keys (attention_keys: image), or {_REMEDY}."
            )
        if count != counts[0]:
            raise ValueError(
                f"row {row} has {count} values of the teacher, row 0 {counts[0]}: train batches of one sample, take "
                f"image tokens as keys (attention_keys: image), or {_REMEDY}."
            )
    width = counts[0] if counts else 0
    states = hidden_states[:, :width]
    return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


__all__ = [
    "AttentionAlignment",
    "AttentionAlignmentOptions",
    "attention_alignment_loss",
    "attention_log_scores",
    "first_positions_keys",
]
