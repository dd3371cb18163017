"""The latent configuration: built from a stock one, checked, saved, and the table of methods."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig, Qwen2_5_VLConfig, Qwen2VLConfig

from modeling_latent import (
    LATENT_CLASSES,
    LATENT_METHODS,
    LatentMethod,
    LatentQwen2_5_VLConfig,
    get_latent_method,
    register_latent_method,
)
from tests.latent import latent_token_ids
from tests.tiny import FAMILIES, tiny_config

IDS = latent_token_ids()
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("latent_patch_token_id", "latent_method", "latent_head", "latent_stop_token_id")),
    "latent_generation": {},
    "latent_stop_vector": False,
    "latent_head_timing": "train",
    "latent_head_size": None,
    "latent_learned_token_ids": None,
    "concept_head_size": None,
    "attention_head": False,
    "patch_embed_fp32": False,
    "rope_positions": "mrope",
}
FIELDS = (*IDS, *DEFAULTS)
MODEL = "modeling_latent_qwen2_5_vl.LatentQwen2_5_VLForConditionalGeneration"


@pytest.fixture
def methods() -> Any:
    before = dict(LATENT_METHODS)
    yield LATENT_METHODS
    LATENT_METHODS.clear()
    LATENT_METHODS.update(before)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as it is written, without what names the class and the file format."""
    skipped = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in skipped}


def test_from_stock_keeps_everything() -> None:
    stock = tiny_config(tie_word_embeddings=True)
    stock.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config = LatentQwen2_5_VLConfig.from_stock(stock, **IDS)
    assert config.model_type == "latent_qwen2_5_vl" and stock.model_type == "qwen2_5_vl"
    assert not config.architectures
    ours = plain(config)
    latent = {name: ours.pop(name) for name in FIELDS}
    assert ours == plain(stock)
    assert latent == {**DEFAULTS, **IDS}
    again = LatentQwen2_5_VLConfig.from_stock(config, latent_method="laser")
    assert plain(again) == {**plain(config), "latent_method": "laser"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Nothing of the stock configuration is lost, the map names the family's own file, other families are refused."""
    config_class, model_class = LATENT_CLASSES[family]
    stock = tiny_config(tie_word_embeddings=True, family=family)
    config = config_class.from_stock(stock, method="laser", **latent_token_ids(family))
    ours = plain(config)
    for name in FIELDS:
        ours.pop(name)
    assert ours == plain(stock) and config.model_type == f"latent_{family}" == config_class.model_type
    assert config.auto_map["AutoModel"] == f"modeling_latent_{family}.{model_class.__name__}"
    assert config.auto_map["AutoConfig"] == f"configuration_latent.{config_class.__name__}"
    assert model_class.__module__ == f"modeling_latent.modeling_latent_{family}"
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    assert plain(AutoConfig.from_pretrained(tmp_path)) == plain(config)
    for other in set(FAMILIES) - {family}:
        with pytest.raises(ValueError, match=f"model_type '{family}', got '{other}'; use the latent class of that"):
            config_class.from_stock(tiny_config(family=other))


def test_from_stock_takes_the_attention_implementation() -> None:
    stock = tiny_config()
    stock._attn_implementation = "eager"
    config = LatentQwen2_5_VLConfig.from_stock(stock, **IDS)
    assert config._attn_implementation == "eager" and config.text_config._attn_implementation == "eager"


def test_from_stock_with_a_method() -> None:
    config = LatentQwen2_5_VLConfig.from_stock(tiny_config(), method="laser", **IDS)
    assert (config.latent_method, config.latent_head) == ("laser", None)
    assert config.latent_generation == {"latent_strategy": "dynamic", "max_latent_steps": 8}
    config.latent_generation["max_latent_steps"] = 3
    assert LATENT_METHODS["laser"].generation["max_latent_steps"] == 8, "the table is not shared"
    mine = LatentQwen2_5_VLConfig.from_stock(tiny_config(), method="laser", latent_head="glu", latent_generation={})
    assert mine.latent_head == "glu" and mine.latent_generation == {}


@pytest.mark.parametrize(
    ("stock", "named"),
    [(LlamaConfig(), "'llama'"), (Qwen2VLConfig(), "'qwen2_vl'"), (tiny_config().text_config, "'qwen2_5_vl_text'")],
)
def test_another_family_is_refused(stock: Any, named: str) -> None:
    with pytest.raises(
        ValueError, match=f"LatentQwen2_5_VLConfig is built from .* 'qwen2_5_vl', got {named}; use the"
    ):
        LatentQwen2_5_VLConfig.from_stock(stock)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown latent fields \['latent_tokens'\]; known: \['latent_token_id'"):
        LatentQwen2_5_VLConfig.from_stock(tiny_config(), latent_tokens=5)


@pytest.mark.parametrize("value", ["7", 7.5, [7]])
def test_a_field_of_the_wrong_type_is_refused(value: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="latent_token_id"):
        LatentQwen2_5_VLConfig.from_stock(tiny_config(), latent_token_id=value)


def test_two_roles_of_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latent token ids must differ from each other, got \[5, 6, 5\]; give"):
        LatentQwen2_5_VLConfig.from_stock(
            tiny_config(), latent_token_id=5, latent_start_token_id=6, latent_end_token_id=5
        )


def test_missing_tokens_are_named() -> None:
    LatentQwen2_5_VLConfig.from_stock(tiny_config(), **IDS).require_latent_tokens()
    config = LatentQwen2_5_VLConfig.from_stock(tiny_config(), latent_token_id=5)
    config._name_or_path = "org/model"
    message = r"'org/model' has no latent tokens \(latent_start_token_id, latent_end_token_id is None.*convert_stock"
    with pytest.raises(ValueError, match=message):
        config.require_latent_tokens()


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = LatentQwen2_5_VLConfig.from_stock(tiny_config(), method="laser", **IDS, latent_patch_token_id=500)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "latent_qwen2_5_vl" and written["latent_patch_token_id"] == 500
    assert written["auto_map"] == {
        "AutoConfig": "configuration_latent.LatentQwen2_5_VLConfig",
        "AutoModel": MODEL,
        "AutoModelForImageTextToText": MODEL,
        "AutoModelForCausalLM": MODEL,
        "AutoProcessor": "processing_latent.LatentProcessor",
    }
    for loaded in (LatentQwen2_5_VLConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LatentQwen2_5_VLConfig
        assert plain(loaded) == plain(config) and loaded.auto_map == config.auto_map
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_entries_of_the_map_that_a_folder_has_are_kept() -> None:
    config = LatentQwen2_5_VLConfig(auto_map={"AutoModel": "other.Model"})
    assert config.auto_map["AutoModel"] == "other.Model" and config.auto_map["AutoModelForCausalLM"] == MODEL


def test_the_stock_class_is_left_alone() -> None:
    assert Qwen2_5_VLConfig.model_type == "qwen2_5_vl" and not hasattr(tiny_config(), "latent_token_id")
    assert type(AutoConfig.for_model("qwen2_5_vl")) is Qwen2_5_VLConfig


# Methods


def test_laser() -> None:
    """Names and order of the marker tokens are those of the published tokenizer: the order fixes the ids."""
    laser = get_latent_method("laser")
    assert list(laser.tokens.items()) == [
        ("start", "<|laser_start|>"),
        ("slot", "<|laser|>"),
        ("end", "<|laser_end|>"),
    ]
    assert laser.head is None and "2601.06803" in laser.source


def test_register_a_method(methods: dict) -> None:
    mine = LatentMethod("mine", {"start": "<s>", "slot": "<l>", "end": "<e>"}, {"latent_strategy": "off"}, head="glu")
    assert register_latent_method(mine) is mine and get_latent_method("mine") is mine
    register_latent_method(LatentMethod(**vars(mine)))  # the same values again
    config = LatentQwen2_5_VLConfig.from_stock(tiny_config(), method="mine")
    assert config.latent_head == "glu" and config.latent_generation == {"latent_strategy": "off"}
    with pytest.raises(ValueError, match="'mine' is already registered with other values; choose another name"):
        register_latent_method(LatentMethod("mine", {"start": "<s>", "slot": "<l>", "end": "<f>"}))
    with pytest.raises(ValueError, match=r"latent method 'short': tokens lack the roles \['end', 'slot'\]"):
        register_latent_method(LatentMethod("short", {"start": "<s>"}))


def test_an_unknown_method_is_refused(methods: dict) -> None:
    for call in (get_latent_method, lambda name: LatentQwen2_5_VLConfig.from_stock(tiny_config(), method=name)):
        with pytest.raises(
            ValueError, match=r"unknown latent method 'lasser'; choose one of \[.*'laser', .* or register"
        ):
            call("lasser")
