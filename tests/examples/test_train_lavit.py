"""The script of LaViT: mazes from teacher to student, published data and arguments, a folder of signals, refusals."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples import train_lavit
from modeling_latent import load_latent_model
from tests.hub import ROOT
from tests.trainers.staged_parts import staged_parts
from tests.trainers.teacher_parts import WIDTH, StubTeacher, teacher_records
from trainers.data.records import RecordShareError
from trainers.teachers import TeacherConfig, extract_teacher
from trainers.tiny import save_tiny_stock_checkpoint

Run = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the script with flags on top of those of a short run; returns what was printed."""

    def call(*flags: object, **options: object) -> str:
        short = {"model_name_or_path": base, "output_dir": tmp_path / "out", "max_steps": 2}
        speed = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
        quiet = {"activation_checkpointing": False, "dtype": "float32", "per_device_train_batch_size": 2}
        given = {**short, **speed, **quiet, "save_strategy": "no", **options}
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["train_lavit.py", *words, *map(str, flags)])
        train_lavit.main()
        return capsys.readouterr().out

    return call


def logged(printed: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'{name}': '?([\d.e+-]+)'?", printed)]


# Mazes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def maze_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Run:
    """The run without data, with a teacher that is trained for a step and of which every answer is accepted."""
    recipe = yaml.safe_load((ROOT / "hub_configs" / "maze-tiny" / "lavit_teacher.yaml").read_text())
    short = {"max_steps": 1, "num_mazes": 4, "per_device_train_batch_size": 2, "warmup_steps": 0}
    teacher_recipe = tmp_path / "teacher.yaml"
    teacher_recipe.write_text(yaml.safe_dump({**recipe, **short, "model_name_or_path": str(base)}))
    monkeypatch.setattr(train_lavit, "TEACHER_RECIPE", teacher_recipe)
    monkeypatch.setattr(train_lavit, "TeacherConfig", partial(TeacherConfig, acceptance="none"))
    return partial(run, num_mazes=6, num_eval_mazes=2)


def test_mazes_from_teacher_to_student_and_again(
    maze_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process of a launcher: the teacher is trained by a process of its own all the same."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    printed = maze_run(max_steps=4, gate_steps=4)
    assert "6 of 6 samples accepted" in printed
    for name in ("loss_concept", "loss_attention", "grad_norm_concept_head", "grad_norm_attention_head"):
        values = logged(printed, name)
        assert len(values) >= 4 and min(values) > 0, name
    assert "'eval_loss'" in printed or "'eval_" in printed
    teacher, _ = load_latent_model(tmp_path / "out-teacher")
    model, processor = load_latent_model(tmp_path / "out")
    assert (teacher.config.latent_method, model.config.latent_method) == ("ivtlr", "lavit")
    assert model.config.concept_head_size == teacher.config.get_text_config().hidden_size
    assert model.generation_config.latent_strategy == "learned"
    assert len(processor.latent_learned_token_ids) == len(model.config.latent_learned_token_ids) == 4
    assert not list(tmp_path.glob("*.partial"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher is there")

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-signals").iterdir()}
    monkeypatch.setattr(subprocess, "run", refuse)
    maze_run(max_steps=4, gate_steps=4)
    again = load_latent_model(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    shards = {path: time for path, time in files.items() if path.name.startswith("shard")}
    assert shards and all(path.stat().st_mtime_ns == time for path, time in shards.items())


def test_a_teacher_that_failed_leaves_no_folder(
    maze_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = yaml.safe_load(train_lavit.TEACHER_RECIPE.read_text())
    train_lavit.TEACHER_RECIPE.write_text(yaml.safe_dump({**broken, "model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(subprocess.CalledProcessError):
        maze_run()
    assert not (tmp_path / "out-teacher").exists()


def test_a_teacher_of_the_users_and_the_baseline_without_latents(maze_run: Run, tmp_path: Path) -> None:
    model, processor = staged_parts(scale=1.0)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "teacher")
    printed = maze_run(maze_teacher=tmp_path / "teacher", attention_loss_weight=0, maze_seed=5)
    assert logged(printed, "loss_concept") and not logged(printed, "loss_attention")
    assert not load_latent_model(tmp_path / "out")[0].config.attention_head
    printed = maze_run(output_dir=tmp_path / "plain", latent_form="none")
    assert not logged(printed, "loss_concept") and not (tmp_path / "plain-signals").exists()
    saved = load_latent_model(tmp_path / "plain")[0]
    assert saved.generation_config.latent_strategy == "off" and saved.config.concept_head_size is None


def test_no_accepted_sample_is_an_error(maze_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_lavit, "TeacherConfig", TeacherConfig)
    with pytest.raises(ValueError, match="there is no record to train on; the summary above says why"):
        maze_run()


# Data of a teacher --------------------------------------------------------------------------------------------------


@pytest.fixture
def signals(tmp_path: Path) -> Path:
    """A folder of signals with the published layout beside it, of pictures that lie as files."""
    records = teacher_records(5, tmp_path / "data")
    config = TeacherConfig(
        output_dir=str(tmp_path / "signals"), acceptance="none", write_json=True, save_full_concept=True,
        output_lavit15k_root=str(tmp_path / "lavit15k"),
    )  # fmt: skip
    return extract_teacher(config, None, None, records, teacher=StubTeacher(), progress=False)


def training_json(signals: Path) -> Path:
    (path,) = (signals.parent / "lavit15k").rglob("*training*.json")
    return path


def test_a_folder_of_signals(run: Run, signals: Path, tmp_path: Path) -> None:
    printed = run(teacher_dir=signals, num_latent_tokens=2, max_samples=2, max_steps=-1, num_train_epochs=1)
    assert len(logged(printed, "loss_concept")) == 1
    assert min(logged(printed, "grad_norm_concept_head")) > 0
    model, processor = load_latent_model(tmp_path / "out")
    assert model.config.concept_head_size == WIDTH and len(processor.latent_learned_token_ids) == 2
    assert model.generation_config.num_latent_steps == 2
    # what was trained goes on being trained
    trained = {"teacher_dir": signals, "model_name_or_path": tmp_path / "out", "num_latent_tokens": 2}
    run(**trained, output_dir=tmp_path / "more", training_stage=2)
    assert load_latent_model(tmp_path / "more")[0].config.concept_head_size == WIDTH
    with pytest.raises(ValueError, match="concept_head_size=9"):
        run(**trained, concept_head_size=9)
    with pytest.raises(ValueError, match="has the latent tokens .*'<lvr2>'}, not .*'<lvr3>'"):
        run(**{**trained, "num_latent_tokens": 3})


def test_the_published_json_by_the_published_arguments(run: Run, signals: Path, tmp_path: Path) -> None:
    path = training_json(signals)
    images = next(folder for folder in path.parents[1].rglob("images") if folder.is_dir())
    printed = run(
        data_path=path, image_root=images, num_lavit_tokens=4, loss_scale_vtop=0.3, loss_scale_traj=0.3,
        training_stage=1, bottleneck_block_prompt=True, freeze_vision=True, v_top_dim=WIDTH, max_samples=4,
        use_trajectory_supervision=True,
    )  # fmt: skip
    assert "4 good rows, 0 bad rows" in printed
    assert min(logged(printed, "grad_norm_attention_head")) > 0
    config = load_latent_model(tmp_path / "out")[0].config
    assert (config.concept_head_size, config.attention_head) == (WIDTH, True)


def test_bad_rows_are_counted_and_too_many_stop_the_run(run: Run, signals: Path) -> None:
    path = training_json(signals)
    value = json.loads(path.read_text())
    value["results"][0]["question"] = ""
    value["results"][2]["v_top_path_abs"] = str(signals / "gone.pth")
    path.write_text(json.dumps(value))
    images = next(folder for folder in path.parents[1].rglob("images") if folder.is_dir())
    with pytest.raises(RecordShareError, match="3 good rows, 2 bad rows"):
        run(data_path=path, image_folder=images)
    assert "3 good rows, 2 bad rows" in run(data_path=path, image_folder=images, max_bad_share=0.5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two sources": ({"data_path": "a.json", "teacher_dir": "signals"}, "give one of them"),
    "an option of the JSON": ({"attention_dir": "y"}, "attention_dir='y' is read with data_path only"),
    "an option of the JSON for a folder": ({"teacher_dir": "x", "v_top_dir": "y"}, "v_top_dir='y' is read with"),
    "no such folder": ({"teacher_dir": "gone"}, "gone"),
    "another width than the maze teacher's": ({"concept_head_size": 5120}, "concept_head_size=5120, but the teacher"),
    "an unknown check": ({"data_path": "a.json", "check": "deep"}, "check"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, run: Run, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
