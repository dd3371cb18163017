"""`examples/benchmark.py`: every row runs, in small shapes, and writes what it measured. No time is asserted."""

import json
import math
import re
from pathlib import Path

import pytest

from evaluation.speed_table import ROWS, Settings, run
from examples import benchmark

FRESH = {"sft_memory", "fused_memory", "import_time"}  # rows that start processes


def table(rows: list[str], path: Path, capsys: pytest.CaptureFixture[str], method: str = "laser") -> list[dict]:
    """The rows of the JSON, checked against the printed table."""
    lines = run([method, "--quick", "--repeats", "1", "--rows", *rows, "--json", str(path)])
    record = json.loads(path.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[0]) == record["environment"]
    assert set(record["environment"]["versions"]) == {"python", "torch", "transformers", "trl"}
    assert record["method"] == method and record["environment"]["quick"] and record["environment"]["threads"] == 1
    printed = [line for line in printed if "no bar" in line]  # libraries print, too
    assert len(record["rows"]) == len(lines) == len(printed)
    for row, line in zip(record["rows"], printed, strict=True):
        assert line.startswith(row["name"]) and row["met"] is None
        assert len(row["first"]) == len(row["second"]) == 1 and min(row["first"] + row["second"]) > 0
        assert math.isclose(row["ratio"], row["first"][0] / row["second"][0])
    return record["rows"]


def test_rows_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table([name for name in ROWS["laser"] if name not in FRESH], tmp_path / "new" / "table.json", capsys)
    names = " | ".join(row["name"] for row in rows)
    for part in ("latent decode step / stock text step", "text step of a latent model", "batch of 8 mixed rows"):
        assert part in names
    for part in (
        "SFT step with DWAL / plain step of trl.SFTTrainer",
        "labelled rows only",
        "every position a concept",
    ):
        assert part in names
    assert len(rows) == 2 * 3 + 2 * 2 + 3 + 2


def test_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(list(ROWS["packing"]), tmp_path / "table.json", capsys, "packing")
    assert [row["unit"] for row in rows] == ["tokens/s"] * 2
    joined = benchmark.Joined.draw(Settings(quick=True))
    lengths = [len(sample["input_ids"]) for sample in joined.samples]
    assert sum(lengths) == sum(joined.rows) and max(joined.rows) <= 256 and all(16 <= n <= 128 for n in lengths)
    share = 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert rows[0]["details"]["padding_before"] == pytest.approx(share) and f"padding {share:.1%}" in rows[0]["name"]
    assert 0 < rows[1]["details"]["padding_before"] < share
    (batch,) = joined.batches(len(lengths), "cpu")
    assert batch["attention_mask"].sum() == joined.tokens
    assert (batch["labels"] != -100).sum() == sum(n - n // 2 for n in lengths)


@pytest.mark.slow
def test_rows_in_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(sorted(FRESH), tmp_path / "table.json", capsys)
    assert {row["unit"] for row in rows} == {"MiB", "s"} and len(rows) == 3 + 2 + 1


def test_bars_are_those_of_the_full_shapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(benchmark, "processor_seconds", lambda code: 3.0 if "modeling_latent" in code else 2.0)
    (line,) = run(["laser", "--rows", "import_time", "--repeats", "2"])
    assert (line.ratio, line.bar, line.met) == (1.5, 1.2, False) and "NOT MET" in capsys.readouterr().out
    assert set(benchmark.SFT_BARS.values()) == {1.05, None}


def test_a_step_trains(tmp_path: Path) -> None:
    """Every arm of the training rows computes gradients, of one batch, and DWAL only where it is meant."""
    settings = Settings(quick=True)
    for arm in (benchmark.DWAL, *benchmark.SFT_BARS):
        benchmark.sft_step(arm, settings, str(tmp_path), optimise=True)()
    labels, ids = (benchmark.sft_batch(settings)[name] for name in ("labels", "input_ids"))
    assert (labels != -100).sum() == ids.numel() / 2 and ids.shape == (4, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["laser", "--rows", "decode"], r"laser has no \['decode'\]; choose from \['decode_tiny'"),
        (["laser", "--repeats", "0"], "--repeats is 0; give 1 or more"),
        (["lazer"], "invalid choice: 'lazer'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(arguments)
    assert re.search(message, capsys.readouterr().err)
