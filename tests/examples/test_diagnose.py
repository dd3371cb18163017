"""The script of the causal card."""

import json
import sys
from pathlib import Path

import pytest

import examples.diagnose
from tests.evaluation.intervention_parts import parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    target = tmp_path_factory.mktemp("model")
    for part in parts("fixed"):
        part.save_pretrained(target)
    return target


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *map(str, flags)])
    examples.diagnose.main()


def test_a_card_of_mazes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folder, "--num_items", 4, "--interventions", "gauss_norm", "no_span", "all⇸L", "--device=cpu",
             "--strategy", "fixed:num_latent_steps=2,force_span,force_end", "--max_new_tokens", 10,
             "--output", tmp_path / "card", "--num_pictures", 1]  # fmt: skip
    run(monkeypatch, *flags)
    said = capsys.readouterr().out
    assert (
        said.startswith("undecided: the card lacks swap (shuffle_items)")
        and "  gauss_norm  " in said
        and "n=4" in said
    )
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["ids"] == [f"maze-test-123-{n}" for n in range(4)] and card["strategy"]["num_latent_steps"] == 2
    assert list(card["conditions"]) == ["clean", "gauss_norm", "no_span", "all⇸L"]
    for name in ("card.md", "report.html", "summary.png", "figures/effects.png"):
        assert (tmp_path / "card" / name).is_file(), name
    assert len(list((tmp_path / "card" / "items").glob("*.png"))) == 1


def test_the_list_and_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--list")
    assert "gauss_norm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch)
    assert "--model is missing; give a folder or a Hub id" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown protocol 'lsr'"):
        run(monkeypatch, "--model", "none", "--protocol", "lsr")
