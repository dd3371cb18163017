"""DWAL loss: row by row in plain Python beside the vectorised and the fused form, and the properties of the method."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trainers.losses import (
    DwalLossOutput,
    DwalOptions,
    DwalRows,
    dwal,
    dwal_loss,
    find_latent_rows,
    fused_dwal_loss,
    mask_region_labels,
)

START, END = 3, 5
VOCAB = 13
COUNTS = ("num_rows", "num_wide_rows", "confused_count", "last_concept_count", "dwal_count")

OPTIONS = {
    "default": DwalOptions(),
    "threshold_0.9": DwalOptions(entropy_threshold=0.9, force_prob=0.3),
    "window_1": DwalOptions(window_size=1),
    "window_3": DwalOptions(window_size=3, temperature=0.5),
    "window_40": DwalOptions(window_size=40, temperature=2.0),
    "decay": DwalOptions(spatial_decay_gamma=0.7),
    "ramp": DwalOptions(time_weight_init=0.2),
    "time_aware": DwalOptions.reference(time_aware=True),
    "mse": DwalOptions(loss_type="mse"),
    "mse_reference": DwalOptions.reference(loss_type="mse", time_aware=True, temperature=2.0),
    "mse_reference_window": DwalOptions.reference(loss_type="mse", window_size=4),
    "mse_example": DwalOptions(loss_type="mse", row_average="example"),
    "example": DwalOptions(row_average="example", time_weight_init=0.5),
    "set": DwalOptions(deduplicate_window=True),
    "set_decay": DwalOptions(deduplicate_window=True, spatial_decay_gamma=0.8, window_size=6),
    "set_mse": DwalOptions(deduplicate_window=True, loss_type="mse"),
}


# One row at a time -------------------------------------------------------------------------------------------


def naive_rows(ids: list[int]) -> tuple[list[tuple[int, int, int]], set[int]]:
    """Rows `(j, E(j), S(j))` of one sequence and the positions its pairs cover, in the words of section 4.1."""
    starts = [p for p in range(1, len(ids)) if ids[p] == START]
    ends = [p for p in range(1, len(ids)) if ids[p] == END]
    covered = {j for s, e in zip(starts, ends, strict=False) for j in range(s + 1, e)}
    latent = [j for j in sorted(covered) if ids[j] != END]
    after = [min((e for e in ends if e > j), default=len(ids) - 1) for j in latent]
    before = [max(s for s in starts if s < j) for j in latent]
    return list(zip(latent, after, before, strict=True)), covered


def naive_row(
    z: torch.Tensor, ids: list[int], row: tuple[int, int, int], columns: int, options: DwalOptions
) -> dict[str, Any]:
    """Loss, number of terms and metrics of one row with logits `z` `(V,)`: the card, sections 4.3 and 4.4."""
    j, end, start = row
    n = min(columns, end - j)
    window = list(range(n))
    last = n - 1
    if options.deduplicate_window:
        window = [k for k in range(n) if ids[j + k] not in ids[j : j + k]]
        last = next(k for k in window if ids[j + k] == ids[j + n - 1])
    clipped = torch.stack([z[ids[min(j + k, len(ids) - 1)]].clamp(-1e4, 1e4) for k in range(columns)])
    decay = math.log(options.spatial_decay_gamma or 1)
    u = torch.stack([clipped[k].detach() + k * decay for k in window])
    q = (u / options.temperature).softmax(0)
    entropy = -sum(p * (p + 1e-8).log() for p in q) / math.log(max(len(window), 2))
    confused = min(max(float(entropy), 0.0), 1.0) > options.entropy_threshold
    target = q.clone()
    if confused:
        target = (1 - options.force_prob) * q
        target[0] += options.force_prob
    if options.loss_type == "mse":
        seen = window if options.mse_masked else list(range(columns))
        student = dict(zip(seen, (clipped[seen] / options.temperature).softmax(0), strict=True))
        loss, terms = sum((student[k] - t) ** 2 for k, t in zip(window, target, strict=True)), len(window)
    else:
        loss = -sum(t * z.log_softmax(0)[ids[j + k]] for k, t in zip(window, target, strict=True))
        terms = 1
        if options.time_weight_init is not None:
            a = options.time_weight_init
            loss = (a + (1 - a) * (j - start - 1) / max(end - start - 1, 1)) * loss
    wide = len(window) > 1
    best = max(range(len(window)), key=lambda i: (float(q[i]), -i))
    return {
        "loss": loss,
        "dwal_count": terms,
        "num_rows": 1,
        "num_wide_rows": int(wide),
        "confused_count": int(wide and confused),
        "last_concept_count": int(wide and window[best] == last),
    }


def naive_dwal(logits: torch.Tensor, input_ids: torch.Tensor, options: DwalOptions) -> dict[str, Any]:
    """Loss and counts of a batch, from all logits `(B, S, V)`."""
    found = [(b, ids, row) for b, ids in enumerate(input_ids.tolist()) for row in naive_rows(ids)[0]]
    columns = options.window_size or max((e - j + 1 for _, _, (j, e, _) in found), default=1)
    results = [(b, naive_row(logits[b, row[0] - 1], ids, row, columns, options)) for b, ids, row in found]
    total = {name: sum(result[name] for _, result in results) for name in COUNTS}
    if options.row_average == "example":
        parts = {b: [r for c, r in results if c == b] for b, _ in results}
        means = [sum(r["loss"] for r in part) / sum(r["dwal_count"] for r in part) for part in parts.values()]
        total.update(loss=sum(means) / max(len(means), 1), dwal_count=len(means))
    else:
        total["loss"] = sum(result["loss"] for _, result in results) / max(total["dwal_count"], 1)
    wide = max(total["num_wide_rows"], 1)
    return total | {
        "confused_ratio": total["confused_count"] / wide,
        "last_concept_ratio": total["last_concept_count"] / wide,
    }


# Helpers -----------------------------------------------------------------------------------------------------


def random_ids(batch: int, length: int, seed: int, markers: float = 0.3) -> torch.Tensor:
    """Text with markers anywhere: strays, nested starts, empty regions, position 0, the last position."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCAB, (batch, length), generator=generator)
    draw = torch.rand(batch, length, generator=generator)
    return ids.masked_fill(draw < markers, START).masked_fill(draw < markers / 2, END)


def random_logits(ids: torch.Tensor, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*ids.shape, VOCAB, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def head_case(rows: int, hidden_size: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states of the rows, head weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, hidden_size), (VOCAB, hidden_size), (VOCAB,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(loss: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


def chain_batch() -> torch.Tensor:
    """Two well-formed sequences: one region of five tokens with a repeat, regions of one, none and three."""
    return torch.tensor([[9, 8, 3, 6, 7, 6, 8, 9, 5, 11, 12, 0], [8, 3, 10, 5, 3, 5, 3, 11, 12, 7, 5, 6]])


def chain_cross_entropy(logits: torch.Tensor, ids: torch.Tensor, rows: DwalRows) -> torch.Tensor:
    """Next-token cross entropy on the chain tokens."""
    return F.cross_entropy(rows.select(logits), ids[rows.batch_index, rows.position])


class SeenOps(TorchDispatchMode):
    """Names of the operations that ran, and the largest tensor any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        return out


# Rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_rows_of_every_short_sequence(length: int) -> None:
    ids = torch.tensor(list(itertools.product([START, END, 9], repeat=length)))
    rows = find_latent_rows(ids, START, END)
    expected, covered = [], torch.zeros_like(ids, dtype=torch.bool)
    for b, sequence in enumerate(ids.tolist()):
        found, positions = naive_rows(sequence)
        expected += [(b, j, j - s - 1, e - s - 1, e - j) for j, e, s in found]
        covered[b, sorted(positions)] = True
    columns = [rows.batch_index, rows.position, rows.offset, rows.length, rows.window_mask.sum(1)]
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
    assert torch.equal(rows.region_mask, covered)
    assert not (rows.window_ids == END)[rows.window_mask].any()


@pytest.mark.parametrize("window_size", [None, 1, 2, 30])
def test_window_ids_and_widths(window_size: int | None) -> None:
    ids = random_ids(6, 17, seed=1)
    rows = find_latent_rows(ids, START, END, window_size)
    found = [(b, row) for b, sequence in enumerate(ids.tolist()) for row in naive_rows(sequence)[0]]
    columns = window_size or max(e - j + 1 for _, (j, e, _) in found)
    assert len(found) == len(rows) > 10
    places = [[(b, min(j + k, 16)) for k in range(columns)] for b, (j, _, _) in found]
    assert rows.window_ids.tolist() == [[int(ids[place]) for place in row] for row in places]
    assert rows.window_mask.tolist() == [[j + k < e for k in range(columns)] for _, (j, e, _) in found]


def test_labels_inside_regions_are_masked() -> None:
    ids = chain_batch()
    labels = ids.masked_fill(ids == 0, -100)
    masked = mask_region_labels(labels, find_latent_rows(ids, START, END))
    ignored = [[3, 4, 5, 6, 7, 11], [2, 7, 8, 9]]
    for b, row in enumerate(masked.tolist()):
        assert [p for p, label in enumerate(row) if label == -100] == ignored[b]
    assert torch.equal(masked[masked != -100], ids[masked != -100])
    assert (labels == ids).sum() == 23  # the caller's tensor is left alone


# Fast and naive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 9), (3, 14), (5, 25)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_logits_match_row_by_row(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    for seed in range(3):
        ids = random_ids(*shape, seed=seed)
        logits = random_logits(ids, seed)
        expected = naive_dwal(logits, ids, options)
        expected_loss = torch.as_tensor(expected["loss"], dtype=torch.float64)
        wanted = gradients(expected_loss, [logits])[0] if expected_loss.requires_grad else torch.zeros_like(logits)

        fast_logits = logits.detach().to(dtype).requires_grad_()
        rows = find_latent_rows(ids, START, END, options.window_size)
        output = dwal_loss(rows.select(fast_logits), rows, options)
        tight = dtype == torch.float64
        close = {"rtol": 1e-10, "atol": 1e-12} if tight else {"rtol": 1e-5, "atol": 1e-6}
        assert output.loss.dtype == dtype
        torch.testing.assert_close(output.loss.double(), expected_loss.detach(), **close)
        torch.testing.assert_close(gradients(output.loss, [fast_logits])[0].double(), wanted, **close)
        for field in COUNTS:
            assert getattr(output, field).item() == expected[field], field
        for field in ("confused_ratio", "last_concept_ratio"):
            assert getattr(output, field).item() == pytest.approx(expected[field], abs=1e-6), field


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_matches_full_logits(name: str, chunk_size: int, bias: bool) -> None:  # acceptance 11
    options = OPTIONS[name]
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END, options.window_size)
    assert len(rows) > 20
    for dtype, close in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        tensors = head_case(len(rows), dtype=dtype)[: 3 if bias else 2]
        full = dwal_loss(F.linear(*tensors), rows, options)
        fused = fused_dwal_loss(*tensors, *([] if bias else [None]), rows, options, chunk_size=chunk_size)
        for field in dataclasses.fields(DwalLossOutput):
            torch.testing.assert_close(getattr(fused, field.name), getattr(full, field.name), rtol=close, atol=close)
        # 0.3: the gradient of the loss in a larger sum
        for got, want in zip(gradients(0.3 * fused.loss, tensors), gradients(0.3 * full.loss, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=close, atol=close)


def test_set_of_a_long_window() -> None:
    """Sorting a long row keeps first occurrences first only when it is stable."""
    generator = torch.Generator().manual_seed(0)
    chain = torch.randint(6, 10, (1, 90), generator=generator)
    ids = F.pad(F.pad(chain, (1, 0), value=START), (1, 2), value=END)
    logits = random_logits(ids, seed=0)
    options = OPTIONS["set_decay"]
    options = dataclasses.replace(options, window_size=None)
    rows = find_latent_rows(ids, START, END)
    output = dwal_loss(rows.select(logits), rows, options)
    expected = naive_dwal(logits, ids, options)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=1e-10, atol=1e-12)
    assert output.last_concept_count.item() == expected["last_concept_count"] > 0


@pytest.mark.parametrize("loss_type", ["weighted_ce", "mse"])
def test_clamped_window_logits(loss_type: str) -> None:
    ids = chain_batch()
    options = DwalOptions(loss_type=loss_type, entropy_threshold=0.3)
    logits = random_logits(ids, seed=2).detach()
    logits[0, 2, 6], logits[0, 2, 8], logits[1, 6, 12] = 10_003.0, 10_001.0, -10_050.0
    logits.requires_grad_()
    rows = find_latent_rows(ids, START, END)
    expected = naive_dwal(logits, ids, options)
    wanted = gradients(expected["loss"], [logits])[0]
    states = rows.select(logits)
    full = dwal_loss(states, rows, options)
    fused = fused_dwal_loss(states, torch.eye(VOCAB, dtype=torch.float64), None, rows, options, chunk_size=2)
    for output in (full, fused):
        torch.testing.assert_close(output.loss, expected["loss"], rtol=1e-10, atol=1e-10)
        grad = torch.autograd.grad(output.loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


# The method's properties (card, section 10) ------------------------------------------------------------------


def both_forms(logits: torch.Tensor, rows: DwalRows, options: DwalOptions) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of the full-logit and the fused form."""
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    forms: list[Callable[[torch.Tensor], DwalLossOutput]] = [
        lambda states: dwal_loss(states, rows, options),
        lambda states: fused_dwal_loss(states, head, None, rows, options, chunk_size=3),
    ]
    losses = [form(rows.select(logits)).loss for form in forms]
    return [(loss.detach(), gradients(loss, [logits])[0]) for loss in losses]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DwalOptions(window_size=1), id="window_1"),
        pytest.param(DwalOptions(force_prob=1.0, entropy_threshold=-1.0), id="always_forced"),
    ],
)
def test_equals_next_token_cross_entropy(options: DwalOptions) -> None:  # acceptance 4 and 5
    ids = chain_batch()
    logits = random_logits(ids, seed=0)
    rows = find_latent_rows(ids, START, END, options.window_size)
    expected = chain_cross_entropy(logits, ids, rows)
    wanted = gradients(expected, [logits])[0]
    for loss, grad in both_forms(logits, rows, options):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, wanted)


def test_never_confused_ignores_force_prob() -> None:  # acceptance 5
    ids = chain_batch()
    logits = random_logits(ids, seed=0)
    rows = find_latent_rows(ids, START, END)
    losses = [
        dwal_loss(rows.select(logits), rows, DwalOptions(entropy_threshold=eta, force_prob=f)).loss.item()
        for eta in (1.0, 1.5)
        for f in (0.0, 0.4, 1.0)
    ]
    assert len(set(losses)) == 1
    confused = dwal_loss(rows.select(logits), rows, DwalOptions(entropy_threshold=0.0, force_prob=1.0)).loss.item()
    assert confused != pytest.approx(losses[0])


def test_threshold_is_strict() -> None:
    ids = torch.tensor([[8, START, 6, 7, END]])
    rows = find_latent_rows(ids, START, END)
    certain = torch.zeros(2, VOCAB).index_fill(1, torch.tensor([7]), 900.0)  # entropy exactly 0
    for threshold, count in ((0.0, 0), (-1e-3, 1)):
        assert dwal_loss(certain, rows, DwalOptions(entropy_threshold=threshold)).confused_count.item() == count


@pytest.mark.parametrize("loss_type", ["weighted_ce", "mse"])
def test_time_aware_with_neutral_values_is_plain(loss_type: str) -> None:  # acceptance 6
    ids = chain_batch()
    logits = random_logits(ids, seed=0)
    rows = find_latent_rows(ids, START, END)
    neutral = DwalOptions(loss_type=loss_type, spatial_decay_gamma=1.0, time_weight_init=1.0)
    plain = both_forms(logits, rows, DwalOptions(loss_type=loss_type))
    for got, want in zip(both_forms(logits, rows, neutral), plain, strict=True):
        torch.testing.assert_close(got, want)
    active = DwalOptions(loss_type=loss_type, spatial_decay_gamma=0.5, time_weight_init=0.1)
    assert both_forms(logits, rows, active)[0][0] != pytest.approx(plain[0][0].item())


def test_end_marker_is_trained_by_cross_entropy_alone() -> None:  # acceptance 7
    ids = chain_batch()
    logits = random_logits(ids, seed=0)
    rows = find_latent_rows(ids, START, END)
    trained = {0: [2, 3, 4, 5, 6], 1: [1, 6, 7, 8]}  # from each start marker to the last but one chain token
    targets = mask_region_labels(ids, rows)
    for _, grad in both_forms(logits, rows, DwalOptions()):
        for b, positions in trained.items():
            assert grad[b].abs().sum(-1).nonzero().flatten().tolist() == positions
    for b, p in (ids == END).nonzero().tolist():
        assert targets[b, p] == END


def test_batch_without_regions() -> None:  # acceptance 8
    ids = torch.tensor([[9, 8, 7, 6, 3, 8], [3, 9, 5, 5, 8, 3]])
    logits = random_logits(ids, seed=0, dtype=torch.float32)
    rows = find_latent_rows(ids, START, END)
    labels = mask_region_labels(ids, rows)
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted = gradients(cross_entropy, [logits])[0]
    head = torch.eye(VOCAB, requires_grad=True)
    for options in OPTIONS.values():
        rows = find_latent_rows(ids, START, END, options.window_size)
        for fused in (False, True):
            states = rows.select(logits)
            output = fused_dwal_loss(states, head, None, rows, options) if fused else dwal_loss(states, rows, options)
            assert output.loss.item() == 0 and output.loss.requires_grad
            assert output.confused_ratio.item() == output.last_concept_ratio.item() == 0
            again = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            grad, head_grad = gradients(again + output.loss, [logits, head])
            assert torch.equal(grad, wanted) and not head_grad.any()


def test_teacher_gets_no_gradient() -> None:  # acceptance 9
    ids = chain_batch()
    logits = random_logits(ids, seed=4)
    options = DwalOptions(entropy_threshold=0.7, time_weight_init=0.5, spatial_decay_gamma=0.9)
    rows = find_latent_rows(ids, START, END)
    want = torch.zeros_like(logits)
    for b, sequence in enumerate(ids.tolist()):
        for j, end, start in naive_rows(sequence)[0]:
            z = logits[b, j - 1].detach()
            k = torch.arange(end - j, dtype=z.dtype)
            q = (z[sequence[j:end]] + k * math.log(0.9)).softmax(0)
            entropy = -(q * (q + 1e-8).log()).sum() / math.log(max(end - j, 2))
            target = 0.2 * q + 0.8 * F.one_hot(torch.tensor(0), end - j).to(q) if entropy > 0.7 else q
            omega = 0.5 + 0.5 * (j - start - 1) / (end - start - 1)
            row = z.softmax(0)
            for token, share in zip(sequence[j:end], target.tolist(), strict=True):
                row[token] -= share
            want[b, j - 1] = omega / len(rows) * row
    output = dwal_loss(rows.select(logits), rows, options)
    assert 0 < output.confused_count < output.num_wide_rows  # both kinds of target occur
    for _, grad in both_forms(logits, rows, options):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_row_terms_do_not_depend_on_the_batch() -> None:  # acceptance 10
    ids = torch.cat([random_ids(4, 30, seed=8), random_ids(1, 30, seed=9, markers=0.05)])
    ids[4] = torch.tensor([8, START, *range(6, 12), *range(6, 12), *range(6, 12), END, *[9] * 9])  # widens all windows
    logits = random_logits(ids, seed=1)
    options = DwalOptions(time_weight_init=0.5)
    whole_rows = find_latent_rows(ids, START, END)
    whole = dwal_loss(whole_rows.select(logits), whole_rows, options)
    parts = []
    for b in range(len(ids)):
        rows = find_latent_rows(ids[b : b + 1], START, END)
        parts.append(dwal_loss(rows.select(logits[b : b + 1]), rows, options))
    assert whole_rows.window_ids.shape[1] == 19
    for field in ("dwal_sum", *COUNTS):  # what a trainer adds over micro-batches and ranks
        torch.testing.assert_close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    grads = gradients(sum(part.dwal_sum for part in parts), [logits])
    torch.testing.assert_close(grads, gradients(whole.dwal_sum, [logits]), rtol=1e-12, atol=1e-14)


def test_masked_mse_does_not_depend_on_the_batch_and_the_reference_does() -> None:
    ids = chain_batch()[1:]
    logits = random_logits(ids, seed=1)
    longer = torch.tensor([[8, START, *range(6, 12), END, 9, 9, 9]])
    values = {}
    for masked in (True, False):
        options = DwalOptions(loss_type="mse", mse_masked=masked)
        alone = find_latent_rows(ids, START, END)
        together = find_latent_rows(torch.cat([ids, longer]), START, END)
        states = torch.cat([alone.select(logits), torch.zeros(6, VOCAB, dtype=logits.dtype)])
        constant = dwal_loss(states[-6:], find_latent_rows(longer, START, END), options).dwal_sum
        one = dwal_loss(alone.select(logits), alone, options).dwal_sum
        values[masked] = one.item(), (dwal_loss(states, together, options).dwal_sum - constant).item()
    assert values[True][1] == pytest.approx(values[True][0], rel=1e-12)
    assert values[False][1] != pytest.approx(values[False][0], rel=1e-3)


# Where it runs -----------------------------------------------------------------------------------------------


def test_losses_do_not_wait_for_the_device() -> None:
    """No value of a tensor is read on the host, and no shape depends on data."""
    ids = random_ids(4, 25, seed=3)
    for options in OPTIONS.values():
        rows = find_latent_rows(ids, START, END, options.window_size)
        tensors = head_case(len(rows))
        with SeenOps() as seen:
            dwal_loss(F.linear(*tensors), rows, options).loss.backward()
            fused_dwal_loss(*tensors, rows, options, chunk_size=5).loss.backward()
        assert "mm" in seen.names and "scatter_add_" in seen.names
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount"} & seen.names


@pytest.mark.parametrize("loss_type", ["weighted_ce", "mse"])
def test_no_tensor_larger_than_a_chunk_of_logits(loss_type: str) -> None:  # acceptance 11
    options = DwalOptions(loss_type=loss_type, window_size=4)
    rows = find_latent_rows(random_ids(8, 60, seed=3), START, END, 4)
    assert len(rows) > 100
    hidden = torch.randn(len(rows), 3, requires_grad=True)
    weight = torch.randn(2000, 3, requires_grad=True)
    with SeenOps() as seen:
        fused_dwal_loss(hidden, weight, None, rows, options, chunk_size=8).loss.backward()
    assert seen.largest == 8 * 2000
    with SeenOps() as seen:
        dwal_loss(F.linear(hidden, weight), rows, options).loss.backward()
    assert seen.largest == len(rows) * 2000


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_parts_get_no_gradient(trained: tuple[bool, ...]) -> None:
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    tensors = head_case(len(rows))
    want = gradients(dwal_loss(F.linear(*tensors), rows, DwalOptions()).loss, tensors)
    for tensor, needed in zip(tensors, trained, strict=True):
        tensor.requires_grad_(needed)
    with SeenOps() as seen:
        fused_dwal_loss(*tensors, rows, DwalOptions(), chunk_size=9).loss.backward()
    for tensor, needed, grad in zip(tensors, trained, want, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            torch.testing.assert_close(tensor.grad, grad)
    assert ("addmm_" in seen.names) == trained[1]  # the product for the head's gradient


def test_without_grad() -> None:
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    tensors = head_case(len(rows))
    with torch.no_grad(), SeenOps() as seen:
        output = fused_dwal_loss(*tensors, rows, DwalOptions(), chunk_size=9)
    assert not output.loss.requires_grad and "addmm_" not in seen.names
    torch.testing.assert_close(output.loss, dwal_loss(F.linear(*tensors), rows, DwalOptions()).loss.detach())


def test_head_released_after_the_forward() -> None:
    """As under ZeRO-3, where a gathered head is empty again when the backward runs."""
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    hidden, weight, bias = head_case(len(rows))
    want = gradients(dwal_loss(F.linear(hidden, weight, bias), rows, DwalOptions()).loss, [hidden, weight, bias])
    gathered = weight * 1.0
    loss = fused_dwal_loss(hidden, gathered, bias, rows, DwalOptions(), chunk_size=9).loss
    gathered.data = gathered.data.new_empty(0)
    weight.data.zero_()
    for got, grad in zip(gradients(loss, [hidden, weight, bias]), want, strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    tensors = head_case(len(rows))
    want = gradients(dwal_loss(F.linear(*tensors), rows, DwalOptions()).loss, tensors)

    def region(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_dwal_loss(hidden * 1.0, weight, bias, rows, DwalOptions(), chunk_size=9).loss

    (2 * checkpoint(region, *tensors, use_reentrant=use_reentrant)).backward()
    for tensor, grad in zip(tensors, want, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * grad)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("loss_type", ["weighted_ce", "mse"])
def test_low_precision(how: str, loss_type: str) -> None:
    """bfloat16 logits, float32 loss: the fused form is as far from float64 as the head's stock forward."""
    options = DwalOptions(loss_type=loss_type)
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    exact = head_case(len(rows), hidden_size=32)
    reference = gradients(dwal_loss(F.linear(*exact), rows, options).loss, exact)
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    tensors = [t.detach().to(dtype).requires_grad_() for t in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        full = dwal_loss(F.linear(*tensors), rows, options)
        fused = fused_dwal_loss(*tensors, rows, options, chunk_size=9)
    assert full.loss.dtype == fused.loss.dtype == torch.float32
    torch.testing.assert_close(fused.loss, full.loss, rtol=1e-5, atol=1e-6)
    for got, stock, want in zip(gradients(fused.loss, tensors), gradients(full.loss, tensors), reference, strict=True):
        assert got.dtype == dtype
        error, stock_error = ((g.double() - want).norm() / want.norm() for g in (got, stock))
        assert error <= max(1.2 * stock_error, 1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_low_precision_adds_up_in_float32(dtype: torch.dtype, tolerance: float, how: str) -> None:
    """Against float32: loss to 1e-3, gradients to `tolerance` in norm (two roundings), and no loss from many chunks.

    Adding 100 chunks up in bfloat16 (8 bits) would lose the small ones: an error of some per cent.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 512, (4, 202), generator=generator)
    ids[:, 1], ids[:, 201] = START, END
    rows, options = find_latent_rows(ids, START, END, window_size=12), DwalOptions(window_size=12)
    shapes = [(len(rows), 64), (512, 64), (512,)]
    exact = [torch.randn(s, generator=generator).mul_(0.3).requires_grad_() for s in shapes]
    want = fused_dwal_loss(*exact, rows, options)
    wanted = gradients(want.loss, exact)
    tensors = [t.detach().to(torch.float32 if how == "autocast" else dtype).requires_grad_() for t in exact]
    found = {}
    for chunk_size in (8, 1000):
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            loss = fused_dwal_loss(*tensors, rows, options, chunk_size=chunk_size).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want.loss, rtol=1e-3, atol=0)
        found[chunk_size] = gradients(loss, tensors)
        for got, grad in zip(found[chunk_size], wanted, strict=True):
            assert (got.float() - grad).norm() <= tolerance * grad.norm()
    assert len(rows) == 796
    one_rounding = torch.finfo(dtype).eps if how == "weights" else 1e-5
    for many, one in zip(found[8], found[1000], strict=True):
        assert (many.float() - one.float()).norm() <= one_rounding * one.float().norm()


def test_slots_without_a_concept_are_no_rows() -> None:
    ids = torch.tensor([[9, START, 7, 7, END, 8], [START, 9, START, 10, 7, END]])
    rows = find_latent_rows(ids, START, END, slot_id=7)
    assert list(zip(rows.batch_index.tolist(), rows.position.tolist(), strict=True)) == [(1, 3)]
    assert torch.equal(rows.region_mask, find_latent_rows(ids, START, END).region_mask)


def test_autocast_leaves_float64_alone() -> None:
    rows = find_latent_rows(random_ids(4, 25, seed=3), START, END)
    tensors = head_case(len(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_dwal_loss(*tensors, rows, DwalOptions())
        full = dwal_loss(F.linear(*tensors), rows, DwalOptions())
    torch.testing.assert_close(fused.loss, full.loss, rtol=1e-12, atol=0)


def test_second_backward_is_refused() -> None:
    rows = find_latent_rows(chain_batch(), START, END)
    loss = fused_dwal_loss(*head_case(len(rows)), rows, DwalOptions()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


MEMORY_SCRIPT = """
import sys, torch
import torch.nn.functional as F
from trainers.losses import DwalOptions, dwal_loss, find_latent_rows, fused_dwal_loss

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

tokens, vocabulary, size = 512, 152064, 32
ids = torch.randint(10, vocabulary, (1, tokens))
ids[0, 1], ids[0, tokens - 4] = 3, 5
rows = find_latent_rows(ids, 3, 5, window_size=8)
options = DwalOptions(window_size=8)
states = torch.randn(1, tokens, size, requires_grad=True)
weight = torch.randn(vocabulary, size, requires_grad=True)
F.linear(states[0, :8], weight).sum().backward()
before = peak()
if sys.argv[1] == "full":
    loss = dwal_loss(rows.select(F.linear(states, weight)), rows, options).loss
else:
    loss = fused_dwal_loss(rows.select(states), weight, None, rows, options, chunk_size=32).loss
loss.backward()
print(peak() - before, loss.item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_fused_memory_of_a_process() -> None:  # acceptance 11
    """Every position a row, which is the worst case of the fused form: its peak stays under a fifth."""
    code = "import torch; torch.manual_seed(0); torch.set_num_threads(1)" + MEMORY_SCRIPT
    results = {}
    for form in ("full", "fused"):
        done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True, check=True)
        results[form] = [float(word) for word in done.stdout.split()]
    assert results["fused"][1] == pytest.approx(results["full"][1], rel=1e-5)
    assert results["fused"][0] <= results["full"][0] / 5


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window_size", 0),
        ("window_size", 2.0),
        ("window_size", True),
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("entropy_threshold", math.nan),
        ("entropy_threshold", "0.6"),
        ("force_prob", 1.1),
        ("loss_type", "kl"),
        ("spatial_decay_gamma", 0.0),
        ("spatial_decay_gamma", 1.2),
        ("time_weight_init", -0.1),
        ("mse_masked", 1),
        ("deduplicate_window", None),
        ("row_average", "mean"),
    ],
)
def test_wrong_option_is_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option}={value!r} is not valid: \w+".replace("(", r"\(")):
        DwalOptions(**{option: value})


def test_wrong_input_is_refused() -> None:
    ids = chain_batch()
    rows = find_latent_rows(ids, START, END)
    hidden, weight, _ = head_case(len(rows))
    refused: list[tuple[str, Callable[[], Any]]] = [
        (r"input_ids has shape \(12,\)", lambda: find_latent_rows(ids[0], START, END)),
        ("dtype torch.float32", lambda: find_latent_rows(ids.float(), START, END)),
        ("end_id=3", lambda: find_latent_rows(ids, START, START)),
        ("window_size=0", lambda: find_latent_rows(ids, START, END, 0)),
        (r"labels has shape \(2, 11\), expected \(2, 12\)", lambda: mask_region_labels(ids[:, 1:], rows)),
        (r"states has shape \(2, 11, 6\)", lambda: rows.select(torch.zeros(2, 11, 6))),
        (rf"logits has shape .* expected \({len(rows)}, D\)", lambda: dwal_loss(hidden[1:], rows, DwalOptions())),
        ("window_size=3 is not valid", lambda: dwal_loss(hidden, rows, DwalOptions(window_size=3))),
        ("gather a sharded head", lambda: fused_dwal_loss(hidden, weight[:, :0], None, rows, DwalOptions())),
        ("chunk_size=0", lambda: fused_dwal_loss(hidden, weight, None, rows, DwalOptions(), chunk_size=0)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_move_between_devices() -> None:
    rows = find_latent_rows(chain_batch(), START, END, 3).to("meta")
    assert rows.window_ids.device.type == rows.region_mask.device.type == "meta"
    assert rows.window_size == 3


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(dwal)
    assert result.attempted > 10 and result.failed == 0
