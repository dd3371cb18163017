"""LoRA and QLoRA for latent models: which modules and rows are trained, what is quantised, what an adapter carries.

An adapter that teaches a latent method must hold the rows of the marker tokens, in the embedding and, where the LM
head is a matrix of its own, in the head: the stock checkpoint never trained them. LoRA: arXiv 2106.09685; QLoRA: arXiv
2305.14314.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_peft_config, get_quantization_config

from modeling_latent import LatentProcessor
from modeling_latent.loading_latent import embedding_name

# Every projection of the language model; a vision tower and a latent head have layers of some of these names, too. The
# last ones are those of GPT-2.
LANGUAGE_MODEL_PROJECTIONS = (
    r"(?!.*\bvisual\.).*\b(layers|h)\.\d+\..*\.((q|k|v|o|qkv|gate|up|gate_up|down)_proj|c_attn|c_proj|c_fc)"
)
# What a quantised base keeps in full precision: the image encoder is small and sees every pixel, the fused losses
# multiply with the weight of the LM head, a latent head makes the vectors that are fed back.
KEPT_UNQUANTISED = ["model.visual", "model.vqmodel", "lm_head", "latent_head", "concept_head", "attention_head"]
_ADAPTER_OPTIONS = ("lora_", "use_rslora", "use_dora")


def build_peft_config(args: ModelConfig, model: PreTrainedModel, processor: LatentProcessor) -> LoraConfig | None:
    """The `lora_*` options as a PEFT configuration, with the marker rows trained; `None` without `use_peft`.

    Args:
        args: options of the model; without `lora_target_modules` every projection of the language model is adapted.
        model: the latent model that the adapter goes on.
        processor: says which tokens are latent.

    Raises:
        ValueError: adapter options without `use_peft`, or a LoRA of the LM head.
    """
    if not args.use_peft:
        defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
        given = [n for n in defaults if n.startswith(_ADAPTER_OPTIONS) and getattr(args, n) != defaults[n]]
        if given:
            raise ValueError(f"{given[0]}={getattr(args, given[0])!r} is read with use_peft=true only; set it")
        return None
    config = get_peft_config(args)
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = LANGUAGE_MODEL_PROJECTIONS
    elif isinstance(args.lora_target_modules, str) and args.lora_target_modules.isidentifier():
        config.target_modules = {args.lora_target_modules}  # one name of a list is a name, not a pattern
    names = config.target_modules
    if re.fullmatch(names, "lm_head") if isinstance(names, str) else names and "lm_head" in names:
        raise ValueError(
            f"lora_target_modules={args.lora_target_modules!r} matches lm_head: the losses multiply with its weight "
            "and would pass the adapter by; take it out (the rows of the latent tokens are trained there anyway)"
        )
    ids = sorted(processor.tokenizer.convert_tokens_to_ids(list(processor.latent_tokens.values())))
    whole = set(config.modules_to_save or [])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embedding = embedding_name(model)
    layers = [embedding] if tied else [embedding, "lm_head"]
    config.trainable_token_indices = {layer: ids for layer in layers if layer not in whole} or None
    config.revision = None if args.model_revision == "main" else args.model_revision
    return config


def quantisation_options(args: ModelConfig, has_adapter: bool, platform: bool = True) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `load_in_4bit` and `load_in_8bit`; empty without them.

    The vision tower, the LM head and a latent head are kept in `dtype`.

    Args:
        args: options of the model.
        has_adapter: whether an adapter is trained on the base.
        platform: `False` checks the options alone and returns nothing, for a machine that will not train.

    Raises:
        ValueError: a quantised base without adapter, 4 bits without a compute type, or a platform without
            bitsandbytes; names what is missing.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return {}
    option = "load_in_4bit" if args.load_in_4bit else "load_in_8bit"
    if not has_adapter:
        raise ValueError(f"{option}=true: a quantised base is not trained itself; add use_peft: true")
    if args.load_in_4bit and args.dtype in (None, "auto"):
        raise ValueError(f"{option}=true with dtype={args.dtype!r}: name the type to compute in, e.g. dtype: bfloat16")
    if not platform:
        return {}
    check_quantisation_platform(option)
    config = get_quantization_config(args)
    config.llm_int8_skip_modules = list(KEPT_UNQUANTISED)
    device = PartialState().local_process_index if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def quantised_bits(args: ModelConfig) -> float | None:
    """Bits of a weight of the quantised base, its scales included (QLoRA, section 3); `None` for one that is not."""
    if args.load_in_4bit:  # blocks of 64 weights; their scales in 32 bits, or in 8 bits and blocks of 256
        return 4 + (8 / 64 + 32 / (64 * 256) if args.use_bnb_nested_quant else 32 / 64)
    return 8.0 if args.load_in_8bit else None


def check_quantisation_platform(option: str) -> None:
    """Say what is missing for a bitsandbytes model on this machine.

    Raises:
        ValueError: names the package or the device.
    """
    if not is_bitsandbytes_available():
        raise ValueError(
            f"{option}=true needs the package bitsandbytes, which is not installed here: pip install bitsandbytes "
            "(extra `gpu`), or leave the option out"
        )
    try:
        validate_bnb_backend_availability(raise_exception=True)
    except RuntimeError as error:
        raise ValueError(
            f"{option}=true: the installed bitsandbytes supports none of the devices of this machine ({error})"
        ) from error


def continue_adapter(model: PreTrainedModel, name: str, revision: str, weights: bool = True) -> PeftModel:
    """The adapter of a folder or repository on its base, to be trained on.

    Args:
        model: the base, from `load_latent_model(name, adapter="skip")`.
        name: folder or repository of the adapter.
        revision: of the adapter.
        weights: `False` for a base on the meta device: modules of the same shapes, nothing read.
    """
    if weights:
        return PeftModel.from_pretrained(model, name, is_trainable=True, revision=revision)
    config = PeftConfig.from_pretrained(name, revision=revision)
    config.inference_mode = False
    config.base_model_name_or_path = model.name_or_path
    return get_peft_model(model, config)


def save_latent_settings(model: torch.nn.Module, folder: str | Path) -> None:
    """Write the latent configuration and the decoding defaults beside an adapter; nothing for a whole model.

    `load_latent_model(folder)` reads the method and checks the token ids with them.
    """
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        base.config.save_pretrained(folder)
        base.generation_config.save_pretrained(folder)


__all__ = [
    "KEPT_UNQUANTISED",
    "LANGUAGE_MODEL_PROJECTIONS",
    "build_peft_config",
    "check_quantisation_platform",
    "continue_adapter",
    "quantised_bits",
    "quantisation_options",
    "save_latent_settings",
]
