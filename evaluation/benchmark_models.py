"""Random models for the rows of `benchmark_staged.py`: a stock one with eager attention and the latent one with the
same weights, for each family, and a batch of one row with an image.

The image encoders are as small as they can be. They run once on either side, and what is measured is the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from modeling_latent import LATENT_CLASSES

from .naive_backbones import NaiveBackbone, NaiveChameleon, NaiveQwenVL
from .speed_table import Settings

CODES = 64  # image tokens in Chameleon's vocabulary
SPECIAL = ("image", "video", "vision_start", "vision_end", "slot", "patch", "start", "end")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder and of its prompt.

    Args:
        side: image tokens in a row of the picture; `side ** 2` in all.
        prompt: tokens in front of the slots, those of the image included.
        answer: labelled tokens behind them, and new tokens of a generation.
        patches: K, copies before each slot.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    side: int
    prompt: int
    answer: int
    patches: int


@dataclass
class Pair:
    """One family in both forms.

    Args:
        naive: makes the stock model ready for a run of the naive schedule.
        latent: the model of this library, SDPA attention.
        images: image inputs of one row.
        prompt: ids of one row `(prompt,)`.
        sizes: what it was made with.
        ids: token ids by role.
        patches: K; 0 for a family without images.
    """

    naive: Callable[[], NaiveBackbone]
    latent: PreTrainedModel
    images: dict[str, torch.Tensor]
    prompt: torch.LongTensor
    sizes: Sizes
    ids: dict[str, int]
    patches: int


def build_pair(family: str, sizes: Sizes, settings: Settings) -> Pair:
    """Both models of a family of `FAMILIES`, and a row; the same ones each time."""
    torch.manual_seed(0)
    ids = {role: sizes.vocab_size - 1 - place for place, role in enumerate(SPECIAL)}
    config, model_class, images, naive_class = FAMILIES[family](sizes, ids)
    to = {"device": settings.device, "dtype": settings.dtype}
    stock = model_class._from_config(config, attn_implementation="eager").to(**to).eval()
    with torch.no_grad():
        stock.lm_head.weight[list(ids.values())] = 0  # no marker is ever said
    config_class, latent_class = LATENT_CLASSES["causal_lm" if family == "gpt2" else family]
    latent_config = config_class.from_stock(
        config,
        method="ivtlr" if images else "coconut",
        latent_token_id=ids["slot"],
        latent_patch_token_id=ids["patch"] if images else None,
        latent_start_token_id=ids["start"],
        latent_end_token_id=ids["end"],
        rope_positions="flat",
    )
    latent_config._attn_implementation = "sdpa"
    latent = latent_class._from_config(latent_config, attn_implementation="sdpa").to(**to).eval()
    names = dict(stock.state_dict())
    if family == "gpt2":
        names = {name.replace("transformer.", "model.language_model."): value for name, value in names.items()}
    latent.load_state_dict(names)
    images = {name: value.to(settings.device) for name, value in images.items()}
    images = {name: value.to(settings.dtype) if value.is_floating_point() else value for name, value in images.items()}
    prompt = torch.randint(10, sizes.vocab_size - 10 - CODES, (sizes.prompt,), device=settings.device)
    if images:
        prompt[2 : 2 + sizes.side**2] = ids["image"]
        prompt[1], prompt[2 + sizes.side**2] = ids["vision_start"], ids["vision_end"]
    naive = partial(naive_class, stock, **images)
    return Pair(naive, latent, images, prompt, sizes, ids, sizes.patches if images else 0)


Built = tuple[PreTrainedConfig, type[PreTrainedModel], dict[str, torch.Tensor], Callable[..., NaiveBackbone]]


def _text(sizes: Sizes, **further: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 2 * sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": 8_192,
        "bos_token_id": None,
        "eos_token_id": None,
        **further,
    }


def _qwen2_vl(sizes: Sizes, ids: dict[str, int]) -> Built:
    half = sizes.hidden_size // sizes.num_heads // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2VLConfig(
        text_config=_text(sizes, num_key_value_heads=sizes.num_heads // 2, rope_parameters=rope),
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": sizes.hidden_size, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    grid = torch.tensor([[1, 2 * sizes.side, 2 * sizes.side]])
    images = {"pixel_values": torch.randn(int(grid.prod()), 1_176), "image_grid_thw": grid}
    return config, Qwen2VLForConditionalGeneration, images, partial(NaiveQwenVL, rope_positions="flat")


def _chameleon(sizes: Sizes, ids: dict[str, int]) -> Built:
    first = min(ids.values()) - CODES
    letters = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(CODES)]
    vq_config = {
        "embed_dim": 8,
        "num_embeddings": CODES,
        "latent_channels": 32,
        "resolution": 2 * sizes.side,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    names = {"<image>": ids["image"], **{name: first + code for code, name in enumerate(letters)}}
    text = _text(sizes, num_key_value_heads=sizes.num_heads, vocabulary_map=names, vq_config=vq_config)
    images = {"pixel_values": torch.rand(1, 3, 2 * sizes.side, 2 * sizes.side)}
    return ChameleonConfig(**text), ChameleonForConditionalGeneration, images, NaiveChameleon


def _gpt2(sizes: Sizes, ids: dict[str, int]) -> Built:
    config = GPT2Config(
        vocab_size=sizes.vocab_size,
        n_positions=8_192,
        n_embd=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return config, GPT2LMHeadModel, {}, NaiveBackbone


FAMILIES: dict[str, Callable[[Sizes, dict[str, int]], Built]] = {
    "qwen2_vl": _qwen2_vl,
    "chameleon": _chameleon,
    "gpt2": _gpt2,
}

__all__ = ["FAMILIES", "Pair", "Sizes", "build_pair"]
