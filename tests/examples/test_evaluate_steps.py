"""The script of questions with stepwise rationales: every kind of task with tiny models, its files, and bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.benchmarks.steps import evaluate_steps
from examples import evaluate_steps as script
from modeling_latent import load_latent_model
from tests.tiny import tiny_images
from tests.trainers.staged_parts import staged_parts
from trainers.data.predictions import read_m3cot_predictions, read_scienceqa_predictions
from trainers.data.records import RecordShareError
from trainers.tiny_text import save_tiny_text_checkpoint

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `main()` with flags; returns what was printed."""

    def call(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate_steps.py", *map(str, flags), "--device=cpu"])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family with the tokens of its method, written once."""
    folder = tmp_path_factory.mktemp("models")

    def of_family(family: str) -> Path:
        if not (folder / family).exists():
            model, processor = staged_parts(family)
            if family not in ("gpt2", "llama"):
                model.generation_config.latent_strategy, model.generation_config.num_latent_patches = "staged", 1
            model.save_pretrained(folder / family)
            processor.save_pretrained(folder / family)
        return folder / family

    return of_family


def rows(task: str, number: int = 3) -> list[dict[str, Any]]:
    """Rows as published, the images beside the file."""
    kinds = {
        "m3cot": {"answer": "B", "rationale": "It is cold. So.", "domain": "science", "topic": "physics"},
        "scienceqa": {"answer": 1, "lecture": "Ice is cold.", "solution": None, "subject": "natural science"},
    }
    shared = {"choices": ["ice", "fire"], **kinds[task]}
    questions = ["Which is hot? " * (i + 1) for i in range(number)]
    return [{**shared, "id": f"r{i}", "question": each, "image": f"{i % 2}.png"} for i, each in enumerate(questions)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and files of rows."""
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
    for task in ("m3cot", "scienceqa"):
        (tmp_path / f"{task}.json").write_text(json.dumps(rows(task)))
    return tmp_path


SHORT = ("--max_new_tokens=4", "--num_latent_steps=2", "--batch_size=2")


def test_m3cot_with_its_files(run: Run, saved: Callable[[str], Path], folder: Path) -> None:
    """Three conditions on the same questions: their lines, differences, predictions, and the JSON."""
    model, other = saved("qwen2_5_vl"), saved("qwen2_vl")
    files = ("--predictions", folder / "p.jsonl", "--output", folder / "scores.json")
    data = ("--task=m3cot", "--data_path", folder / "m3cot.json")
    printed = run("--model", model, *data, *SHORT, "--num_latent_patches=1", "--compare", other, *files)
    names = ["m3cot, latents staged", "m3cot, latents off", "m3cot, latents staged, qwen2_vl"]
    lines = [line for line in printed.splitlines() if "published rule" in line]
    assert "3 good rows, 0 bad rows" in printed and [line[: line.index("  ")].strip() for line in lines] == names
    assert all("  n=3  science " in line for line in lines)
    assert "latent steps 2.0" in lines[0] and "latent steps 0.0" in lines[1]
    assert all(f"  {names[0]} minus {name}: " in printed for name in names[1:])
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores) == names
    texts = [each["text"] for each in scores[names[0]]["predictions"]]
    lines = read_m3cot_predictions(folder / "p.jsonl")
    assert [line["messages"][1] for line in lines] == texts and [line["id"] for line in lines] == ["r0", "r1", "r2"]
    # The same as a call of the function.
    records = script.read_records(script.build_parser().parse_args([*map(str, data), "--model=x"]))
    options = {"latent_strategy": "staged", "num_latent_steps": 2, "num_latent_patches": 1, "max_new_tokens": 4}
    report = evaluate_steps("x", "m3cot", *load_latent_model(model), records, **options)
    assert json.loads(json.dumps(report.summary())) == scores[names[0]]


def test_published_prompts_of_chameleon(run: Run, saved: Callable[[str], Path], folder: Path) -> None:
    flags = ("--task=scienceqa", "--data_path", folder / "scienceqa.json", "--prompt=published_inference", "--num=2")
    printed = run("--model", saved("chameleon"), *flags, *SHORT, "--predictions", folder / "p.json")
    assert "2 predictions: " in printed and "natural science" in printed
    found = read_scienceqa_predictions(folder / "p.json")
    assert len(found) == 2 and set(found) <= {0, 1, 2}


def test_graphs_with_stock_and_latent_models_of_text(run: Run, saved: Callable[[str], Path], tmp_path: Path) -> None:
    stock = save_tiny_text_checkpoint(tmp_path / "stock")
    model = ("--model", saved("gpt2"), "--compare", stock, "--compare_strategy=off")
    small = ("--task=graphs", "--small", "--num=3", "--seed=7", "--output", tmp_path / "scores.json")
    printed = run(*model, *small, *SHORT)
    assert "graphs, latents staged minus graphs, latents off, stock: " in printed and "good rows" not in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    staged, off, other = (scores[f"graphs, latents {name}"]["predictions"] for name in ("staged", "off", "off, stock"))
    assert [each["id"] for each in staged] == [f"graph-test-7-{i}" for i in range(3)]
    assert {each["num_latent_steps"] for each in staged} == {2} and all(
        not each["num_latent_steps"] for each in off + other
    )
    groups = set(scores["graphs, latents off"]["by_group"])
    run(*model, *small, *SHORT, "--path_lengths", 2)
    sizes = json.loads((tmp_path / "scores.json").read_text())["graphs, latents off"]["by_group"]
    assert set(sizes) == {"2 steps"} != groups


def test_images_of_a_given_size(run: Run, saved: Callable[[str], Path], folder: Path) -> None:
    """Blocks run out of image tokens where the picture is small: the size that is asked for is what the model sees."""
    data = (
        "--model",
        saved("qwen2_5_vl"),
        "--task=m3cot",
        "--data_path",
        folder / "m3cot.json",
        "--strategies=staged",
    )
    paths = {}
    for size in (28, 84):
        output = ("--output", folder / "scores.json", "--image_size", size, "--num_latent_patches=5")
        run(*data, *SHORT, *output, "--strategies=staged")
        scores = json.loads((folder / "scores.json").read_text())
        paths[size] = {each["latent_path"].split("]")[0] for each in scores["m3cot, latents staged"]["predictions"]}
    assert paths == {28: {"⟨[1 patch"}, 84: {"⟨[5 patches"}}
    assert Image.open(folder / "0.png").size == (80, 60)


def test_strategies_with_options_of_their_own(run: Run, saved: Callable[[str], Path], tmp_path: Path) -> None:
    data = ("--model", saved("gpt2"), "--task=graphs", "--small", "--num=2", "--output", tmp_path / "scores.json")
    strategies = ("staged", "staged:num_latent_steps=3", "staged:num_latent_steps=1,latent_markers=false")
    run(*data, "--max_new_tokens=3", "--num_latent_steps=2", "--strategies", *strategies)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == [f"graphs, latents {each}" for each in strategies]
    found = [{(each["num_latent_steps"], each["num_markers"]) for each in score["predictions"]}
             for score in scores.values()]  # fmt: skip
    assert found == [{(2, 2)}, {(3, 2)}, {(1, 0)}]


def test_bad_rows_are_counted_and_too_many_stop_the_script(
    run: Run, saved: Callable[[str], Path], folder: Path
) -> None:
    (folder / "m3cot.json").write_text(json.dumps([*rows("m3cot"), {**rows("m3cot")[0], "answer": "Z"}]))
    flags = ("--model", saved("qwen2_5_vl"), "--task=m3cot", "--data_path", folder / "m3cot.json", *SHORT)
    with pytest.raises(RecordShareError, match="3 good rows, 1 bad rows"):
        run(*flags)
    printed = run(*flags, "--max_bad_share=0.5", "--strategies", "staged", "--num=1")
    assert "3 good rows, 1 bad rows" in printed and "n=1" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=m3cot"], "task 'm3cot' needs data_path"),
        (["--task=graphs", "--data_path=x.json"], "graphs are generated"),
        (["--task=prosqa", "--data_path=gone.json"], "gone.json"),
        (["--task=prosqa", "--data_path=gone.json", "--small"], "sizes of generated graphs, and prosqa is read"),
        (["--task=graphs", "--strategies", "slow"], "latent_strategy='slow' is unknown"),
        (["--task=graphs", "--strategies", "staged:mask_latents"], r"'staged' does not read \['mask_latents'\]"),
        (["--task=graphs", "--strategies=off", "--num_latent_patches=3"], r"num_latent_patches=3 is read by none of"),
        (["--task=graphs", "--num_nodes=3"], "num_nodes is 3"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(flags: list[str], message: str, run: Run) -> None:
    with pytest.raises(ValueError, match=message):
        run("--model=gone", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=mmvp"], "argument --task: invalid choice: 'mmvp'"),
        (["--task=m3cot", "--prompt=test"], "argument --prompt: invalid choice: 'test'"),
        (["--task=m3cot", "--format=llava"], "argument --format: invalid choice: 'llava'"),
        (["--task=graphs", "--predictions=x"], "--predictions: graphs has no published form of predictions"),
        ([], "the following arguments are required: --task"),
    ],
)
def test_wrong_arguments(flags: list[str], message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--model=gone", *flags)
    assert message in capsys.readouterr().err
