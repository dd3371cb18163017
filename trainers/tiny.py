"""Tiny parts of the Qwen-VL families built in code, with no download, for the maze example, dry runs and tests.

Tokenizer, image processor, processor, configuration, random model, and a folder that looks like the stock checkpoint
of Qwen2-VL, Qwen2.5-VL or Qwen3-VL. The tokenizer is a byte-level BPE (see `tiny_tokenizer.py`).
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from modeling_latent.processing_latent import LatentProcessor

from .tiny_tokenizer import (
    QWEN3_ADDED_TOKENS,
    QWEN_SPECIAL_TOKENS,
    TINY_TEXTS,
    build_tiny_tokenizer,
)

# The chat template that Qwen2-VL and Qwen2.5-VL publish (no generation tags).
STOCK_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The text of Qwen3-VL's: the same turns without a default system message.
QWEN3_CHAT_TEMPLATE = STOCK_CHAT_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}",
    "",
)

# Rows of the embedding beyond the tokenizer, for latent tokens; the stock checkpoint has some too.
_SPARE_ROWS = 8


@dataclass(frozen=True)
class TinyFamily:
    """What a family fixes beside its sizes.

    Args:
        config_class, model_class: stock classes.
        patch_size: side of a patch in pixels; a token covers 2 x 2 patches.
        image_mean, image_std: normalisation of the pixels, `None` for that of CLIP.
        added_tokens: tokens between the special ones and the latent ones.
        chat_template: the one that the published checkpoints have.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    patch_size: int = 14
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    added_tokens: tuple[str, ...] = ()
    chat_template: str = STOCK_CHAT_TEMPLATE

    @property
    def pixels_per_token(self) -> int:
        """Area that one image token covers."""
        return (2 * self.patch_size) ** 2


TINY_FAMILIES: dict[str, TinyFamily] = {
    "qwen2_vl": TinyFamily(Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": TinyFamily(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": TinyFamily(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        patch_size=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        added_tokens=QWEN3_ADDED_TOKENS,
        chat_template=QWEN3_CHAT_TEMPLATE,
    ),
}
DEFAULT_FAMILY = "qwen2_5_vl"


def tiny_family(family: str) -> TinyFamily:
    """Look a family up by the `model_type` of its stock configuration.

    Raises:
        ValueError: for an unknown family, with those that exist.
    """
    if family not in TINY_FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of {sorted(TINY_FAMILIES)}")
    return TINY_FAMILIES[family]


def build_tiny_image_processor(
    min_pixels: int | None = None, max_pixels: int | None = None, family: str = DEFAULT_FAMILY
) -> Qwen2VLImageProcessorPil:
    """The stock image processor (Pillow only) for small images: one token covers 28 x 28 pixels, 32 x 32 in Qwen3-VL.

    Args:
        min_pixels: smallest area after resizing; default one token.
        max_pixels: largest area after resizing; default four tokens.
        family: key of `TINY_FAMILIES`.

    Raises:
        ValueError: when the bounds leave no size.
    """
    entry = tiny_family(family)
    token = entry.pixels_per_token
    min_pixels, max_pixels = min_pixels or token, max_pixels or 4 * token
    if not 0 < min_pixels <= max_pixels or max_pixels < token:
        raise ValueError(
            f"need 0 < min_pixels <= max_pixels and max_pixels >= {token}, got {min_pixels} and {max_pixels}"
        )
    options: dict[str, Any] = {} if entry.patch_size == 14 else {"patch_size": entry.patch_size}
    if entry.image_mean is not None:
        options.update(image_mean=list(entry.image_mean), image_std=list(entry.image_std))
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels}, **options)


def build_tiny_processor(
    texts: Iterable[str] = TINY_TEXTS,
    vocab_size: int = 512,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    latent_tokens: dict[str, str] | None = None,
    words: Sequence[str] = (),
    family: str = DEFAULT_FAMILY,
) -> LatentProcessor:
    """A [`LatentProcessor`] on a tiny tokenizer; the latent tokens come on top of `vocab_size`.

    Args:
        texts, vocab_size, words: see [`build_tiny_tokenizer`].
        min_pixels, max_pixels: see [`build_tiny_image_processor`].
        latent_tokens: see [`LatentProcessor`].
        family: key of `TINY_FAMILIES`.
    """
    entry = tiny_family(family)
    return LatentProcessor(
        build_tiny_image_processor(min_pixels, max_pixels, family),
        build_tiny_tokenizer(texts, vocab_size, words, entry.added_tokens),
        chat_template=entry.chat_template,
        latent_tokens=latent_tokens,
    )


def tiny_config(
    family: str,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    vision_depth: int = 2,
    vision_hidden_size: int = 32,
    vision_num_heads: int = 2,
    vision_intermediate_size: int | None = None,
    window_size: int = 112,
    max_position_embeddings: int = 4096,
    rope_theta: float = 1_000_000.0,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = False,
) -> PreTrainedConfig:
    """Configuration of a small stock model whose token ids are those of `tokenizer`.

    Args:
        family: key of `TINY_FAMILIES`.
        vocab_size: rows of the embedding; `None` takes the entries of the tokenizer and a few spare rows for latent
            tokens, rounded up to a multiple of 16.
        tokenizer: one of [`build_tiny_tokenizer`], or any with the special tokens of Qwen2.5-VL.
        intermediate_size, vision_intermediate_size: `None` means twice the hidden size.
        window_size: side of the windows of Qwen2.5-VL's vision tower in pixels; its last layer attends everywhere. The
            other families have no windows.
        rope_theta: base of the rotary frequencies. Narrow heads need a small one: with the stock value the slow
            frequencies, which carry the width, cannot tell neighbouring columns apart.
        initializer_range: standard deviation of the initial weights, of both towers.

    The rotary sections (time, height, width) keep the shares of the stock models: 1/4, 3/8, 3/8 of half a head, and
    3/8, 5/16, 5/16 interleaved in Qwen3-VL. Qwen3-VL hands on the features of up to three vision layers, spread over
    the tower, but of fewer than the text model has: behind its last layer they would change nothing.

    Raises:
        ValueError: when the embedding has fewer rows than the tokenizer entries, or sizes do not divide.
    """
    entry = tiny_family(family)
    rows = vocab_size if vocab_size is not None else -(-(len(tokenizer) + _SPARE_ROWS) // 16) * 16
    if rows < len(tokenizer):
        raise ValueError(f"vocab_size {rows} is smaller than the tokenizer ({len(tokenizer)} entries)")
    half = hidden_size // num_heads // 2
    if hidden_size % (2 * num_heads) or num_heads % num_kv_heads or half < 3:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 2 x num_heads ({num_heads}) with heads of at least 6, "
            f"and num_heads a multiple of num_kv_heads ({num_kv_heads})"
        )
    if vision_hidden_size % (4 * vision_num_heads):
        raise ValueError(f"vision_hidden_size {vision_hidden_size} must be a multiple of 4 x {vision_num_heads} heads")
    ids = dict(zip(QWEN_SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(QWEN_SPECIAL_TOKENS)), strict=True))
    special = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = {
        "vocab_size": rows,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "initializer_range": initializer_range,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **_rotary_sections(family, half)},
        **({"head_dim": 2 * half} if family == "qwen3_vl" else {}),
        **special,
    }
    vision_config = {
        "depth": vision_depth,
        "num_heads": vision_num_heads,
        "initializer_range": initializer_range,
        **_vision_sizes(family, hidden_size, vision_hidden_size, vision_intermediate_size or 2 * vision_hidden_size),
        **_vision_layers(family, vision_depth, num_layers, window_size),
    }
    return entry.config_class(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        **(special if family != "qwen3_vl" else {}),
    )


tiny_qwen2_5_vl_config = functools.partial(tiny_config, "qwen2_5_vl")


def _rotary_sections(family: str, half: int) -> dict[str, Any]:
    """Frequencies of time, height and width; they sum to half a head."""
    if family == "qwen3_vl":
        side = max(1, half * 5 // 16)
        return {"mrope_section": [half - 2 * side, side, side], "mrope_interleaved": True}
    time = half // 4
    height = (half - time) // 2
    return {"mrope_section": [time, height, half - time - height]}


def _vision_sizes(family: str, hidden_size: int, vision_hidden_size: int, vision_intermediate_size: int) -> dict:
    if family != "qwen2_vl":
        return {
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_intermediate_size,
            "out_hidden_size": hidden_size,
        }
    ratio, rest = divmod(vision_intermediate_size, vision_hidden_size)
    if rest:
        raise ValueError(
            f"vision_intermediate_size {vision_intermediate_size} must be a multiple of vision_hidden_size "
            f"{vision_hidden_size} in Qwen2-VL"
        )
    return {"embed_dim": vision_hidden_size, "hidden_size": hidden_size, "mlp_ratio": ratio}


def _vision_layers(family: str, vision_depth: int, num_layers: int, window_size: int) -> dict[str, Any]:
    if family == "qwen2_5_vl":
        return {"window_size": window_size, "fullatt_block_indexes": [vision_depth - 1]}
    if family == "qwen3_vl":
        thirds = {vision_depth // 3, 2 * vision_depth // 3, vision_depth - 1}
        return {"deepstack_visual_indexes": sorted(thirds)[: max(1, num_layers - 1)], "num_position_embeddings": 256}
    return {}


def build_tiny_stock_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A stock model with random weights, the same for the same seed, in evaluation mode; random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_family(config.model_type).model_class(config)
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=sorted({text.eos_token_id, text.bos_token_id}),
        pad_token_id=text.pad_token_id,
    )
    return model.eval()


def save_tiny_stock_checkpoint(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: Qwen2VLImageProcessorPil | None = None,
    config: PreTrainedConfig | None = None,
    seed: int = 0,
    family: str | None = None,
) -> Path:
    """Write a folder with the files of a stock checkpoint: no latent token, no code, the stock template.

    Args:
        folder: created when absent.
        tokenizer: default: [`build_tiny_tokenizer`] on `TINY_TEXTS`.
        image_processor: default: [`build_tiny_image_processor`].
        config: default: [`tiny_config`] for the tokenizer.
        seed: of the weights.
        family: key of `TINY_FAMILIES`; default that of `config`, else `DEFAULT_FAMILY`.

    Raises:
        ValueError: an unknown family, or one that is not that of `config`.
    """
    folder = Path(folder)
    family = family or (DEFAULT_FAMILY if config is None else config.model_type)
    entry = tiny_family(family)
    if config is not None and config.model_type != family:
        raise ValueError(f"family={family!r} does not fit a configuration of {config.model_type!r}; leave one out")
    if tokenizer is None:
        tokenizer = build_tiny_tokenizer(TINY_TEXTS, added_tokens=entry.added_tokens)
    config = config if config is not None else tiny_config(family, None, tokenizer)
    build_tiny_stock_model(config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (image_processor or build_tiny_image_processor(family=family)).save_pretrained(folder)
    # The published checkpoints keep the template in this file.
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": entry.chat_template}, indent=2) + "\n")
    return folder


__all__ = [
    "DEFAULT_FAMILY",
    "QWEN3_ADDED_TOKENS",
    "QWEN3_CHAT_TEMPLATE",
    "QWEN_SPECIAL_TOKENS",
    "STOCK_CHAT_TEMPLATE",
    "TINY_FAMILIES",
    "TINY_TEXTS",
    "TinyFamily",
    "build_tiny_image_processor",
    "build_tiny_processor",
    "build_tiny_stock_model",
    "build_tiny_tokenizer",
    "save_tiny_stock_checkpoint",
    "tiny_config",
    "tiny_family",
    "tiny_qwen2_5_vl_config",
]
