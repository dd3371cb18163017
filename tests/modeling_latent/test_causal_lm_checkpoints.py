"""Causal language models with latents: stock and saved checkpoints, rows of added tokens, adapters, remote code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_latent import (
    LatentCausalLM,
    LatentCausalLMConfig,
    LatentTextProcessor,
    convert_stock_checkpoint,
    load_latent_model,
)
from modeling_latent.causal_lm_check import check_causal_lm
from tests.hub import run_python
from tests.latent import named_as_latent
from tests.tiny import TEXT_FAMILIES, tiny_stock_model
from trainers.adapters import save_latent_settings
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.tiny_text import (
    build_tiny_text_tokenizer,
    save_tiny_text_checkpoint,
    tiny_text_config,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}


def save_stock(folder: Path, family: str, tied: bool) -> Path:
    tokenizer = build_tiny_text_tokenizer(family)
    config = tiny_text_config(family, None, tokenizer, tie_word_embeddings=tied)
    return save_tiny_text_checkpoint(folder, family, tokenizer, config)


CASES = [("gpt2", True), ("gpt2", False), ("llama", False), ("llama", True), ("qwen3", True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def stock_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / request.param[0], *request.param)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


# Checkpoints


def test_every_tensor_is_that_of_the_stock_class(stock_folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(stock_folder)
    config = LatentCausalLMConfig.from_stock(stock.config)
    ours, found = LatentCausalLM.from_pretrained(stock_folder, config=config, output_loading_info=True)
    assert not any(found.values())
    expected = named_as_latent(stock)
    state = ours.state_dict()
    assert state.keys() == expected.keys() and len(state) > 20
    assert not [name for name in state if not torch.equal(state[name], expected[name])]
    assert is_tied(ours) == is_tied(stock) == stock.config.tie_word_embeddings
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_bare_base_model_is_a_checkpoint_too(family: str, tmp_path: Path) -> None:
    """As GPT-2 is published: its tensors have no `transformer.` before them."""
    stock = tiny_stock_model(family=family, tie_word_embeddings=True)
    stock.base_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith(stock.base_model_prefix)]  # noqa: SIM118
    config = LatentCausalLMConfig.from_stock(stock.config)
    ours, found = LatentCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(found.values())
    assert all(torch.equal(value, named_as_latent(stock)[name]) for name, value in ours.state_dict().items())


OTHERS: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    # Its checkpoints have a tensor for each expert, its layers one for all.
    "mixtral": MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=2),
    # Its checkpoints call the head `embed_out` and the base model `gpt_neox`.
    "gpt_neox": AutoConfig.for_model("gpt_neox", **SIZES, intermediate_size=48),
    "phi3": AutoConfig.for_model("phi3", **SIZES, intermediate_size=48, pad_token_id=0),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_load_and_come_back(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OTHERS[family]
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    check_causal_lm(config, family)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = LatentCausalLM.from_pretrained(tmp_path / "stock", config=LatentCausalLMConfig.from_stock(config))
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = stock(ids).logits
        assert type(again) is LatentCausalLM
        assert torch.equal(ours(ids).logits, expected) and torch.equal(again(ids).logits, expected)


def test_a_saved_folder_has_our_names_and_comes_back(stock_folder: Path, tmp_path: Path) -> None:
    model, processor = convert_stock_checkpoint(stock_folder, method="coconut")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    own = {name for name in model.state_dict() if name != "lm_head.weight" or not is_tied(model)}
    assert names == own and all(name.startswith(("model.language_model.", "lm_head.")) for name in names)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        load_latent_model(tmp_path)[0],
    ]
    for again in loaded:
        assert type(again) is LatentCausalLM and is_tied(again) == is_tied(model)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        assert again.generation_config.latent_strategy == "staged"
    again.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LatentTextProcessor


def test_the_shapes_alone(stock_folder: Path) -> None:
    model, processor = load_latent_model(stock_folder, "coconut", weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    whole, _ = convert_stock_checkpoint(stock_folder, method="coconut")
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in whole.state_dict().items()
    }
    assert is_tied(model) == is_tied(whole)


# Rows that added tokens start with


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_start_with_the_row_of_the_methods_token(family: str, tmp_path: Path) -> None:
    """GPT-2 gets new rows, Llama has free ones here; embedding and LM head alike, and no other row changes."""
    folder = save_stock(tmp_path, family, tied=family == "gpt2")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for method in ("coconut", "ivtlr"):
        model, processor = convert_stock_checkpoint(folder, method=method)
        source = processor.tokenizer.encode("<<")
        ids = processor.tokenizer.convert_tokens_to_ids(list(processor.latent_tokens.values()))
        assert len(source) == 1 and len(ids) == (3 if method == "coconut" else 4)
        for theirs, ours in (
            (stock.get_input_embeddings(), model.get_input_embeddings()),
            (stock.get_output_embeddings(), model.get_output_embeddings()),
        ):
            assert torch.equal(ours.weight[ids], theirs.weight[source].expand(len(ids), -1))
            rest = [row for row in range(len(theirs.weight)) if row not in ids]
            assert torch.equal(ours.weight[rest], theirs.weight[rest])
    rows = model.config.text_config.vocab_size
    assert rows == len(model.get_input_embeddings().weight) == (len(processor.tokenizer) if family == "gpt2" else rows)


def test_another_token_or_none(tmp_path: Path) -> None:
    folder = save_stock(tmp_path, "gpt2", tied=True)
    model, processor = convert_stock_checkpoint(folder, method="coconut", init_token="a")
    rows, slot = model.get_input_embeddings().weight, processor.latent_token_id
    (source,) = processor.tokenizer.encode("a")
    assert torch.equal(rows[slot], rows[source])
    for options in ({"init_token": None}, {"method": "laser"}):
        model, processor = convert_stock_checkpoint(folder, **{"method": "coconut", **options})
        rows, slot = model.get_input_embeddings().weight, processor.latent_token_id
        assert not (rows[slot] == rows[:slot]).all(dim=1).any()
    with pytest.raises(ValueError, match=r"init_token='two words' is \d+ tokens of this tokenizer; choose a string"):
        convert_stock_checkpoint(folder, method="coconut", init_token="two words")


def test_tokens_that_the_checkpoint_has_keep_their_rows(tmp_path: Path) -> None:
    """A stock folder whose tokenizer knows the tokens of the method has learned rows for them."""
    tokenizer = build_tiny_text_tokenizer("gpt2")
    tokenizer.add_tokens(["<|start-latent|>", "<|end-latent|>", "<|latent|>"], special_tokens=True)
    folder = save_tiny_text_checkpoint(tmp_path, "gpt2", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    model, _ = convert_stock_checkpoint(folder, method="coconut")
    assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_a_tokenizer_without_the_methods_token(tmp_path: Path) -> None:
    tokenizer = build_tiny_text_tokenizer("gpt2", words=())
    assert len(tokenizer.encode("<<")) == 2
    model, processor = convert_stock_checkpoint(
        save_tiny_text_checkpoint(tmp_path, "gpt2", tokenizer), method="coconut"
    )
    assert len(model.get_input_embeddings().weight) == len(processor.tokenizer) == len(tokenizer) + 3


# Adapters


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_an_adapter_is_trained_saved_and_loaded(family: str, tmp_path: Path) -> None:
    base = save_stock(tmp_path / "base", family, tied=family != "llama")
    args = LatentModelConfig(model_name_or_path=str(base), use_peft=True, dtype="float32", lora_r=4)
    model, processor, settings = load_for_training(args, "coconut")
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    ids = sorted(processor.tokenizer.convert_tokens_to_ids(list(processor.latent_tokens.values())))
    layers = [embedding, "lm_head"] if family == "llama" else [embedding]
    assert settings.trainable_token_indices == dict.fromkeys(layers, ids)
    adapted = get_peft_model(model, settings).eval()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    matrices = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    gpt2 = {"c_attn", "c_proj", "c_fc"}
    expected = gpt2 if family == "gpt2" else {f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")}
    assert matrices == expected
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        inputs = torch.tensor([[5, 6, processor.latent_start_token_id, 7, processor.latent_end_token_id]])
        logits = adapted(inputs).logits
        adapted.save_pretrained(tmp_path / "adapter")
        processor.save_pretrained(tmp_path / "adapter")
        save_latent_settings(adapted, tmp_path / "adapter")
        for mode in ("attach", "merge"):
            again, _ = load_latent_model(tmp_path / "adapter", adapter=mode)
            torch.testing.assert_close(again(inputs).logits, logits, atol=1e-4, rtol=0)
    assert is_tied(again) == (family != "llama")


# Without the library

ALONE = """
import json
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

report = {}
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=["What is it?", "Is the path safe?"], return_tensors="pt", padding=True)
    found = {"modules": [type(processor).__module__], "ids": []}
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        found["modules"].append(type(model).__module__)
        found["ids"].append(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
        found["tied"] = model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(folder + "-again")
    processor.save_pretrained(folder + "-again")
    report[folder] = found
assert not {"modeling_latent", "trainers", "evaluation"} & {name for name, module in sys.modules.items() if module}
print(json.dumps(report))
"""


def test_a_saved_folder_decodes_without_the_library(tmp_path: Path) -> None:
    folders, expected = [], {}
    for family in ("gpt2", "llama"):
        model, processor = convert_stock_checkpoint(
            save_stock(tmp_path / f"stock-{family}", family, tied=family == "gpt2"), method="coconut"
        )
        folder = tmp_path / family
        for part in (model, processor):
            part.save_pretrained(folder)
        code = {path.name for path in folder.glob("*.py")}
        assert {"modeling_latent_causal_lm.py", "processing_latent_text.py", "latent_plan.py"} <= code
        assert not {name for name in code if "image" in name or "qwen" in name or "chameleon" in name}
        inputs = processor(text=["What is it?", "Is the path safe?"], return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert (ids == processor.latent_token_id).sum(1).tolist() == [6, 6]
        folders += [str(folder), f"{folder}-again"]
        expected[str(folder)] = expected[f"{folder}-again"] = {"ids": [ids.tolist()] * 2, "tied": family == "gpt2"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options: dict[str, Any] = {
        "blocked": ("modeling_latent", "trainers", "evaluation"),
        "env": {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        "cwd": elsewhere,
    }
    report = json.loads(run_python(ALONE, *folders, **options).splitlines()[-1])
    for folder, found in report.items():
        assert all(module.startswith("transformers_modules.") for module in found.pop("modules"))
        assert found == expected[folder]
