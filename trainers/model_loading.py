"""From the model options of a recipe to what a trainer takes: model, processor, adapter."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig

from modeling_latent import LATENT_HEADS, LatentProcessor, get_latent_method, load_latent_model
from modeling_latent.configuration_latent import (
    HEAD_TIMINGS,
    LATENT_TOKEN_FIELDS,
    ROPE_POSITIONS,
    published_method,
)
from modeling_latent.loading_latent import adapter_settings

from .adapters import build_peft_config, continue_adapter, quantisation_options
from .data.boxes import checked_option
from .optimizer_groups import part_of

# Options that are fields of the latent configuration; `None` takes what the checkpoint or the method says.
LATENT_OPTIONS = (
    "latent_head",
    "latent_head_size",
    "latent_head_timing",
    "latent_stop_vector",
    "concept_head_size",
    "attention_head",
    "patch_embed_fp32",
    "rope_positions",
)
_LATENT_PARTS = ("latent_head", "latent_stop_vector", "concept_head", "attention_head")


@dataclass
class LatentModelConfig(ModelConfig):
    """`trl.ModelConfig` with the options of a vision-language model; a YAML key and a flag each."""

    freeze_vision_tower: bool = field(
        default=False,
        metadata={"help": "Keep the vision tower as it is, and its merger, too, unless freeze_merger is set."},
    )
    freeze_merger: bool | None = field(
        default=None, metadata={"help": "Keep the merger as it is; default: as freeze_vision_tower."}
    )
    freeze_llm: bool = field(
        default=False,
        metadata={
            "help": "Keep the language model as it is, embeddings and LM head included. A latent head and an end "
            "vector are always trained, as are the heads of LaViT."
        },
    )
    latent_head: str | None = field(
        default=None,
        metadata={"help": "Head of a stock checkpoint made latent: 'simple' or 'glu'; default: as the checkpoint."},
    )
    latent_head_size: int | None = field(
        default=None, metadata={"help": "Inner width of the head 'glu'; default: the decoder's intermediate_size."}
    )
    latent_head_timing: str | None = field(
        default=None,
        metadata={"help": "States that meet the head in decoding: 'train' (those fed) or 'reference' (published)."},
    )
    latent_stop_vector: bool | None = field(
        default=None, metadata={"help": "Give a stock checkpoint a learned end vector; default: as the checkpoint."}
    )
    concept_head_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the teacher of a stock checkpoint made latent (LaViT); default: as the checkpoint."
        },
    )
    attention_head: bool | None = field(
        default=None,
        metadata={"help": "Give a stock checkpoint the head that predicts a teacher's attention (LaViT)."},
    )
    patch_embed_fp32: bool | None = field(
        default=None,
        metadata={"help": "Patch embedding as a matrix product in float32, not a 3-D convolution; default: false."},
    )
    rope_positions: str | None = field(
        default=None,
        metadata={
            "help": "Positions in a Qwen-VL model: 'mrope', or 'flat' (published IVT-LR: the plain index, of image "
            "tokens too); default: as the checkpoint, else 'mrope'."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Least number of pixels of an image after resizing."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Greatest number of pixels of an image after resizing."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_head is not None:
            checked_option("latent_head", self.latent_head, sorted(LATENT_HEADS))
        if self.latent_head_timing is not None:
            checked_option("latent_head_timing", self.latent_head_timing, HEAD_TIMINGS)
        if self.rope_positions is not None:
            checked_option("rope_positions", self.rope_positions, ROPE_POSITIONS)
        size = self.latent_head_size
        if size is not None and (not isinstance(size, int) or size < 1 or self.latent_head == "simple"):
            raise ValueError(
                f"latent_head_size={size!r} with latent_head={self.latent_head!r}: it is the width of the head 'glu', "
                "at least 1; leave it out for the width of the decoder"
            )
        if self.freeze_llm and self.use_peft:
            raise ValueError(
                "freeze_llm=true with use_peft=true: the base is frozen anyway, and the adapter trains what "
                "lora_target_modules names; leave freeze_llm out"
            )


def load_for_training(
    args: LatentModelConfig,
    method: str,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    latent_tokens: dict[str, str] | None = None,
) -> tuple[PreTrainedModel | PeftModel, LatentProcessor, PeftConfig | None]:
    """Model, processor and adapter configuration for a trainer.

    A latent checkpoint is taken as it is, a stock one is made latent, an adapter goes on being trained. A latent head
    or an end vector that the checkpoint lacks is drawn at random in the model's dtype; one that it has is kept.

    Args:
        args: options of the model.
        method: of a stock checkpoint.
        weights: `False` builds everything on the meta device (dry run); a quantised base then has its full shapes.
        trust_remote_code: as in `from_pretrained`.
        latent_tokens: of a stock checkpoint, in place of the method's.

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
    given = {option: getattr(args, option) for option in LATENT_OPTIONS if getattr(args, option) is not None}
    if given and not continued:
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, trust_remote_code=trust_remote_code)
        kwargs["latent_fields"] = fields_to_add(config, given, method, name)
    model, processor = load_latent_model(
        name,
        method=None if continued else method,
        adapter="skip",
        revision=args.model_revision,
        weights=weights,
        trust_remote_code=trust_remote_code,
        latent_tokens=latent_tokens,
        **kwargs,
    )
    set_pixels(processor, args.min_pixels, args.max_pixels)
    merger = args.freeze_vision_tower if args.freeze_merger is None else args.freeze_merger
    freeze_parts(model, vision_tower=args.freeze_vision_tower, merger=merger, llm=args.freeze_llm)
    peft_config = build_peft_config(args, model, processor)
    if peft_config is not None:
        train_latent_parts(peft_config, model)
    if continued:
        fields_to_add(model.config, given, method, name)
        model = continue_adapter(model, name, args.model_revision, weights)
    return model, processor, peft_config


def fields_to_add(config: PreTrainedConfig, given: dict[str, Any], method: str, name: str) -> dict[str, Any] | None:
    """Which latent fields a checkpoint is to be loaded with: those given that it does not say itself; `None` for none.

    Args:
        config: of the checkpoint: stock, written by the published code of a method, or latent.
        given: options among `LATENT_OPTIONS` that are set.
        method: that a stock checkpoint is made for.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: an option that contradicts the checkpoint, or one that would have no effect.
    """
    published, is_latent = published_method(config), config.model_type.startswith("latent_")
    if is_latent:
        said = {option: getattr(config, option) for option in LATENT_OPTIONS}
    elif published is not None:
        said = {key: value for key, value in published.published.fields(config).items() if value}
    else:
        said = {}
    for option, value in given.items():
        if option in said and said[option] != value:
            raise ValueError(
                f"{option}={value!r}, but {name} was made with {option}={said[option]!r}; leave {option} out, or make "
                "a latent model of the stock checkpoint anew"
            )
    head = given.get("latent_head", said.get("latent_head", get_latent_method(method).head))
    for option in ("latent_head_size", "latent_head_timing"):
        if option in given and head is None:
            raise ValueError(
                f"{option}={given[option]!r}: {name} has no latent head; set latent_head, or leave it out"
            )
    if is_latent:
        return None
    return {option: value for option, value in given.items() if option not in said} or None


def freeze_parts(model: PreTrainedModel, *, vision_tower: bool, merger: bool, llm: bool) -> None:
    """Take the gradient from parts of a model. A latent head and an end vector keep theirs, as in the published code;
    so does the embedding of a model with learned tokens, which are rows of it (LaViT).

    Args:
        vision_tower: without its merger.
        merger: the projector into the language model.
        llm: the language model with embeddings and LM head.
    """
    frozen = {"vision": vision_tower, "merger": merger, "main": llm, "latent head": False}
    learned = getattr(model.config, "latent_learned_token_ids", None)
    embedding = model.get_input_embeddings().weight if learned else None
    for name, parameter in model.named_parameters():
        kept = name.startswith("latent_stop_vector.") or parameter is embedding
        if frozen[part_of(name)] and not kept:
            parameter.requires_grad_(False)


def train_latent_parts(config: PeftConfig, model: PreTrainedModel) -> None:
    """Let an adapter train and hold the latent head and the end vector whole, whatever modules it adapts."""
    parts = [name for name in _LATENT_PARTS if getattr(model, name, None) is not None]
    if parts:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *parts})


def check_processor(processor: Any) -> None:
    """Refuse what is no `LatentProcessor` as the `processing_class` of a trainer.

    Raises:
        ValueError: names its class and the remedy.
    """
    if not hasattr(processor, "latent_token_id"):
        raise ValueError(
            f"processing_class must be the LatentProcessor saved beside the model, got {type(processor).__name__}; "
            "load it with LatentProcessor.from_pretrained(folder)"
        )


def check_token_ids(config: PreTrainedConfig, processor: Any) -> None:
    """Refuse a processor whose latent tokens are not those of the model: no span would be found, without a word.

    Raises:
        ValueError: names the token, its ids and the remedy.
    """
    for name in LATENT_TOKEN_FIELDS:
        expected, found = getattr(config, name), getattr(processor, name)
        if expected != found:
            raise ValueError(
                f"{name} is {expected} in the model and {found} in processing_class; load both from the same folder"
            )


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
    given = [name for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if value is not None]
    if not given:
        return
    size = dict(getattr(getattr(processor, "image_processor", None), "size", None) or {})
    if "longest_edge" not in size:
        raise ValueError(
            f"{given[0]} bounds the area of the images of a Qwen-VL model; {type(processor).__name__} has no such "
            "bound, leave it out"
        )
    size["shortest_edge"] = min_pixels or size["shortest_edge"]
    size["longest_edge"] = max_pixels or size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"min_pixels={size['shortest_edge']} is above max_pixels={size['longest_edge']}; give both, in order"
        )
    processor.image_processor.size = size


__all__ = [
    "LATENT_OPTIONS",
    "LatentModelConfig",
    "check_processor",
    "check_token_ids",
    "fields_to_add",
    "freeze_parts",
    "load_for_training",
    "set_pixels",
    "train_latent_parts",
]
