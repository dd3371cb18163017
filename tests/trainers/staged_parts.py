"""Parts of the tests of curricula: tiny models of every family with the tokens of a method, records, trainers."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_latent import LATENT_CLASSES, LATENT_METHODS
from modeling_latent.configuration_latent import LATENT_TOKEN_FIELDS
from tests.latent import liven
from tests.tiny import tiny_images
from trainers import LatentSFTTrainer, StagedSFTConfig, tiny, tiny_chameleon, tiny_text
from trainers.data.records import Record, make_record, records_to_dataset

QWEN_FAMILIES = tuple(tiny.TINY_FAMILIES)
IMAGE_FAMILIES = (*QWEN_FAMILIES, "chameleon")
TEXT_FAMILIES = tuple(tiny_text.TINY_TEXT_FAMILIES)
PIXELS = 28 * 28 * 36


def staged_processor(family: str = "qwen2_5_vl", method: str | None = None) -> Any:
    """A processor with the tokens of a method."""
    tokens = LATENT_METHODS[method or ("coconut" if family in TEXT_FAMILIES else "ivtlr")].tokens
    if family in TEXT_FAMILIES:
        return tiny_text.build_tiny_text_processor(family, latent_tokens=tokens)
    if family == "chameleon":
        return tiny_chameleon.build_tiny_chameleon_processor(latent_tokens=tokens)
    return tiny.build_tiny_processor(latent_tokens=tokens, family=family, max_pixels=PIXELS)


def _stock_model(family: str, tokenizer: Any) -> PreTrainedModel:
    if family in TEXT_FAMILIES:
        return tiny_text.build_tiny_text_stock_model(tiny_text.tiny_text_config(family, None, tokenizer), 0)
    if family == "chameleon":
        return tiny_chameleon.build_tiny_chameleon_stock_model(
            tiny_chameleon.tiny_chameleon_config(None, tokenizer), 0
        )
    return tiny.build_tiny_stock_model(tiny.tiny_config(family, None, tokenizer), 0)


def staged_parts(family: str = "qwen2_5_vl", method: str | None = None, scale: float = 4.0, **fields: Any) -> tuple:
    """A tiny model with the tokens of a method, its matrices enlarged so that latents matter, and its processor."""
    processor = staged_processor(family, method)
    stock = _stock_model(family, processor.tokenizer)
    key = "causal_lm" if family in TEXT_FAMILIES else family
    method = method or ("coconut" if family in TEXT_FAMILIES else "ivtlr")
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
