"""Parts of the tests of curricula: tiny models of every family with the tokens of a method, records, trainers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from modeling_latent import LATENT_CLASSES, LATENT_METHODS
from modeling_latent.configuration_latent import LATENT_TOKEN_FIELDS
from modeling_latent.conversion_latent import LATENT_PROCESSORS
from tests.latent import liven
from tests.tiny import tiny_images
from trainers import LatentSFTTrainer, StagedSFTConfig, tiny, tiny_chameleon
from trainers.data.records import Record, make_record, records_to_dataset
from trainers.tiny_tokenizer import TINY_TEXTS, build_tiny_tokenizer

QWEN_FAMILIES = tuple(tiny.TINY_FAMILIES)
IMAGE_FAMILIES = (*QWEN_FAMILIES, "chameleon")
TEXT_FAMILIES = ("gpt2", "llama")
PIXELS = 28 * 28 * 36

_SIZES = {"vocab_size": 560, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_TEXT_CONFIGS = {
    "gpt2": lambda: GPT2Config(**_SIZES, n_embd=64, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0,
                               embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda: LlamaConfig(**_SIZES, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip


def staged_parts(family: str = "qwen2_5_vl", method: str | None = None, scale: float = 4.0, **fields: Any) -> tuple:
    """A tiny model with the tokens of a method, its matrices enlarged so that latents matter, and its processor."""
    method = method or ("coconut" if family in TEXT_FAMILIES else "ivtlr")
    tokens = LATENT_METHODS[method].tokens
    if family in TEXT_FAMILIES:
        processor = LATENT_PROCESSORS["causal_lm"](build_tiny_tokenizer(TINY_TEXTS), latent_tokens=tokens)
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(_TEXT_CONFIGS[family]())
        key = "causal_lm"
    elif family == "chameleon":
        processor = tiny_chameleon.build_tiny_chameleon_processor(latent_tokens=tokens)
        stock = tiny_chameleon.build_tiny_chameleon_stock_model(
            tiny_chameleon.tiny_chameleon_config(None, processor.tokenizer), 0
        )
        key = family
    else:
        processor = tiny.build_tiny_processor(latent_tokens=tokens, family=family, max_pixels=PIXELS)
        stock = tiny.build_tiny_stock_model(tiny.tiny_config(family, None, processor.tokenizer), 0)
        key = family
    config_class, model_class = LATENT_CLASSES[key]
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    config = config_class.from_stock(stock.config, method=method, **ids, **fields)
    model = model_class(config)
    own, weights = model.state_dict(), stock.state_dict()
    if key == "causal_lm":
        weights = {our: _weight(weights, our) for our in own}
    model.load_state_dict(weights)
    return liven(model, scale).eval(), processor


def _weight(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor of a stock causal language model whose name ends as ours does."""
    end = name.removeprefix("model.language_model.")
    (found,) = [key for key in weights if key == end or key.split(".", 1)[1] == end]
    return weights[found]


def scenes(images: bool = True) -> list[Record]:
    """Records with questions of different length, one to four steps, and images of different size."""
    pictures = tiny_images(4)
    questions = [
        "What is it?",
        "Is the path safe? Look twice.",
        "Where is the dog? Tell me, say yes.",
        "How many?",
    ]
    steps = [
        ["Look at the map.", "It has a hole."],
        ["The path is free."],
        ["The dog runs.", "It is on the street.", "The street is safe.", "So it is."],
        ["One.", "Two.", "Three."],
    ]
    return [
        make_record(
            f"s{i}", questions[i], "Yes" if i % 2 else "a dog", [pictures[i]] if images else [], steps=steps[i],
            meta={"source": "scenes.json", "row": i},
        )
        for i in range(4)
    ]  # fmt: skip


OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "activation_checkpointing": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 4,
    "epochs_per_stage": 1,
    "num_stages": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
}


def staged_args(folder: Path, family: str = "qwen2_5_vl", **options: Any) -> StagedSFTConfig:
    """A short run through four stages of one epoch each."""
    base = dict(OPTIONS)
    if {"steps_per_stage", "start_stage"} & options.keys():
        del base["epochs_per_stage"], base["num_stages"]
    if family in TEXT_FAMILIES:
        base.update(latent_method="coconut", staged_format="coconut")
    else:
        base.update(num_latent_patches=2)
        if family == "chameleon":
            base.update(staged_format="ivtlr-chameleon")
    return StagedSFTConfig(output_dir=str(folder), **{**base, **options})


def staged_trainer(
    folder: Path, family: str = "qwen2_5_vl", parts: tuple | None = None, data: Any = None, **options: Any
) -> LatentSFTTrainer:
    """A trainer on [`scenes`]."""
    given = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in options}
    args = staged_args(folder, family, **options)
    model, processor = parts or staged_parts(family, args.latent_method)
    data = records_to_dataset(scenes(family not in TEXT_FAMILIES)) if data is None else data
    return LatentSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor, **given)
