"""Keys of the published YAML files of IVT-LR and Coconut: the table, the page and the configs; translations."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.train_ivtlr import StagedScriptArguments, TrainStagedConfig
from tests.hub import ROOT
from trainers.model_loading import LatentModelConfig
from trainers.published_arguments import (
    PublishedParser,
    arguments_of,
    staged_argument_table,
    translate_arguments,
    translate_settings,
)

# Method card of IVT-LR, sections 6.1 and 11.2-11.5.
CARD = (
    "save_path name epochs_per_stage max_latent_stage resume batch_size_training gradient_accumulation_steps lr "
    "num_epochs pad_latent_to_max load_model_path seed c_thought uniform_prob no_cot cot no_thoughts reset_optimizer "
    "save_only_improve weight_decay num_selected_patches"
).split()


def test_every_published_key_has_a_row_and_every_field_exists() -> None:
    rows = arguments_of("staged")
    assert set(CARD) <= set(rows)
    parts = (TrainStagedConfig, LatentModelConfig, StagedScriptArguments)
    names = {field.name for part in parts for field in dataclasses.fields(part)}
    assert not {row.ours for row in rows.values() if row.ours} - names
    assert not {row.name for row in rows.values() if row.translate is None} - names
    assert {row.name for row in rows.values() if row.translate is not None} & names == {"reset_optimizer", "debug"}


def test_the_page_has_the_table_row_by_row() -> None:
    text = (ROOT / "hub_configs" / "methods" / "ivtlr.md").read_text()
    shown = re.search(r"<!-- published keys: begin -->\n(.*)\n<!-- published keys: end -->", text, re.DOTALL)
    assert shown and shown[1].splitlines() == staged_argument_table()


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"save_path": "runs", "name": "qwen"}, {"output_dir": "runs/qwen"}),
    ({"save_path": "runs"}, {"output_dir": "runs"}),
    ({"lr": 4e-5, "num_epochs": 16}, {"learning_rate": 4e-5, "num_train_epochs": 16}),
    (
        {"batch_size_training": 2, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    ),
    ({"resume": 0, "load_model_path": "None"}, {}),
    ({"resume": 3, "num_epochs": 25}, {"resume_epoch": 3, "num_train_epochs": 25}),
    (
        {"resume": 3, "num_epochs": 25, "epochs_per_stage": 3, "load_model_path": "runs/cot"},
        {"start_stage": 1, "num_train_epochs": 22, "epochs_per_stage": 3, "model_name_or_path": "runs/cot"},
    ),
    ({"model_id": "gpt2", "load_model_path": None}, {"model_name_or_path": "gpt2"}),
    ({"model_id": "gpt2", "load_model_path": "runs/cot"}, {"model_name_or_path": "runs/cot"}),
    ({"reset_optimizer": True}, {"reset_optimizer": "epoch"}),
    ({"reset_optimizer": False}, {"reset_optimizer": "never"}),
    ({"reset_optimizer": "stage"}, {"reset_optimizer": "stage"}),
    (
        {"coconut": True, "cot": False, "no_cot": False, "c_thought": 2},
        {"staged_mode": "latent", "latents_per_step": 2},
    ),
    ({"coconut": False, "cot": True, "c_thought": 0}, {"staged_mode": "cot"}),
    ({"no_thoughts": True, "c_thought": 0}, {"staged_mode": "no_thoughts"}),
    ({"no_cot": True}, {"staged_mode": "no_cot"}),
    ({"only_eval": False, "debug": False, "save_only_improve": False}, {}),
    ({"project": "coconut", "debug": "underflow_overflow"}, {"project": "coconut", "debug": "underflow_overflow"}),
    ({"train_path": "a.json", "val_path": "b.json"}, {"data_path": "a.json", "eval_data_path": "b.json"}),
    ({"num_selected_patches": 64}, {"num_latent_patches": 64}),
    ({"uniform_prob": 0.1, "unknown": 1}, {"uniform_prob": 0.1, "unknown": 1}),
]


@pytest.mark.parametrize(("settings", "expected"), CASES, ids=lambda value: json.dumps(value)[:40])
def test_translations(settings: dict, expected: dict) -> None:
    assert translate_settings(settings, "staged") == expected
    words = [f"--{name}={value}" for name, value in settings.items()]
    found = dict(word.removeprefix("--").split("=", 1) for word in translate_arguments(words, "staged"))
    assert found == {name: str(value) for name, value in expected.items()}


REFUSED = [
    ({"name": "qwen"}, "name='qwen', an argument of the published code: it is a folder in save_path"),
    ({"resume": "yes"}, "resume='yes'.*give the number of epochs that are behind"),
    ({"resume": 4, "load_model_path": "a", "epochs_per_stage": 3}, "4 epochs are no whole number of stages"),
    ({"resume": 3, "load_model_path": "a", "epochs_per_stage": 3, "num_epochs": 3}, "resume=3 leaves none of them"),
    ({"load_model_path": "qwen_vl/model.pth"}, "convert the file first"),
    ({"c_thought": 0, "coconut": True}, "no latents at all are no_thoughts: true"),
    ({"cot": "perhaps"}, r"choose one of \[True, False\]"),
    ({"coconut": True, "cot": True}, "cot.* says staged_mode='cot' and coconut.* says staged_mode='latent'"),
    ({"only_eval": True}, "only_eval=True"),
    ({"debug": True}, "for a short run set max_steps"),
    ({"save_only_improve": True}, "save_strategy: best"),
    ({"lr": 1e-4, "learning_rate": 2e-4}, "give one of them"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_has_no_meaning_here_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_settings(settings, "staged")


def test_a_published_file_is_parsed_and_flags_win(tmp_path: Path) -> None:
    keys = {
        "save_path": str(tmp_path), "name": "x", "epochs_per_stage": 4, "max_latent_stage": 5, "resume": 0,
        "batch_size_training": 2, "gradient_accumulation_steps": 8, "num_epochs": 16, "lr": "4e-5",
    }  # fmt: skip
    (tmp_path / "qwen.yaml").write_text(yaml.safe_dump(keys))
    parser = PublishedParser((StagedScriptArguments, TrainStagedConfig), stage="staged")
    words = ["--config", str(tmp_path / "qwen.yaml"), "--num_epochs", "8", "--use_cpu", "true", "--bf16", "false"]
    script, config = parser.parse_args_and_config(words)
    assert (config.output_dir, config.epochs_per_stage, config.num_train_epochs) == (str(tmp_path / "x"), [4], 8)
    assert (config.learning_rate, config.per_device_train_batch_size, script.resume_epoch) == (4e-5, 2, None)
    assert config.curriculum().plan(80, 10) == [(0, 0, 40), (1, 40, 80)]
    words += ["--epochs_per_stage", "1", "3", "2"]
    assert parser.parse_args_and_config(words)[1].curriculum().lengths == (1, 3, 2)
