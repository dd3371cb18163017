"""The script of IVT-LR and Coconut: mazes, graphs, published data and YAML keys, a resumed run, bad rows, refusals."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples import train_ivtlr
from modeling_latent import load_latent_model
from tests.hub import ROOT
from tests.tiny import tiny_images
from trainers.data.records import RecordError, RecordShareError
from trainers.tiny import save_tiny_stock_checkpoint
from trainers.tiny_chameleon import save_tiny_chameleon_checkpoint
from trainers.tiny_text import save_tiny_text_checkpoint

Run = Callable[..., str]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny stock checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen": save_tiny_stock_checkpoint(folder / "qwen", family="qwen2_vl"),
        "chameleon": save_tiny_chameleon_checkpoint(folder / "chameleon"),
        "gpt2": save_tiny_text_checkpoint(folder / "gpt2"),
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the script with flags on top of those of a short run; returns what was printed."""

    def call(base: Path, *flags: object, **options: object) -> str:
        short = {"model_name_or_path": base, "output_dir": tmp_path / "out", "num_eval_mazes": 0}
        speed = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
        quiet = {"activation_checkpointing": False, "attn_implementation": "sdpa", "dtype": "float32"}
        given = {**short, **speed, **quiet, "save_strategy": "no", **options}
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["train_ivtlr.py", *words, *map(str, flags)])
        train_ivtlr.main()
        return capsys.readouterr().out

    return call


def stages(printed: str) -> list[int]:
    """The logged stages, step by step."""
    return [int(found[1]) for found in re.finditer(r"\{'loss': .*?'stage': (\d+)", printed)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures."""
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
    return tmp_path


def m3cot(number: int, **changes: object) -> dict[str, Any]:
    """A row as published."""
    return {
        "id": f"m-{number}", "question": "What is it?", "choices": ["a dog", "a map"], "answer": "AB"[number % 2],
        "rationale": "Look. It has legs. Maps have none. So it is.", "image": f"{number % 2}.png", "context": "",
        "domain": "science", "topic": "x", "category": "y", "image_id": "z", "split": "train", **changes,
    }  # fmt: skip


def scienceqa(number: int) -> dict[str, Any]:
    return {
        "image": f"{number % 2}.png", "question": "Which?", "choices": ["left", "right"], "answer": number % 2,
        "hint": "", "lecture": "Magnets pull.", "solution": "The left one is big. So it pulls more.",
    }  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_mazes_without_arguments_but_a_model(run: Run, bases: dict, tmp_path: Path) -> None:
    """The recipe of the mazes, cut short: a stream, a stage after the other, and an evaluation at the last."""
    printed = run(
        bases["qwen"], steps_per_stage=1, num_stages=3, max_steps=4, num_eval_mazes=2, per_device_train_batch_size=2,
        lr_scheduler_type="constant", lr_scheduler_kwargs="{}",
    )  # fmt: skip
    assert stages(printed) == [0, 1, 2, 2] and "'eval_stage': 2" in printed
    model, processor = load_latent_model(tmp_path / "out")
    assert (model.config.latent_method, model.config.rope_positions) == ("ivtlr", "mrope")
    saved = model.generation_config
    assert (saved.latent_strategy, saved.num_latent_steps, saved.num_latent_patches) == ("staged", 2, 2)
    assert processor.latent_patch_token_id == model.config.latent_patch_token_id


def published_yaml(path: Path, **changes: object) -> Path:
    """The keys of the published YAML files."""
    keys = {
        "save_path": str(path.parent / "runs"), "name": "ivtlr", "epochs_per_stage": 2, "max_latent_stage": 5,
        "resume": 0, "batch_size_training": 2, "gradient_accumulation_steps": 1, "num_epochs": 6, "lr": 1e-3,
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**keys, **changes}))
    return path


def test_the_published_keys_and_data_and_a_resume_that_loads(run: Run, bases: dict, folder: Path) -> None:
    """Three stages of two epochs; then the same from the checkpoint of the third epoch, in the middle of a stage."""
    data = write(folder / "m3cot.json", [m3cot(n) for n in range(4)])
    options = {
        "data_path": data, "data_format": "m3cot", "staged_format": "ivtlr-qwen", "num_latent_patches": 2,
        "rope_positions": "flat", "output_dir": None, "image_size": 56, "save_strategy": "epoch",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = published_yaml(folder / "qwen.yaml")
    printed = run(bases["qwen"], "--config", config, **options)
    assert "4 good rows, 0 bad rows" in printed
    assert stages(printed) == [0] * 4 + [1] * 4 + [2] * 4
    out = folder / "runs" / "ivtlr"
    assert f"saved to {out}" in printed and "'learning_rate': '0.001'" in printed
    assert load_latent_model(out)[0].config.rope_positions == "flat"
    whole = {name: value.clone() for name, value in load_latent_model(out)[0].state_dict().items()}
    printed = run(bases["qwen"], "--config", published_yaml(folder / "again.yaml", resume=3), **options)
    assert stages(printed) == [1, 1, 2, 2, 2, 2]
    again = load_latent_model(out)[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    with pytest.raises(ValueError, match=r"no complete checkpoint of epoch 9; there are: checkpoint-2 \(epoch 1\)"):
        run(bases["qwen"], "--config", published_yaml(folder / "gone.yaml", resume=9, num_epochs=12), **options)


def test_weights_of_another_run_with_a_stage_to_begin_with(run: Run, bases: dict, folder: Path) -> None:
    """`load_model_path` with `resume`: stage 0 is left out, and so are its epochs."""
    data = write(
        folder / "graphs.json", [{"question": f"Is {n} odd?", "steps": ["Look."], "answer": "x"} for n in "13"]
    )
    common = {"data_path": data, "staged_format": "coconut", "output_dir": None, "model_name_or_path": None}
    keys = {"load_model_path": str(bases["gpt2"]), "resume": 2, "num_epochs": 6, "c_thought": 2, "coconut": True}
    more = {"reset_optimizer": True, "pad_latent_to_max": True, "uniform_prob": 0.0, "seed": 3, "project": "coconut"}
    config = published_yaml(folder / "gsm.yaml", **keys, **more, max_latent_stage=3)
    printed = run(bases["gpt2"], "--config", config, "--latent_method=coconut", **common)
    assert stages(printed) == [1, 1, 2, 2]
    saved = load_latent_model(folder / "runs" / "ivtlr")[0].generation_config
    assert (saved.num_latent_steps, saved.latent_markers) == (6, True)
    config = published_yaml(folder / "mid.yaml", **{**keys, "resume": 3})
    with pytest.raises(ValueError, match="3 epochs are no whole number of stages of epochs_per_stage=2"):
        run(bases["gpt2"], "--config", config, "--latent_method=coconut", **common)


@pytest.mark.parametrize("mode", ["latent", "pause", "cot", "no_cot"])
def test_coconut_and_its_controls_on_graphs(mode: str, run: Run, bases: dict, tmp_path: Path) -> None:
    recipe = ROOT / "hub_configs" / "coconut-prosqa" / "sft.yaml"
    printed = run(
        bases["gpt2"], "--config", recipe, staged_mode=mode, num_mazes=2, per_device_train_batch_size=2,
        epochs_per_stage=1, num_train_epochs=3, num_eval_mazes=1,
    )  # fmt: skip
    assert stages(printed) == ([0, 1, 2] if mode in ("latent", "pause") else [0, 0, 0])
    model, _ = load_latent_model(tmp_path / "out")
    assert model.config.latent_method == "coconut"
    assert model.generation_config.latent_strategy == ("staged" if mode in ("latent", "pause") else "off")


def test_chameleon_on_scienceqa_with_an_adapter(run: Run, bases: dict, folder: Path) -> None:
    recipe = ROOT / "hub_configs" / "ivtlr-chameleon-scienceqa" / "sft.yaml"
    data = write(folder / "sqa.json", [scienceqa(n) for n in range(2)])
    printed = run(
        bases["chameleon"], "--config", recipe, data_path=data, epochs_per_stage=1, num_train_epochs=4, lora_r=4,
        num_latent_patches=3, gradient_accumulation_steps=1,
    )  # fmt: skip
    assert stages(printed) == [0, 1, 2, 3] and "2 good rows, 0 bad rows" in printed
    assert (folder / "out" / "adapter_config.json").is_file()
    model, _ = load_latent_model(folder / "out")
    assert model.generation_config.num_latent_steps == 3 and model.generation_config.num_latent_patches == 3


def test_bad_rows_are_counted_and_too_many_stop_the_run(run: Run, bases: dict, folder: Path) -> None:
    bad = [m3cot(4, rationale=""), m3cot(5, answer="F"), m3cot(6, question="a <|latent|> b")]
    data = write(folder / "m3cot.json", [m3cot(n) for n in range(4)] + bad + [m3cot(7, image=None)])
    options = {"data_path": data, "data_format": "m3cot", "start_stage": 1, "num_latent_patches": 1, "max_steps": 1}
    with pytest.raises(RecordShareError, match="4 good rows, 3 bad rows"):
        run(bases["qwen"], **options)
    printed = run(bases["qwen"], max_bad_share=0.5, **options)
    assert "4 good rows, 3 bad rows" in printed and "skipped on request: 1" in printed


def test_what_cannot_work_is_refused(run: Run, bases: dict, folder: Path) -> None:
    data = write(folder / "m3cot.json", [m3cot(n) for n in range(2)])
    with pytest.raises(ValueError, match="data_format"):
        run(bases["qwen"], data_path=data, data_format="m4cot", start_stage=1)
    with pytest.raises(ValueError, match="without a curriculum would train stage 0 alone"):
        run(bases["qwen"], data_path=data, data_format="m3cot")
    with pytest.raises(ValueError, match="min_pixels bounds the area of the images of a Qwen-VL model"):
        run(bases["chameleon"], min_pixels=784)
    with pytest.raises(ValueError, match="convert the file first"):
        run(bases["qwen"], "--load_model_path=model.pth")
    with pytest.raises(RecordError, match="it has no image, and the method looks at one"):
        rows = write(folder / "text.json", [{"question": "Odd?", "steps": ["Look."], "answer": "x"}])
        run(bases["qwen"], data_path=rows, data_format="prosqa", start_stage=1)


def test_options_of_graphs_are_refused_where_none_is_generated(run: Run, bases: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_nodes, small: options of generated graphs, but the model sees"):
        run(bases["qwen"], "--latent_method=ivtlr", num_nodes=8, small=True, steps_per_stage=1, max_steps=1)
    data = write(tmp_path / "prosqa.json", [{"question": "Q", "steps": ["s"], "answer": "a"}])
    with pytest.raises(ValueError, match="notation: options of generated graphs, but data_path='.*' is read"):
        run(bases["gpt2"], "--latent_method=coconut", data_path=data, notation="pairs", steps_per_stage=1, max_steps=1)
