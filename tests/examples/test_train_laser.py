"""The training script: YAML and flags, data in the published format, bad rows, every kind of start model."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import TrlParser

from examples import evaluate, generate, train_laser
from modeling_latent import LATENT_CLASSES, LatentQwen2_5_VLForConditionalGeneration, load_latent_model
from tests.hub import ROOT
from tests.tiny import tiny_images
from trainers.data.llava import write_llava
from trainers.data.mazes import maze_dataset, maze_of_record, published_identities
from trainers.data.records import RecordError, RecordShareError, record_from_row
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.tiny import save_tiny_stock_checkpoint

PARTS = (train_laser.ScriptArguments, train_laser.TrainLaserConfig, LatentModelConfig)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock checkpoint."""
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four mazes in the published format: `mazes.json` beside a folder of pictures."""
    records = [record_from_row(row) for row in maze_dataset(4, seed=8, sizes=(3,))]
    write_llava(records, tmp_path / "mazes.json", tmp_path)
    return tmp_path / "mazes.json"


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs `main()` with flags on top of those of a short run; returns what was printed."""

    def call(*flags: object) -> str:
        short = {"model_name_or_path": base, "output_dir": tmp_path / "out", "max_steps": 2, "num_eval_mazes": 2}
        speed = {"per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "disable_tqdm": True}
        defaults = [f"--{name}={value}" for name, value in {**short, **speed, "save_strategy": "no"}.items()]
        monkeypatch.setattr(sys, "argv", ["train_laser.py", *defaults, *map(str, flags)])
        train_laser.main()
        return capsys.readouterr().out

    return call


def break_rows(path: Path, *rows: int) -> None:
    """Takes the chain out of some rows of a data file."""
    values = json.loads(path.read_text())
    for row in rows:
        del values[row]["reasoning_chain"]
    path.write_text(json.dumps(values))


def parse(*flags: object) -> tuple[Any, ...]:
    return TrlParser(PARTS).parse_args_and_config([str(flag) for flag in flags])


# Options ----------------------------------------------------------------------------------------------------------

YAML = {
    "model_name_or_path": "some/model",
    "attn_implementation": "sdpa",
    "dtype": "bfloat16",
    "data_path": "data.json",
    "image_folder": "pictures",
    "freeze_vision_tower": True,
    "min_pixels": 784,
    "max_pixels": 1568,
    "maze_seed": 3,
    "num_mazes": 90,
    "num_eval_mazes": 7,
    "vsp_dir": "published",
    "dry_run_processes": 8,
    "model_revision": "v2",
    "use_peft": True,
    "lora_r": 4,
    "load_in_4bit": True,
    "latent_method": "laser",
    "latent_form": "slots",
    "num_slots": 4,
    "latent_loss_weight": 0.1,
    "max_bad_share": 0.25,
    "dwal_window_size": 5,
    "dwal_entropy_threshold": 0.8,
    "dwal_loss_type": "mse",
    "learning_rate": 1e-5,
    "max_steps": 40,
    "warmup_steps": 3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 8,
    "report_to": "tensorboard",
    "seed": 11,
    "use_cpu": True,
    "bf16": False,
}


def test_every_key_of_a_yaml_arrives_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**YAML, "output_dir": str(tmp_path)}))
    flags = {"num_slots": 9, "learning_rate": 0.5, "maze_seed": 4, "model_name_or_path": "other/model"}
    parts = parse("--config", tmp_path / "a.yaml", *[f"--{name}={value}" for name, value in flags.items()])
    found = {name: getattr(part, name) for part in reversed(parts) for name in vars(part)}
    found["report_to"] = found["report_to"][0] if isinstance(found["report_to"], list) else found["report_to"]
    expected = {**YAML, **flags, "output_dir": str(tmp_path)}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("size, base", [("7b", "7B"), ("3b", "3B")])
def test_the_recipe_of_the_paper_is_read(size: str, base: str, tmp_path: Path) -> None:
    recipe = ROOT / "hub_configs" / f"laser-{size}" / "sft.yaml"
    values = yaml.safe_load(recipe.read_text())
    names = {field.name for part in PARTS for field in dataclasses.fields(part)}
    assert set(values) <= names
    script, config, model = parse("--config", recipe, "--output_dir", tmp_path, "--use_cpu=true", "--bf16=false")
    assert (config.latent_loss_weight, config.dwal_entropy_threshold, config.dwal_force_prob) == (1.0, 0.6, 0.8)
    assert (config.enable_dynamic_batch, config.dynamic_batch_token_cap, config.dynamic_batch_max_bs) == (
        True,
        8192,
        16,
    )
    assert (config.learning_rate, config.weight_decay, config.adam_epsilon, config.max_steps) == (1e-5, 0.1, 1e-6, 320)
    assert model.freeze_vision_tower and (model.min_pixels, model.max_pixels) == (128 * 28 * 28, 8192 * 28 * 28)
    assert model.model_name_or_path == f"Qwen/Qwen2.5-VL-{base}-Instruct" and not model.use_peft


def test_several_loggers_are_a_list(tmp_path: Path) -> None:
    options = {"report_to": ["tensorboard", "wandb"], "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(options))
    assert parse("--config", tmp_path / "a.yaml")[1].report_to == ["tensorboard", "wandb"]
    assert parse("--output_dir", tmp_path, "--report_to=tensorboard", "--use_cpu=true", "--bf16=false")[
        1
    ].report_to == ["tensorboard"]


@pytest.mark.parametrize("key", ["dwal_windowsize", "lambda"])
def test_an_unknown_key_is_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({key: 3, "use_cpu": True, "bf16": False}))
    with pytest.raises(ValueError, match=key):
        parse("--config", tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=key):
        parse(f"--{key}=3", "--use_cpu=true", "--bf16=false")


def test_a_wrong_value_in_a_yaml_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"dwal_force_prob": 1.5, "use_cpu": True, "bf16": False}))
    with pytest.raises(ValueError, match=r"dwal_force_prob=1.5 is not valid: give a number from 0 to 1"):
        parse("--config", tmp_path / "a.yaml")


# Data ---------------------------------------------------------------------------------------------------------------


def test_published_format_trains_and_saves(run: Run, data: Path, tmp_path: Path) -> None:
    printed = run("--data_path", data, "--logging_steps=1")
    assert "4 good rows, 0 bad rows" in printed and f"saved to {tmp_path / 'out'}" in printed
    assert "loss_latent" in printed and "eval_loss" not in printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert isinstance(model, LatentQwen2_5_VLForConditionalGeneration) and model.config.latent_method == "laser"
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.latent_start_token_id == model.config.latent_start_token_id
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"modeling_latent_qwen2_5_vl.py", "processing_latent.py", "generation_config.json"} <= files
    assert model.generation_config.latent_strategy == "dynamic"


def test_images_in_another_folder_and_a_meta_file(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    moved = data.rename(tmp_path / "text" / "part.json")
    assert "4 good rows" in run("--data_path", moved, "--image_folder", tmp_path)
    meta = [{"data_path": "text/part.json", "image_folder": ".", "ds_name": "a"}]
    (tmp_path / "meta.json").write_text(json.dumps(meta * 2))
    assert "8 good rows" in run("--data_path", tmp_path / "meta.json")


def test_too_many_bad_rows_stop_the_run(run: Run, data: Path, tmp_path: Path) -> None:
    break_rows(data, 1, 3)
    with pytest.raises(RecordShareError) as caught:
        run("--data_path", data, "--max_bad_share=0.4")
    message = str(caught.value)
    assert "above max_bad_share=0.4" in message and "2 good rows, 2 bad rows (50.00% bad)" in message
    for row in (1, 3):
        assert f"{data}, row {row}: required column 'reasoning_chain' is missing" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_few_bad_rows_are_counted_and_left_out(run: Run, data: Path, tmp_path: Path) -> None:
    break_rows(data, 2)
    printed = run("--data_path", data, "--max_bad_share=0.25")
    assert "3 good rows, 1 bad rows (25.00% bad)" in printed
    assert f"{data}, row 2: required column 'reasoning_chain' is missing" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_repaired_data_is_read_again(run: Run, data: Path) -> None:
    whole = data.read_text()
    break_rows(data, 0)
    assert "3 good rows, 1 bad rows" in run("--data_path", data, "--max_bad_share=0.5")
    data.write_text(whole)
    assert "4 good rows, 0 bad rows" in run("--data_path", data, "--max_bad_share=0.5")


def test_a_file_cut_in_the_middle_is_an_error(run: Run, data: Path) -> None:
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(RecordError, match=r"mazes.json, whole file: not valid JSON at line \d+, byte \d+ of \d+.*cut"):
        run("--data_path", data)


def test_a_picture_cut_in_the_middle_is_named(run: Run, data: Path) -> None:
    for name in (value["image"] for value in json.loads(data.read_text())):
        picture = data.parent / name
        picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    with pytest.raises(RecordError, match=r"mazes.json, row \d: image '.*png' cannot be read"):
        run("--data_path", data)


def test_missing_and_empty_files_are_errors(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no.json, whole file: the file does not exist; check the path"):
        run("--data_path", tmp_path / "no.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="train_dataset is empty"):
        run("--data_path", tmp_path / "empty.json")


def test_the_sample_of_the_readme_trains_as_slots(run: Run, data: Path) -> None:
    values = json.loads(data.read_text())
    for value in values:
        del value["reasoning_chain"]
        reply = f"<|laser_start|>{'<laser>' * 4}<|laser_end|><answer>B</answer>"
        value["conversations"][1]["value"] = reply
    data.write_text(json.dumps(values))
    with pytest.raises(RecordShareError, match="'reasoning_chain' is missing.*latent_form='slots'"):
        run("--data_path", data)
    assert "4 good rows, 0 bad rows" in run("--data_path", data, "--latent_form=slots")


# Models -------------------------------------------------------------------------------------------------------------


def test_a_latent_folder_is_continued_and_the_vision_tower_can_be_frozen(
    run: Run, data: Path, base: Path, tmp_path: Path
) -> None:
    run("--data_path", data, "--freeze_vision_tower=true", "--learning_rate=0.01")
    first = load_file(tmp_path / "out" / "model.safetensors")
    stock = load_file(base / "model.safetensors")
    frozen = [name for name in first if name.startswith("visual.")]
    assert len(frozen) > 10 and all(torch.equal(first[name], stock[name]) for name in frozen)
    moved = [name for name in first if name in stock and not torch.equal(first[name], stock[name])]
    assert len(moved) > 10
    again = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "again"]
    run("--data_path", data, *again, "--learning_rate=0")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_without_config_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no config.json; give a folder written by save_pretrained"):
        run("--model_name_or_path", tmp_path / "empty")


def test_another_family_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(
        json.dumps({"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]})
    )
    families = re.escape(str(sorted(LATENT_CLASSES)))
    with pytest.raises(
        ValueError, match=f"text is a 'clip_text_model' checkpoint; latent classes exist for {families}"
    ):
        run("--model_name_or_path", tmp_path / "text")


def test_a_folder_that_does_not_exist_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="gone"):
        run("--model_name_or_path", tmp_path / "gone")


def test_options_that_cannot_work_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="load_in_8bit=true: a quantised base is not trained itself; add use_peft"):
        run("--load_in_8bit=true")
    with pytest.raises(ValueError, match="model_revision='v2': .*base is a folder, which has none; leave it out"):
        run("--model_revision=v2")
    with pytest.raises(ValueError, match="lora_alpha=3 is read with use_peft=true only"):
        run("--lora_alpha=3")
    with pytest.raises(ValueError, match="matches lm_head: the losses multiply with its weight"):
        run("--use_peft=true", "--lora_target_modules", "lm_head")


def test_pixels_bound_the_image_tokens(base: Path, tmp_path: Path) -> None:
    def tokens(*flags: str) -> int:
        _, _, model_args = parse(
            f"--model_name_or_path={base}", f"--output_dir={tmp_path}", "--use_cpu=true", "--bf16=false", *flags
        )
        _, processor, _ = load_for_training(model_args, "laser", weights=False)
        image = tiny_images(1)[0].resize((280, 280))
        return int(processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].prod()) // 4

    assert tokens() == 4  # the tiny processor allows 3136 pixels
    assert tokens("--max_pixels=784") == 1
    assert tokens("--max_pixels=12544") == 16
    assert tokens("--min_pixels=78400", "--max_pixels=156800") == 100
    with pytest.raises(ValueError, match="min_pixels=78400 is above max_pixels=3136; give both, in order"):
        tokens("--min_pixels=78400")


def test_an_adapter_is_trained_by_flags_and_loaded_alone(
    run: Run,
    data: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run("--data_path", data, "--use_peft=true", "--lora_r=2", "--lora_target_modules", "q_proj")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "config.json"} <= files and "model.safetensors" not in files
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names if "lora_" in name} == {"q_proj"}
    model, _ = load_latent_model(tmp_path / "out")
    assert isinstance(model, LatentQwen2_5_VLForConditionalGeneration)
    # the scripts put it on its base, too
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(tmp_path / "out"), "--max_new_tokens=6"])
    generate.main()
    assert re.search(r"span: +\d+ slots at \d+, closed by", capsys.readouterr().out)
    flags = ["--num_mazes=2", f"--output={tmp_path / 'scores'}", "--strategies", "dynamic"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(tmp_path / "out"), *flags])
    evaluate.main()
    (scores,) = json.loads((tmp_path / "scores" / "results.json").read_text())["conditions"]
    assert scores["variant"] == "dynamic" and len(scores["items"]) == 2
    with pytest.raises(ValueError, match="base is a stock 'qwen2_5_vl' checkpoint without latents"):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(base)])
        generate.main()
    # and another run goes on from it
    run("--data_path", data, "--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "more")
    more = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert more.keys() == names.keys() and any(not torch.equal(more[name], names[name]) for name in names)


def test_a_run_goes_on_where_it_stopped(run: Run, data: Path, tmp_path: Path) -> None:
    options = ["--data_path", data, "--save_strategy=steps", "--save_steps=1", "--learning_rate=0.01"]
    run(*options)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}"
    run(*options, checkpoint, "--output_dir", tmp_path / "resumed")
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


# Generated mazes ----------------------------------------------------------------------------------------------------


def test_without_data_generated_mazes_are_trained_and_evaluated(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.scripts.TINY_BASE", str(base))
    printed = run("--model_name_or_path", "", "--max_steps=1", "--logging_steps=1")
    assert "eval_loss_latent" in printed and f"saved to {tmp_path / 'out'}" in printed
    assert "eval_" not in run("--num_eval_mazes=0", "--max_steps=1")


def test_published_mazes_are_left_out(base: Path, tmp_path: Path) -> None:
    tables = tmp_path / "level3" / "table"
    tables.mkdir(parents=True)
    seen = [maze_of_record(record_from_row(row)) for row in maze_dataset(30, seed=3, sizes=(3,))]
    for number, maze in enumerate(seen[:8], 1):
        (tables / f"{number}.txt").write_text(maze.to_text())
    options = ["--output_dir", tmp_path / "out", "--use_cpu=true", "--bf16=false", "--num_eval_mazes=20"]
    script, config, _ = parse(*options, "--num_mazes=200", f"--vsp_dir={tmp_path}", "--maze_seed=3")
    found = [
        {maze_of_record(record_from_row(row)).identity for row in part}
        for part in train_laser.load_data(script, config)
    ]
    excluded = published_identities(tmp_path)
    assert len(excluded) > 4 and not excluded & (found[0] | found[1])
    script.vsp_dir = None
    found = {maze_of_record(record_from_row(row)).identity for row in train_laser.load_data(script, config)[0]}
    assert excluded & found
    script.vsp_dir = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        train_laser.load_data(script, config)


def test_the_seed_fixes_data_and_added_rows(base: Path, tmp_path: Path) -> None:
    def start(*flags: str) -> tuple[str, torch.Tensor]:
        torch.rand(7)
        script, config, model_args = parse(
            f"--model_name_or_path={base}", f"--output_dir={tmp_path}", "--use_cpu=true", "--bf16=false",
            "--num_eval_mazes=0", "--use_peft=true", "--lora_r=2", *flags,
        )  # fmt: skip
        trainer = train_laser.build_trainer(script, config, model_args)
        factor = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
        return next(iter(trainer.train_dataset))["id"], factor.detach()

    first, again, other = start("--seed=1"), start("--seed=1"), start("--seed=2")
    assert first[0] == again[0] == "maze-train-1-0" and other[0] == "maze-train-2-0"
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert start("--seed=1", "--maze_seed=5")[0] == "maze-train-5-0"


def test_the_script_runs_as_a_program(base: Path, tmp_path: Path) -> None:
    config = {
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_eval_mazes": 2,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "env": {"LATENT_SCRIPT_TEST": "1"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_laser.py"), "--config", str(tmp_path / "a.yaml"), "--seed=5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"saved to {tmp_path / 'out'}" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
