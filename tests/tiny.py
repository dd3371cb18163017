"""Tiny parts shared by the tests: processor, stock model, images and a batch. Built once, handed out as copies.

Everything exists for the Qwen-VL families (`trainers.tiny.TINY_FAMILIES`), for Chameleon, and without images for the
kinds of `trainers.tiny_text.TINY_TEXT_FAMILIES`; the default is Qwen2.5-VL.
"""

import copy
from functools import lru_cache

import numpy as np
from PIL import Image
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from trainers import tiny, tiny_chameleon, tiny_text
from trainers.tiny import DEFAULT_FAMILY, TINY_FAMILIES

FAMILIES = tuple(TINY_FAMILIES)
CHAMELEON = "chameleon"
TEXT_FAMILIES = tuple(tiny_text.TINY_TEXT_FAMILIES)
LASER_TOKENS = {"start": "<|laser_start|>", "slot": "<|laser|>", "end": "<|laser_end|>"}


@lru_cache
def _processor(family: str) -> ProcessorMixin:
    if family == CHAMELEON:
        return tiny_chameleon.build_tiny_chameleon_processor(latent_tokens=LASER_TOKENS)
    if family in TEXT_FAMILIES:
        return tiny_text.build_tiny_text_processor(family, latent_tokens=LASER_TOKENS)
    return tiny.build_tiny_processor(latent_tokens=LASER_TOKENS, family=family)


@lru_cache
def _stock_model(seed: int, tie_word_embeddings: bool | None, family: str) -> PreTrainedModel:
    config = tiny_config(tie_word_embeddings, family)
    if family in TEXT_FAMILIES:
        return tiny_text.build_tiny_text_stock_model(config, seed)
    if family != CHAMELEON:
        return tiny.build_tiny_stock_model(config, seed)
    model = tiny_chameleon.build_tiny_chameleon_stock_model(config, seed)
    model.generation_config.eos_token_id = [config.eos_token_id, config.pad_token_id]  # two ends, as in the others
    return model


def tiny_processor(family: str = DEFAULT_FAMILY) -> ProcessorMixin:
    """A processor with the marker tokens of LASER; an image of 80 x 60 pixels is 2 tokens, 16 of Chameleon."""
    return copy.deepcopy(_processor(family))


def tiny_config(tie_word_embeddings: bool | None = None, family: str = DEFAULT_FAMILY) -> PreTrainedConfig:
    """A stock configuration with the token ids and the vocabulary of [`tiny_processor`]: hidden 64, 2 layers.

    Embedding and LM head are tied when asked for, and in those text models that are published so."""
    tokenizer = _processor(family).tokenizer
    if family in TEXT_FAMILIES:
        rows = len(tokenizer) + 8  # the last one is free in every family
        return tiny_text.tiny_text_config(family, rows, tokenizer, tie_word_embeddings=tie_word_embeddings)
    if family == CHAMELEON:
        return tiny_chameleon.tiny_chameleon_config(None, tokenizer, tie_word_embeddings=bool(tie_word_embeddings))
    return tiny.tiny_config(family, None, tokenizer, tie_word_embeddings=bool(tie_word_embeddings))


def tiny_stock_model(
    seed: int = 0, tie_word_embeddings: bool | None = None, family: str = DEFAULT_FAMILY
) -> PreTrainedModel:
    """A random stock model of [`tiny_config`] in evaluation mode, float32; the same weights for the same seed."""
    return copy.deepcopy(_stock_model(seed, tie_word_embeddings, family))


def tiny_images(n: int) -> list[Image.Image]:
    """`n` different noise images of different sizes, RGB; the same ones each time."""
    sizes = [(80, 60), (56, 56), (60, 100), (28, 56)]
    random = np.random.default_rng(0)
    images = []
    for i in range(n):
        width, height = sizes[i % len(sizes)]
        images.append(Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return images


def tiny_prompts() -> list[list[dict]]:
    """Two conversations of different length, each with its own image, that wait for an answer."""
    first, second = tiny_images(2)
    return [
        [{"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "What is it?"}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": second},
                    {"type": "text", "text": "Is the path safe? Answer with the option's letter."},
                ],
            }
        ],
    ]


def tiny_inputs(processor: ProcessorMixin | None = None, family: str = DEFAULT_FAMILY) -> BatchFeature:
    """[`tiny_prompts`] as one batch of tensors, padded on the left, ready for `model.generate(**inputs)`."""
    processor = processor or _processor(family)
    return processor.apply_chat_template(
        tiny_prompts(),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
