"""A tiny causal language model for questions on graphs (`data/graphs.py`), built in code with no download: where
Coconut (arXiv 2412.06769) and its controls are trained and compared in minutes.

It reads the notation in pairs ("zumpus lempus ; Alex zumpus ; Alex ? lempus gorpus"), one token a word: a concept
stands next to what it is, so a small model can learn to look it up.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .data.graphs import SMALL_GRAPHS
from .tiny_text import save_tiny_text_checkpoint, tiny_text_config

_WORDS = ("<pad>", "<eos>", "<unk>", "<<", ";", "?", "\n", "###")


def build_graph_tokenizer(
    names: Sequence[str] = (*SMALL_GRAPHS["entities"], *SMALL_GRAPHS["concepts"]),
) -> PreTrainedTokenizerFast:
    """A tokenizer of these names and of the signs of the notation in pairs; blanks separate words.

    Example:
        >>> build_graph_tokenizer(["Alex", "zumpus"]).tokenize("Alex zumpus ; Alex ? zumpus\\n### ")
        ['Alex', 'zumpus', ';', 'Alex', '?', 'zumpus', '\\n', '###']
    """
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*_WORDS, *names))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", behavior="removed"), pre_tokenizers.Split("\n", behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def save_graph_base(folder: str | Path, hidden_size: int = 64, num_layers: int = 4, seed: int = 0) -> Path:
    """Write a stock checkpoint of the kind of Llama with random weights and [`build_graph_tokenizer`].

    Args:
        folder: created when absent.
        hidden_size, num_layers: sizes of the model.
        seed: of the weights.
    """
    tokenizer = build_graph_tokenizer()
    config = tiny_text_config(
        "llama",
        None,
        tokenizer,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_kv_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return save_tiny_text_checkpoint(folder, "llama", tokenizer, config, seed)


__all__ = ["build_graph_tokenizer", "save_graph_base"]
