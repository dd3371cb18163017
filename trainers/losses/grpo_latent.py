"""GRPO_latent: the parts of group-relative policy optimisation that latents change. The rest is TRL's.

Papers: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2; for the Gaussian policy "Monet: Reasoning in Latent
Visual Space Beyond Images and Language", arXiv 2511.21395 (VLPO).

A completion holds text tokens, which the policy sampled, and latents, which it fed back. Replay puts the recorded
latents at their positions and takes the loss over the tokens that were sampled. Advantages, ratio, clipping, KL and
the reductions are those of `trl.GRPOTrainer`, which multiplies its completion mask by the mask made here.

| topic | reference code | here |
|---|---|---|
| end of a completion | first EOS id, that of a latent's placeholder too | first EOS that was sampled |
| positions out of the loss | from start to end tokens, by a scan of prompt and completion | recorded latents |
| start token | out of the loss | in it (`train_start_token=False` takes it out) |
| tokens that decoding wrote by force | in the loss | out of it (`forced_mask`) |

`reference_loss_mask` is the reference code's. Shapes: `B` completions, `P` prompt and `C` completion positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

GAUSSIAN_REDUCTIONS = ("mean", "sum")


# Which positions are trained ----------------------------------------------------------------------------------


def completion_mask_until_eos(
    completion_ids: torch.Tensor, eos_token_ids: int | Iterable[int], latent_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions up to and with the first EOS, and which completions have one (card, section 4.4).

    Args:
        completion_ids (`torch.Tensor` of shape `(B, C)`): Ids, padded on the right.
        eos_token_ids (`int` or ints): Ids that end a completion.
        latent_mask (`torch.Tensor` of shape `(B, C)`, bool, *optional*): Positions fed by latents: an EOS id there was
            never sampled and ends nothing. Without it, as in the reference code, it does.

    Returns:
        `(mask, terminated)`: bool `(B, C)` and `(B,)`. A completion without EOS is masked in over its whole length. To
        train on terminated completions only, as `mask_truncated_completions` does: `mask & terminated[:, None]`.

    Example:
        >>> mask, terminated = completion_mask_until_eos(torch.tensor([[4, 2, 2], [4, 4, 4]]), 2)
        >>> mask.int().tolist(), terminated.tolist()
        ([[1, 1, 0], [1, 1, 1]], [True, False])
    """
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    is_eos = torch.isin(completion_ids, torch.tensor(ids, device=completion_ids.device))
    if latent_mask is not None:
        is_eos = is_eos & ~_same_shape("latent_mask", latent_mask, completion_ids)
    before = is_eos.cumsum(1) - is_eos.int()
    return before == 0, is_eos.any(1)


def sampled_token_mask(
    completion_mask: torch.Tensor,
    latent_mask: torch.Tensor,
    completion_ids: torch.Tensor | None = None,
    start_id: int | None = None,
    *,
    train_start_token: bool = True,
    forced_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Positions that carry the token loss: sampled text, without latents (card, section 9.2).

    Args:
        completion_mask (`torch.Tensor` of shape `(B, C)`): From [`completion_mask_until_eos`], or 0 and 1.
        latent_mask (`torch.Tensor` of shape `(B, C)`, bool): Recorded latents (`trace.latent_mask` of the completion).
        completion_ids, start_id: Needed only for `train_start_token=False`.
        train_start_token (`bool`, defaults to `True`): Whether the token that opens a region is trained.
        forced_mask (`torch.Tensor` of shape `(B, C)`, bool, *optional*): Tokens that decoding wrote without asking the
            policy: a span forced open, an end marker at the cap, ids of a forced answer.

    Returns:
        bool `(B, C)`. The end token is trained where it was sampled.

    Raises:
        ValueError: If shapes differ, or ids are missing for `train_start_token=False`.

    Example:
        >>> ids = torch.tensor([[7, 3, 9, 9, 5, 8, 2, 0]])
        >>> mask, _ = completion_mask_until_eos(ids, 2)
        >>> sampled_token_mask(mask, ids == 9).int().tolist()
        [[1, 1, 0, 0, 1, 1, 1, 0]]
    """
    mask = completion_mask.bool() & ~_same_shape("latent_mask", latent_mask, completion_mask)
    if forced_mask is not None:
        mask = mask & ~_same_shape("forced_mask", forced_mask, completion_mask)
    if train_start_token:
        return mask
    if completion_ids is None or start_id is None:
        raise ValueError("train_start_token=False needs completion_ids and start_id: pass both.")
    return mask & (_same_shape("completion_ids", completion_ids, completion_mask, torch.long) != start_id)


def span_mask(input_ids: torch.Tensor, start_id: int, end_id: int) -> torch.Tensor:
    """Bool `(B, S)`: from each start token (inclusive) to the next end token (exclusive), or to the end of the row.

    Example:
        >>> span_mask(torch.tensor([[7, 3, 1, 3, 5, 8, 5, 3, 1]]), start_id=3, end_id=5).int().tolist()
        [[0, 1, 1, 1, 0, 0, 0, 1, 1]]
    """
    if start_id == end_id:
        raise ValueError(f"end_id={end_id!r} is the start token too: give two different ids.")
    is_start, is_end = input_ids == start_id, input_ids == end_id
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    last_start = (place * is_start).cummax(1).values
    last_end = (place * is_end).cummax(1).values
    return last_start > last_end


def reference_loss_mask(
    prompt_ids: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor, start_id: int, end_id: int
) -> torch.Tensor:
    """The reference code's token loss mask, found by a scan of the ids (card, section 4.4): bool `(B, C)`.

    The start token, every placeholder and a latent-end token are out, the end token is in. A placeholder that happens
    to be an end token opens the loss inside the region; a start token in the prompt shuts the completion out.
    """
    spans = span_mask(torch.cat([prompt_ids, completion_ids], dim=1), start_id, end_id)
    return completion_mask.bool() & ~spans[:, prompt_ids.shape[1] :]


def _same_shape(name: str, value: torch.Tensor, other: torch.Tensor, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(other.shape)} (batch, completion).")
    return value.to(dtype)


# Metrics that TRL defines in another way, or not at all ----------------------------------------------------------


def completion_metrics(completion_mask: torch.Tensor, terminated: torch.Tensor) -> dict[str, float]:
    """Lengths of completions as the reference logs them (card, section 4.4), over completions of all processes.

    TRL counts trained tokens only once it is given a mask of them. Here a length is that of the completion with its
    latents, and 0 for a completion that `mask_truncated_completions` dropped.

    Args:
        completion_mask (`torch.Tensor` of shape `(B, C)`): From [`completion_mask_until_eos`].
        terminated (`torch.Tensor` of shape `(B,)`, bool): Completions with an EOS.

    Returns:
        `completions/{mean,min,max}_length`, `completions/clipped_ratio` (share without EOS) and
        `completions/{mean,min,max}_terminated_length` (0 when none has an EOS).

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> completion_metrics(mask, torch.tensor([True, False]))["completions/mean_length"]
        2.5
    """
    lengths = completion_mask.sum(1).float()
    ended = lengths[terminated.bool()]
    metrics = {"completions/clipped_ratio": 1 - len(ended) / max(len(lengths), 1)}
    for name, values in {"length": lengths, "terminated_length": ended}.items():
        values = values if len(values) else lengths.new_zeros(1)
        for kind in ("mean", "min", "max"):
            metrics[f"completions/{kind}_{name}"] = getattr(values, kind)().item()
    return metrics


def group_reward_std(rewards: torch.Tensor, num_generations: int) -> float:
    """Mean over groups of the unbiased standard deviation inside a group: what the reference logs as `reward_std`.

    TRL logs the deviation over all completions. A group is `num_generations` consecutive entries of `rewards` `(B,)`.

    Raises:
        ValueError: If groups are smaller than 2 or do not fill `rewards`.

    Example:
        >>> round(group_reward_std(torch.tensor([0.0, 2.0, 5.0, 5.0]), 2), 4)
        0.7071
    """
    if num_generations < 2 or rewards.shape[0] % num_generations:
        raise ValueError(f"num_generations={num_generations!r} does not cut {rewards.shape[0]} rewards into groups.")
    return rewards.view(-1, num_generations).std(1).mean().item()


# Credit for latents: a Gaussian policy ---------------------------------------------------------------------------


def gaussian_latent_logps(
    latents: torch.Tensor, states: torch.Tensor, sigma: float, reduction: str = "mean"
) -> torch.Tensor:
    """Log-likelihood of recorded latents under a Gaussian around the vectors that the policy would feed.

    A latent `a` is taken as an action of the policy `N(a; mu, sigma^2 I)`, whose mean `mu` is the vector that the
    current weights compute at that place, teacher forced on the same recorded trajectory:

        log pi(a) = -||a - mu||^2 / (2 sigma^2) + const

    The constant `-(H / 2) log(2 pi sigma^2)` is the same for every policy, cancels in every ratio and is left out, so
    the value is 0 at `a = mu` and negative elsewhere. `d log pi / d mu = (a - mu) / sigma^2`. `reduction="mean"`
    divides by `H`, which is the density with variance `H sigma^2`: values of the size of a token's, where the sum over
    thousands of dimensions underflows every ratio.

    The values stand in for token log-probabilities at latent positions ([`put_latent_logps`]); ratio, clipping and KL
    then are those of the tokens. In the paper (VLPO) latents are recorded without noise, so the old policy's value is
    0 and the ratio is `exp(-||a - mu||^2 / (2 sigma^2))`. Where `a = mu`, as in the first update after such a
    rollout, the gradient is exactly 0: latents get credit from the second update on, or from the first if the rollout
    adds noise. `latent_noise=r` adds a vector of length `r ||h||` in a random direction, a deviation of
    `r ||h|| / sqrt(H)` in each dimension: a `sigma` of that size makes the likelihood that of the rollout.

    Args:
        latents (`torch.Tensor` of shape `(..., H)`): Recorded latents; no gradient flows into them.
        states (`torch.Tensor` of shape `(..., H)`): What the policy would feed there: the hidden state at the position
            before, through the latent head if the model has one.
        sigma (`float`): Standard deviation in each dimension, above 0, in the units of the latents.
        reduction (`str`, defaults to `"mean"`): `"mean"` or `"sum"` over `H`.

    Returns:
        `torch.Tensor` of shape `(...)`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the shapes differ or an option is not valid.

    Example:
        >>> gaussian_latent_logps(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), sigma=1.0).tolist()
        [-1.25]
    """
    latents, states = _gaussian_inputs(latents, states, sigma, reduction)
    return -_reduce((latents - states).square(), reduction) / (2 * sigma**2)


def gaussian_latent_log_ratio(
    latents: torch.Tensor,
    states: torch.Tensor,
    old_states: torch.Tensor | None,
    sigma: float,
    reduction: str = "mean",
    max_log_ratio: float = 20.0,
) -> torch.Tensor:
    """Log of the ratio of the current to the old policy at recorded latents, without loss of digits.

        log pi(a) - log pi_old(a) = (mu - mu_old) . (2 a - mu - mu_old) / (2 sigma^2)

    This is the difference of two [`gaussian_latent_logps`], written so that equal means give exactly 0 however far the
    latent is. It is limited to `max_log_ratio` either way, so that its exponential stays finite; beyond that the
    gradient is 0.

    Args:
        latents, states, sigma, reduction: See [`gaussian_latent_logps`].
        old_states (`torch.Tensor` of shape `(..., H)`, *optional*): Means of the policy that made the rollout; no
            gradient flows into them. `None`: the latents themselves, recorded without noise (VLPO).
        max_log_ratio (`float`, defaults to 20.0): Limit, above 0.

    Returns:
        `torch.Tensor` of shape `(...)`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the shapes differ or an option is not valid.

    Example:
        >>> a = torch.tensor([[1.0, 3.0]])
        >>> gaussian_latent_log_ratio(a, torch.tensor([[0.0, 1.0]]), None, sigma=1.0).tolist()
        [-1.25]
    """
    if not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio={max_log_ratio!r} is not valid: give a number above 0.")
    old_states = latents if old_states is None else _same_states("old_states", old_states, latents)
    latents, states = _gaussian_inputs(latents, states, sigma, reduction)
    old_states = old_states.detach().to(states.dtype)
    product = (states - old_states) * ((latents - states) + (latents - old_states))
    return (_reduce(product, reduction) / (2 * sigma**2)).clamp(-max_log_ratio, max_log_ratio)


def put_latent_logps(token_logps: torch.Tensor, latent_logps: torch.Tensor, latent_mask: torch.Tensor) -> torch.Tensor:
    """Token log-probabilities `(B, C)` with `latent_logps` `(B, C)` where `latent_mask` `(B, C)` is true.

    With `latent_policy="gaussian"` the latent positions then belong into the loss mask, too.

    Example:
        >>> put_latent_logps(torch.tensor([[-1.0, -9.0]]), torch.tensor([[0.0, -2.0]]), torch.tensor([[False, True]]))
        tensor([[-1., -2.]])
    """
    mask = _same_shape("latent_mask", latent_mask, token_logps)
    values = _same_shape("latent_logps", latent_logps, token_logps, token_logps.dtype)
    return torch.where(mask, values, token_logps)


def _reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
    return values.mean(-1) if reduction == "mean" else values.sum(-1)


def _same_states(name: str, value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    if value.shape != latents.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(latents.shape)} as the latents.")
    return value


def _gaussian_inputs(latents: torch.Tensor, states: torch.Tensor, sigma: Any, reduction: str) -> tuple:
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not (0 < sigma < math.inf):
        raise ValueError(f"sigma={sigma!r} is not valid: give a number above 0.")
    if reduction not in GAUSSIAN_REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not valid: choose one of {', '.join(GAUSSIAN_REDUCTIONS)}.")
    _same_states("states", states, latents)
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    return latents.detach().to(dtype), states.to(dtype)
