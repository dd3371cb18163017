"""Tiny causal language models built in code, with no download, for dry runs and tests: the counterparts of `tiny.py`
without images.

Three kinds that differ where latents care: GPT-2 (learned positions, one matrix for embedding and LM head, no padding
token, no chat), Llama (rotary positions, two matrices), Qwen3 (normed queries and keys, heads wider than the model).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_latent.processing_latent_text import LatentTextProcessor

from .tiny_tokenizer import TINY_TEXTS, build_tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Rows of the embedding beyond the tokenizer, for latent tokens; published checkpoints of Llama and Qwen have some too.
_SPARE_ROWS = 8


@dataclass(frozen=True)
class TinyTextFamily:
    """What a kind fixes beside its sizes.

    Args:
        config_class, model_class: stock classes.
        special_tokens: in the order of their ids.
        named_tokens: roles of special tokens.
        chat_template: of its published checkpoints, in short.
        spare_rows: rows of the embedding beyond the tokenizer.
        tied: whether the LM head is the embedding matrix, as in its published checkpoints.
        fixed: further entries of the configuration.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    special_tokens: tuple[str, ...] = _CHAT_TOKENS
    named_tokens: dict[str, str] = field(
        default_factory=lambda: {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    chat_template: str | None = CHAT_TEMPLATE
    spare_rows: int = _SPARE_ROWS
    tied: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)


TINY_TEXT_FAMILIES: dict[str, TinyTextFamily] = {
    "gpt2": TinyTextFamily(
        GPT2Config,
        GPT2LMHeadModel,
        special_tokens=("<|endoftext|>",),
        named_tokens={"eos_token": "<|endoftext|>"},
        chat_template=None,
        spare_rows=0,
        tied=True,
    ),
    "llama": TinyTextFamily(LlamaConfig, LlamaForCausalLM),
    "qwen3": TinyTextFamily(Qwen3Config, Qwen3ForCausalLM, tied=True, fixed={"head_dim": 24}),
}


def tiny_text_family(family: str) -> TinyTextFamily:
    """Look a kind up by the `model_type` of its stock configuration.

    Raises:
        ValueError: for an unknown one, with those that exist.
    """
    if family not in TINY_TEXT_FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of {sorted(TINY_TEXT_FAMILIES)}")
    return TINY_TEXT_FAMILIES[family]


def build_tiny_text_tokenizer(
    family: str, texts: Iterable[str] = TINY_TEXTS, vocab_size: int = 512, words: Sequence[str] = ("<<",)
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with the special tokens and the chat template of a kind; the other arguments are those of
    [`build_tiny_tokenizer`]. By default it has `<<`, whose row the tokens of Coconut start with."""
    entry = tiny_text_family(family)
    tokenizer = build_tiny_tokenizer(
        texts, vocab_size, words, special_tokens=entry.special_tokens, named_tokens=entry.named_tokens
    )
    tokenizer.chat_template = entry.chat_template
    return tokenizer


def build_tiny_text_processor(
    family: str,
    texts: Iterable[str] = TINY_TEXTS,
    vocab_size: int = 512,
    latent_tokens: dict[str, str] | None = None,
    words: Sequence[str] = ("<<",),
) -> LatentTextProcessor:
    """A [`LatentTextProcessor`] on a tiny tokenizer; latent tokens come on top of `vocab_size`."""
    return LatentTextProcessor(
        build_tiny_text_tokenizer(family, texts, vocab_size, words), latent_tokens=latent_tokens
    )


def tiny_text_config(
    family: str,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 4096,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool | None = None,
) -> PreTrainedConfig:
    """Configuration of a small stock model whose token ids are those of `tokenizer`.

    Args:
        family: key of `TINY_TEXT_FAMILIES`.
        vocab_size: rows of the embedding; `None` takes the entries of the tokenizer and, except for GPT-2, a few
            spare rows for latent tokens.
        tokenizer: one of [`build_tiny_text_tokenizer`].
        num_kv_heads: GPT-2 has as many as `num_heads`.
        intermediate_size: `None` means twice the hidden size.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: default as in the published checkpoints of the kind.

    Raises:
        ValueError: an unknown family, an embedding with fewer rows than the tokenizer entries, or sizes that do not
            divide.
    """
    entry = tiny_text_family(family)
    rows = vocab_size if vocab_size is not None else len(tokenizer) + entry.spare_rows
    if rows < len(tokenizer):
        raise ValueError(f"vocab_size {rows} is smaller than the tokenizer ({len(tokenizer)} entries)")
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}), and that of num_kv_heads "
            f"({num_kv_heads})"
        )
    inner = intermediate_size or 2 * hidden_size
    if family == "gpt2":
        sizes = {"n_inner": inner, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {"intermediate_size": inner, "num_key_value_heads": num_kv_heads, "rms_norm_eps": 1e-6}
    start = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
    return entry.config_class(
        vocab_size=rows,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        bos_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=entry.tied if tie_word_embeddings is None else tie_word_embeddings,
        **sizes,
        **entry.fixed,
    )


def build_tiny_text_stock_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A stock model with random weights, the same for the same seed, in evaluation mode; random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_text_family(config.model_type).model_class(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted({config.eos_token_id, config.bos_token_id}),
        pad_token_id=config.pad_token_id,
    )
    return model.eval()


def save_tiny_text_checkpoint(
    folder: str | Path,
    family: str = "gpt2",
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: PreTrainedConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder with the files of a stock checkpoint: no latent token, no code.

    Args:
        folder: created when absent.
        family: key of `TINY_TEXT_FAMILIES`, that of `config` if one is given.
        tokenizer: default: [`build_tiny_text_tokenizer`].
        config: default: [`tiny_text_config`] for the tokenizer.
        seed: of the weights.

    Raises:
        ValueError: an unknown family, or one that is not that of `config`.
    """
    folder = Path(folder)
    if config is not None and config.model_type != family:
        raise ValueError(f"family={family!r} does not fit a configuration of {config.model_type!r}; name that one")
    tokenizer = build_tiny_text_tokenizer(family) if tokenizer is None else tokenizer
    config = tiny_text_config(family, None, tokenizer) if config is None else config
    build_tiny_text_stock_model(config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


__all__ = [
    "TINY_TEXT_FAMILIES",
    "TinyTextFamily",
    "build_tiny_text_processor",
    "build_tiny_text_stock_model",
    "build_tiny_text_tokenizer",
    "save_tiny_text_checkpoint",
    "tiny_text_config",
    "tiny_text_family",
]
