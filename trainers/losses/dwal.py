"""DWAL, dynamic windowed alignment: every position of a latent region is trained on all concept tokens still to come.

Paper: "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning" (LASER), arXiv 2601.06803.

A row is one chain token at position `j`. The logits that predict it, those at `j - 1`, are trained toward a soft
target over the window `ids[j], ids[j + 1], ...` up to the end marker. The target is the model's own softmax restricted
to that window, without gradient. Where its normalised entropy exceeds a threshold it is mixed with the one-hot next
token.

| topic | paper | reference code | here |
|---|---|---|---|
| window | set of tokens | positions: duplicates count twice | positions; `deduplicate_window=True` for the set |
| average | `1/T` per example | flat over the rows of the micro-batch | flat; `row_average="example"` for the paper's |
| divergence | cross-entropy | or `mse`, student over padded columns too | both; `mse_masked=False` for the code's |
| time-aware variant | decay `k ln(gamma)` on the teacher | decay, and a ramp of row weights | two separate switches |
| entropy threshold | 0.6 | 0.8, in the published script 0.6 | 0.6 |

`DwalOptions.reference` returns the options of the reference code. The functions know no model and no trainer.
`fused_dwal_loss` works from hidden states and never holds more than `chunk_size` rows of logits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .rows import select_rows

IGNORE_INDEX = -100
LOSS_TYPES = ("weighted_ce", "mse")
ROW_AVERAGES = ("flat", "example")
_LOGIT_CLAMP = 1e4
_ENTROPY_EPS = 1e-8


def _require(ok: bool, option: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{option}={value!r} is not valid: {remedy}.")


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


@dataclass(frozen=True)
class DwalOptions:
    """Options of the DWAL loss. A wrong value raises `ValueError` with the option, the value and the remedy.

    Args:
        window_size (`int`, *optional*): Tokens in a window at most. `None` takes the whole rest of the region.
        temperature (`float`, defaults to 1.0): Divides the window logits of the teacher (and of the `mse` student).
        entropy_threshold (`float`, defaults to 0.6): A teacher whose entropy, divided by the log of the window length,
            is strictly above this is "confused". Below 0: always; 1 or more: never.
        force_prob (`float`, defaults to 0.8): Weight of the one-hot next token in the target of a confused row.
        loss_type (`str`, defaults to `"weighted_ce"`): Cross entropy with the soft target over the full vocabulary, or
            `"mse"` between the two window distributions.
        spatial_decay_gamma (`float`, *optional*): First half of the time-aware variant: adds `k * ln(gamma)` to the
            teacher's logit of the k-th window token. `None` switches it off. The reference value is 0.91.
        time_weight_init (`float`, *optional*): Second half: weight of a region's first row in `weighted_ce`, rising
            linearly toward 1 along the region. `None` switches it off. The reference value is 0.5.
        mse_masked (`bool`, defaults to `True`): Whether the `mse` student ignores columns beyond its window. With
            `False`, as in the reference code, its value depends on the longest region of the batch.
        deduplicate_window (`bool`, defaults to `False`): Whether a token that recurs in a window counts once.
        row_average (`str`, defaults to `"flat"`): Mean over all rows of the batch, or `"example"`: mean over the rows
            of each sequence, then over the sequences that have rows.

    Example:
        >>> DwalOptions(window_size=3).entropy_threshold
        0.6
        >>> DwalOptions(temperature=0)
        Traceback (most recent call last):
        ValueError: temperature=0 is not valid: give a number above 0.
    """

    window_size: int | None = None
    temperature: float = 1.0
    entropy_threshold: float = 0.6
    force_prob: float = 0.8
    loss_type: str = "weighted_ce"
    spatial_decay_gamma: float | None = None
    time_weight_init: float | None = None
    mse_masked: bool = True
    deduplicate_window: bool = False
    row_average: str = "flat"

    def __post_init__(self) -> None:
        _check_window_size(self.window_size)
        positive = _is_number(self.temperature, 0) and self.temperature > 0
        _require(positive, "temperature", self.temperature, "give a number above 0")
        threshold = self.entropy_threshold
        _require(_is_number(threshold), "entropy_threshold", threshold, "give a finite number, usually 0 to 1")
        _require(_is_number(self.force_prob, 0, 1), "force_prob", self.force_prob, "give a number from 0 to 1")
        _require(self.loss_type in LOSS_TYPES, "loss_type", self.loss_type, f"choose one of {', '.join(LOSS_TYPES)}")
        gamma, ramp = self.spatial_decay_gamma, self.time_weight_init
        gamma_ok = gamma is None or (_is_number(gamma, 0, 1) and gamma > 0)
        _require(gamma_ok, "spatial_decay_gamma", gamma, "give a number above 0 and up to 1, or None to switch it off")
        ramp_ok = ramp is None or _is_number(ramp, 0, 1)
        _require(ramp_ok, "time_weight_init", ramp, "give a number from 0 to 1, or None to switch the ramp off")
        for name in ("mse_masked", "deduplicate_window"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "give True or False")
        averages = ", ".join(ROW_AVERAGES)
        _require(self.row_average in ROW_AVERAGES, "row_average", self.row_average, f"choose one of {averages}")

    @classmethod
    def reference(
        cls,
        *,
        time_aware: bool = False,
        spatial_decay_gamma: float = 0.91,
        time_weight_init: float = 0.5,
        **options: Any,
    ) -> DwalOptions:
        """Options that reproduce the reference code: unmasked `mse` student, positions, flat mean.

        Example:
            >>> DwalOptions.reference(time_aware=True).spatial_decay_gamma
            0.91
        """
        if time_aware:
            options.update(spatial_decay_gamma=spatial_decay_gamma, time_weight_init=time_weight_init)
        return cls(**{"mse_masked": False, **options})


def _check_window_size(window_size: int | None) -> None:
    integer = isinstance(window_size, int) and not isinstance(window_size, bool)
    ok = window_size is None or (integer and window_size >= 1)
    _require(ok, "window_size", window_size, "give an integer of at least 1, or None for the whole rest of the region")


@dataclass(frozen=True, eq=False)
class DwalRows:
    """The latent targets of a batch, in row-major order (`N` rows, windows of `K` columns). All on one device.

    Attributes:
        batch_index (`torch.Tensor` of shape `(N,)`): Sequence of each row.
        position (`torch.Tensor` of shape `(N,)`): Position `j` of the predicted token; its logits are at `j - 1`.
        window_ids (`torch.Tensor` of shape `(N, K)`): `ids[j + k]`, past the end of the sequence its last id.
        window_mask (`torch.Tensor` of shape `(N, K)`, bool): Columns inside the window; column 0 always is.
        offset (`torch.Tensor` of shape `(N,)`): Place of `j` in its region, 0 for the token after the start marker.
        length (`torch.Tensor` of shape `(N,)`): Tokens between the start marker before `j` and the end after it.
        region_mask (`torch.Tensor` of shape `(B, S)`, bool): Positions covered by a pair of markers, which get no CE.
        window_size (`int`, *optional*): Window size that the rows were found with.
    """

    batch_index: torch.Tensor
    position: torch.Tensor
    window_ids: torch.Tensor
    window_mask: torch.Tensor
    offset: torch.Tensor
    length: torch.Tensor
    region_mask: torch.Tensor
    window_size: int | None = None

    def __len__(self) -> int:
        return self.position.shape[0]

    def to(self, device: torch.device | str) -> DwalRows:
        """The same rows on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return DwalRows(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states or logits `(B, S, D)` at the positions that predict the rows: `(N, D)`."""
        return select_rows(states, self.region_mask.shape, self.batch_index, self.position - 1)


def find_latent_rows(
    input_ids: torch.Tensor,
    start_id: int,
    end_id: int,
    window_size: int | None = None,
    slot_id: int | None = None,
) -> DwalRows:
    """Find the rows that DWAL trains, from the markers in a batch (method card, section 4.1).

    Markers count from position 1 on. In each sequence the i-th start is paired with the i-th end, surplus ones are
    ignored. A pair `(s, e)` covers `s + 1 ... e - 1`; covered positions that do not hold an end marker are rows. A
    window runs from its row to the next end marker, which it never contains. The sizes `N` and (dynamic windows only)
    `K` depend on the data, so on an accelerator this synchronises once or twice: call it once a step, before the
    model runs. The losses do not synchronise.

    Args:
        input_ids (`torch.Tensor` of shape `(B, S)`): Token ids, padded on either side.
        start_id (`int`): Id of the start marker.
        end_id (`int`): Id of the end marker.
        window_size (`int`, *optional*): Columns `K` of the windows. `None`: one more than the longest window.
        slot_id (`int`, *optional*): Id of slots without a concept; covered positions that hold it are no rows.

    Raises:
        ValueError: If `input_ids` is not a 2-D integer tensor, the two markers are equal or `window_size` is below 1.

    Example:
        >>> rows = find_latent_rows(torch.tensor([[7, 3, 20, 21, 5, 8]]), start_id=3, end_id=5)
        >>> rows.position.tolist(), rows.window_ids.tolist()
        ([2, 3], [[20, 21, 5], [21, 5, 8]])
        >>> rows.window_mask.int().tolist(), rows.region_mask.int().tolist()
        ([[1, 1, 0], [1, 0, 0]], [[0, 0, 1, 1, 0, 0]])
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids has shape {shape} and dtype {input_ids.dtype}: give token ids (batch, length).")
    _require(start_id != end_id, "end_id", end_id, "the start and end markers need two different ids")
    _check_window_size(window_size)
    length = input_ids.shape[1]
    place = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    starts = (input_ids == start_id) & (place > 0)
    ends = (input_ids == end_id) & (place > 0)
    # Position p lies in pair i when start i is before p and end i is after it:
    # (ends up to and with p) < i <= min(starts before p, all ends).
    opened = starts.cumsum(1) - starts.int()
    closed = ends.cumsum(1)
    region_mask = torch.minimum(opened, ends.sum(1, keepdim=True)) > closed
    next_end = place.masked_fill(~ends, length - 1).flip(1).cummin(1).values.flip(1)
    last_start = place.masked_fill(~starts, 0).cummax(1).values
    # A row holds no end marker, so "at or after" equals "after" for it; a start marker can itself be a row.
    previous_start = F.pad(last_start, (1, 0))[:, :length]
    is_row = region_mask & (input_ids != end_id)
    if slot_id is not None:
        is_row = is_row & (input_ids != slot_id)
    batch_index, position = is_row.nonzero(as_tuple=True)
    remaining = next_end[batch_index, position] - position
    columns = window_size
    if columns is None:
        columns = int(remaining.max()) + 1 if remaining.numel() else 1
    column = torch.arange(columns, device=input_ids.device)
    source = (position[:, None] + column).clamp(max=length - 1)
    start = previous_start[batch_index, position]
    return DwalRows(
        batch_index=batch_index,
        position=position,
        window_ids=input_ids[batch_index[:, None], source].long(),
        window_mask=column < remaining[:, None],
        offset=position - start - 1,
        length=position + remaining - start - 1,
        region_mask=region_mask,
        window_size=window_size,
    )


def mask_region_labels(labels: torch.Tensor, rows: DwalRows) -> torch.Tensor:
    """Labels `(B, S)` for the cross-entropy term: a copy with -100 on every position inside a region (card, 4.2).

    Example:
        >>> ids = torch.tensor([[7, 3, 20, 21, 5, 8]])
        >>> mask_region_labels(ids, find_latent_rows(ids, 3, 5)).tolist()
        [[7, 3, -100, -100, 5, 8]]
    """
    if labels.shape != rows.region_mask.shape:
        expected = tuple(rows.region_mask.shape)
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {expected}: pass the rows' own batch.")
    return labels.masked_fill(rows.region_mask, IGNORE_INDEX)


@dataclass(frozen=True, eq=False)
class DwalLossOutput:
    """Result of the DWAL loss, all 0-dim tensors on the device of the inputs.

    `loss = dwal_sum / dwal_count`, `confused_ratio = confused_count / num_wide_rows`, `last_concept_ratio =
    last_concept_count / num_wide_rows`, each 0 where the count is 0. Over micro-batches and ranks add the sums and the
    counts, then divide; means and ratios of parts do not add up.

    Attributes:
        loss: Mean loss, float32 (float64 for float64 inputs). Exactly 0, with its graph, when there are no rows.
        confused_ratio: Share of wide rows (two tokens or more in the window) with entropy above the threshold.
        last_concept_ratio: Share of wide rows whose most likely window token is the last one (`laser_end_max_ratio`).
        dwal_sum: Weighted sum of the row losses, with gradient.
        dwal_count: What `dwal_sum` is divided by: rows, window entries (`mse`) or sequences (`row_average="example"`).
        num_rows, num_wide_rows, confused_count, last_concept_count: Integer counts.
    """

    loss: torch.Tensor
    confused_ratio: torch.Tensor
    last_concept_ratio: torch.Tensor
    dwal_sum: torch.Tensor
    dwal_count: torch.Tensor
    num_rows: torch.Tensor
    num_wide_rows: torch.Tensor
    confused_count: torch.Tensor
    last_concept_count: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Windows:
    """What the loss needs of the rows: ids and mask `(N, K)`, column of the last concept and row weight `(N,)`."""

    ids: torch.Tensor
    mask: torch.Tensor
    last_column: torch.Tensor
    weight: torch.Tensor

    def __getitem__(self, part: slice) -> _Windows:
        return _Windows(self.ids[part], self.mask[part], self.last_column[part], self.weight[part])


def _prepare(rows: DwalRows, states: torch.Tensor, name: str, options: DwalOptions) -> tuple[_Windows, torch.Tensor]:
    """Windows with their row weights, and the count that the weighted sum of row losses is divided by."""
    if states.dim() != 2 or states.shape[0] != len(rows):
        shape = tuple(states.shape)
        raise ValueError(f"{name} has shape {shape}, expected ({len(rows)}, D): pass rows.select(...) of the batch.")
    remedy = f"the rows were found with window_size={rows.window_size!r}, give both the same"
    _require(rows.window_size == options.window_size, "window_size", options.window_size, remedy)
    ids, mask = rows.window_ids, rows.window_mask
    last_column = mask.sum(1) - 1
    if options.deduplicate_window:
        last_column = (ids == ids.gather(1, last_column[:, None])).int().argmax(1)
        mask = mask & ~_repeats(ids)
    weight = torch.ones_like(rows.position, dtype=_loss_dtype(states))
    terms = mask.sum(1) if options.loss_type == "mse" else torch.ones_like(rows.position)
    if options.loss_type == "weighted_ce" and options.time_weight_init is not None:
        progress = rows.offset / rows.length.clamp(min=1).to(weight.dtype)
        weight = options.time_weight_init + (1 - options.time_weight_init) * progress
    if options.row_average == "flat":
        return _Windows(ids, mask, last_column, weight), terms.sum()
    per_example = terms.new_zeros(rows.region_mask.shape[0]).index_add_(0, rows.batch_index, terms)
    weight = weight / per_example[rows.batch_index]
    return _Windows(ids, mask, last_column, weight), (per_example > 0).sum()


def count_terms(rows: DwalRows, options: DwalOptions) -> torch.Tensor:
    """`DwalLossOutput.dwal_count` of a batch before it is run, 0-dim: rows, window entries (`mse`) or sequences."""
    mask = rows.window_mask
    if options.deduplicate_window:
        mask = mask & ~_repeats(rows.window_ids)
    terms = mask.sum(1) if options.loss_type == "mse" else torch.ones_like(rows.position)
    if options.row_average == "flat":
        return terms.sum()
    return (terms.new_zeros(rows.region_mask.shape[0]).index_add_(0, rows.batch_index, terms) > 0).sum()


def _repeats(ids: torch.Tensor) -> torch.Tensor:
    """Bool `(N, K)`: columns whose token already stands further left. A window is a prefix of its row, so a valid
    column is only ever shadowed by a valid one."""
    ordered, order = ids.sort(dim=1, stable=True)
    repeat = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))[:, : ids.shape[1]]
    return torch.zeros_like(repeat).scatter_(1, order, repeat)


def _loss_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _teacher(
    window_logits: torch.Tensor, windows: _Windows, options: DwalOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft target `(N, K)` without gradient, and which rows are confused and prefer the last concept `(N,)`."""
    logits = window_logits.detach().clamp(-_LOGIT_CLAMP, _LOGIT_CLAMP)
    if options.spatial_decay_gamma is not None:
        column = torch.arange(logits.shape[1], dtype=logits.dtype, device=logits.device)
        logits = logits + column * math.log(options.spatial_decay_gamma)
    probs = (logits / options.temperature).masked_fill(~windows.mask, -math.inf).softmax(-1)
    width = windows.mask.sum(1)
    entropy = -(probs * (probs + _ENTROPY_EPS).log()).sum(-1) / width.clamp(min=2).to(probs.dtype).log()
    confused = entropy.clamp(0, 1) > options.entropy_threshold
    forced = options.force_prob * confused.to(probs.dtype)[:, None]
    first = F.pad(forced, (0, probs.shape[1] - 1))
    target = probs * (1 - forced) + first
    prefers_last = probs.argmax(-1) == windows.last_column
    return target, confused & (width > 1), prefers_last & (width > 1)


def _student(window_logits: torch.Tensor, windows: _Windows, options: DwalOptions) -> torch.Tensor:
    """Window distribution `(N, K)` of the `mse` student."""
    logits = window_logits.clamp(-_LOGIT_CLAMP, _LOGIT_CLAMP) / options.temperature
    if options.mse_masked:
        logits = logits.masked_fill(~windows.mask, -math.inf)
    return logits.softmax(-1)


def _output(
    dwal_sum: torch.Tensor, count: torch.Tensor, windows: _Windows, confused: torch.Tensor, prefers_last: torch.Tensor
) -> DwalLossOutput:
    num_wide = (windows.mask.sum(1) > 1).sum()
    wide = num_wide.clamp(min=1)
    return DwalLossOutput(
        loss=dwal_sum / count.clamp(min=1),
        confused_ratio=confused.sum() / wide,
        last_concept_ratio=prefers_last.sum() / wide,
        dwal_sum=dwal_sum,
        dwal_count=count,
        num_rows=torch.full_like(num_wide, windows.mask.shape[0]),
        num_wide_rows=num_wide,
        confused_count=confused.sum(),
        last_concept_count=prefers_last.sum(),
    )


def dwal_loss(logits: torch.Tensor, rows: DwalRows, options: DwalOptions) -> DwalLossOutput:
    """DWAL loss from the logits that predict the rows (card, sections 4.3 and 4.4).

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): `rows.select(all_logits)`, any float type; used in float32.
        rows (`DwalRows`): From `find_latent_rows` with the same `window_size`.
        options (`DwalOptions`): The loss.

    Returns:
        `DwalLossOutput`. With `weighted_ce`, `d loss / d logits = weight / N * (softmax(logits) - target)`.

    Raises:
        ValueError: If the number of logit rows is not the number of rows, or the two window sizes differ.

    Example:
        >>> rows = find_latent_rows(torch.tensor([[7, 3, 20, 21, 5, 8]]), start_id=3, end_id=5)
        >>> output = dwal_loss(torch.zeros(2, 32), rows, DwalOptions())
        >>> round(output.loss.item(), 4), output.confused_ratio.item(), output.num_rows.item()
        (3.4657, 1.0, 2)
    """
    windows, count = _prepare(rows, logits, "logits", options)
    logits = logits.to(_loss_dtype(logits))
    window_logits = logits.gather(1, windows.ids)
    target, confused, prefers_last = _teacher(window_logits, windows, options)
    if options.loss_type == "mse":
        error = _student(window_logits, windows, options) - target
        row_loss = error.square().masked_fill(~windows.mask, 0).sum(-1)
    else:
        row_loss = -(target * logits.log_softmax(-1).gather(1, windows.ids)).sum(-1)
    return _output((windows.weight * row_loss).sum(), count, windows, confused, prefers_last)


def fused_dwal_loss(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None,
    rows: DwalRows,
    options: DwalOptions,
    chunk_size: int = 256,
) -> DwalLossOutput:
    """`dwal_loss(linear(hidden, lm_head_weight, lm_head_bias), rows, options)` with `chunk_size * V` logits at most.

    The gradients are computed in the forward, chunk by chunk, and scaled in the backward, once: three products with
    the head in all, where recomputing takes four. The backward needs neither the logits nor the head, so DeepSpeed
    ZeRO-3 has to gather the head for this call only. A head without `requires_grad` costs no weight gradient. Autocast
    is followed as `torch.nn.functional.linear` does; the loss, and the gradients until they are scaled, are float32.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): `rows.select(hidden_states)`, after the final norm.
        lm_head_weight (`torch.Tensor` of shape `(V, H)`): Head, as a plain gathered tensor.
        lm_head_bias (`torch.Tensor` of shape `(V,)`, *optional*): Bias of the head.
        rows (`DwalRows`): From `find_latent_rows` with the same `window_size`.
        options (`DwalOptions`): The loss.
        chunk_size (`int`, defaults to 256): Rows that meet the head at a time.

    Raises:
        ValueError: If shapes do not fit (a sharded head does not), the two window sizes differ or `chunk_size` is
            below 1.
        RuntimeError: In a second backward through the same result (`retain_graph=True`).

    Example:
        >>> rows = find_latent_rows(torch.tensor([[7, 3, 20, 21, 5, 8]]), start_id=3, end_id=5)
        >>> output = fused_dwal_loss(torch.zeros(2, 4), torch.ones(32, 4), None, rows, DwalOptions())
        >>> round(output.loss.item(), 4)
        3.4657
    """
    _require(
        isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size", chunk_size, "give an integer of at least 1"
    )
    windows, count = _prepare(rows, hidden, "hidden", options)
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[1]:
        shape = tuple(lm_head_weight.shape)
        raise ValueError(
            f"lm_head_weight has shape {shape}, expected (V, {hidden.shape[1]}): gather a sharded head first."
        )
    dwal_sum, confused, prefers_last = _FusedDwal.apply(
        hidden, lm_head_weight, lm_head_bias, windows, options, chunk_size, torch.is_grad_enabled()
    )
    return _output(dwal_sum, count, windows, confused, prefers_last)


def _fused_chunk(
    logits: torch.Tensor, windows: _Windows, options: DwalOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum of a chunk's losses, its confused rows and those that prefer the last concept.

    Overwrites `logits` `(n, V)` with the gradient of that sum: one buffer holds logits, probabilities and gradient.
    """
    window_logits = logits.gather(1, windows.ids)
    target, confused, prefers_last = _teacher(window_logits, windows, options)
    weight = windows.weight[:, None]
    if options.loss_type == "mse":
        probs = _student(window_logits, windows, options)
        error = (probs - target).masked_fill(~windows.mask, 0)
        slope = 2 * weight * error
        slope = probs * (slope - (probs * slope).sum(-1, keepdim=True)) / options.temperature
        slope = slope.masked_fill(window_logits.abs() > _LOGIT_CLAMP, 0)
        logits.zero_().scatter_add_(1, windows.ids, slope)
        return (weight * error.square()).sum(), confused, prefers_last
    peak = logits.amax(-1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    row_loss = total.log() - (target * (window_logits - peak)).sum(-1, keepdim=True)
    logits.mul_(weight / total).scatter_add_(1, windows.ids, -weight * target)
    return (weight * row_loss).sum(), confused, prefers_last


class _FusedDwal(torch.autograd.Function):
    """Weighted sum of the row losses, with the gradients computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        windows: _Windows,
        options: DwalOptions,
        chunk_size: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device, dtype, inputs = hidden.device.type, hidden.dtype, (hidden, weight, bias)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        head = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
        grads = [
            torch.zeros_like(tensor, dtype=_loss_dtype(hidden)) if grad_enabled and needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        sums, confused, prefers_last = [], [], []
        with torch.autocast(device, enabled=False):
            for start in range(0, max(len(hidden), 1), chunk_size):
                part = slice(start, start + chunk_size)
                outputs = _FusedDwal._chunk(head, grads, part, windows[part], options)
                for outputs_so_far, output in zip((sums, confused, prefers_last), outputs, strict=True):
                    outputs_so_far.append(output)
        ctx.save_for_backward(*grads)
        ctx.scaled = False
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        outputs = torch.stack(sums).sum(), torch.cat(confused), torch.cat(prefers_last)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def _chunk(
        head: list[torch.Tensor | None],
        grads: list[torch.Tensor | None],
        part: slice,
        windows: _Windows,
        options: DwalOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs of one chunk of rows; adds its gradients. A function of its own so that its buffers are freed."""
        hidden, weight, bias = head
        logits = F.linear(hidden[part], weight, bias)
        logits = logits.to(_loss_dtype(logits))
        outputs = _fused_chunk(logits, windows, options)
        grad_hidden, grad_weight, grad_bias = grads
        if grad_hidden is not None:
            grad_hidden[part] = torch.mm(logits.to(weight.dtype), weight).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(logits.t(), hidden[part].to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += logits.sum(0)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.scaled:
            raise RuntimeError(
                "fused_dwal_loss is differentiated once: add all terms of the loss, then call backward."
            )
        ctx.scaled = True  # in place: a copy of the head's gradient would cost its memory and most of the time here
        grads = (
            None if grad is None else grad.mul_(grad_sum).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None
