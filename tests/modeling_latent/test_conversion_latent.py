"""From a stock folder to a latent model: every tensor arrives, in each layout, and the saved folder comes back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from modeling_latent import (
    LATENT_CLASSES,
    LATENT_METHODS,
    LatentMethod,
    LatentProcessor,
    LatentQwen2_5_VLForConditionalGeneration,
    convert_stock_checkpoint,
    register_latent_method,
)
from tests.tiny import LASER_TOKENS, tiny_inputs, tiny_prompts
from trainers.tiny import TINY_FAMILIES, TINY_TEXTS, build_tiny_tokenizer, save_tiny_stock_checkpoint, tiny_config

LAYOUTS = ("published", "current", "published in shards", "published by transformers 4.54")
# Family, whether the embeddings are tied, layout. The published names of Qwen3-VL are the current ones.
CASES = [
    *(("qwen2_5_vl", tied, layout) for tied in (False, True) for layout in LAYOUTS),
    ("qwen2_vl", False, "current"),
    ("qwen2_vl", True, "published in shards"),
    ("qwen3_vl", False, "published"),
    ("qwen3_vl", True, "published in shards"),
]


def save_stock(folder: Path, family: str, tied: bool) -> Path:
    """A stock checkpoint as transformers writes it, which is the layout of the published ones."""
    tokenizer = family_tokenizer(family)
    config = tiny_config(family, None, tokenizer, tie_word_embeddings=tied)
    return save_tiny_stock_checkpoint(folder, tokenizer, config=config)


def family_tokenizer(family: str) -> Any:
    return build_tiny_tokenizer(TINY_TEXTS, added_tokens=TINY_FAMILIES[family].added_tokens)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stock_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock"), "qwen2_5_vl", request.param)


def lay_out(source: Path, folder: Path, layout: str) -> Path:
    """A copy of a stock folder in one of the layouts."""
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    if "qwen3" in json.loads((source / "config.json").read_text())["model_type"]:
        assert "model.language_model.layers.0.mlp.up_proj.weight" in weights
        assert "model.visual.patch_embed.proj.weight" in weights
    else:
        assert "model.layers.0.mlp.up_proj.weight" in weights and "visual.patch_embed.proj.weight" in weights
    if layout == "current":
        renamed = {}
        for name, value in weights.items():
            if name.startswith("visual."):
                name = f"model.{name}"
            elif name.startswith("model."):
                name = name.replace("model.", "model.language_model.", 1)
            renamed[name] = value
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "published in shards":
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, members in parts.items():
            save_file({name: weights[name] for name in members}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif layout == "published by transformers 4.54":
        config = json.loads((folder / "config.json").read_text())
        text = config["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_scaling"] = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
        text["rope_theta"] = rope["rope_theta"]
        flat = {name: value for name, value in text.items() if name not in ("model_type", "layer_types")}
        config["vision_config"].pop("rope_parameters")
        config["vision_config"]["model_type"] = "qwen2_5_vl"
        laser = {"architectures": ["QwenWithLaser"], "laser_start_id": 580, "laser_id": 581, "laser_end_id": 582}
        config = {**flat, **config, **laser, "torch_dtype": config.pop("dtype"), "transformers_version": "4.54.0"}
        (folder / "config.json").write_text(json.dumps(config))
        generation = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**generation, "_from_model_config": True}))
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {'' if case[1] else 'un'}tied, {case[2]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, tied, layout = request.param
    root = tmp_path_factory.mktemp("layouts")
    return lay_out(save_stock(root / "stock", family, tied), root / "model", layout)


def classes(folder: Path) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The stock and the latent class for a stock folder."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    return TINY_FAMILIES[family].model_class, LATENT_CLASSES[family][1]


def encode(processor: LatentProcessor) -> dict[str, torch.Tensor]:
    return dict(tiny_inputs(processor))


# Loading


def test_every_tensor_is_that_of_the_stock_class(folder: Path) -> None:
    stock_class, latent_class = classes(folder)
    stock = stock_class.from_pretrained(folder)
    model, processor = convert_stock_checkpoint(folder)
    assert type(model) is latent_class and not model.training
    ours, theirs = model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = encode(processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_nothing_is_missing(folder: Path) -> None:
    """The load itself reports neither missing nor unexpected nor mismatched weights."""
    config = convert_stock_checkpoint(folder)[0].config
    load = classes(folder)[1].from_pretrained
    _, report = load(folder, config=config, output_loading_info=True)
    assert not [key for key, entries in report.items() if entries], report


def test_tokens_and_defaults(folder: Path) -> None:
    model, processor = convert_stock_checkpoint(folder)
    size = len(family_tokenizer(json.loads((folder / "config.json").read_text())["model_type"]))
    roles = {role: processor.tokenizer.convert_tokens_to_ids(token) for role, token in LASER_TOKENS.items()}
    assert roles == {"start": size, "slot": size + 1, "end": size + 2}
    config = model.config
    assert (config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id) == tuple(roles.values())
    assert (config.latent_method, config.latent_head, config.latent_patch_token_id) == ("laser", None, None)
    assert config.latent_generation == {"latent_strategy": "dynamic", "max_latent_steps": 8}
    assert model.generation_config.latent_strategy == "dynamic" and model.generation_config.max_latent_steps == 8
    pad, end = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>"))
    assert model.generation_config.eos_token_id == [pad, end] and model.generation_config.pad_token_id == pad
    prompt = processor.apply_chat_template(tiny_prompts()[0], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    inputs = encode(processor)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == [[roles["start"], *[roles["slot"]] * 8, roles["end"]]] * 2


def test_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    """Our folder names its tensors as the stock class would, every tensor comes back, and the defaults are used."""
    model, processor = convert_stock_checkpoint(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stock_class, latent_class = classes(folder)
    stock_class.from_pretrained(folder).save_pretrained(tmp_path / "stock")
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(tmp_path / "stock" / "model.safetensors"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is latent_class
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    saved, loaded = (m.config.to_dict() for m in (model, again))
    assert {**saved, "architectures": loaded["architectures"], "_name_or_path": loaded["_name_or_path"]} == loaded
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    inputs = encode(AutoProcessor.from_pretrained(tmp_path))
    expected = model.generate(**encode(processor), max_new_tokens=12, do_sample=False)
    assert torch.equal(again.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


# Options


def test_rows_are_added_only_when_the_tokenizer_outgrows_them(stock_folder: Path, tmp_path: Path) -> None:
    """A vocabulary without spare rows gets three, drawn like all embeddings; old rows and the tying stay."""
    spacious = convert_stock_checkpoint(stock_folder)[0]
    assert spacious.config.get_text_config().vocab_size == spacious.get_input_embeddings().num_embeddings == 512
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    size, tied = len(tokenizer), spacious.config.tie_word_embeddings
    config = tiny_config("qwen2_5_vl", size, tokenizer, tie_word_embeddings=tied)
    save_tiny_stock_checkpoint(tmp_path / "tight", tokenizer, config=config)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "tight")
    model, processor = convert_stock_checkpoint(tmp_path / "tight")
    assert len(processor.tokenizer) == size + 3 == model.config.get_text_config().vocab_size
    for ours, theirs in (
        (model.get_input_embeddings(), stock.get_input_embeddings()),
        (model.get_output_embeddings(), stock.get_output_embeddings()),
    ):
        assert ours.weight.shape == (size + 3, 64) and torch.equal(ours.weight[:size], theirs.weight)
        assert 0.005 < ours.weight[size:].std().item() < 0.04
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "latent")
    again = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "latent")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_processor_and_load_options_of_the_caller(stock_folder: Path, tmp_path: Path) -> None:
    processor = LatentProcessor.from_pretrained(stock_folder, latent_tokens={**LASER_TOKENS, "patch": "<|patch|>"})
    bare = shutil.copytree(stock_folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        (bare / name).unlink()
    model, same = convert_stock_checkpoint(
        bare, processor=processor, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert same is processor and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == model.model.language_model.config._attn_implementation == "eager"
    assert model.config.latent_patch_token_id == processor.latent_patch_token_id == processor.latent_end_token_id + 1
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(bare, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())


def test_a_method_with_a_head(stock_folder: Path, tmp_path: Path) -> None:
    """The stock weights arrive beside a new head, and the defaults are those of the method."""
    method = LatentMethod("headed", LASER_TOKENS, {"latent_strategy": "fixed", "num_latent_steps": 4}, head="glu")
    register_latent_method(method)
    try:
        model, _ = convert_stock_checkpoint(stock_folder, method="headed")
    finally:
        del LATENT_METHODS["headed"]
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(stock_folder).state_dict()
    extra = {name for name in model.state_dict() if name not in stock}
    assert extra and all(name.startswith("latent_head.") for name in extra)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in stock.items())
    assert (model.config.latent_method, model.config.latent_head) == ("headed", "glu")
    assert model.generation_config.num_latent_steps == 4
    model.save_pretrained(tmp_path)
    again = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], model.state_dict()[name]) for name in model.state_dict())
    assert GenerationConfig.from_pretrained(tmp_path).latent_strategy == "fixed"


# What is refused


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty has no config.json; give a folder written by save_pretrained or a"):
        convert_stock_checkpoint(empty)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=8, num_attention_heads=1, **shape)).save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match=r"masked is a 'bert' checkpoint, whose head is no plain matrix, so latents"):
        convert_stock_checkpoint(tmp_path / "masked")
    CLIPTextModel(CLIPTextConfig(vocab_size=8, num_attention_heads=1, **shape)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"clip is a 'clip_text_model' checkpoint; latent classes exist for .*'qwen2"):
        convert_stock_checkpoint(tmp_path / "clip")
    (empty / "config.json").write_text("{")
    with pytest.raises(OSError, match="empty/config.json' is not a valid JSON file"):
        convert_stock_checkpoint(empty)


def test_a_latent_folder_and_an_unknown_method_are_refused(stock_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown latent method 'lazer'; choose one of .*'laser', "):
        convert_stock_checkpoint(stock_folder, method="lazer")
    model, processor = convert_stock_checkpoint(stock_folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a latent model already \(method 'laser'\); load it with AutoModel"):
        convert_stock_checkpoint(tmp_path)
