"""Every option of the trainer's config reaches what it is for, and every wrong value is refused by its name."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, TrlParser

from tests.latent import tiny_latent_model
from trainers import LatentSFTConfig
from trainers.exposure import LatentExposure
from trainers.losses.dwal import DwalOptions
from trainers.objectives import build_objective

# A value that differs from the default for every option of the loss.
DWAL_VALUES: dict[str, Any] = {
    "dwal_window_size": 3,
    "dwal_temperature": 2.5,
    "dwal_entropy_threshold": 0.31,
    "dwal_force_prob": 0.4,
    "dwal_loss_type": "mse",
    "dwal_spatial_decay_gamma": 0.91,
    "dwal_time_weight_init": 0.5,
    "dwal_mse_masked": False,
    "dwal_deduplicate_window": True,
    "dwal_row_average": "example",
}
OWN = {field.name for field in dataclasses.fields(LatentSFTConfig)} - {f.name for f in dataclasses.fields(SFTConfig)}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Builds a config that writes nowhere near the checkout."""
    return lambda **options: LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_there_is_one_field_for_every_option_of_the_loss() -> None:
    names = {field.name for field in dataclasses.fields(LatentSFTConfig) if field.name.startswith("dwal_")}
    assert names == {f"dwal_{field.name}" for field in dataclasses.fields(DwalOptions)} == set(DWAL_VALUES)


def test_defaults_are_those_of_the_published_script(make: Any) -> None:
    config = make()
    assert config.dwal_options() == DwalOptions(entropy_threshold=0.6, force_prob=0.8, temperature=1.0)
    assert (config.latent_loss_weight, config.latent_form, config.latent_method) == (1.0, "chain", None)
    assert config.max_length is None and config.pad_to_multiple_of == 8 and config.max_bad_share == 0.01
    assert config.remove_unused_columns is False


@pytest.mark.parametrize("name", DWAL_VALUES)
def test_each_option_reaches_the_loss(name: str, make: Any) -> None:
    value = DWAL_VALUES[name]
    model = tiny_latent_model(latent_method="laser")
    objective = build_objective(make(**{name: value}), model.config)
    assert objective.options == DwalOptions(**{name.removeprefix("dwal_"): value}) != DwalOptions()


def test_the_exposure_is_built_from_its_fields(make: Any) -> None:
    assert make().exposure() == LatentExposure("text", 1.0, 1)
    options = {"latent_exposure": "own", "latent_exposure_prob": 0.25, "latent_exposure_passes": 3}
    assert make(**options).exposure() == LatentExposure("own", 0.25, 3)


def test_every_field_has_a_help_text() -> None:
    for field in dataclasses.fields(LatentSFTConfig):
        if field.name in OWN:
            assert len(field.metadata["help"]) > 20, field.name
    assert OWN > {"latent_method", "latent_form", "num_slots", "latent_loss_weight", "max_bad_share"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"latent_loss_weight": -0.1}, "latent_loss_weight=-0.1 must be a finite number, 0 or more"),
    ({"latent_loss_weight": float("nan")}, "latent_loss_weight=nan must be a finite number"),
    ({"latent_loss_weight": float("inf")}, "latent_loss_weight=inf must be a finite number"),
    ({"latent_loss_weight": "much"}, "latent_loss_weight='much' must be a finite number"),
    ({"ce_weight": -1}, "ce_weight=-1 must be a finite number, 0 or more"),
    ({"latent_loss_weight": True}, "latent_loss_weight=True must be a finite number"),
    ({"latent_form": "roi"}, "latent_form='roi' is unknown; choose 'chain', 'slots', 'regions', 'learned' or 'none'"),
    ({"latent_form": None}, "latent_form=None is unknown; choose 'chain', 'slots', 'regions', 'learned' or 'none'"),
    ({"num_slots": 4}, "num_slots=4 with latent_form='chain': .*latent_form='slots'"),
    ({"num_slots": 4, "latent_form": "none"}, "num_slots=4 with latent_form='none': .*latent_form='slots'"),
    ({"num_slots": 0, "latent_form": "slots"}, "num_slots=0 .*at least 1"),
    ({"num_slots": -2, "latent_form": "slots"}, "num_slots=-2 .*at least 1"),
    ({"num_slots": 2.5, "latent_form": "slots"}, "num_slots=2.5 .*integer of at least 1"),
    ({"latent_exposure": "self"}, r"latent_exposure='self' is unknown; choose one of \['text', 'oracle', 'own', 'f"),
    ({"latent_exposure_prob": 0.0}, "latent_exposure_prob=0.0 must be above 0 and at most 1; use 'text' or 'oracle'"),
    ({"latent_exposure_prob": 1.1}, "latent_exposure_prob=1.1 must be above 0 and at most 1"),
    ({"latent_exposure_prob": "half"}, "latent_exposure_prob='half' must be above 0 and at most 1"),
    ({"latent_exposure_unit": "span"}, r"latent_exposure_unit='span' is unknown; choose one of \['row', 'latent'\]"),
    ({"latent_exposure_forced": -1}, "latent_exposure_forced=-1 must be an integer, 0 or more"),
    (
        {"latent_exposure": "free", "activation_checkpointing": True},
        "latent_exposure='free' needs the cache, which activation checkpointing drops",
    ),
    ({"latent_exposure_passes": 0}, "latent_exposure_passes=0 must be an integer of at least 1"),
    ({"latent_exposure_passes": 1.5}, "latent_exposure_passes=1.5 must be an integer of at least 1"),
    ({"loss_average": "tokens"}, r"loss_average='tokens' is unknown; choose one of \['batch', 'token', 'sample'\]"),
    ({"latent_head_lr": -1.0}, "latent_head_lr=-1.0 must be above 0"),
    ({"weight_decay_rule": "none"}, r"weight_decay_rule='none' is unknown; choose one of \['transformers'"),
    ({"vision_lr": 0}, "vision_lr=0 must be above 0; to keep that part as it is, freeze it"),
    ({"merger_lr": float("nan")}, "merger_lr=nan must be above 0"),
    ({"stop_on_nan": "yes"}, "stop_on_nan='yes' must be true or false"),
    ({"max_bad_share": -0.01}, "max_bad_share=-0.01 must be between 0 and 1"),
    ({"max_bad_share": 1.5}, "max_bad_share=1.5 must be between 0 and 1"),
    ({"max_bad_share": "1%"}, "max_bad_share='1%' must be between 0 and 1"),
    ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be an integer of at least 1, or None"),
    ({"pad_to_multiple_of": -8}, "pad_to_multiple_of=-8 must be an integer of at least 1"),
    ({"pad_to_multiple_of": "eight"}, "pad_to_multiple_of='eight' must be an integer of at least 1"),
    ({"enable_dynamic_batch": "yes"}, "enable_dynamic_batch='yes' must be true or false"),
    ({"dynamic_batch_token_cap": 0}, "dynamic_batch_token_cap=0 must be an integer of at least 1"),
    ({"dynamic_batch_max_bs": 2.0}, "dynamic_batch_max_bs=2.0 must be an integer of at least 1"),
    ({"dynamic_batch_plan": "best"}, "dynamic_batch_plan='best' is unknown; choose 'balanced' or 'reference'"),
    ({"latent_packing": "rows"}, "latent_packing='rows' is unknown; choose 'buckets' or 'sequence'"),
    ({"packing_max_tokens": 0}, "packing_max_tokens=0 must be an integer of at least 1"),
    ({"packing_long_threshold": 1.5}, "packing_long_threshold=1.5 must be an integer of at least 1"),
    ({"packing_max_instances": True}, "packing_max_instances=True must be an integer of at least 1"),
    ({"packing_max_samples": 0}, "packing_max_samples=0 must be an integer of at least 1, or None"),
    ({"packing_over_long": "drop"}, r"packing_over_long='drop' is unknown; choose one of \['keep', 'cut', 'refuse'\]"),
    ({"lengths_path": "x.json"}, "lengths_path='x.json' is read only with enable_dynamic_batch=True"),
    ({"dwal_window_size": 0}, "dwal_window_size=0 is not valid: give an integer of at least 1, or None"),
    ({"dwal_window_size": 2.0}, "dwal_window_size=2.0 is not valid: give an integer of at least 1"),
    ({"dwal_temperature": 0}, "dwal_temperature=0 is not valid: give a number above 0"),
    ({"dwal_temperature": "hot"}, "dwal_temperature='hot' is not valid: give a number above 0"),
    ({"dwal_entropy_threshold": float("nan")}, "dwal_entropy_threshold=nan is not valid: give a finite number"),
    ({"dwal_force_prob": 1.2}, "dwal_force_prob=1.2 is not valid: give a number from 0 to 1"),
    ({"dwal_loss_type": "kl"}, "dwal_loss_type='kl' is not valid: choose one of weighted_ce, mse"),
    ({"dwal_spatial_decay_gamma": 0.0}, "dwal_spatial_decay_gamma=0.0 is not valid: give a number above 0"),
    ({"dwal_time_weight_init": 2}, "dwal_time_weight_init=2 is not valid: give a number from 0 to 1"),
    ({"dwal_mse_masked": "yes"}, "dwal_mse_masked='yes' is not valid: give True or False"),
    ({"dwal_deduplicate_window": 1}, "dwal_deduplicate_window=1 is not valid: give True or False"),
    ({"dwal_row_average": "token"}, "dwal_row_average='token' is not valid: choose one of flat, example"),
    ({"max_length": 1024}, "max_length=1024 would cut image tokens or a span; leave it out and bound max_pixels"),
    ({"packing": True}, "packing=True does not work with images and spans; set it to false"),
    ({"padding_free": True}, "padding_free=True does not work with images and spans; set it to false"),
    ({"eval_packing": True}, "eval_packing=True does not work with images and spans; set it to false"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 needs the logits of all positions.*leave it out"),
    ({"assistant_only_loss": True}, "assistant_only_loss=True says what the collator does anyway.*leave it out"),
    ({"completion_only_loss": False}, "completion_only_loss=False is not available.*leave it out"),
    ({"chat_template_path": "a.jinja"}, "chat_template_path='a.jinja' is not read.*leave it out"),
    ({"save_on_each_node": True}, "save_on_each_node=True leaves the other nodes without weights.*leave it out"),
    ({"shuffle_dataset": True}, "shuffle_dataset=True is not read.*leave it out"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_a_wrong_value_is_refused_by_name(options: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**options)
    # The name is the one that the user typed: nothing stands before it.
    assert re.match(next(iter(options)), str(caught.value))


def test_every_own_field_is_checked() -> None:
    checked = {name for options, _ in WRONG for name in options}
    # For the first the model is needed, see below; the second may be any folder.
    assert OWN - checked == {"latent_method", "logging_dir"}


def test_an_unknown_method_and_a_stock_model_are_refused_with_the_remedy(make: Any) -> None:
    model = tiny_latent_model(latent_method="laser")
    with pytest.raises(ValueError, match=r"latent_method='dream' has no training .*choose one of .*'laser'"):
        build_objective(make(latent_method="dream"), model.config)
    with pytest.raises(ValueError, match="latent_method=None has no training objective"):
        build_objective(make(), tiny_latent_model().config)
    with pytest.raises(ValueError, match=r"stock configuration; make the model with convert_stock_checkpoint\(folder"):
        build_objective(make(), model.config.get_text_config())
    without = tiny_latent_model(latent_method="laser", latent_end_token_id=None)
    with pytest.raises(ValueError, match="latent_end_token_id is None.*convert_stock_checkpoint"):
        build_objective(make(), without.config)


def test_yaml_and_flags_fill_the_config(tmp_path: Path) -> None:
    lines = {**DWAL_VALUES, "latent_loss_weight": 0.1, "latent_form": "slots", "num_slots": 6, "max_bad_share": 0.2}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{text}")
    parser = TrlParser((LatentSFTConfig,))
    (config,) = parser.parse_args_and_config(
        ["--config", str(tmp_path / "a.yaml"), "--dwal_force_prob", "0.7", "--num_slots", "2"]
    )
    expected = {**lines, "dwal_force_prob": 0.7, "num_slots": 2}
    assert {name: getattr(config, name) for name in expected} == expected
