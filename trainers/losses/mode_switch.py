"""Losses that teach a model when to leave a latent region.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251; both are its auxiliary stop rules.

* [`mode_switch_loss`]: at the start token and at every latent, binary cross entropy on the logit of the end token: 1
  where the region ends, else 0. Only this one column of the LM head is used.
* [`latent_end_loss`]: a learned vector stands at the latent-end position; the hidden state before it is regressed on
  that vector, which decoding compares with the latents.

| topic | paper | reference code | here |
|---|---|---|---|
| target of the last latent | 1 | 0: the data put a latent-end token before the end token | 1; other layouts refused |
| rows | start and latents | the same, positions cut off at the end included | those with a next position |
| without a head | allowed | crashes | allowed |

`reference=True` gives the reference code's targets, which in the published data are 0 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .roi_regression import RegressionOutput, regression_output, regression_rows
from .rows import select_rows


@dataclass(frozen=True, eq=False)
class ModeSwitchRows:
    """The start and latent positions of a batch in row-major order (`N` rows). All on one device.

    Attributes:
        batch_index (`torch.Tensor` of shape `(N,)`): Sequence of each row.
        position (`torch.Tensor` of shape `(N,)`): Position `q` whose output says whether the region ends.
        target (`torch.Tensor` of shape `(N,)`, bool): Whether position `q + 1` holds the end token.
        shape (`tuple[int, int]`): `(B, S)` of the batch.
    """

    batch_index: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.position.shape[0]

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, S, D)` at the positions themselves: `(N, D)`."""
        return select_rows(states, self.shape, self.batch_index, self.position)


def find_mode_switch_rows(
    input_ids: torch.Tensor,
    start_id: int,
    latent_id: int,
    end_id: int,
    attention_mask: torch.Tensor | None = None,
    reference: bool = False,
) -> ModeSwitchRows:
    """Find start and latent positions, and which of them come right before the end token (card, section 4.3).

    Args:
        input_ids (`torch.Tensor` of shape `(B, S)`): Token ids.
        start_id, latent_id, end_id (`int`): Ids of the start, latent and end tokens.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): Positions before padding or after the last
            position have no target and are left out.
        reference (`bool`, defaults to `False`): As the reference code: every position counts, and a region that
            something else closes has target 0 throughout.

    Raises:
        ValueError: If the ids are not three different ones, or (not with `reference`) a region is closed by another
            token than the end token, so that its last latent could only be taught that the region goes on.

    Example:
        >>> rows = find_mode_switch_rows(torch.tensor([[7, 3, 9, 9, 5, 8]]), start_id=3, latent_id=9, end_id=5)
        >>> rows.position.tolist(), rows.target.int().tolist()
        ([1, 2, 3], [0, 0, 1])
    """
    if len({start_id, latent_id, end_id}) < 3:
        raise ValueError(f"start_id={start_id}, latent_id={latent_id}, end_id={end_id}: give three different ids.")
    batch, length = input_ids.shape
    is_latent = input_ids == latent_id
    keep = (input_ids == start_id) | is_latent
    following = input_ids.roll(-1, dims=1)
    if not reference:
        has_next = torch.ones_like(keep) if attention_mask is None else attention_mask.bool()
        has_next = has_next.roll(-1, dims=1)
        has_next[:, -1:] = False
        keep = keep & has_next
        _refuse_other_closings(input_ids, is_latent & keep, following, latent_id, end_id)
    flat = keep.flatten().nonzero()[:, 0]
    target = (following == end_id).flatten()[flat]
    return ModeSwitchRows(flat // max(length, 1), flat % max(length, 1), target, (batch, length))


def _refuse_other_closings(
    input_ids: torch.Tensor, is_latent: torch.Tensor, following: torch.Tensor, latent_id: int, end_id: int
) -> None:
    other = (is_latent & (following != latent_id) & (following != end_id)).nonzero()
    if other.shape[0]:
        row, position = other[0].tolist()
        token = int(following[row, position])
        raise ValueError(
            f"row {row}: the region that ends at position {position} is closed by token {token}, not by the end token "
            f"{end_id}, so the mode switch would be taught never to stop: lay the data out "
            "without the latent-end token (latent_end_in_text=False), or take the published targets (reference=True)."
        )


def end_token_logits(
    states: torch.Tensor, lm_head_weight: torch.Tensor, end_id: int, lm_head_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Logit of the end token for each hidden state, from one row of the LM head.

    Args:
        states (`torch.Tensor` of shape `(N, H)`): `rows.select(hidden_states)`: what the LM head reads there in
            decoding. The reference code takes, with a latent head, the states that `roi_regression.apply_latent_head`
            returns, though decoding reads others.
        lm_head_weight (`torch.Tensor` of shape `(V, H)`): Head, as a plain gathered tensor.
        end_id (`int`): Id of the end token.
        lm_head_bias (`torch.Tensor` of shape `(V,)`, *optional*): Bias of the head.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32 (float64 for float64 inputs).
    """
    column = slice(end_id, end_id + 1)
    logits = F.linear(states, lm_head_weight[column], None if lm_head_bias is None else lm_head_bias[column])
    return logits[:, 0] if logits.dtype == torch.float64 else logits[:, 0].float()


@dataclass(frozen=True, eq=False)
class ModeSwitchOutput:
    """Result of the mode-switch loss, all 0-dim tensors on the device of the inputs.

    `loss = loss_sum / num_rows`, 0 without rows. Over micro-batches and ranks add sums and counts, then divide.

    Attributes:
        loss: Mean loss, float32 (float64 for float64 inputs). Exactly 0, with its graph, when there are no rows.
        loss_sum: Sum of the row losses, with gradient.
        num_rows, num_ends: Rows, and rows with target 1.
        hit_count: Rows with target 1 and a positive logit (probability above 1/2): ends that are found.
        false_count: Rows with target 0 and a positive logit: regions that would be left too early.
    """

    loss: torch.Tensor
    loss_sum: torch.Tensor
    num_rows: torch.Tensor
    num_ends: torch.Tensor
    hit_count: torch.Tensor
    false_count: torch.Tensor


def mode_switch_loss(end_logits: torch.Tensor, target: torch.Tensor) -> ModeSwitchOutput:
    """Binary cross entropy of the end token's logit, mean over the rows (card, section 4.3).

    Args:
        end_logits (`torch.Tensor` of shape `(N,)`): From [`end_token_logits`].
        target (`torch.Tensor` of shape `(N,)`, bool): `rows.target`.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> output = mode_switch_loss(torch.tensor([-2.0, 3.0]), torch.tensor([False, True]))
        >>> round(output.loss.item(), 4), output.hit_count.item(), output.false_count.item()
        (0.0878, 1, 0)
    """
    if end_logits.shape != target.shape or end_logits.dim() != 1:
        raise ValueError(f"end_logits has shape {tuple(end_logits.shape)}, target {tuple(target.shape)}: give (N,).")
    loss_sum = F.binary_cross_entropy_with_logits(end_logits, target.to(end_logits.dtype), reduction="sum")
    num_rows = torch.full((), target.shape[0], device=target.device)
    says_end = end_logits.detach() > 0
    return ModeSwitchOutput(
        loss=loss_sum / num_rows.clamp(min=1),
        loss_sum=loss_sum,
        num_rows=num_rows,
        num_ends=target.sum(),
        hit_count=(says_end & target).sum(),
        false_count=(says_end & ~target).sum(),
    )


def latent_end_loss(states: torch.Tensor, end_vector: torch.Tensor, loss_type: str = "mse") -> RegressionOutput:
    """Distance of the states before the latent-end positions to the learned end vector (card, section 4.3).

    Both sides are trained. With a latent head the states go through it. The end vector is also what the latent-end
    positions are fed (`replace_latents` with the latent-end token's positions).

    Args:
        states (`torch.Tensor` of shape `(M, H)`): Hidden states at `p_end - 1`, from
            `find_roi_rows(input_ids == latent_end_id).select(hidden_states)`.
        end_vector (`torch.Tensor` of shape `(H,)`): The learned vector.
        loss_type (`str`, defaults to `"mse"`): `"mse"`, `"mae"` or `"cosine"`, as in `roi_regression`.

    Returns:
        `RegressionOutput`; 0 with its graph when no region of the batch has a latent-end position.

    Raises:
        ValueError: If the hidden sizes differ, or for an unknown loss.

    Example:
        >>> latent_end_loss(torch.zeros(3, 2), torch.tensor([1.0, 3.0]), "mae").loss.item()
        2.0
    """
    if states.dim() != 2 or end_vector.shape != states.shape[1:]:
        raise ValueError(
            f"states has shape {tuple(states.shape)}, end_vector {tuple(end_vector.shape)}: give (M, H) and (H,)."
        )
    targets = end_vector.expand_as(states)
    return regression_output(regression_rows(states, targets, loss_type), states, targets)
