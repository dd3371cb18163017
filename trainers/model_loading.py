"""From the model options of a recipe to what a trainer takes: model, processor, adapter."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from modeling_latent import LatentProcessor, load_latent_model
from modeling_latent.loading_latent import adapter_settings

from .adapters import build_peft_config, continue_adapter, quantisation_options


@dataclass
class LatentModelConfig(ModelConfig):
    """`trl.ModelConfig` with the options of a vision-language model; a YAML key and a flag each."""

    freeze_vision_tower: bool = field(
        default=False, metadata={"help": "Keep the vision tower and its merger as they are."}
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Least number of pixels of an image after resizing."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Greatest number of pixels of an image after resizing."}
    )


def load_for_training(
    args: LatentModelConfig, method: str, *, weights: bool = True, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, LatentProcessor, PeftConfig | None]:
    """Model, processor and adapter configuration for a trainer.

    A latent checkpoint is taken as it is, a stock one is made latent, an adapter goes on being trained.

    Args:
        args: options of the model.
        method: of a stock checkpoint.
        weights: `False` builds everything on the meta device (dry run); a quantised base then has its full shapes.
        trust_remote_code: as in `from_pretrained`.

    Raises:
        ValueError: options that contradict each other or cannot work here; names option, value and remedy.
    """
    name = args.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is not set; give a folder or a Hub id")
    if Path(name).is_dir() and args.model_revision != "main":
        raise ValueError(f"model_revision={args.model_revision!r}: {name} is a folder, which has none; leave it out")
    continued = adapter_settings(name, args.model_revision) is not None
    if continued and args.use_peft:
        raise ValueError(
            f"model_name_or_path={name!r} is an adapter and goes on being trained as it is; leave use_peft out, or "
            "merge it (load_latent_model(..., adapter='merge')) and train a new one on the saved model"
        )
    kwargs: dict[str, Any] = {"dtype": args.dtype or "auto"}
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    kwargs.update(quantisation_options(args, has_adapter=args.use_peft or continued, platform=weights))
    model, processor = load_latent_model(
        name,
        method=None if continued else method,
        adapter="skip",
        revision=args.model_revision,
        weights=weights,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    set_pixels(processor, args.min_pixels, args.max_pixels)
    if args.freeze_vision_tower:
        model.model.visual.requires_grad_(False)
    peft_config = build_peft_config(args, model, processor)
    if continued:
        model = continue_adapter(model, name, args.model_revision, weights)
    return model, processor, peft_config


def set_pixels(processor: LatentProcessor, min_pixels: int | None, max_pixels: int | None) -> None:
    """Bound the area of resized images; the options become part of the saved processor.

    Raises:
        ValueError: bounds below 1, or in the wrong order.
    """
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and value < 1:
            raise ValueError(
                f"{name}={value} must be at least 1 (an area in pixels); leave it out for the model's own"
            )
    size = dict(processor.image_processor.size)
    size["shortest_edge"] = min_pixels or size["shortest_edge"]
    size["longest_edge"] = max_pixels or size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"min_pixels={size['shortest_edge']} is above max_pixels={size['longest_edge']}; give both, in order"
        )
    processor.image_processor.size = size


__all__ = ["LatentModelConfig", "load_for_training", "set_pixels"]
