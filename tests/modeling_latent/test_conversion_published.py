"""Files of the published codes of IVT-LR and Coconut: names, merged adapters, settings, and what is refused.

`tests/golden/ivtlr_published.py` compares converted models with the logits of the reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from modeling_latent import load_latent_model
from modeling_latent.conversion_published import convert_published_checkpoint
from modeling_latent.published_weights import read_published_weights
from tests.hub import LocalHub
from trainers.tiny import (
    TINY_TEXTS,
    build_tiny_stock_model,
    build_tiny_tokenizer,
    save_tiny_stock_checkpoint,
    tiny_config,
)
from trainers.tiny_text import (
    build_tiny_text_stock_model,
    build_tiny_text_tokenizer,
    save_tiny_text_checkpoint,
    tiny_text_config,
)

PREFIX, LAYER = "base_causallm.base_model.model.", "model.layers.0.self_attn.q_proj"
WRAPPED = ("self_attn.q_proj", "mlp.down_proj")
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Qwen2-VL with more rows than its tokenizer has entries, as the published one."""
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("base"), family="qwen2_vl")


def trained_model(tie_word_embeddings: bool = False) -> PreTrainedModel:
    """The stock model with an embedding cut to the tokenizer and three tokens."""
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    config = tiny_config("qwen2_vl", len(tokenizer) + 3, tokenizer, tie_word_embeddings=tie_word_embeddings)
    return build_tiny_stock_model(config, seed=3)


def published(model: PreTrainedModel | None = None) -> dict[str, torch.Tensor]:
    """The names of the published code: frozen weights in bfloat16, adapters on two layers of each block in float32."""
    found, random = {}, torch.Generator().manual_seed(0)
    for name, value in (model or trained_model()).state_dict().items():
        name = name.removeprefix("model.") if name.startswith("model.visual.") else name
        name = name.replace("model.language_model.", "model.")
        module, _, kind = name.rpartition(".")
        if not module.endswith(WRAPPED) or module.startswith("visual."):
            found[PREFIX + name] = value.bfloat16()
            continue
        found[f"{PREFIX}{module}.base_layer.{kind}"] = value.bfloat16()
        if kind == "weight":
            for side, shape in (("A", (RANK, value.shape[1])), ("B", (value.shape[0], RANK))):
                found[f"{PREFIX}{module}.lora_{side}.default.weight"] = torch.randn(shape, generator=random)
    found["embedding.weight"] = found[f"{PREFIX}model.embed_tokens.weight"]
    return found


def write(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pth")
    return folder / "model.pth"


def convert(path: Path, base: Path, **options: Any) -> tuple[Any, Any]:
    return convert_published_checkpoint(path, base, **{"lora_alpha": ALPHA, **options})


def test_every_tensor_arrives(base: Path, tmp_path: Path) -> None:
    tensors, rows = published(), len(build_tiny_tokenizer(TINY_TEXTS)) + 3
    model, processor = convert(write(tmp_path, tensors), base)
    ours = model.state_dict()
    assert model.dtype == torch.bfloat16  # that of the frozen weights
    for name, value in published_as_ours(tensors).items():
        assert torch.equal(ours[name][: len(value)], value), name
    assert set(ours) == set(published_as_ours(tensors))
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert len(ours[name]) == rows + 1 == len(processor.tokenizer)
        assert torch.equal(ours[name][rows], ours[name][rows - 1])  # of the token for inserted embeddings


def published_as_ours(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By hand: our names, adapters merged in float32."""
    merged = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if "lora" in name or name == "embedding.weight":
            continue
        if name.endswith(".base_layer.weight"):
            down, up = (tensors[key.replace("base_layer", f"lora_{side}.default")] for side in "AB")
            value = (value.float() + ALPHA / RANK * (up @ down)).bfloat16()
        name = name.replace(".base_layer", "")
        start, _, rest = name.partition(".")
        name = {"visual": f"model.visual.{rest}", "model": f"model.language_model.{rest}"}.get(start, name)
        merged[name] = value
    return merged


def test_settings_of_a_conversion(base: Path, tmp_path: Path) -> None:
    path, rows = write(tmp_path, published()), len(build_tiny_tokenizer(TINY_TEXTS)) + 3
    model, processor = convert(path, base)
    config = model.config
    assert config.rope_positions == "flat" and config.latent_method == "ivtlr"
    ids = (config.latent_start_token_id, config.latent_end_token_id, config.latent_token_id)
    assert ids == (rows - 3, rows - 2, rows - 1) and config.latent_patch_token_id == rows
    assert processor.latent_patch_token_id == rows
    options = model.generation_config
    assert (options.latent_strategy, options.num_latent_steps, options.num_latent_patches) == ("staged", 3, 32)
    assert (options.latent_patch_order, options.latent_patch_images) == ("index_then_kth", "last")
    assert options.eos_token_id == trained_model().generation_config.eos_token_id
    other, _ = convert(path, base, latent_fields={"rope_positions": "mrope"}, dtype=torch.float32)
    assert other.config.rope_positions == "mrope" and other.dtype == torch.float32


@pytest.mark.parametrize("way", ["module prefix", "safetensors", "folder", "old format", "already merged"])
def test_ways_to_write_the_same(way: str, base: Path, tmp_path: Path) -> None:
    tensors = published()
    expected = convert(write(tmp_path, tensors), base)[0].state_dict()
    path = write(tmp_path, tensors)
    if way == "module prefix":
        write(tmp_path, {f"module.{name}": value for name, value in tensors.items()})
    elif way == "safetensors":
        del tensors["embedding.weight"]  # shared memory is not written twice
        save_file(tensors, path := tmp_path / "model.safetensors")
    elif way == "folder":
        path = tmp_path
    elif way == "old format":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        stock = read_published_weights(path)
        merged = dict(stock.weights)
        for module, (down, up) in stock.adapters.items():
            weight = merged[f"{module}.weight"]
            merged[f"{module}.weight"] = (weight.float() + ALPHA / RANK * (up @ down)).bfloat16()
        (tmp_path / "merged").mkdir()  # the tensors of the first file are mapped
        path = write(tmp_path / "merged", {PREFIX + name: value for name, value in merged.items()})
    ours = convert(path, base)[0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    config = tiny_config("qwen2_vl", None, tokenizer, tie_word_embeddings=True)
    tied = save_tiny_stock_checkpoint(tmp_path / "tied", tokenizer, config=config)
    tensors = published(trained_model(tie_word_embeddings=True))
    model, _ = convert(write(tmp_path, tensors), tied)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}lm_head.weight"] + 1
    with pytest.raises(ValueError, match="has an LM head of its own, and .*tied ties it"):
        convert(write(tmp_path, tensors), tied)


def test_a_kept_adapter_can_be_switched_off(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, published())
    merged, kept = (convert(path, base, dtype=torch.float32, adapter=way)[0] for way in ("merge", "keep"))
    assert kept.peft_config["default"].base_model_name_or_path == str(base)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
        kept.disable_adapters()
        assert not torch.allclose(kept(ids).logits, merged(ids).logits, atol=1e-2)


def test_a_kept_adapter_is_saved_alone_and_finds_its_base(tmp_path: Path) -> None:
    """The base is the stock folder, whose rows behind the tokenizer stand for the latent tokens."""
    base = save_tiny_stock_checkpoint(tmp_path / "base", family="qwen2_vl", seed=3)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(base).bfloat16()
    stock.float().save_pretrained(base)
    stock.resize_token_embeddings(len(build_tiny_tokenizer(TINY_TEXTS)) + 3)
    kept, processor = convert(write(tmp_path, published(stock)), base, dtype=torch.float32, adapter="keep")
    for part in (kept, kept.config, kept.generation_config, processor):
        part.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded, _ = load_latent_model(tmp_path / "adapter")
    assert loaded.config.rope_positions == "flat" and loaded.generation_config.latent_strategy == "staged"
    ids, words = torch.arange(10, 30)[None], len(build_tiny_tokenizer(TINY_TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits[..., :words], kept(ids).logits[..., :words])


@pytest.mark.parametrize("names", ["published", "plain", "DeepSpeed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_coconut_checkpoints_of_text_models(family: str, names: str, tmp_path: Path) -> None:
    """GPT-2 is tied: the published file holds its matrix three times."""
    base = save_tiny_text_checkpoint(tmp_path / "base", family)
    tokenizer = build_tiny_text_tokenizer(family)
    config = tiny_text_config(family, len(tokenizer) + 3, tokenizer)
    tensors = build_tiny_text_stock_model(config, seed=3).state_dict()
    prefix = {"published": "base_causallm.", "plain": "", "DeepSpeed": "module.base_causallm."}[names]
    saved = {prefix + name: value for name, value in tensors.items()}
    if names != "plain":
        embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        saved[prefix.removesuffix("base_causallm.") + "embedding.weight"] = tensors[embedding]
    model, processor = convert_published_checkpoint(write(tmp_path, saved), base, "coconut")
    ours = model.state_dict()
    for name, value in tensors.items():
        inner = name.removeprefix("transformer.").removeprefix("model.")
        assert torch.equal(ours[name if name == "lm_head.weight" else f"model.language_model.{inner}"], value), name
    assert model.config.latent_token_id == len(tokenizer) + 2 == len(processor.tokenizer) - 1
    assert model.config.latent_patch_token_id is None
    assert (model.generation_config.latent_strategy, model.generation_config.latent_markers) == ("staged", True)


def test_a_checkpoint_on_the_hub(base: Path, tmp_path: Path, hub: LocalHub) -> None:
    (tmp_path / "qwen_vl").mkdir()
    path = write(tmp_path / "qwen_vl", published())
    code = f"""
    from huggingface_hub import HfApi
    from modeling_latent.conversion_published import convert_published_checkpoint
    api = HfApi()
    api.create_repo("org/weights")
    api.upload_file(path_or_fileobj={str(path)!r}, path_in_repo="qwen_vl/model.pth", repo_id="org/weights")
    options = dict(filename="qwen_vl/model.pth", lora_alpha={ALPHA})
    model, processor = convert_published_checkpoint("org/weights", {str(base)!r}, **options)
    print(model.config.latent_token_id)
    """
    assert hub.run(code).split()[-1] == str(len(build_tiny_tokenizer(TINY_TEXTS)) + 2)


# Refusals


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(names)}


def with_tensor(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors, f"{PREFIX}{name}": value}


def more_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    grown = {}
    for name, value in tensors.items():
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight", "embedding.weight"))
        grown[name] = torch.cat([value, value[:8]]) if is_table else value
    return grown


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "half an adapter": (
        lambda found: without(found, "0.self_attn.q_proj.lora_B.default.weight"),
        rf"{LAYER} has lora_A alone",
    ),
    "no adapter on a layer made for one": (
        lambda found: without(found, *(f"0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB")),
        rf"{LAYER} has base_layer tensors only",
    ),
    "an adapter on nothing": (
        lambda found: without(found, "0.self_attn.q_proj.base_layer.weight", "0.self_attn.q_proj.base_layer.bias"),
        rf"{LAYER} has lora tensors only",
    ),
    "a rank that does not fit": (
        lambda found: with_tensor(found, f"{LAYER}.lora_A.default.weight", torch.zeros(RANK + 1, 64)),
        rf"{LAYER} has lora_A \(5, 64\) and lora_B \(64, 4\) on a weight \(64, 64\)",
    ),
    "two ranks": (
        lambda found: with_tensor(
            with_tensor(found, f"{LAYER}.lora_A.default.weight", torch.zeros(2, 64)),
            f"{LAYER}.lora_B.default.weight",
            torch.zeros(64, 2),
        ),
        r"ranks \[2, 4\]",
    ),
    "two adapters": (
        lambda found: with_tensor(found, f"{LAYER}.lora_A.other.weight", torch.zeros(RANK, 64)),
        r"adapters \['default', 'other'\]",
    ),
    "a vocabulary of another tokenizer": (more_rows, r"embedding rows, so its start, end and slot tokens are \["),
    "an unknown tensor": (
        lambda found: with_tensor(found, "model.extra.weight", torch.zeros(2)),
        r"without a place \['model.*extra.weight'\]",
    ),
    "a missing tensor": (
        lambda found: without(found, "model.norm.weight"),
        r"missing \['model.language_model.norm.weight'\]",
    ),
    "a tensor of another shape": (
        lambda found: with_tensor(found, "model.norm.weight", torch.zeros(3)),
        r"of another shape .*model.language_model.norm.weight",
    ),
    "no embedding": (lambda found: without(found, "embed_tokens.weight"), "no input embedding among"),
    "other names": (
        lambda found: {name.removeprefix(PREFIX): value for name, value in found.items()},
        r"\['lm_head.weight', .* and \d+ more do not begin with 'base_causallm.'",
    ),
    "more than tensors": (lambda found: {"state_dict": found, "epoch": 3}, r"entries \['epoch', 'state_dict'\]"),
    "a list": (lambda found: list(found.values()), "holds a list, not a dictionary"),
    "objects": (lambda found: {"path": Path("a")}, "objects other than tensors are not read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses_a_broken_file(name: str, base: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    path = write(tmp_path, change(published()))
    with pytest.raises(ValueError, match=message) as caught:
        convert(path, base)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\x80\x02garbage"])
def test_refuses_what_neither_format_is(content: bytes, name: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a file of tensors that torch.save or safetensors wrote"):
        convert(tmp_path / name, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "laser"}, r"method='laser': no published checkpoint is read so; choose one of \['ivtlr'"),
        ({"adapter": "drop"}, r"adapter='drop'.*\['merge', 'keep'\]"),
        ({"lora_alpha": None}, r"r = 4, the published ones r = 64 with alpha = 16; .*pass lora_alpha"),
        ({"filename": "other.pth"}, "other.pth: no such file"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    write(tmp_path, published())
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, base, **options)
