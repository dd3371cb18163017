"""Rows of slots that depend on each other in `examples/benchmark.py`: both sides do the same work, and every row runs.

No time is asserted.
"""

from pathlib import Path

import pytest
import torch

from evaluation import benchmark_staged
from evaluation.benchmark_models import FAMILIES
from evaluation.benchmark_staged import (
    GRADIENTS,
    QUICK,
    SIZES,
    generation_ratio,
    naive_step,
    our_step,
    pair_of,
    plain_row,
    training_row,
)
from evaluation.speed_table import ROWS, Settings
from tests.examples.test_benchmark import table

SETTINGS = Settings(repeats=1, quick=True)
FRESH = {"memory_qwen2_vl", "memory_chameleon", "memory_gpt2"}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_take_the_same_step(family: str, gradient: str) -> None:
    """Loss and gradient of the naive schedule, with and without the logits of every pass, and of ours."""
    pair = pair_of(family, SETTINGS)
    stock = pair.naive().model
    ours = our_step(pair, 3, gradient)()
    expected = pair.latent.lm_head.weight.grad.clone()
    for every in (False, True):
        assert naive_step(pair, 3, gradient, every)() == pytest.approx(ours, abs=1e-4)
        torch.testing.assert_close(stock.lm_head.weight.grad, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_step(family: str) -> None:
    pair = pair_of(family, SETTINGS)
    patches = 0 if family == "gpt2" else QUICK.patches
    row, plain = training_row(pair, 2, blocks=True), plain_row(pair, 2)
    length = QUICK.prompt + 2 * (patches + 1) + QUICK.answer
    assert row["input_ids"].shape == plain["input_ids"].shape == (1, length)
    assert int((row["labels"] != -100).sum()) == QUICK.answer
    slots, copies = (int((row["input_ids"] == pair.ids[role]).sum()) for role in ("slot", "patch"))
    assert (slots, copies) == (2, 2 * patches)
    assert not torch.isin(plain["input_ids"], torch.tensor([pair.ids["slot"], pair.ids["patch"]])).any()
    compact = training_row(pair, 2, blocks=False)["input_ids"]
    assert compact.shape == (1, length - copies)


def test_sizes_of_the_full_rows_are_those_of_the_bars() -> None:
    for sizes in SIZES.values():
        assert sizes.prompt >= 1_000 and sizes.answer == 8 and (sizes.hidden_size, sizes.num_layers) == (512, 8)
    assert {SIZES[family].patches for family in ("qwen2_vl", "chameleon")} == {64}
    assert all(SIZES[family].side ** 2 >= 4 * 64 for family in ("qwen2_vl", "chameleon"))


def test_refuses_to_compare_different_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_staged, "naive_step", lambda *_, **__: lambda: 1.0)
    with pytest.raises(RuntimeError, match="qwen2_vl, detach: the steps compared do not find one loss"):
        benchmark_staged.schedule_ratios("qwen2_vl", SETTINGS, "detach")


def test_generation_writes_as_many_tokens_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens behind three slots: passes, last pass and three decode steps on the naive side."""
    calls = []
    run = benchmark_staged.naive_staged_generate

    def counted(*args: object, **options: object) -> object:
        done = run(*args, **options)
        calls.append((done.calls, len(done.new_tokens)))
        return done

    monkeypatch.setattr(benchmark_staged, "naive_staged_generate", counted)
    (line,) = generation_ratio("qwen2_vl", SETTINGS)
    assert set(calls) == {(3 + 1 + 3, 4)} and line.at_least and line.bar == 4


@pytest.mark.parametrize("method", ["ivtlr", "coconut"])
def test_rows_in_one_process(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in ROWS[method] if name not in FRESH]
    rows = table(names, tmp_path / "table.json", capsys, method)
    text = " | ".join(row["name"] for row in rows)
    for part in (
        "detach step, n = 0 / plain step",
        "bptt step, n = 4 / plain step",
        "speed of 4 tokens behind 3 slots",
    ):
        assert part in text
    families = 2 if method == "ivtlr" else 1
    assert len(rows) == families * (10 + 1) + 4


@pytest.mark.slow
def test_rows_in_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(["memory_gpt2"], tmp_path / "table.json", capsys, "coconut")
    assert [row["unit"] for row in rows] == ["MiB"] * 4
