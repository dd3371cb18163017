"""The script of multiple-choice sets: strategies with options, published spellings, its files, and bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.choice_records import read_choices
from evaluation.benchmarks.choices import evaluate_choices
from examples import evaluate_choices as script
from modeling_latent import load_latent_model
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.evaluation.choice_files import mmvp_rows, write_blink, write_mmvp
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_processor, tiny_stock_model
from trainers.data.records import RecordShareError
from trainers.tiny import build_tiny_processor

Run = Callable[..., str]
SHORT = ("--max_new_tokens=4", "--batch_size=3")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `main()` with flags; returns what was printed."""

    def call(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate_choices.py", *map(str, flags), "--device=cpu"])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with learned tokens."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    liven(tiny_latent_model(latent_method="lavit", **ids)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def steps(scores: dict[str, Any], name: str) -> set[int]:
    """How many learned tokens were laid out."""
    return {each["num_prefilled"] for each in scores[name]["predictions"]}


def test_conditions_differences_and_files(run: Run, saved: Path, tmp_path: Path) -> None:
    strategies = [
        "learned",
        "learned:mask_latents",
        "learned:num_latent_steps=2",
        "learned:force_latents=false",
        "off",
    ]
    data = write_mmvp(tmp_path / "mmvp")
    files = ("--predictions", tmp_path / "lines.jsonl", "--output", tmp_path / "scores.json")
    flags = ("--model", saved, "--dataset=mmvp", "--data_root", data, *SHORT)
    printed = run(*flags, "--strategies", *strategies, *files)
    names = [f"mmvp, latents {each}" for each in strategies]
    lines = [line for line in printed.splitlines() if "published rule" in line]
    assert (
        "4 good rows, 0 bad rows" in printed and [line.split("  ")[0].split(" strict")[0] for line in lines] == names
    )
    assert all(f"  {names[0]} minus {name}: " in printed for name in names[1:])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [steps(scores, name) for name in names] == [{4}, {4}, {2}, {0}, {0}]
    texts = [[each["text"] for each in scores[name]["predictions"]] for name in names]
    assert texts[0] != texts[1] and texts[0] != texts[2] != texts[4] and texts[3] == texts[4]
    written = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["meta"] for line in written] == mmvp_rows()
    assert all(line["lvr_count"] >= 4 for line in written)
    # The same as a call of the function.
    options = {"latent_strategy": "learned", "mask_latents": True, "max_new_tokens": 4}
    report = evaluate_choices("x", "mmvp", *load_latent_model(saved), read_choices("mmvp", data), **options)
    assert json.loads(json.dumps(report.summary())) == scores[names[1]]


@pytest.mark.parametrize(
    ("switches", "strategy"),
    [
        ([], None),
        (["--force_lvr"], "learned:force_latents"),
        (["--mask_lvr"], "learned:mask_latents"),
        (["--mask_lvr", "--force_lvr"], "learned:force_latents,mask_latents"),
    ],
)
def test_published_spellings(switches: list[str], strategy: str | None, run: Run, saved: Path, tmp_path: Path) -> None:
    write_blink(tmp_path, "Counting")
    write_blink(tmp_path, "IQ_Test")
    files = ("--output_file", tmp_path / "lines.jsonl", "--output", tmp_path / "scores.json")
    data = ("--dataset=blink", "--data_root", tmp_path, "--task_name=IQ_Test", "--max_samples=1")
    printed = run("--checkpoint", saved, *data, *SHORT, *switches, *files)
    assert "1 good rows, 0 bad rows" in printed and "n=1  IQ_Test" in printed
    names = [f"blink, latents {each}" for each in ([strategy] if strategy else ["learned", "off"])]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == names and steps(scores, names[0]) == {4}
    (line,) = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert line["id"] == "val_IQ_Test_0" and line["meta"]["task"] == "IQ_Test"
    assert line["model_output"] == scores[names[0]]["predictions"][0]["raw"]


def test_a_stock_model_is_compared_without_latents(run: Run, saved: Path, tmp_path: Path) -> None:
    tiny_stock_model().save_pretrained(tmp_path / "stock")
    tiny_processor().save_pretrained(tmp_path / "stock")
    data = ("--dataset=mmvp", "--data_root", write_mmvp(tmp_path / "mmvp"), "--strategies=learned")
    printed = run("--model", saved, *data, *SHORT, "--compare", tmp_path / "stock", "--compare_strategy=off")
    assert "mmvp, latents learned minus mmvp, latents off, stock: " in printed


def test_rows_left_out_are_told_and_too_many_stop_the_script(run: Run, saved: Path, tmp_path: Path) -> None:
    rows = mmvp_rows()
    write_mmvp(tmp_path, [*rows[:3], {**rows[3], "Correct Answer": "(e)"}])
    flags = ("--model", saved, "--dataset=mmvp", "--data_root", tmp_path, "--strategies=off", *SHORT)
    with pytest.raises(RecordShareError, match=r"3 good rows, 1 bad rows[\s\S]*row 3: the ground truth '\(e\)'"):
        run(*flags)
    printed = run(*flags, "--max_bad_share=0.5")
    assert "3 good rows, 1 bad rows" in printed and "n=3" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategies", "learned", "learned:mask_latents=holes"], "mask_latents='holes' is unknown"),
        (["--strategies", "off:mask_latents"], r"latent_strategy='off' does not read \['mask_latents'\]"),
        (["--strategies", "slow"], "latent_strategy='slow' is unknown"),
        (["--strategies", "off", "--num_latent_steps=3"], "num_latent_steps=3 is read by none of"),
        (["--task_name=IQ_Test"], "mmvp has no tasks; leave it out"),
        (["--max_samples=0"], "max_samples=0 must be at least 1"),
        (["--data_root=gone"], "gone, whole file: neither a file nor a folder"),
        (["--dataset=mmstar"], "none of the files .'mmstar.parquet'. is here"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    flags: list[str], message: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run("--model=gone", "--dataset=mmvp", "--data_root", write_mmvp(tmp_path), *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=gqa", "--data_root=x"], "argument --dataset/--task: invalid choice: 'gqa'"),
        (["--dataset=mmvp"], "the following arguments are required: --data_root"),
        (["--dataset=mmvp", "--data_root=x", "--mask_lvr", "--strategies=off"], "write it into --strategies"),
    ],
)
def test_wrong_arguments(flags: list[str], message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--model=gone", *flags)
    assert message in capsys.readouterr().err
