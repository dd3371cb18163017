"""Strategy `search` of latent models: the search over latents in `generate` (see `search_latent.py`).

DMLR: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623.
"""

from torch import nn
from transformers import LogitsProcessorList

from .latent_strategies import (
    LatentOption,
    LatentOptions,
    LatentStrategy,
    register_latent_option,
    register_latent_strategy,
)
from .search_generate import (
    PROMPT_INPUTS,
    check_generation,
    expand_cache,
    generate_with_search,
    ignore_prompt,
    search_decoding,
    search_prompts_of,
)
from .search_options import SEARCH_OPTIONS

UNSAVED = ("thought_mask", "seed")  # of one call


def search_thoughts(model: nn.Module, model_kwargs: dict, options: LatentOptions) -> dict:
    """`layout` of the strategy: search, then the prompt of the answer with its cache."""
    given = {name: getattr(options.values, name) for name in SEARCH_OPTIONS}
    if given["thought_mask"] is not None:  # which wins over saved options that lay thought tokens out
        given |= {name: None for name in ("num_thought_tokens", "thought_token_id") if name not in options.given}
    answer, result = search_prompts_of(model, model_kwargs, given)
    options.outputs["search"] = result
    if callable(options.values.reward):  # the trace, which has the options, is a file at last
        options.values.reward = getattr(options.values.reward, "__name__", type(options.values.reward).__name__)
    return {**{name: value for name, value in model_kwargs.items() if name not in PROMPT_INPUTS}, **answer}


def published_penalty(processors: LogitsProcessorList, options: LatentOptions, prompt_length: int) -> None:
    """`processors` of the strategy: in reference mode a repetition penalty counts what is generated alone."""
    if options.values.mode == "reference":
        ignore_prompt(processors, prompt_length)


# An option that is left out has the default of its mode, which `search_settings` knows.
for _name, _option in SEARCH_OPTIONS.items():
    register_latent_option(
        LatentOption(
            _name,
            None,
            lambda name, value: None if value is None else SEARCH_OPTIONS[name].check(name, value),
            _option.help,
            saved=_name not in UNSAVED,
        )
    )

register_latent_strategy(
    LatentStrategy(
        name="search",
        options=(*SEARCH_OPTIONS, "latent_topk"),
        opens_span=False,
        tokens=None,
        refuse=check_generation,
        layout=search_thoughts,
        processors=published_penalty,
    )
)

__all__ = [
    "expand_cache",
    "generate_with_search",
    "published_penalty",
    "search_decoding",
    "search_prompts_of",
    "search_thoughts",
]
