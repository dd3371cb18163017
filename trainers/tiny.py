"""Tiny parts of a Qwen2.5-VL built in code, with no download, for the maze example, dry runs and tests.

Tokenizer, image processor, processor, configuration, random model, and a folder that looks like the stock checkpoint.
The tokenizer is a byte-level BPE trained on given lines, with the pre-tokenization and the special tokens of Qwen2.5.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from modeling_latent.processing_latent import LatentProcessor

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# How Qwen2.5 cuts text before BPE: contractions, words with the space before them, single digits, punctuation, blanks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
TINY_TEXTS = (
    "system\nYou are a helpful assistant.\nuser\nWhat is in the picture?\nassistant\n",
    "The picture shows a stadium with many seats, a fence and the grass outside. What is the boy wearing? Jeans.",
    "The player starts at the top left of the map and walks right, right, down, left and up to the goal.",
    "Is the path safe? Yes, it is safe. No, the player falls into a hole. Which option is right? <answer>B</answer>",
    "Street Art, a red bicycle, two dogs, a wooden table, the third window, a green door, a small blue boat.",
    "How many cells are there? There are 0 1 2 3 4 5 6 7 8 9 cells in each row and column of the frozen lake.",
)

# Rows of the embedding beyond the tokenizer, for latent tokens; the stock checkpoint has some too.
_SPARE_ROWS = 8


def build_tiny_tokenizer(
    texts: Iterable[str], vocab_size: int = 512, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on some lines, with the special tokens of Qwen2.5 at the end of the vocabulary.

    Padding token `<|endoftext|>`, end token `<|im_end|>`, no beginning token. `len(tokenizer) <= vocab_size`; it is
    less when the lines offer fewer pairs to merge.

    Args:
        texts: training lines; special tokens in them are left out.
        vocab_size: upper bound of the number of entries, special tokens included, at least 264.
        words: strings that must be single tokens, alone and after a space (`"A1"` and `" A1"`), as ordinary entries.
            They stay whole in the pre-tokenization where no letter or digit follows, and the pairs that build them are
            appended to the merges: the result is an ordinary BPE.

    Raises:
        ValueError: for a string instead of lines, a vocabulary that is too small, or an impossible word.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be several lines, e.g. a list of strings; got one string")
    for word in words:
        if not isinstance(word, str) or not word or re.search(r"\s", word) or word in QWEN_SPECIAL_TOKENS:
            raise ValueError(f"words may hold strings without white space that are no special token, got {word!r}")
    room = vocab_size - len(QWEN_SPECIAL_TOKENS)
    if room < 256:
        raise ValueError(f"vocab_size must be at least {256 + len(QWEN_SPECIAL_TOKENS)}, got {vocab_size}")
    trained = _empty_backend(models.BPE(), words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    special = re.compile("|".join(map(re.escape, QWEN_SPECIAL_TOKENS)))
    trained.train_from_iterator((piece for text in texts for piece in special.split(text)), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary, merges = _with_words(alphabet, merges, words, room)

    backend = _empty_backend(models.BPE(vocab=vocabulary, merges=merges), words)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )
    for form in (form for word in words for form in (word, f" {word}")):
        tokens = tokenizer.tokenize(form)
        if len(tokens) != 1:
            raise ValueError(f"{form!r} cannot be one token here, it becomes {tokens}; spell the word otherwise")
    return tokenizer


def _empty_backend(model: models.BPE, words: Sequence[str]) -> Tokenizer:
    """A tokenizer that cuts and decodes text as Qwen2.5 does, except that `words` are never cut."""
    longest_first = sorted(set(words), key=lambda word: (-len(word), word))
    kept = [rf" ?{re.escape(word)}" + (r"(?![\p{L}\p{N}])" if word[-1].isalnum() else "") for word in longest_first]
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([*kept, QWEN_SPLIT])), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_words(
    alphabet: list[str], merges: list[tuple[str, str]], words: Sequence[str], room: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges with every word as one entry, in at most `room` entries.

    The first merges of a BPE are a BPE themselves. So the last learnt merges are dropped until there is room, and the
    pairs that glue the pieces of each word are appended. They come last: what was one token before stays one.
    """
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    forms = [bytes_of.pre_tokenize_str(form)[0][0] for word in words for form in (word, f" {word}")]
    kept = len(merges)
    while True:
        all_merges = merges[:kept]
        ranks = {pair: rank for rank, pair in enumerate(all_merges)}
        for form in forms:
            pieces = _merge(list(form), ranks)
            while len(pieces) > 1:
                pair = (pieces[0], pieces[1])
                ranks[pair] = len(all_merges)
                all_merges.append(pair)
                pieces = _merge(list(form), ranks)
        entries = dict.fromkeys([*alphabet, *("".join(pair) for pair in all_merges)])
        if len(entries) <= room:
            return {entry: index for index, entry in enumerate(entries)}, all_merges
        if kept == 0:
            needed = len(entries) + len(QWEN_SPECIAL_TOKENS)
            raise ValueError(f"{len(words)} words need vocab_size >= {needed}, got {room + len(QWEN_SPECIAL_TOKENS)}")
        kept = max(0, kept - (len(entries) - room))


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Plain BPE of one word: join the pair of lowest rank, leftmost first, until no pair has a rank."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def build_tiny_image_processor(min_pixels: int = 784, max_pixels: int = 3136) -> Qwen2VLImageProcessorPil:
    """The stock image processor (Pillow only) for small images: one token covers 28 x 28 pixels.

    Args:
        min_pixels: smallest area after resizing; 784 is one token.
        max_pixels: largest area after resizing; 3136 is four tokens.

    Raises:
        ValueError: when the bounds leave no size.
    """
    if not 0 < min_pixels <= max_pixels or max_pixels < 784:
        raise ValueError(f"need 0 < min_pixels <= max_pixels and max_pixels >= 784, got {min_pixels} and {max_pixels}")
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})


def build_tiny_processor(
    texts: Iterable[str] = TINY_TEXTS,
    vocab_size: int = 512,
    min_pixels: int = 784,
    max_pixels: int = 3136,
    latent_tokens: dict[str, str] | None = None,
    words: Sequence[str] = (),
) -> LatentProcessor:
    """A [`LatentProcessor`] on a tiny tokenizer; the latent tokens come on top of `vocab_size`.

    Args:
        texts, vocab_size, words: see [`build_tiny_tokenizer`].
        min_pixels, max_pixels: see [`build_tiny_image_processor`].
        latent_tokens: see [`LatentProcessor`].
    """
    tokenizer = build_tiny_tokenizer(texts, vocab_size, words)
    return LatentProcessor(build_tiny_image_processor(min_pixels, max_pixels), tokenizer, latent_tokens=latent_tokens)


def tiny_qwen2_5_vl_config(
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
) -> Qwen2_5_VLConfig:
    """Configuration of a small stock Qwen2.5-VL whose token ids are those of `tokenizer`.

    Args:
        vocab_size: rows of the embedding; `None` takes the entries of the tokenizer and a few spare rows for latent
            tokens, rounded up to a multiple of 16.
        tokenizer: one of [`build_tiny_tokenizer`], or any with the special tokens of Qwen2.5-VL.
        intermediate_size, vision_intermediate_size: `None` means twice the hidden size.
        window_size: side of the windows of the vision tower in pixels; its last layer attends everywhere.
        rope_theta: base of the rotary frequencies. Narrow heads need a small one: with the stock value the slow
            frequencies, which carry the width, cannot tell neighbouring columns apart.
        initializer_range: standard deviation of the initial weights, of both towers.

    The rotary sections (time, height, width) keep the shares of the stock model: 1/4, 3/8, 3/8 of half a head.

    Raises:
        ValueError: when the embedding has fewer rows than the tokenizer entries, or sizes do not divide.
    """
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
    time_section = half // 4
    height_section = (half - time_section) // 2
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
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta,
            "mrope_section": [time_section, height_section, half - time_section - height_section],
        },
        **special,
    }
    vision_config = {
        "depth": vision_depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_intermediate_size or 2 * vision_hidden_size,
        "num_heads": vision_num_heads,
        "out_hidden_size": hidden_size,
        "window_size": window_size,
        "initializer_range": initializer_range,
        "fullatt_block_indexes": [vision_depth - 1],
    }
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        **special,
    )


def build_tiny_stock_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A stock model with random weights, the same for the same seed, in evaluation mode; random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
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
    config: Qwen2_5_VLConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder with the files of a stock Qwen2.5-VL checkpoint: no latent token, no code, the stock template.

    Args:
        folder: created when absent.
        tokenizer: default: [`build_tiny_tokenizer`] on `TINY_TEXTS`.
        image_processor: default: [`build_tiny_image_processor`].
        config: default: [`tiny_qwen2_5_vl_config`] for the tokenizer.
        seed: of the weights.
    """
    folder = Path(folder)
    tokenizer = tokenizer if tokenizer is not None else build_tiny_tokenizer(TINY_TEXTS)
    config = config if config is not None else tiny_qwen2_5_vl_config(None, tokenizer)
    build_tiny_stock_model(config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (image_processor or build_tiny_image_processor()).save_pretrained(folder)
    # The published checkpoints keep the template in this file.
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": STOCK_CHAT_TEMPLATE}, indent=2) + "\n")
    return folder
