"""The script of mazes: strategies with options of their own, and what is refused before a model is loaded."""

import json
import sys
from pathlib import Path

import pytest

from examples import evaluate as script
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.latent import liven, tiny_latent_model
from trainers.tiny import build_tiny_processor


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device=cpu", "--num_mazes=3"])
    script.main()


def test_strategies_with_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    liven(tiny_latent_model(latent_method="lavit", **ids)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    strategies = ["learned", "learned:mask_latents", "learned:num_latent_steps=1", "off"]
    output = tmp_path / "scores.json"
    run(monkeypatch, "--model", tmp_path, "--max_new_tokens=4", "--output", output, "--strategies", *strategies)
    names = [f"held-out, latents {each}" for each in strategies]
    scores, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert list(scores) == names and all(f"{names[0]} minus {name}: " in printed for name in names[1:])
    laid_out = [{each["num_prefilled"] for each in scores[name]["predictions"]} for name in names]
    assert laid_out == [{4}, {4}, {1}, {0}]
    texts = [[each["text"] for each in scores[name]["predictions"]] for name in names]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("dynamic:mask_latents", r"strategy 'dynamic:mask_latents': .* does not read \['mask_latents'\]"),
        ("dynamic:max_latent_steps=no", "max_latent_steps=False must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    strategy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, "--model=gone", "--strategies", strategy)


def test_a_stock_model_searches_and_votes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thought tokens in the user's turn; where the question's last tokens are taken, no step changes nothing."""
    strategies = ["off", "search:num_thought_tokens=2,max_num_steps=0", "search:mode=reference,max_num_steps=1"]
    flags = ["--model=hub_configs/maze-tiny/base", "--max_new_tokens=20", "--vote", "1", "3"]
    for place in ("turn", "question"):
        output = tmp_path / f"{place}.json"
        run(monkeypatch, *flags, f"--thoughts={place}", "--output", output, "--strategies", *strategies)
        scores, printed = json.loads(output.read_text()), capsys.readouterr().out
        names = [f"held-out, latents {each}" for each in (*strategies, "off, most of 1", "off, most of 3")]
        assert list(scores) == names and all(f"{names[0]} minus {name}: " in printed for name in names[1:])
        laid_out = [{each["num_prefilled"] for each in scores[name]["predictions"]} for name in names]
        assert laid_out == [{0}, {2}, {8}, {0}, {0}]
        texts = [[each["text"] for each in scores[name]["predictions"]] for name in names[:2]]
        assert (texts[0] == texts[1]) == (place == "question")


def test_wrong_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--vote .4, 0.: give numbers of replies, 1 or more"):
        run(monkeypatch, "--model=gone", "--vote", "4", "0")
