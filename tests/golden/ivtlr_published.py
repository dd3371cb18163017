"""The vectors' weight files, written as published `.pth` checkpoints, through the converter.

The converted model must give the logits of the cases, decode the tokens, and come back from a saved folder. Collected
by `test_ivtlr.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, ChameleonImageProcessorPil, GenerationConfig, Qwen2VLImageProcessorPil

from modeling_latent import load_latent_model
from modeling_latent.conversion_published import convert_published_checkpoint
from modeling_latent.latent_plan import LatentPlan
from tests.golden.conftest import each
from tests.golden.ivtlr_stock import FOLDER, ORDERS, STOCK, Case, assert_final_logits, bound, images, table

ALIAS, TIED = "embedding.weight", "base_causallm.lm_head.weight"
FAMILIES = [family for family in STOCK if table(family)]
METHODS = {family: "coconut" if family == "coconut" else "ivtlr" for family in STOCK}


def published_tensors(family: str) -> dict[str, torch.Tensor]:
    """What the published code saves: the adapters in float32, tied tensors and the alias under all their names."""
    found = load_file(FOLDER / f"{family}_weights.safetensors")
    found = {name: value.float() if ".lora_" in name else value for name, value in found.items()}
    return {**found, **{alias: found[name] for alias, name in table(family).get("aliases", {}).items()}}


def save_base(family: str, folder: Path) -> Path:
    """A stock folder without weights: configuration, tokenizer and image processor."""
    settings = dict(table(family)["config"])
    rows = settings.pop("vocab_size_after_resize", settings["vocab_size"])
    STOCK[family][0](**settings).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.sep_token = "<reserved08706>"
    assert len(tokenizer) == rows - 3
    tokenizer.save_pretrained(folder)
    vision = settings.get("vision_config", {})
    if family == "qwen2vl":
        sizes = {
            "patch_size": vision["patch_size"],
            "merge_size": vision["spatial_merge_size"],
            "temporal_patch_size": vision["temporal_patch_size"],
        }
        Qwen2VLImageProcessorPil(**sizes).save_pretrained(folder)
    elif family == "chameleon":
        ChameleonImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """Converts a family's file: `(model, processor)` in float32, once for the same arguments."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def convert(family: str, **options: Any) -> tuple[Any, Any]:
        key = (family, *sorted(options.items()))
        if key not in made:
            folder = root / family
            if not folder.is_dir():
                torch.save(published_tensors(family), save_base(family, folder) / "model.pth")
            lora = table(family).get("lora", {})
            made[key] = convert_published_checkpoint(
                folder, folder, METHODS[family], lora_alpha=lora.get("lora_alpha"), dtype=torch.float32, **options
            )
        return made[key]

    return convert


def case_inputs(model: Any, case: Case) -> dict[str, torch.Tensor]:
    """The batch with the blocks that its slots stand for."""
    config = model.config
    count = case.info.get("K", 0)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for ids, mask in zip(case.batch["input_ids"].tolist(), case.batch["attention_mask"].tolist(), strict=True):
        blocks = [count if token == config.latent_token_id else 0 for token in ids]
        fill = {"input_ids": config.latent_patch_token_id, "attention_mask": 1}
        for name, values in (("input_ids", ids), ("attention_mask", mask)):
            spread = [[fill[name]] * more + [value] for value, more in zip(values, blocks, strict=True)]
            rows[name].append([value for block in spread for value in block])
    inputs = {name: torch.tensor(values) for name, values in rows.items()}
    return inputs if case.family == "coconut" else {**inputs, **images(case.family, case.info["samples"])}


def assert_case(model: Any, case: Case) -> None:
    """The logits of the published rows; those behind them are tokens of ours."""
    inputs = case_inputs(model, case)
    order = ORDERS.get(case.info.get("order", "score"), "score")
    plan = LatentPlan(patch_order=order, patch_images="last")
    with torch.no_grad():
        logits = model(**inputs, latent_plan=plan).logits[..., : model.config.latent_token_id + 1]
    if case.family != "coconut":
        assert_final_logits(case, logits, inputs["attention_mask"])
        return
    real = inputs["attention_mask"].bool()
    columns = logits[..., table("coconut")["logit_cols"]]
    for ours, key in ((columns, "logits_cols"), (logits.logsumexp(-1), "logits_lse")):
        torch.testing.assert_close(ours[real], case.expected[key][real], atol=bound("logits"), rtol=0)


def some_cases(family: str) -> list[str]:
    """Without slots, and the case with most of them whose order of insertion is one of ours."""
    infos = table(family)["cases"]
    known = [name for name, info in infos.items() if info.get("order", "score") in ORDERS]

    def slots(name: str) -> int:
        return max(infos[name].get("n_latents", [infos[name].get("n_latent", 0)]))

    return [next(name for name in known if not slots(name)), max(known, key=slots)]


EVERY = [(family, name) for family in FAMILIES for name in some_cases(family)]


@each("key", EVERY, ids="-".join)
def test_a_published_checkpoint_gives_the_logits(key: tuple[str, str], published: Callable) -> None:
    model, processor = published(key[0])
    assert model.dtype == torch.float32 and not model.training
    assert processor.latent_token_id == model.config.latent_token_id == table(key[0])["token_ids"]["latent"]
    assert_case(model, Case.read(*key))


@each("key", [key for key in EVERY if key[0] != "coconut"], ids="-".join)
def test_a_kept_adapter_gives_the_logits(key: tuple[str, str], published: Callable) -> None:
    model, _ = published(key[0], adapter="keep")
    settings = model.peft_config["default"]
    lora = table(key[0])["lora"]
    assert (settings.r, settings.lora_alpha) == (lora["r"], lora["lora_alpha"])
    assert {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")} == set(
        lora["target_modules"]
    )
    assert_case(model, Case.read(*key))


@each("key", EVERY, ids="-".join)
def test_a_saved_conversion_gives_the_logits(key: tuple[str, str], published: Callable, tmp_path: Path) -> None:
    for part in published(key[0]):
        part.save_pretrained(tmp_path)
    model, processor = load_latent_model(tmp_path)
    assert model.generation_config.latent_strategy == "staged" and processor.latent_tokens
    assert_case(model, Case.read(*key))


@each("family", [family for family in FAMILIES if family != "coconut" and table(family)["generation"]])
def test_a_published_checkpoint_decodes_as_published(family: str, published: Callable) -> None:
    """With nothing said but K: the conversion has set the strategy, the number of slots and the order."""
    model, _ = published(family)
    ids = table(family)["token_ids"]
    entries = [entry for entry in table(family)["generation"] if "note" not in entry]
    entry = next((entry for entry in entries if entry["n_latent"] == 3), entries[-1])
    slots = {} if entry["n_latent"] == 3 else {"num_latent_steps": entry["n_latent"]}
    prompt = entry.get("prompt_ids")
    if prompt is None:
        sample = table(family)["base_samples"][entry["sample"]]
        prompt = [*sample["before"], *[ids["image"]] * table(family)["n_image_tokens"], *sample["after"]]
    prompt = torch.tensor([[token for token in prompt if token != ids["latent"]]])
    config = GenerationConfig(**{**model.generation_config.to_dict(), "eos_token_id": entry["eos_token_id"]})
    output = model.generate(
        input_ids=prompt,
        **images(family, [entry["sample"]]),
        num_latent_patches=entry["K"],
        latent_ids="readable",
        generation_config=config,
        max_new_tokens=entry["max_new_tokens"],
        **slots,
    )
    new = output[0, prompt.shape[1] + entry["n_latent"] * (entry["K"] + 1) :].tolist()
    assert new == entry["new_tokens"]
