"""Tiny parts of Chameleon built in code, with no download, for dry runs and tests: the counterparts of `tiny.py`.

An image of 32 x 32 pixels becomes 4 x 4 tokens, named by a VQ encoder with a codebook of 64 vectors.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from modeling_latent.processing_latent_chameleon import LatentChameleonProcessor

from .tiny_tokenizer import TINY_TEXTS, build_tiny_tokenizer

CODEBOOK_SIZE = 64
IMAGE_SIZE = 32
IMAGE_TOKENS = 16
CHAMELEON_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>", "<reserved08706>")
_NAMED_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "<reserved08706>",
    "extra_special_tokens": {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
}
# Rows of the embedding beyond the tokenizer, for latent tokens.
_SPARE_ROWS = 8


def image_token_name(code: int) -> str:
    """Entry of the vocabulary for a vector of the codebook, as the published tokenizer spells it.

    Example:
        >>> image_token_name(0), image_token_name(12)
        ('IMGIMGAZ', 'IMGIMGBCZ')
    """
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def build_tiny_chameleon_tokenizer(
    texts: Iterable[str] = TINY_TEXTS, vocab_size: int = 512, words: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with the special tokens of Chameleon, and its image tokens on top of `vocab_size`; the other
    arguments are those of [`build_tiny_tokenizer`]."""
    return build_tiny_tokenizer(
        texts,
        vocab_size,
        words,
        added_tokens=[image_token_name(code) for code in range(CODEBOOK_SIZE)],
        special_tokens=CHAMELEON_SPECIAL_TOKENS,
        named_tokens=_NAMED_TOKENS,
    )


def build_tiny_chameleon_image_processor() -> ChameleonImageProcessorPil:
    """The stock image processor (Pillow only): the shorter side to 32 pixels, then the centre square."""
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ChameleonImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)


def build_tiny_chameleon_processor(
    texts: Iterable[str] = TINY_TEXTS,
    vocab_size: int = 512,
    latent_tokens: dict[str, str] | None = None,
    words: Sequence[str] = (),
) -> LatentChameleonProcessor:
    """A [`LatentChameleonProcessor`] on a tiny tokenizer; image and latent tokens come on top of `vocab_size`."""
    return LatentChameleonProcessor(
        build_tiny_chameleon_image_processor(),
        build_tiny_chameleon_tokenizer(texts, vocab_size, words),
        image_seq_length=IMAGE_TOKENS,
        latent_tokens=latent_tokens,
    )


def tiny_chameleon_config(
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 4096,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = False,
) -> ChameleonConfig:
    """Configuration of a small stock Chameleon whose token ids are those of `tokenizer`.

    Args:
        vocab_size: rows of the embedding; `None` takes the entries of the tokenizer and a few spare rows for latent
            tokens, rounded up to a multiple of 16.
        tokenizer: one of [`build_tiny_chameleon_tokenizer`].
        intermediate_size: `None` means twice the hidden size.
        initializer_range: standard deviation of the initial weights of the decoder.

    Raises:
        ValueError: when the embedding has fewer rows than the tokenizer entries.
    """
    rows = vocab_size if vocab_size is not None else -(-(len(tokenizer) + _SPARE_ROWS) // 16) * 16
    if rows < len(tokenizer):
        raise ValueError(f"vocab_size {rows} is smaller than the tokenizer ({len(tokenizer)} entries)")
    names = ["<image>", *(image_token_name(code) for code in range(CODEBOOK_SIZE))]
    return ChameleonConfig(
        vocab_size=rows,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tie_word_embeddings,
        vocabulary_map=dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODEBOOK_SIZE,
            "latent_channels": 32,
            "resolution": IMAGE_SIZE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    )


def build_tiny_chameleon_stock_model(config: ChameleonConfig, seed: int = 0) -> ChameleonForConditionalGeneration:
    """A stock model with random weights, the same for the same seed, in evaluation mode; random state is kept.

    The convolutions of the VQ encoder are as PyTorch makes them: with the initial values of the stock class they tell
    no patch from another, and every image would be one token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChameleonForConditionalGeneration(config)
        for module in model.model.vqmodel.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.reset_parameters()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def save_tiny_chameleon_checkpoint(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: ChameleonConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder with the files of a stock checkpoint: no latent token, no code, no chat template.

    Args:
        folder: created when absent.
        tokenizer: default: [`build_tiny_chameleon_tokenizer`].
        config: default: [`tiny_chameleon_config`] for the tokenizer.
        seed: of the weights.
    """
    tokenizer = build_tiny_chameleon_tokenizer() if tokenizer is None else tokenizer
    config = tiny_chameleon_config(None, tokenizer) if config is None else config
    build_tiny_chameleon_stock_model(config, seed).save_pretrained(folder)
    images = build_tiny_chameleon_image_processor()
    ChameleonProcessor(images, tokenizer, image_seq_length=IMAGE_TOKENS).save_pretrained(folder)
    return Path(folder)


__all__ = [
    "CHAMELEON_SPECIAL_TOKENS",
    "IMAGE_TOKENS",
    "build_tiny_chameleon_image_processor",
    "build_tiny_chameleon_processor",
    "build_tiny_chameleon_stock_model",
    "build_tiny_chameleon_tokenizer",
    "image_token_name",
    "save_tiny_chameleon_checkpoint",
    "tiny_chameleon_config",
]
