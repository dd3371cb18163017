"""Arguments of the published LaViT scripts: the table, the page, the configs and the recipes; translations."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.train_lavit import LavitScriptArguments, TrainLavitConfig
from tests.hub import ROOT
from trainers import published_arguments
from trainers.model_loading import LatentModelConfig
from trainers.published_arguments import (
    PublishedParser,
    arguments_of,
    lavit_argument_table,
    teacher_argument_table,
    translate_arguments,
    translate_settings,
)

# Method card of LaViT, sections 2.1, 2.4, 3, 5.1.
CARD = (
    "num_lavit_tokens v_top_dim loss_scale_vtop loss_scale_traj training_stage bottleneck_block_prompt "
    "use_trajectory_supervision freeze_vision freeze_llm image_root v_top_dir attention_dir max_samples min_pixels "
    "max_pixels learning_rate warmup_ratio weight_decay max_steps per_device_train_batch_size "
    "gradient_accumulation_steps save_steps save_total_limit seed bf16 gradient_checkpointing"
).split()
PARTS = (LavitScriptArguments, TrainLavitConfig, LatentModelConfig)
RECIPES = ROOT / "hub_configs" / "lavit-3b"
CPU = ["--use_cpu=true", "--bf16=false"]


@pytest.fixture(autouse=True)
def no_log_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_arguments, "_LOGGED", set())


def test_every_published_argument_has_a_row_and_every_field_exists() -> None:
    rows = arguments_of("lavit")
    assert set(CARD) <= set(rows)
    names = {field.name for part in PARTS for field in dataclasses.fields(part)}
    assert not {row.ours for row in rows.values() if row.ours} - names
    assert not {row.name for row in rows.values() if row.translate is None} - names
    translated = {row.name for row in rows.values() if row.translate is not None}
    assert translated & names <= {"gradient_checkpointing", "training_stage"}


@pytest.mark.parametrize(
    ("block", "table"), [("published arguments", lavit_argument_table), ("published builder", teacher_argument_table)]
)
def test_the_page_has_the_tables_row_by_row(block: str, table: Callable[[], list[str]]) -> None:
    text = (ROOT / "hub_configs" / "methods" / "lavit.md").read_text()
    shown = re.search(rf"<!-- {block}: begin -->\n(.*)\n<!-- {block}: end -->", text, re.DOTALL)
    assert shown and shown[1].splitlines() == table()


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_lavit_tokens": 4, "v_top_dim": 5120}, {"num_latent_tokens": 4, "concept_head_size": 5120}),
    (
        {"loss_scale_vtop": 0.3, "loss_scale_traj": 0.3},
        {"latent_loss_weight": 0.3, "attention_loss_weight": 0.3},
    ),
    ({"use_trajectory_supervision": True, "loss_scale_traj": 0.3}, {"attention_loss_weight": 0.3}),
    ({"use_trajectory_supervision": ""}, {}),  # an unset variable, as in the single-stage script
    ({"use_trajectory_supervision": False}, {"attention_head": False, "attention_loss_weight": 0.0}),
    (
        {"use_trajectory_supervision": False, "loss_scale_traj": 0.3, "loss_scale_vtop": 1.0},
        {"attention_head": False, "attention_loss_weight": 0.0, "latent_loss_weight": 1.0},
    ),
    ({"freeze_vision": True, "freeze_llm": False}, {"freeze_vision_tower": True, "freeze_merger": True,
                                                    "freeze_llm": False}),
    ({"freeze_vision": False}, {"freeze_vision_tower": False, "freeze_merger": False}),
    ({"bottleneck_block_prompt": True}, {"block_prompt": True}),
    ({"training_stage": 1}, {"training_stage": 1}),
    (
        {"train_json": "a.json", "image_root": "data/images", "v_top_dir": "v", "attention_dir": "t"},
        {"data_path": "a.json", "image_folder": "data/images", "v_top_dir": "v", "attention_dir": "t"},
    ),
    ({"max_samples": 8765, "min_pixels": 200704}, {"max_samples": 8765, "min_pixels": 200704}),
    ({"warmup_ratio": 0.06, "gradient_checkpointing": True}, {"warmup_steps": 0.06, "activation_checkpointing": True}),
    ({"learning_rate": 0.0005, "unknown": 1}, {"learning_rate": 0.0005, "unknown": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), CASES, ids=lambda value: json.dumps(value)[:40])
def test_translations(settings: dict, expected: dict) -> None:
    assert translate_settings(settings, "lavit") == expected
    words = [f"--{name}={value}" for name, value in settings.items()]
    found = dict(word.removeprefix("--").split("=", 1) for word in translate_arguments(words, "lavit"))
    assert {name: yaml.safe_load(value) for name, value in found.items()} == pytest.approx(expected)


REFUSED = [
    ({"training_stage": 3}, r"training_stage=3, .*choose one of \[0, 1, 2\]"),
    ({"training_stage": True}, r"training_stage=True, .*choose one of \[0, 1, 2\]"),
    ({"freeze_vision": "half"}, r"freeze_vision='half', .*choose one of \[True, False\]"),
    ({"use_trajectory_supervision": "maybe"}, "use_trajectory_supervision='maybe', .*choose one of"),
    ({"warmup_ratio": 30}, "warmup_ratio=30, .*below 1; for a number of steps set warmup_steps"),
    ({"loss_scale_vtop": 0.3, "latent_loss_weight": 1.0}, "give one of them"),
    ({"use_trajectory_supervision": False, "attention_loss_weight": 0.3}, "give one of them"),
    ({"freeze_vision": True, "freeze_merger": False}, "give one of them"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_has_no_meaning_here_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_settings(settings, "lavit")


def test_the_published_command_is_parsed_and_flags_win(tmp_path: Path) -> None:
    """Stage 1 of the two-stage script, in its own words."""
    file = tmp_path / "stage1.yaml"
    run = {
        "num_lavit_tokens": 4, "training_stage": 1, "bottleneck_block_prompt": True, "loss_scale_vtop": 0.3,
        "loss_scale_traj": 0.3, "freeze_vision": True, "v_top_dim": 5120, "image_root": "data/images",
        "max_samples": 8765, "learning_rate": "5e-6", "warmup_ratio": 0.06, "weight_decay": 0.1, "max_steps": 400,
        "min_pixels": 200704, "max_pixels": 4194304, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16, "use_trajectory_supervision": True,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(run))
    parser = PublishedParser(PARTS, stage="lavit")
    words = ["--config", str(file), "--loss_scale_traj", "0.1", "--output_dir", str(tmp_path / "out"), *CPU]
    script, config, model = parser.parse_args_and_config(words)
    assert (config.training_stage, config.block_prompt, config.num_latent_tokens) == (1, True, 4)
    assert (config.latent_loss_weight, config.attention_loss_weight, config.learning_rate) == (0.3, 0.1, 5e-6)
    assert config.get_warmup_steps(config.max_steps) == 24
    assert (model.freeze_vision_tower, model.freeze_merger, model.concept_head_size) == (True, True, 5120)
    assert (script.image_folder, script.max_samples) == ("data/images", 8765)


# The recipes --------------------------------------------------------------------------------------------------------

# Method card, section 5.1: steps, rate, warm-up, decay, samples of an optimizer step, samples kept, most pixels.
PUBLISHED = {
    "sft": (1000, 5e-6, 30, 0.0, 16, None, 1003520),
    "single_stage": (1000, 5e-6, 30, 0.1, 16, 14567, 4194304),
    "stage1": (400, 5e-6, 24, 0.1, 16, 8765, 4194304),
    "stage2": (600, 2e-6, 18, 0.1, 16, 8765, 4194304),
    "textonly": (800, 5e-6, 24, 0.1, 16, None, 4194304),
}
VISIBILITY = {"sft": "gate", "single_stage": "none", "stage1": "bottleneck", "stage2": "none", "textonly": "none"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_parse_and_have_the_published_values(name: str) -> None:
    parser = PublishedParser(PARTS, stage="lavit")
    script, config, model = parser.parse_args_and_config(["--config", str(RECIPES / f"{name}.yaml"), *CPU])
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    warmup = config.get_warmup_steps(config.max_steps)
    found = (config.max_steps, config.learning_rate, warmup, config.weight_decay, samples, script.max_samples)
    assert (*found, model.max_pixels) == PUBLISHED[name]
    assert model.min_pixels == 200704 and config.seed == 42 and config.lr_scheduler_type == "linear"
    assert (model.freeze_vision_tower, model.freeze_merger, model.freeze_llm) == (True, True, False)
    assert model.dtype == "float32" and yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["bf16"] is True
    assert config.latent_visibility == VISIBILITY[name]
    weights = (config.latent_loss_weight, config.attention_loss_weight)
    assert weights == ((0.0, 0.0) if name == "textonly" else (0.3, 0.3))


def test_the_second_stage_goes_on_from_the_first() -> None:
    first, second = (yaml.safe_load((RECIPES / f"stage{n}.yaml").read_text()) for n in (1, 2))
    assert second["model_name_or_path"] == first["output_dir"]
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PUBLISHED)
