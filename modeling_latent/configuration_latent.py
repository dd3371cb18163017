"""Configuration of latent-reasoning models: the fields shared by all backbones, one thin class a backbone, and the
table of methods.

A *method* (LASER, LVR, ...) is data here: the names of its marker tokens, its decoding defaults and its latent head.
The decode path reads these fields and knows no method by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, ChameleonConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.configuration_utils import SubConfigSpec


@dataclass(frozen=True)
class PublishedLayout:
    """How the published code of a method saves a model, in terms of ours.

    Args:
        fields: published configuration to further latent fields.
        token_ids: latent field of our configuration to key of the published `config.json`. A folder that has all these
            keys is of this method.
        keys: further keys that our configuration replaces.
        tensors: pattern of a published tensor name to our name.
        architecture: name of the published class, for a method that writes no token ids: a folder that names it is of
            this method.
    """

    fields: Callable[[PreTrainedConfig], dict[str, Any]]
    token_ids: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    tensors: dict[str, str] = field(default_factory=dict)
    architecture: str | None = None

    def wrote(self, config: PreTrainedConfig) -> bool:
        """Whether a stock configuration comes from a folder of this layout."""
        if self.architecture is not None:
            return self.architecture in (getattr(config, "architectures", None) or [])
        return all(hasattr(config, key) for key in self.token_ids.values())


@dataclass(frozen=True)
class LatentMethod:
    """What a published method fixes in a model: its marker tokens, its decoding defaults and its latent head.

    Args:
        name: key of the table, e.g. `"laser"`.
        tokens: role (`"start"`, `"slot"`, `"latent_end"`, `"end"`, `"patch"`) to token string, **in the order in which
            they are added** to the tokenizer (the order fixes the ids). A method whose latents are learned tokens has
            the roles `"learned_1"`, `"learned_2"`, ... in place of `"start"`, `"slot"` and `"end"`.
        generation: defaults of the options of `generate` (see `latent_strategies.py`), saved with the model.
        head: name in the table of latent heads (see `latent_heads.py`), `None` for the hidden state as it is.
        source: paper.
        aliases: names of strategies in the published code of this method, where they differ from the table's.
        published: layout of its published checkpoints, where that is not the stock one with another tokenizer.
        init_token: token whose embedding and LM head rows the added tokens start with, where the tokenizer has it.
    """

    name: str
    tokens: dict[str, str]
    generation: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    source: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    published: PublishedLayout | None = None
    init_token: str | None = None


LATENT_METHODS: dict[str, LatentMethod] = {}


def register_latent_method(method: LatentMethod) -> LatentMethod:
    """Add a method to the table, so that `convert_stock_checkpoint(..., method=name)` and the trainers find it.

    Raises:
        ValueError: when the name is taken by another definition or a required role is missing.
    """
    missing = {"start", "slot", "end"} - set(method.tokens)
    if missing and "learned_1" not in method.tokens:
        raise ValueError(
            f"latent method {method.name!r}: tokens lack the roles {sorted(missing)}; give a string for each, or "
            "learned tokens ('learned_1', ...)"
        )
    if LATENT_METHODS.get(method.name, method) != method:
        raise ValueError(f"latent method {method.name!r} is already registered with other values; choose another name")
    LATENT_METHODS[method.name] = method
    return method


def get_latent_method(name: str) -> LatentMethod:
    """Look a method up by name.

    Raises:
        ValueError: for an unknown name, with the names that exist.
    """
    if name not in LATENT_METHODS:
        raise ValueError(
            f"unknown latent method {name!r}; choose one of {sorted(LATENT_METHODS)} or register it first"
        )
    return LATENT_METHODS[name]


def learned_tokens(number: int) -> dict[str, str]:
    """Role to string of so many learned tokens, named as LaViT (arXiv 2601.10129) names them."""
    return {f"learned_{index}": f"<lvr{index}>" for index in range(1, number + 1)}


register_latent_method(
    LatentMethod(
        name="laser",
        tokens={"start": "<|laser_start|>", "slot": "<|laser|>", "end": "<|laser_end|>"},
        generation={"latent_strategy": "dynamic", "max_latent_steps": 8},
        source="Forest Before Trees: Latent Superposition for Efficient Visual Reasoning, arXiv 2601.06803",
    )
)


def _lvr_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Latent head and end vector of a published LVR configuration."""
    head = getattr(config, "lvr_head_type", "simple") if getattr(config, "lvr_head", False) else None
    return {"latent_head": head, "latent_stop_vector": bool(getattr(config, "latent_end_token", False))}


register_latent_method(
    LatentMethod(
        name="lvr",
        tokens={
            "start": "<|lvr_start|>",
            "slot": "<|lvr|>",
            "latent_end": "<|lvr_latent_end|>",
            "end": "<|lvr_end|>",
        },
        generation={"latent_strategy": "fixed", "num_latent_steps": 8},
        source="Latent Visual Reasoning, arXiv 2509.24251",
        aliases={"latent": "end_vector"},
        published=PublishedLayout(
            token_ids={
                "latent_start_token_id": "lvr_start_id",
                "latent_token_id": "lvr_id",
                "latent_stop_token_id": "lvr_latent_end_id",
                "latent_end_token_id": "lvr_end_id",
            },
            fields=_lvr_fields,
            keys=("lvr_head", "lvr_head_type", "latent_end_token"),
            tensors={r"^lvr_head\.": "latent_head.", r"^lvr_latent_end_emb$": "latent_stop_vector.weight"},
        ),
    )
)


# The published code adds these three in this order; IVT-LR writes neither start nor end.
_STEP_TOKENS = {"start": "<|start-latent|>", "end": "<|end-latent|>", "slot": "<|latent|>"}
register_latent_method(
    LatentMethod(
        name="ivtlr",
        tokens={**_STEP_TOKENS, "patch": "<|latent-patch|>"},
        generation={"latent_strategy": "staged", "num_latent_steps": 3, "num_latent_patches": 32},
        init_token="<<",
        source="Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space, arXiv 2510.12603",
    )
)
register_latent_method(
    LatentMethod(
        name="coconut",
        tokens=_STEP_TOKENS,
        generation={
            "latent_strategy": "staged",
            "num_latent_steps": 6,
            "num_latent_patches": 0,
            "latent_markers": True,
        },
        init_token="<<",
        source="Training Large Language Models to Reason in a Continuous Latent Space, arXiv 2412.06769",
    )
)


def _lavit_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The training heads of a published LaViT configuration."""
    return {
        "concept_head_size": getattr(config, "v_top_dim", 5120),
        "attention_head": bool(getattr(config, "use_trajectory_supervision", True)),
    }


register_latent_method(
    LatentMethod(
        name="lavit",
        tokens=learned_tokens(4),
        generation={"latent_strategy": "learned"},
        source="LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning, arXiv 2601.10129",
        published=PublishedLayout(
            architecture="LaViTQwen2VL",
            fields=_lavit_fields,
            keys=(
                "v_top_dim",
                "loss_scale_vtop",
                "loss_scale_traj",
                "training_stage",
                "bottleneck_block_prompt",
                "use_trajectory_supervision",
            ),
            tensors={r"^v_top_head\.": "concept_head.", r"^traj_head\.": "attention_head."},
        ),
    )
)


def published_method(config: PreTrainedConfig) -> LatentMethod | None:
    """The method whose published code wrote a stock configuration, `None` for a plain stock one."""
    for method in LATENT_METHODS.values():
        if method.published and method.published.wrote(config):
            return method
    return None


HEAD_TIMINGS = ("train", "reference")
ROPE_POSITIONS = ("mrope", "flat")
_REQUIRED_TOKEN_FIELDS = ("latent_token_id", "latent_start_token_id", "latent_end_token_id")
# The ids of a model; a processor has a property of each name.
LATENT_TOKEN_FIELDS = (
    *_REQUIRED_TOKEN_FIELDS,
    "latent_patch_token_id",
    "latent_stop_token_id",
    "latent_learned_token_ids",
)
_KEYS_OF_A_FOLDER = ("model_type", "architectures", "transformers_version", "auto_map")
_LATENT_FIELDS = (
    *LATENT_TOKEN_FIELDS,
    "latent_method",
    "latent_head",
    "latent_generation",
    "latent_stop_vector",
    "latent_head_timing",
    "latent_head_size",
    "concept_head_size",
    "attention_head",
    "patch_embed_fp32",
    "rope_positions",
)


@strict
class LatentConfigMixin(PreTrainedConfig):
    """The latent fields shared by every backbone.

    Args:
        latent_token_id: id that a latent position carries in `input_ids` (contract C1: the ids keep the record).
        latent_start_token_id: id that opens a span.
        latent_end_token_id: id that closes a span.
        latent_patch_token_id: id of an image embedding inserted into a span, for methods that insert some.
        latent_method: name of the method that the model was trained with.
        latent_head: name of the module between a hidden state and the vector fed next; `None` feeds the final-norm
            hidden state as it is.
        latent_generation: decoding defaults of the method; an entry of `generation_config.json` or an argument of
            `generate` wins over them.
        latent_stop_token_id: id behind the last slot, before the end marker, for methods that write one there.
        latent_stop_vector: whether the model has a learned vector that ends a span when a slot comes near it.
        latent_head_timing: which states meet the latent head. `"train"`: those that are fed, as in training.
            `"reference"`: those that a slot returned, before the LM head reads them, as in the published LVR decoder;
            the first slot of a span is then fed a state that no head has seen.
        latent_head_size: inner width of a gated latent head; default: `intermediate_size` of the decoder.
        latent_learned_token_ids: ids of the learned tokens, in their order, for methods that put tokens with an
            embedding of their own where others put slots.
        concept_head_size: width of a teacher's states: the model has a head for training that predicts them
            (`concept_head`, see `latent_lavit.py`); `None` for none.
        attention_head: whether the model has a head for training that predicts a teacher's attention over the image.
        patch_embed_fp32: whether the vision tower's patch embedding is a matrix product in float32 in place of the
            stock 3-D convolution (see `latent_patch_embed.py`).
        rope_positions: of the families with rotary positions in three axes. `"mrope"`: as the stock model; `"flat"`:
            the plain index on all axes, image tokens included, as published IVT-LR weights were trained with.

    Class attributes of a family: `model_type` (also the name of its file), `model_class`, the name of the head class
    in that file, and `processor_reference`, file and name of its processor.
    """

    model_class = None
    processor_reference = "processing_latent.LatentProcessor"

    latent_token_id: int | None = None
    latent_start_token_id: int | None = None
    latent_end_token_id: int | None = None
    latent_patch_token_id: int | None = None
    latent_method: str | None = None
    latent_head: str | None = None
    latent_generation: dict | None = None
    latent_stop_token_id: int | None = None
    latent_stop_vector: bool = False
    latent_head_timing: str = "train"
    latent_head_size: int | None = None
    latent_learned_token_ids: list[int] | None = None
    concept_head_size: int | None = None
    attention_head: bool = False
    patch_embed_fp32: bool = False
    rope_positions: str = "mrope"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.latent_generation = dict(self.latent_generation or {})
        ids = [getattr(self, name) for name in LATENT_TOKEN_FIELDS if name != "latent_learned_token_ids"]
        known = [i for i in (*ids, *(self.latent_learned_token_ids or ())) if i is not None]
        if len(set(known)) != len(known):
            raise ValueError(
                f"latent token ids must differ from each other, got {known}; give each role its own token"
            )
        if self.latent_head_timing not in HEAD_TIMINGS:
            raise ValueError(
                f"latent_head_timing={self.latent_head_timing!r} is unknown; choose one of {list(HEAD_TIMINGS)}"
            )
        if self.concept_head_size is not None and self.concept_head_size < 1:
            raise ValueError(
                f"concept_head_size={self.concept_head_size} must be the width of the teacher's states, or None"
            )
        if self.rope_positions not in ROPE_POSITIONS:
            raise ValueError(
                f"rope_positions={self.rope_positions!r} is unknown; choose one of {list(ROPE_POSITIONS)}"
            )
        reference = self._auto_map_reference()
        if reference:
            self.auto_map = {**reference, **(getattr(self, "auto_map", None) or {})}

    def _auto_map_reference(self) -> dict[str, str]:
        """Where the code of the family is in a saved folder, by Auto class; empty without `model_class`."""
        if self.model_class is None:
            return {}
        model = f"modeling_{self.model_type}.{self.model_class}"
        family = self.model_class.removesuffix("ForConditionalGeneration")
        return {
            "AutoConfig": f"configuration_latent.{family}Config",
            "AutoModel": model,
            "AutoModelForImageTextToText": model,
            "AutoModelForCausalLM": model,
            "AutoProcessor": self.processor_reference,
        }

    @classmethod
    def from_stock(
        cls, stock_config: PreTrainedConfig, method: str | None = None, **latent_fields: Any
    ) -> "LatentConfigMixin":
        """Build the latent configuration from a stock one of the same family.

        Args:
            stock_config: e.g. a `Qwen2_5_VLConfig`.
            method: name in `LATENT_METHODS`; fills `latent_method`, `latent_head` and `latent_generation`. What a
                published configuration of this method says goes into ours.
            latent_fields: any field of this class; wins over the method's.

        Raises:
            ValueError: when the stock configuration is of another family or a field is unknown.
        """
        values = cls._values_of_stock(stock_config)
        unknown = set(latent_fields) - set(_LATENT_FIELDS)
        if unknown:
            raise ValueError(f"unknown latent fields {sorted(unknown)}; known: {list(_LATENT_FIELDS)}")
        if method is not None:
            entry = get_latent_method(method)
            values.update(latent_method=entry.name, latent_head=entry.head, latent_generation=dict(entry.generation))
            if published_method(stock_config) == entry:
                values.update(entry.published.fields(stock_config))
                for key in (*entry.published.token_ids.values(), *entry.published.keys):
                    values.pop(key, None)
        values.update(latent_fields)
        config = cls(**values)
        if stock_config._attn_implementation is not None:
            config._attn_implementation = stock_config._attn_implementation
        return config

    @classmethod
    def _values_of_stock(cls, stock_config: PreTrainedConfig) -> dict[str, Any]:
        """The fields that this class takes from a stock configuration of its family."""
        family = cls.model_type.removeprefix("latent_")
        if stock_config.model_type not in (family, cls.model_type):
            raise ValueError(
                f"{cls.__name__} is built from a configuration with model_type {family!r}, got "
                f"{stock_config.model_type!r}; use the latent class of that family"
            )
        return {key: value for key, value in stock_config.to_dict().items() if key not in _KEYS_OF_A_FOLDER}

    def strategy_of_method(self, name: str) -> str:
        """Name in the table of strategies of what the published code of the model's method calls `name`."""
        method = LATENT_METHODS.get(self.latent_method or "")
        return name if method is None else method.aliases.get(name, name)

    def require_latent_tokens(self, kind: str | None = None) -> None:
        """Raise when the folder that this configuration came from has no latent tokens.

        Args:
            kind: `"slots"` or `"learned"` tokens; `None`: one of the two.

        Raises:
            ValueError: names the missing fields and the call that adds them.
        """
        missing = [name for name in _REQUIRED_TOKEN_FIELDS if getattr(self, name) is None]
        lacks = {"slots": bool(missing), "learned": not self.latent_learned_token_ids}
        if kind is None and not all(lacks.values()) or kind is not None and not lacks[kind]:
            return
        name = self._name_or_path or type(self).__name__
        if kind is not None and not all(lacks.values()):
            has, wants = ("learned tokens", "slots") if kind == "slots" else ("slots", "learned tokens")
            raise ValueError(
                f"the model {name!r} (method {self.latent_method!r}) has {has} and no {wants}; take a strategy of its "
                f"method (latent_strategy={(self.latent_generation or {}).get('latent_strategy')!r}), or 'off'"
            )
        raise ValueError(
            f"the model {name!r} has no latent tokens ({', '.join(missing)} is None in config.json); make a latent "
            "model with `convert_stock_checkpoint(folder, method=...)` or pass latent_strategy='off'"
        )


@strict
class LatentCausalLMConfig(LatentConfigMixin):
    """Any causal language model of the stock library with latent fields; its own configuration is `text_config`.

    Args:
        text_config: stock configuration (Llama, Qwen, GPT-2, ...), or its dictionary with `model_type`; default GPT-2.
        bos_token_id, eos_token_id, pad_token_id: default those of `text_config`.
        tie_word_embeddings: whether the LM head is the embedding matrix; default that of `text_config`.
    """

    model_type = "latent_causal_lm"
    model_class = "LatentCausalLM"
    processor_reference = "processing_latent_text.LatentTextProcessor"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")}

    text_config: dict | PreTrainedConfig | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

    @classmethod
    def _values_of_stock(cls, stock_config: PreTrainedConfig) -> dict[str, Any]:
        if stock_config.model_type == cls.model_type:
            return super()._values_of_stock(stock_config)
        text = stock_config.to_dict()
        # These say how a folder is read, so they stand at the top.
        top = {key: text.pop(key) for key in ("dtype", "quantization_config") if text.get(key) is not None}
        for key in (*_KEYS_OF_A_FOLDER, "_name_or_path"):
            text.pop(key, None)
        return {"text_config": {**text, "model_type": stock_config.model_type}, **top}


@strict
class LatentQwen2VLConfig(LatentConfigMixin, Qwen2VLConfig):
    """Qwen2-VL with latent fields. Build it with [`LatentConfigMixin.from_stock`]."""

    model_type = "latent_qwen2_vl"
    model_class = "LatentQwen2VLForConditionalGeneration"


@strict
class LatentQwen2_5_VLConfig(LatentConfigMixin, Qwen2_5_VLConfig):
    """Qwen2.5-VL with latent fields. Build it with [`LatentConfigMixin.from_stock`]."""

    model_type = "latent_qwen2_5_vl"
    model_class = "LatentQwen2_5_VLForConditionalGeneration"


@strict
class LatentQwen3VLConfig(LatentConfigMixin, Qwen3VLConfig):
    """Qwen3-VL with latent fields. Build it with [`LatentConfigMixin.from_stock`]."""

    model_type = "latent_qwen3_vl"
    model_class = "LatentQwen3VLForConditionalGeneration"


@strict
class LatentChameleonConfig(LatentConfigMixin, ChameleonConfig):
    """Chameleon with latent fields. Build it with [`LatentConfigMixin.from_stock`]."""

    model_type = "latent_chameleon"
    model_class = "LatentChameleonForConditionalGeneration"
    processor_reference = "processing_latent_chameleon.LatentChameleonProcessor"


__all__ = [
    "LATENT_METHODS",
    "LATENT_TOKEN_FIELDS",
    "LatentCausalLMConfig",
    "LatentChameleonConfig",
    "LatentConfigMixin",
    "LatentMethod",
    "LatentQwen2VLConfig",
    "LatentQwen2_5_VLConfig",
    "LatentQwen3VLConfig",
    "PublishedLayout",
    "get_latent_method",
    "learned_tokens",
    "published_method",
    "register_latent_method",
]
