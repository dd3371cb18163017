"""A tiny tokenizer built in code: a byte-level BPE trained on given lines, with the pre-tokenization and the special
tokens of the Qwen-VL families.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
from transformers import PreTrainedTokenizerFast

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
# Qwen3 has these at the ids that Qwen2.5 leaves free: latent tokens come behind them.
QWEN3_ADDED_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
# How Qwen2.5 cuts text before BPE: contractions, words with the space before them, single digits, punctuation, blanks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY_TEXTS = (
    "system\nYou are a helpful assistant.\nuser\nWhat is in the picture?\nassistant\n",
    "The picture shows a stadium with many seats, a fence and the grass outside. What is the boy wearing? Jeans.",
    "The player starts at the top left of the map and walks right, right, down, left and up to the goal.",
    "Is the path safe? Yes, it is safe. No, the player falls into a hole. Which option is right? <answer>B</answer>",
    "Street Art, a red bicycle, two dogs, a wooden table, the third window, a green door, a small blue boat.",
    "How many cells are there? There are 0 1 2 3 4 5 6 7 8 9 cells in each row and column of the frozen lake.",
)


def build_tiny_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 512,
    words: Sequence[str] = (),
    added_tokens: Sequence[str] = (),
    special_tokens: Sequence[str] = QWEN_SPECIAL_TOKENS,
    named_tokens: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on some lines, with the special tokens of Qwen2.5 at the end of the vocabulary.

    Padding token `<|endoftext|>`, end token `<|im_end|>`, no beginning token, unless others are named.
    `len(tokenizer) <= vocab_size`; it is less when the lines offer fewer pairs to merge.

    Args:
        texts: training lines; special tokens in them are left out.
        vocab_size: upper bound of the number of entries, special tokens included, at least 264.
        words: strings that must be single tokens, alone and after a space (`"A1"` and `" A1"`), as ordinary entries.
            They stay whole in the pre-tokenization where no letter or digit follows, and the pairs that build them are
            appended to the merges: the result is an ordinary BPE.
        added_tokens: tokens that come behind the special ones, on top of `vocab_size`, without being special
            (`QWEN3_ADDED_TOKENS`).
        special_tokens: special tokens in the order of their ids.
        named_tokens: arguments of the tokenizer, e.g. `{"eos_token": "</s>", "pad_token": "<pad>"}`. A `bos_token` is
            written before every text.

    Raises:
        ValueError: for a string instead of lines, a vocabulary that is too small, or an impossible word.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be several lines, e.g. a list of strings; got one string")
    for word in words:
        if not isinstance(word, str) or not word or re.search(r"\s", word) or word in special_tokens:
            raise ValueError(f"words may hold strings without white space that are no special token, got {word!r}")
    room = vocab_size - len(special_tokens)
    if room < 256:
        raise ValueError(f"vocab_size must be at least {256 + len(special_tokens)}, got {vocab_size}")
    trained = _empty_backend(models.BPE(), words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    special = re.compile("|".join(map(re.escape, special_tokens)))
    trained.train_from_iterator((piece for text in texts for piece in special.split(text)), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary, merges = _with_words(alphabet, merges, words, room, len(special_tokens))

    backend = _empty_backend(models.BPE(vocab=vocabulary, merges=merges), words)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added_tokens])
    names = dict({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} if named_tokens is None else named_tokens)
    if "bos_token" in names:
        first = names["bos_token"]
        begin = processors.TemplateProcessing(f"{first} $A", special_tokens=[(first, backend.token_to_id(first))])
        backend.post_processor = processors.Sequence([backend.post_processor, begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )
    for form in (form for word in words for form in (word, f" {word}")):
        tokens = tokenizer.tokenize(form, add_special_tokens=False)
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
    alphabet: list[str], merges: list[tuple[str, str]], words: Sequence[str], room: int, num_special: int
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
            needed = len(entries) + num_special
            raise ValueError(f"{len(words)} words need vocab_size >= {needed}, got {room + num_special}")
        kept = max(0, kept - (len(entries) - room))


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Plain BPE of one word: join the pair of lowest rank, leftmost first, until no pair has a rank."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
