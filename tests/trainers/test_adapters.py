"""Adapters: what is trained and saved, loading them alone in another process, merging, resuming, quantised bases."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling_latent import convert_stock_checkpoint, load_latent_model
from tests.hub import ROOT, Repo, StoredFile, run_python
from tests.tiny import tiny_processor
from trainers import LatentSFTConfig, LatentSFTTrainer, adapters
from trainers.adapters import build_peft_config, quantisation_options, quantised_bits
from trainers.data.mazes import maze_dataset
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.tiny import DEFAULT_FAMILY, TINY_FAMILIES, TINY_TEXTS, save_tiny_stock_checkpoint, tiny_config
from trainers.tiny_tokenizer import build_tiny_tokenizer

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
TIED = {"tied": True, "untied": False}


def stock_folder(folder: Path, tied: bool = False, spare: bool = True, seed: int = 0) -> Path:
    """A tiny stock checkpoint; without `spare` rows its embedding grows when tokens are added."""
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    config = tiny_config(DEFAULT_FAMILY, None if spare else len(tokenizer), tokenizer, tie_word_embeddings=tied)
    return save_tiny_stock_checkpoint(folder, tokenizer, config=config, seed=seed)


def model_options(name: Any, **options: Any) -> LatentModelConfig:
    return LatentModelConfig(model_name_or_path=str(name), dtype="float32", **options)


def training(folder: Path, **options: Any) -> LatentSFTConfig:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    speed = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "disable_tqdm": True}
    return LatentSFTConfig(output_dir=str(folder), **{**defaults, **speed, **options})


def adapter_trainer(base: Any, folder: Path, options: dict[str, Any] | None = None, **more: Any) -> LatentSFTTrainer:
    """A trainer of mazes on `base`; without `options` of the model a LoRA of rank 4 on every projection."""
    args = model_options(base, **({"use_peft": True, "lora_r": 4} if options is None else options))
    torch.manual_seed(3)
    model, processor, peft_config = load_for_training(args, "laser")
    data = maze_dataset(8, seed=1, sizes=(3,))
    return LatentSFTTrainer(
        model, training(folder, **more), train_dataset=data, processing_class=processor, peft_config=peft_config
    )


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{name: batch[name] for name in INPUTS}).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By `"tied"` and `"untied"`: base folder, adapter folder, trainer, a batch with markers, and its logits.

    The tied base has no row to spare for the markers: its embedding grows.
    """
    runs = {}
    for name, tied in TIED.items():
        folder = tmp_path_factory.mktemp(name)
        base = stock_folder(folder / "base", tied, spare=not tied)
        trainer = adapter_trainer(base, folder / "adapter")
        trainer.train()
        trainer.save_model()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        model = trainer.model.get_base_model()
        model.forward = type(model).forward.__get__(model)  # as before it was trained
        saved = {**{key: batch[key] for key in INPUTS}, "logits": logits(trainer.model, batch)}
        save_file({key: value.contiguous() for key, value in saved.items()}, folder / "batch.safetensors")
        runs[name] = {"base": base, "folder": folder / "adapter", "trainer": trainer, "batch": saved}
    return runs


# What is trained and saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIED)
def test_only_the_adapter_is_saved_with_what_loading_needs(name: str, trained: dict) -> None:
    folder, model = trained[name]["folder"], trained[name]["trainer"].model
    tensors = load_file(folder / "adapter_model.safetensors")
    tokens = {key: value for key, value in tensors.items() if "lora_" not in key}
    places = [".language_model.embed_tokens."] if TIED[name] else [".language_model.embed_tokens.", ".lm_head."]
    assert len(tokens) == len(places) and all(any(place in key for key in tokens) for place in places)
    assert all(value.shape == (3, 64) for value in tokens.values())
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert sum(value.numel() for value in tensors.values()) == sum(trainable.values())
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "config.json", "generation_config.json", "processor_config.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    lora = {key.split(".lora_")[0] for key in tensors if "lora_" in key}
    assert len(lora) == 2 * 7 and all(".language_model.layers." in key for key in lora)


@pytest.mark.parametrize("name", TIED)
def test_the_marker_rows_and_no_others_are_trained(name: str, trained: dict) -> None:
    merged, processor = load_latent_model(trained[name]["folder"], adapter="merge")
    base, _ = load_latent_model(trained[name]["folder"], adapter="skip")
    ids = sorted(processor.tokenizer.convert_tokens_to_ids(list(processor.latent_tokens.values())))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, get)().weight for model in (base, merged))
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) <= set(ids)
        assert {processor.latent_start_token_id, processor.latent_end_token_id} <= set(changed)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == TIED[name]


# Loading ---------------------------------------------------------------------------------------------------------


def test_a_fresh_process_has_the_same_logits(trained: dict) -> None:
    code = """
    import sys
    import torch
    from pathlib import Path
    from safetensors.torch import load_file
    from modeling_latent import load_latent_model
    for folder in map(Path, sys.argv[1:]):
        batch = load_file(folder.parent / "batch.safetensors")
        expected = batch.pop("logits")
        for mode in ("attach", "merge"):
            model, processor = load_latent_model(folder, adapter=mode)
            with torch.no_grad():
                print(type(model).__name__, float((model(**batch).logits - expected).abs().max()))
            assert model.generation_config.latent_strategy == "dynamic" and not model.training
    """
    folders = [str(run["folder"]) for run in trained.values()]
    for line in run_python(code, *folders, cwd=ROOT).splitlines():
        name, difference = line.split()
        assert name.startswith("Latent") and float(difference) < 1e-6


@pytest.mark.parametrize("name", TIED)
def test_merged_equals_unmerged_and_peft_and_loads_whole(name: str, trained: dict, tmp_path: Path) -> None:
    run = trained[name]
    base, _ = load_latent_model(run["folder"], adapter="skip")
    assert (logits(base, run["batch"]) - run["batch"]["logits"]).abs().max() > 0.1  # the adapter does something
    wrapped = PeftModel.from_pretrained(base, run["folder"])
    torch.testing.assert_close(logits(wrapped, run["batch"]), run["batch"]["logits"], atol=1e-6, rtol=0)
    merged, processor = load_latent_model(run["folder"], adapter="merge")
    same = wrapped.merge_and_unload().state_dict()
    assert merged.state_dict().keys() == same.keys()
    assert all(torch.equal(value, same[key]) for key, value in merged.state_dict().items())
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_latent_model(tmp_path)
    torch.testing.assert_close(logits(again, run["batch"]), run["batch"]["logits"], atol=1e-6, rtol=0)


def test_an_attached_adapter_can_be_switched_off_and_decodes(trained: dict) -> None:
    run = trained["untied"]
    model, processor = load_latent_model(run["folder"])
    base, _ = load_latent_model(run["folder"], adapter="skip")
    model.disable_adapters()
    assert torch.equal(logits(model, run["batch"]), logits(base, run["batch"]))
    model.enable_adapters()
    row = run["trainer"].train_dataset[0]
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    merged, _ = load_latent_model(run["folder"], adapter="merge")
    outputs = [m.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True) for m in (model, merged)]
    assert outputs[0].latent_trace.spans and torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_an_adapter_of_a_latent_checkpoint_loads(tmp_path: Path) -> None:
    model, processor = convert_stock_checkpoint(stock_folder(tmp_path / "stock"))
    model.save_pretrained(tmp_path / "latent")
    processor.save_pretrained(tmp_path / "latent")
    trainer = adapter_trainer(tmp_path / "latent", tmp_path / "adapter", max_steps=1)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.save_model()
    inner = trainer.model.get_base_model()
    inner.forward = type(inner).forward.__get__(inner)
    loaded, _ = load_latent_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), logits(trainer.model, batch), atol=1e-6, rtol=0)


# Going on --------------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_its_adapter_checkpoint(trained: dict, tmp_path: Path) -> None:
    run = trained["untied"]
    shutil.copytree(run["folder"] / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = adapter_trainer(run["base"], tmp_path)
    resumed.train(resume_from_checkpoint=True)
    expected = dict(run["trainer"].model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    loaded, _ = load_latent_model(tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(loaded, run["batch"]), run["batch"]["logits"], atol=1e-6, rtol=0)


def test_an_adapter_goes_on_being_trained(trained: dict, tmp_path: Path) -> None:
    run = trained["tied"]
    trainer = adapter_trainer(run["folder"], tmp_path, options={}, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    names = {name for name, p in run["trainer"].model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed and changed <= names == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.save_model()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run["base"])  # and not the adapter that it began with
    with pytest.raises(ValueError, match="is an adapter and goes on being trained as it is; leave use_peft out"):
        load_for_training(model_options(run["folder"], use_peft=True), "laser")


# Refusals --------------------------------------------------------------------------------------------------------


def test_what_is_no_latent_model_is_refused(trained: dict, tmp_path: Path) -> None:
    base, folder = trained["untied"]["base"], trained["untied"]["folder"]
    with pytest.raises(ValueError, match="is a stock 'qwen2_5_vl' checkpoint without latents; give the method"):
        load_latent_model(base)
    with pytest.raises(ValueError, match="adapter='on' is unknown"):
        load_latent_model(folder, adapter="on")
    with pytest.raises(ValueError, match="is no adapter; leave base_model out"):
        load_latent_model(base, base_model=folder)
    with pytest.raises(ValueError, match="itself an adapter; merge that one and save it first"):
        load_latent_model(folder, base_model=folder)
    with pytest.raises(ValueError, match="was trained with latent_token_id=493, its base .* has"):
        other, processor = convert_stock_checkpoint(base, processor=other_ids())
        other.save_pretrained(tmp_path)
        load_latent_model(folder, base_model=tmp_path)


def other_ids() -> Any:
    """A processor whose latent tokens have other ids: one token was added before them."""
    processor = tiny_processor()
    processor.tokenizer.add_tokens("<|other|>", special_tokens=True)
    tokens = {"start": "<|s|>", "slot": "<|l|>", "end": "<|e|>"}
    return type(processor)(processor.image_processor, processor.tokenizer, latent_tokens=tokens)


def test_an_adapter_that_does_not_fit_its_base_is_refused(trained: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(trained["tied"]["folder"], tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    gone = {**settings, "base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(ValueError, match="is an adapter of '.*gone', which does not exist here; say where"):
        load_latent_model(folder)
    load_latent_model(folder, base_model=trained["tied"]["base"])
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "trainable_token_indices": None}))
    with pytest.raises(ValueError, match="does not hold the rows .* of the embedding"):
        load_latent_model(folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(key for key in tensors if "q_proj.lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit its base .*q_proj.lora_B"):
        load_latent_model(folder)


def test_an_adapter_of_another_tool_says_what_is_missing(trained: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(trained["untied"]["folder"], tmp_path / "adapter")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="without latents; give the method"):
        load_latent_model(folder)
    model, _ = load_latent_model(folder, method="laser")
    batch = trained["untied"]["batch"]
    torch.testing.assert_close(logits(model, batch), batch["logits"], atol=1e-6, rtol=0)


# The configuration -----------------------------------------------------------------------------------------------


def test_options_of_the_adapter(trained: dict) -> None:
    model, processor, _ = load_for_training(model_options(trained["untied"]["base"]), "laser")

    def config(**options: Any) -> Any:
        return build_peft_config(model_options("x", use_peft=True, **options), model, processor)

    assert build_peft_config(model_options("x"), model, processor) is None
    assert config(lora_target_modules=["q_proj"]).target_modules == {"q_proj"}  # TRL makes a pattern of one name
    assert config(lora_target_modules=["q_proj", "v_proj"]).target_modules == {"q_proj", "v_proj"}
    assert config(lora_target_modules=["all-linear"]).target_modules == "all-linear"
    assert config(model_revision="v2").revision == "v2" and config().revision is None
    ids = list(range(processor.latent_start_token_id, processor.latent_end_token_id + 1))
    assert config().trainable_token_indices == {"embed_tokens": ids, "lm_head": ids}
    assert config(lora_modules_to_save=["embed_tokens"]).trainable_token_indices == {"lm_head": ids}
    with pytest.raises(ValueError, match="lora_r=4 is read with use_peft=true only"):
        build_peft_config(model_options("x", lora_r=4), model, processor)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_adapted_in_its_language_model_alone(family: str, tmp_path: Path) -> None:
    folder = save_tiny_stock_checkpoint(tmp_path, family=family)
    args = model_options(folder, use_peft=True, lora_r=2)
    model, _, config = load_for_training(args, "laser", weights=False)
    wrapped = get_peft_model(model, config)
    lora = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    layers = model.config.get_text_config().num_hidden_layers
    assert len(lora) == 7 * layers and all(".language_model.layers." in name for name in lora)
    assert all(parameter.device.type == "meta" for parameter in wrapped.parameters())


# Revisions -------------------------------------------------------------------------------------------------------


def stored(folder: Path, **changed: str) -> dict[str, StoredFile]:
    """The files of a folder as a Hub keeps them; `changed` replaces the text of some, by name without suffix."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files.update({f"{name}.json": text.encode() for name, text in changed.items()})
    return {name: StoredFile(data, lfs=name.endswith(".safetensors")) for name, data in files.items()}


def test_a_revision_reaches_all_files_and_the_base_of_an_adapter(hub: Any, trained: dict, tmp_path: Path) -> None:
    """The repository of the base changes after an adapter was trained on its first revision."""
    run = trained["untied"]
    folders = [run["base"], stock_folder(tmp_path / "newer", seed=2, spare=False)]
    repo, commits = Repo(), []
    for number, folder in enumerate(folders, 1):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"][0]["lstrip"] = number == 2
        images = json.loads((folder / "preprocessor_config.json").read_text())
        images["size"]["shortest_edge"] = 784 * number
        texts = {"tokenizer": json.dumps(tokenizer), "preprocessor_config": json.dumps(images)}
        commits.append(repo.add(stored(folder, **texts)))
    settings = json.loads((run["folder"] / "adapter_config.json").read_text())
    settings.update(base_model_name_or_path="org/base", revision=commits[0])
    adapter = Repo()
    adapter.add(stored(run["folder"], adapter_config=json.dumps(settings)))
    hub.repos.update({("models", "org/base"): repo, ("models", "org/adapter"): adapter})
    code = f"""
    import json, sys
    sys.path.insert(0, {str(ROOT)!r})
    import torch
    from safetensors.torch import load_file
    from modeling_latent import load_latent_model
    from trainers.model_loading import LatentModelConfig, load_for_training
    for revision in {[commits[0], "main"]!r}:
        args = LatentModelConfig(model_name_or_path="org/base", model_revision=revision, use_peft=True, lora_r=2)
        model, processor, peft_config = load_for_training(args, "laser")
        added = json.loads(processor.tokenizer.backend_tokenizer.to_str())["added_tokens"]
        print(json.dumps([
            float(model.model.visual.patch_embed.proj.weight.double().sum()),
            processor.image_processor.size["shortest_edge"], added[0]["lstrip"],
            model.config.get_text_config().vocab_size, peft_config.revision,
        ]))
    batch = load_file({str(run["folder"].parent / "batch.safetensors")!r})
    expected = batch.pop("logits")
    model, _ = load_latent_model("org/adapter")
    with torch.no_grad():
        print("difference", float((model(**batch).logits - expected).abs().max()))
    """
    printed = hub.run(code).splitlines()
    found = [json.loads(line) for line in printed if line.startswith("[") and "WARNING" not in line]
    assert len(found) == 2
    for (weights, pixels, lstrip, rows, revision), number in zip(found, (1, 2), strict=True):
        tensors = load_file(folders[number - 1] / "model.safetensors")
        assert weights == tensors["visual.patch_embed.proj.weight"].double().sum().item()
        assert (pixels, lstrip, revision) == (784 * number, number == 2, commits[0] if number == 1 else None)
        vocabulary = AutoConfig.from_pretrained(folders[number - 1]).get_text_config().vocab_size
        assert rows == max(vocabulary, len(tiny_processor().tokenizer))
    (difference,) = (float(line.split()[1]) for line in printed if line.startswith("difference"))
    assert difference < 1e-6


# Quantised bases -------------------------------------------------------------------------------------------------


def test_a_quantised_base_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantisation_options(model_options("x"), has_adapter=False) == {}
    assert quantised_bits(model_options("x")) is None
    four = model_options("x", load_in_4bit=True, use_bnb_nested_quant=True)
    assert quantised_bits(four) == pytest.approx(4.127, abs=1e-3)
    assert quantised_bits(model_options("x", load_in_8bit=True)) == 8
    with pytest.raises(ValueError, match="load_in_4bit=true: a quantised base is not trained itself; add use_peft"):
        quantisation_options(four, has_adapter=False)
    four.dtype = "auto"
    with pytest.raises(ValueError, match="load_in_4bit=true with dtype='auto': name the type to compute in"):
        quantisation_options(four, has_adapter=True)
    monkeypatch.setattr(adapters, "is_bitsandbytes_available", lambda: False)
    for bits in (4, 8):
        args = model_options("x", **{f"load_in_{bits}bit": True})
        with pytest.raises(ValueError, match=f"load_in_{bits}bit=true needs the package bitsandbytes, which is not"):
            quantisation_options(args, has_adapter=True)

    def nothing(raise_exception: bool) -> None:
        raise RuntimeError("only gaudi")

    monkeypatch.setattr(adapters, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(adapters, "validate_bnb_backend_availability", nothing)
    four.dtype = "bfloat16"
    with pytest.raises(ValueError, match=r"supports none of the devices of this machine \(only gaudi\)"):
        quantisation_options(four, has_adapter=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", TIED)
def test_a_base_in_four_bits_is_trained_through_its_adapter(name: str, tmp_path: Path) -> None:
    base = stock_folder(tmp_path / "base", TIED[name])
    options = {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "use_bnb_nested_quant": True}
    trainer = adapter_trainer(base, tmp_path / "adapter", options, max_steps=2, latent_exposure="own")
    model = trainer.model.get_base_model()
    four = {key for key, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")}
    assert len(four) == 14 and all(".language_model." in key and key.endswith("base_layer") for key in four)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {key for key, p in trainer.model.named_parameters() if not torch.equal(before[key], p)}
    assert changed == {key for key, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.save_model()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    model.forward = type(model).forward.__get__(model)
    quantised = quantisation_options(model_options(base, **options), has_adapter=True)
    loaded, _ = load_latent_model(tmp_path / "adapter", dtype=torch.float32, **quantised)
    # the adapter was trained in bfloat16, as in the paper, and is loaded in the type of the base
    torch.testing.assert_close(logits(loaded, batch), logits(trainer.model, batch), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="is not merged into quantised weights"):
        load_latent_model(tmp_path / "adapter", adapter="merge", dtype=torch.float32, **quantised)
    whole, _ = load_latent_model(tmp_path / "adapter", adapter="merge")
    assert (logits(whole, batch) - logits(trainer.model, batch)).abs().max() < 0.5
