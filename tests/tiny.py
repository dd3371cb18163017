"""Tiny parts shared by the tests: processor, stock model, images and a batch. Built once, handed out as copies."""

import copy
from functools import lru_cache

import numpy as np
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_latent.processing_latent import LatentProcessor
from trainers.tiny import build_tiny_processor, build_tiny_stock_model, tiny_qwen2_5_vl_config

LASER_TOKENS = {"start": "<|laser_start|>", "slot": "<|laser|>", "end": "<|laser_end|>"}


@lru_cache
def _processor() -> LatentProcessor:
    return build_tiny_processor(latent_tokens=LASER_TOKENS)


@lru_cache
def _stock_model(seed: int, tie_word_embeddings: bool) -> Qwen2_5_VLForConditionalGeneration:
    return build_tiny_stock_model(tiny_config(tie_word_embeddings=tie_word_embeddings), seed)


def tiny_processor() -> LatentProcessor:
    """A processor with the marker tokens of LASER; an image of 80 x 60 pixels is 2 tokens."""
    return copy.deepcopy(_processor())


def tiny_config(tie_word_embeddings: bool = False) -> Qwen2_5_VLConfig:
    """A stock configuration with the token ids and the vocabulary of [`tiny_processor`]: hidden 64, 2 layers."""
    return tiny_qwen2_5_vl_config(None, _processor().tokenizer, tie_word_embeddings=tie_word_embeddings)


def tiny_stock_model(seed: int = 0, tie_word_embeddings: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """A random stock model of [`tiny_config`] in evaluation mode, float32; the same weights for the same seed."""
    return copy.deepcopy(_stock_model(seed, tie_word_embeddings))


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


def tiny_inputs(processor: LatentProcessor | None = None) -> BatchFeature:
    """[`tiny_prompts`] as one batch of tensors, padded on the left, ready for `model.generate(**inputs)`."""
    processor = processor or _processor()
    return processor.apply_chat_template(
        tiny_prompts(),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
