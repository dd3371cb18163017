"""The scripts of LVR's two stages: published formats and names, mazes, bad rows, one stage after the other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from examples import evaluate, train_lvr, train_lvr_grpo
from modeling_latent import load_latent_model
from tests.tiny import tiny_images
from trainers.data.records import RecordShareError
from trainers.tiny import save_tiny_stock_checkpoint

Run = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock checkpoint."""
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the `main()` of a script with flags on top of those of a short run; returns what was printed."""

    def call(script: ModuleType, *flags: object) -> str:
        short = {"output_dir": tmp_path / "out", "max_steps": 1, "num_eval_mazes": 0, "save_strategy": "no"}
        speed = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
        given = {word.split("=")[0] for word in map(str, flags)}
        if not {"--model_name_or_path", "--model_id"} & given:
            short["model_name_or_path"] = base
        defaults = [f"--{name}={value}" for name, value in {**short, **speed}.items()]
        monkeypatch.setattr(sys, "argv", ["script", *defaults, *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    return call


def item(number: int, **changes: object) -> dict:
    """An item of the first stage as published; without boxes and placeholder it is one of the second."""
    reply = "<lvr>\n<answer>B</answer>"
    return {
        "dataset": "flickr30k", "split": "train", "question_id": number, "image": [f"{number % 2}.png"],
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": reply}],
        "bboxes": [[0.1, 0.2, 0.6, 0.9]], **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures."""
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
    return tmp_path


def test_the_published_format_and_names(run: Run, folder: Path, base: Path) -> None:
    """A meta file, the flags of the published script, a head and an end vector; both are saved and go on."""
    (folder / "items.json").write_text(json.dumps([item(n) for n in range(4)]))
    meta = [{"ds_name": "viscot", "data_path": str(folder / "items.json"), "image_folder": str(folder)}]
    (folder / "meta.json").write_text(json.dumps(meta))
    published = [
        "--model_id", base, "--data_path", folder / "meta.json", "--lvr_head", "True", "--lvr_head_type", "simple",
        "--latent_end_token", "True", "--mode_switch_loss", "True", "--loss_lvr_fct", "mae", "--loss_lvr_lambda=0.2",
        "--freeze_vision_tower", "True", "--freeze_llm", "False", "--per_device_train_batch_size", "2",
        "--logging_steps", "1", "--image_max_pixles", "3136", "--latent_strategy=end_vector",
    ]  # fmt: skip
    printed = run(train_lvr, *published)
    assert "4 good rows, 0 bad rows" in printed
    assert "loss_mode_switch" in printed and "latent_cosine" in printed
    model, processor = load_latent_model(folder / "out")
    assert model.config.latent_head == "simple" and model.config.latent_stop_vector
    assert model.generation_config.latent_strategy == "end_vector"
    assert processor.image_processor.size["longest_edge"] == 3136
    start, trained = (load_file(path / "model.safetensors") for path in (base, folder / "out"))
    frozen = [name for name in start if "visual" in name]
    assert frozen and all(torch.equal(start[name], trained[name]) for name in frozen)
    saved = load_file(folder / "out" / "model.safetensors")["latent_stop_vector.weight"]
    run(train_lvr, "--model_name_or_path", folder / "out", "--data_path", folder / "items.json", "--learning_rate=0",
        "--output_dir", folder / "again")  # fmt: skip
    assert torch.equal(load_file(folder / "again" / "model.safetensors")["latent_stop_vector.weight"], saved)


def test_bad_rows_are_counted_and_too_many_stop_the_run(run: Run, folder: Path) -> None:
    rows = [item(n) for n in range(5)] + [item(5, bboxes=[[0.6, 0.2, 0.1, 0.9]]), item(6, bboxes=[])]
    (folder / "items.json").write_text(json.dumps(rows))
    with pytest.raises(RecordShareError, match="5 good rows, 2 bad rows"):
        run(train_lvr, "--data_path", folder / "items.json")
    printed = run(train_lvr, "--data_path", folder / "items.json", "--max_bad_share=0.5")
    assert "5 good rows, 2 bad rows" in printed and f"saved to {folder / 'out'}" in printed


def test_dead_options_refuse_with_the_remedy(run: Run, folder: Path) -> None:
    for flags, message in (
        (["--bits", "8"], "load_in_8bit"),
        (["--precompute_ref_log_probs", "True"], "precompute_ref_log_probs"),
        (["--beta", "0.1"], "beta"),
        (["--online_checkpoint", "True"], "push_to_hub"),
    ):
        with pytest.raises(ValueError, match=message):
            run(train_lvr, *flags)


def test_the_second_stage_goes_on_from_the_first_on_mazes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = ["--per_device_train_batch_size=2", "--num_mazes=4", "--latent_strategy=fixed", "--num_latent_steps=1"]
    printed = run(train_lvr, *small, "--logging_steps=1", "--num_eval_mazes=2")
    assert "eval_latent_cosine_free" in printed
    flags = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "grpo", "--num_mazes=4"]
    rollouts = ["--num_generations=2", "--per_device_train_batch_size=4", "--max_completion_length=12"]
    printed = run(train_lvr_grpo, *flags, *rollouts, "--logging_steps=1", "--decoding_strategy=steps", "--lvr_steps=2")
    assert "rewards/maze_reward/mean" in printed and "latent/steps_mean" in printed
    model, _ = load_latent_model(tmp_path / "grpo")
    assert model.config.latent_method == "lvr"
    flags = ["--model", tmp_path / "grpo", "--strategies", "fixed", "--num_mazes=3", "--compare", tmp_path / "out"]
    flags += ["--temperature=1.0", "--output", tmp_path / "scores"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "mazes, fixed: " in printed and "mazes, fixed, out: " in printed and " minus " in printed


def test_the_second_stage_in_the_published_format(run: Run, folder: Path) -> None:
    """Prompts are the same with `<image>` in the text and without; a reward of the user's own file."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "<answer>B</answer>"}]
    rows = [{"dataset": "x", "id": n, "image": f"{n % 2}.png", "conversations": turns} for n in range(2)]
    rows.append({**rows[0], "conversations": [{**turns[0], "value": "<image>\nWhat is it?"}, turns[1]]})
    (folder / "items.json").write_text(json.dumps(rows))
    source = "def length_reward(completions, **columns):\n    return [1.0] * len(completions)\n"
    (folder / "mine.py").write_text(source)
    flags = ["--data_path", folder / "items.json", "--reward_module", folder / "mine.py"]
    rollouts = ["--num_generations=2", "--per_device_train_batch_size=4", "--max_completion_length=6"]
    printed = run(train_lvr_grpo, *flags, *rollouts, "--logging_steps=1", "--latent_strategy=fixed")
    assert "rewards/length_reward/mean" in printed
