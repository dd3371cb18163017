"""Published LVR arguments: the table against the page and the configs, translations, refusals, and the parser."""

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import TrlParser

from trainers import published_arguments
from trainers.grpo_config import LatentGRPOConfig
from trainers.lvr_config import LVRSFTConfig
from trainers.model_loading import LatentModelConfig
from trainers.published_arguments import (
    PUBLISHED_ARGUMENTS,
    PublishedParser,
    argument_table,
    arguments_of,
    translate_arguments,
    translate_settings,
)
from trainers.scripts import ScriptArguments

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "hub_configs" / "methods" / "lvr.md"
CONFIGS = {"sft": LVRSFTConfig, "grpo": LatentGRPOConfig}
# Method card of LVR, sections 5.1, 5.2 and 5.6.
STAGE_ONE = (
    "model_id coconut lvr_head lvr_head_type latent_end_token max_lvr_tokens loss_lvr_fct loss_lvr_lambda "
    "mode_switch_loss loss_mode_switch_fct loss_mode_switch_lambda freeze_vision_tower freeze_merger freeze_llm "
    "learning_rate lr_scheduler_type warmup_ratio weight_decay vision_lr merger_lr lvr_head_lr max_steps "
    "per_device_train_batch_size gradient_accumulation_steps image_min_pixels image_max_pixels enable_data_packing "
    "max_packed_tokens long_seq_threshold max_instance_per_batch random_seed bf16 gradient_checkpointing "
    "dataloader_num_workers deepspeed save_strategy save_steps save_total_limit checkpoint_name online_checkpoint"
).split()
LISTED = (
    "deepspeed data_path image_folder model_id output_dir num_train_epochs per_device_train_batch_size "
    "gradient_accumulation_steps freeze_vision_tower freeze_llm freeze_merger vision_lr merger_lr learning_rate bf16 "
    "fp16 image_min_pixels image_max_pixels image_max_pixles max_seq_length bits disable_flash_attn2 report_to "
    "logging_dir logging_steps dataloader_num_workers precompute_ref_log_probs beta"
).split()
STAGE_TWO = (
    "temperature top_p top_k min_p repetition_penalty max_completion_length max_prompt_length beta decoding_strategy "
    "lvr_steps num_generations num_iterations epsilon loss_type scale_rewards reward_weights epsilon_high "
    "mask_truncated_completions sync_ref_model log_completions"
).split()


@pytest.fixture(autouse=True)
def no_log_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_arguments, "_LOGGED", set())


def names_of(stage: str) -> set[str]:
    """Fields of what the script of a stage parses."""
    parts = (CONFIGS[stage], LatentModelConfig, ScriptArguments)
    return {field.name for part in parts for field in dataclasses.fields(part)}


# The table ----------------------------------------------------------------------------------------------------------


def test_every_published_argument_has_a_row() -> None:
    assert set(STAGE_ONE) | set(LISTED) <= set(arguments_of("sft"))
    assert set(LISTED) | set(STAGE_TWO) <= set(arguments_of("grpo"))
    assert len({(row.name, row.stages) for row in PUBLISHED_ARGUMENTS}) == len(PUBLISHED_ARGUMENTS)
    stages = r"\['sft', 'grpo', 'staged', 'lavit', 'teacher'\]"
    with pytest.raises(ValueError, match=f"unknown stage 'rl'; choose one of {stages}"):
        arguments_of("rl")


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_field_that_the_table_names_exists(stage: str) -> None:
    rows = arguments_of(stage).values()
    assert not {row.ours for row in rows if row.ours} - names_of(stage)
    # What passes under its own name is ours; what is translated is no field, or one that means the same.
    assert not {row.name for row in rows if row.translate is None} - names_of(stage)
    same_meaning = {"decoding_strategy", "lvr_steps", "gradient_checkpointing"}
    assert not {row.name for row in rows if row.translate is not None} & names_of(stage) - same_meaning


def test_the_page_has_the_table_row_by_row() -> None:
    text = PAGE.read_text()
    shown = re.search(r"<!-- published arguments: begin -->\n(.*)\n<!-- published arguments: end -->", text, re.DOTALL)
    assert shown, f"{PAGE.name} has no table"
    for line, expected in zip(shown[1].splitlines(), argument_table(), strict=True):
        assert line == expected
    assert len(shown[1].splitlines()) == len(PUBLISHED_ARGUMENTS) + 2


# Translations -------------------------------------------------------------------------------------------------------


SFT_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lvr_head": True}, {"latent_head": "simple"}),
    ({"lvr_head": True, "lvr_head_type": "glu"}, {"latent_head": "glu"}),
    ({"lvr_head": False, "lvr_head_type": "glu"}, {}),
    ({"latent_end_token": True}, {"latent_stop_vector": True}),
    ({"latent_end_token": False}, {}),
    ({"loss_lvr_fct": "cosine", "loss_lvr_lambda": 0.2}, {"roi_loss_type": "cosine", "latent_loss_weight": 0.2}),
    (
        {"mode_switch_loss": True, "loss_mode_switch_fct": "mae", "loss_mode_switch_lambda": 0.3},
        {"mode_switch_loss": True, "mode_switch_loss_type": "mae", "mode_switch_weight": 0.3},
    ),
    (
        {"enable_data_packing": True, "max_packed_tokens": 8192, "long_seq_threshold": 2048},
        {"latent_packing": "buckets", "packing_max_tokens": 8192, "packing_long_threshold": 2048},
    ),
    ({"max_instance_per_batch": 3, "enable_data_packing": False}, {"packing_max_instances": 3}),
    ({"max_packed_tokens": None, "max_lvr_tokens": None, "random_seed": None}, {}),
    ({"random_seed": 42, "lvr_head_lr": 1e-4}, {"data_seed": 42, "latent_head_lr": 1e-4}),
    ({"image_min_pixels": 3136, "image_max_pixles": 12845056}, {"min_pixels": 3136, "max_pixels": 12845056}),
    ({"image_max_pixels": 784, "max_pixels": 784}, {"max_pixels": 784}),
    ({"model_id": "base"}, {"model_name_or_path": "base"}),
    ({"model_id": "base", "checkpoint_name": "warm"}, {"model_name_or_path": "warm"}),
    ({"model_id": "base", "checkpoint_name": None}, {"model_name_or_path": "base"}),
    ({"warmup_ratio": 0.03, "gradient_checkpointing": True}, {"warmup_steps": 0.03, "activation_checkpointing": True}),
    ({"disable_flash_attn2": True}, {"attn_implementation": "sdpa"}),
    ({"disable_flash_attn2": False, "attn_implementation": "eager"}, {"attn_implementation": "eager"}),
    ({"bits": 16, "coconut": True, "online_checkpoint": False, "precompute_ref_log_probs": False}, {}),
    ({"bits": 4, "load_in_4bit": True}, {"load_in_4bit": True}),
    ({"freeze_llm": True, "unknown": "x"}, {"freeze_llm": True, "unknown": "x"}),
]


@pytest.mark.parametrize(("settings", "expected"), SFT_CASES, ids=lambda value: json.dumps(value)[:40])
def test_settings_and_flags_of_the_first_stage(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate_settings(settings, "sft") == expected
    flags = translate_arguments([f"--{name}={value}" for name, value in settings.items()], "sft")
    read = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert {name: yaml.safe_load(value) for name, value in read.items()} == pytest.approx(expected)


def test_settings_of_the_second_stage() -> None:
    for name, ours in (("steps", "fixed"), ("latent", "end_vector"), (None, "mode_switch"), ("None", "mode_switch")):
        assert translate_settings({"decoding_strategy": name}, "grpo") == {"latent_strategy": ours}
    settings = {"lvr_steps": 8, "beta": 0.04, "temperature": 0.9, "checkpoint_name": "stage-1"}
    assert translate_settings(settings, "grpo") == {
        "num_latent_steps": 8,
        "beta": 0.04,
        "temperature": 0.9,
        "model_name_or_path": "stage-1",
    }


def test_command_lines_keep_the_words_of_others() -> None:
    words = "--config x.yaml --lora_target_modules a b --bf16 --random-seed 7 --lvr_head -1".split()
    with pytest.raises(ValueError, match=r"lvr_head='-1'.*choose one of \[True, False\]"):
        translate_arguments(words, "sft")
    assert translate_arguments([*words[:-2], "--lvr_head"], "sft") == [
        *"--config x.yaml --lora_target_modules a b --bf16".split(),
        "--data_seed=7",
        "--latent_head=simple",
    ]


def test_a_translation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            translate_settings({"loss_lvr_fct": "mse", "coconut": True, "freeze_llm": True}, "sft")
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "loss_lvr_fct='mse' of the published code is roi_loss_type='mse' here" in texts[0]
    assert "coconut=True of the published code is left out here" in texts[1]


# Refusals -----------------------------------------------------------------------------------------------------------


REFUSED = [
    ("sft", {"bits": 4}, "bits=4, .*set load_in_4bit: true and use_peft: true"),
    ("grpo", {"bits": 8}, "bits=8, .*set load_in_8bit: true and use_peft: true"),
    ("sft", {"bits": 3}, "bits=3, .*choose 16"),
    ("sft", {"beta": 0.1}, "beta=0.1, .*left over from DPO"),
    ("sft", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True, .*leave it out"),
    ("sft", {"coconut": False}, "coconut=False, .*latent_form: none"),
    ("sft", {"max_lvr_tokens": 16}, "max_lvr_tokens=16, .*never published.*max_pixels"),
    ("grpo", {"max_seq_length": 32768}, "max_seq_length=32768, .*never reads it.*max_pixels"),
    ("sft", {"online_checkpoint": True}, "online_checkpoint=True, .*set push_to_hub: true"),
    ("sft", {"lvr_head_type": "glu"}, "lvr_head_type='glu', .*without lvr_head.*latent_head: glu"),
    ("sft", {"lvr_head": True, "lvr_head_type": "mlp"}, "lvr_head_type='mlp', .*choose one of"),
    ("sft", {"latent_end_token": "maybe"}, "latent_end_token='maybe', .*choose one of"),
    ("sft", {"warmup_ratio": 75}, "warmup_ratio=75, .*below 1; for a number of steps set warmup_steps"),
    ("sft", {"random_seed": 0}, "random_seed=0, .*give another number"),
    ("grpo", {"decoding_strategy": "beams"}, "decoding_strategy='beams', .*choose one of"),
    ("sft", {"image_max_pixels": 784, "max_pixels": 100}, "max_pixels says max_pixels=100 and image_max_pixels"),
    ("sft", {"image_max_pixels": 784, "image_max_pixles": 100}, "image_max_pixles .*max_pixels=100 and image_max_pix"),
    ("sft", {"lvr_head": True, "latent_head": "glu"}, "latent_head says latent_head='glu' and lvr_head .published."),
    ("grpo", {"lvr_steps": 8, "num_latent_steps": 4}, "give one of them"),
    ("sft", {"checkpoint_name": "a", "model_name_or_path": "b"}, "give one of them"),
]


@pytest.mark.parametrize(("stage", "settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_name_argument_value_and_remedy(stage: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_settings(settings, stage)


# The parser ---------------------------------------------------------------------------------------------------------

CPU = ["--use_cpu=true", "--bf16=false"]


def test_the_parser_takes_published_names_from_flags_and_files(tmp_path: Path) -> None:
    """The published run of stage 1, in its own words: file first, flags win."""
    file = tmp_path / "run.yaml"
    run = {"model_id": "base", "loss_lvr_lambda": 0.1, "warmup_ratio": 0.03, "max_steps": 2500, "lvr_head": False}
    file.write_text(yaml.safe_dump({**run, "enable_data_packing": True, "random_seed": 42, "learning_rate": 1e-5}))
    parser = PublishedParser((ScriptArguments, LVRSFTConfig, LatentModelConfig), "sft")
    flags = ["--loss_lvr_lambda", "0.2", "--freeze_merger", "True", "--image_max_pixels", "4014080", *CPU]
    _, config, model = parser.parse_args_and_config(["--config", str(file), *flags])
    assert (config.latent_loss_weight, config.latent_packing, config.data_seed) == (0.2, "buckets", 42)
    assert config.get_warmup_steps(config.max_steps) == 75
    assert (model.model_name_or_path, model.max_pixels, model.freeze_merger) == ("base", 4014080, True)
    assert model.latent_head is None
    with pytest.raises(ValueError, match="hidden_dim"):
        file.write_text("hidden_dim: 3\n")
        PublishedParser((LVRSFTConfig,), "sft").parse_args_and_config(["--config", str(file), *CPU])


def test_the_folder_of_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    for stage, config in CONFIGS.items():
        config(use_cpu=True, bf16=False)
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "elsewhere"
        with monkeypatch.context() as patch:
            patch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
            config(use_cpu=True, bf16=False, logging_dir=str(tmp_path / stage))
            assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / stage)


# The recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["7b", "3b"])
@pytest.mark.parametrize("stage", CONFIGS)
def test_the_recipes_parse_and_have_the_published_values(size: str, stage: str) -> None:
    path = ROOT / "hub_configs" / f"lvr-{size}" / f"{stage}.yaml"
    parser = TrlParser((ScriptArguments, CONFIGS[stage], LatentModelConfig))
    _, config, model = parser.parse_args_and_config(["--config", str(path), *CPU])
    assert (model.freeze_vision_tower, model.freeze_merger, model.freeze_llm) == (True, True, False)
    pixels = {"sft": (128 * 784, 5120 * 784), "grpo": (128 * 784, 2560 * 784)}[stage]
    assert (model.min_pixels, model.max_pixels) == pixels
    published = {
        "sft": {"learning_rate": 1e-5, "max_steps": 2500, "gradient_accumulation_steps": 8, "latent_loss_weight": 0.1},
        "grpo": {"learning_rate": 5e-6, "temperature": 0.9, "beta": 0.04, "num_generations": 8, "num_latent_steps": 8},
    }[stage]
    assert {name: getattr(config, name) for name in published} == published
    assert config.get_warmup_steps(config.max_steps) == 0.03 * config.max_steps
    seven = yaml.safe_load((ROOT / "hub_configs" / "lvr-7b" / f"{stage}.yaml").read_text())
    values = yaml.safe_load(path.read_text())
    assert {name for name in seven if seven[name] != values.get(name)} <= {"model_name_or_path", "output_dir"}
    assert seven.keys() == values.keys()
