"""The search over latents in `generate`: as the strategy `search` of latent models, as a function for stock
checkpoints, and as a decoding loop of `custom_generate`. The search itself is in `search_latent.py`.

DMLR: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623.
"""

from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from .latent_inputs import mask_of_prompts, replace_latents
from .latent_strategies import (
    LatentOption,
    LatentOptions,
    LatentStrategy,
    register_latent_option,
    register_latent_strategy,
)
from .search_latent import IMAGE_INPUTS, LatentSearch, SearchResult
from .search_options import SEARCH_OPTIONS, search_settings

UNSAVED = ("thought_mask", "seed")  # of one call


def search_prompts_of(
    model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], SearchResult]:
    """Search for thought tokens of a batch of prompts.

    Args:
        model: stock or latent, in evaluation mode.
        inputs: of `generate`: `input_ids` `(B, L)`, `attention_mask`, images.
        options: see `SEARCH_OPTIONS`.

    Returns:
        Inputs of `generate` for the answer (see [`LatentSearch.answer_inputs`]), and what was found.

    Raises:
        ValueError: inputs without ids, a cache of the caller, a training model, or wrong options.
    """
    ids = inputs.get("input_ids")
    others = [name for name in ("inputs_embeds", "position_ids", "latent_embeds") if inputs.get(name) is not None]
    if ids is None or not ids.shape[1] or others:
        raise ValueError(
            f"the search lays its thought tokens out in input_ids; pass input_ids, and leave {others or 'others'} out"
        )
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError("the search makes the cache of the prompt itself; leave past_key_values out")
    if model.training:
        raise ValueError("the search runs on a model in evaluation mode; call model.eval() first")
    settings = search_settings(**options)
    inputs = dict(inputs)
    if settings.thought_mask is None:
        inputs, mask = lay_out_thoughts(model, inputs, settings.num_thought_tokens, settings.thought_token_id)
    else:
        mask = settings.thought_mask.to(ids.device).bool()
        if mask.shape != ids.shape:
            raise ValueError(
                f"thought_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(ids.shape)}; pad it alike"
            )
        counts = sorted(set(mask.sum(dim=1).tolist()))
        if options.get("num_thought_tokens") is not None and counts != [settings.num_thought_tokens]:
            raise ValueError(
                f"num_thought_tokens={settings.num_thought_tokens}, and thought_mask marks {counts}; leave "
                "num_thought_tokens out, or mark as many"
            )
    with torch.no_grad():
        search = LatentSearch(model, inputs, mask, settings)
        result = search.run()
        return search.answer_inputs(result), result


def lay_out_thoughts(
    model: nn.Module, inputs: dict[str, Any], number: int, token_id: int | None = None
) -> tuple[dict[str, Any], torch.BoolTensor]:
    """Prompts with thought tokens behind them.

    Args:
        number: of thought tokens.
        token_id: their id; default: the latent token of the model, or its padding token.

    Raises:
        ValueError: prompts padded on the right, or no id to take.
    """
    ids, config = inputs["input_ids"], model.config
    if token_id is None:
        token_id = getattr(config, "latent_token_id", None)
        token_id = model.generation_config.pad_token_id if token_id is None else token_id
    if token_id is None:
        raise ValueError("the model has no padding token to lay thought tokens out with; pass thought_token_id=...")
    mask = mask_of_prompts(model, ids, inputs.get("attention_mask"))
    short = (mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if short:
        raise ValueError(f"rows {short} are padded on the right; pad prompts on the left, or pass thought_mask")
    grow = {"input_ids": token_id, "attention_mask": 1, "mm_token_type_ids": 0}
    changed = {**inputs, "attention_mask": mask}
    for name, value in grow.items():
        if changed.get(name) is not None:
            changed[name] = nn.functional.pad(changed[name], (0, number), value=value)
    places = torch.arange(changed["input_ids"].shape[1], device=ids.device) >= ids.shape[1]
    return changed, places.expand(len(ids), -1)


# Latent models ------------------------------------------------------------------------------------------------------


def search_thoughts(model: nn.Module, model_kwargs: dict, options: LatentOptions) -> dict:
    """`layout` of the strategy: search, then the prompt of the answer with its cache."""
    given = {name: getattr(options.values, name) for name in SEARCH_OPTIONS}
    answer, result = search_prompts_of(model, model_kwargs, given)
    options.outputs["search"] = result
    spent = (*IMAGE_INPUTS, "mm_token_type_ids")  # the cache has them
    return {**{name: value for name, value in model_kwargs.items() if name not in spent}, **answer}


def ignore_prompt(processors: LogitsProcessorList, options: LatentOptions, prompt_length: int) -> None:
    """`processors` of the strategy: the published code decodes from vectors, so that a repetition penalty counts
    what is generated alone."""
    if options.values.mode == "reference":
        _ignore_prompt(processors, prompt_length)


def _ignore_prompt(processors: LogitsProcessorList, prompt_length: int) -> None:
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is None:
            processor.prompt_ignore_length = prompt_length


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
        layout=search_thoughts,
        processors=ignore_prompt,
    )
)


# Stock models -------------------------------------------------------------------------------------------------------


def generate_with_search(model: nn.Module, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """`generate` of a stock model behind a search over thought tokens. Also the function of a folder for
    `custom_generate` (see [`save_search_folder`]).

    Args:
        model: any causal language or vision-language model of transformers, in evaluation mode.
        inputs: ids, if not in `kwargs`.
        kwargs: of `generate`, and the options of the search (`SEARCH_OPTIONS`).

    Returns:
        What `generate` returns, its `sequences` with the prompt and its thought tokens; with
        `return_dict_in_generate=True` also `search`, a [`SearchResult`].

    Raises:
        ValueError: see [`search_prompts_of`].
    """
    if inputs is not None and kwargs.get("input_ids") is None:
        kwargs["input_ids"] = inputs
    options = {name: kwargs.pop(name) for name in SEARCH_OPTIONS if name in kwargs}
    given = ("input_ids", "attention_mask", "mm_token_type_ids", "inputs_embeds", "position_ids", "past_key_values")
    prompt = {name: kwargs.pop(name) for name in (*given, *IMAGE_INPUTS) if name in kwargs}
    answer, result = search_prompts_of(model, prompt, options)
    feed_vectors(model, answer)
    config = kwargs.get("generation_config") or model.generation_config
    beams, returned = (
        kwargs.get(name) or getattr(config, name) or 1 for name in ("num_beams", "num_return_sequences")
    )
    expand_cache(answer["past_key_values"], max(beams, returned))
    penalty = kwargs.get("repetition_penalty") or config.repetition_penalty
    if search_mode(options) == "reference" and penalty not in (None, 1.0):
        # the stock list would count the prompt, too
        kwargs["repetition_penalty"] = 1.0
        processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=answer["input_ids"].shape[1])
        kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or [])])
    output = model.generate(**answer, **kwargs)
    if not torch.is_tensor(output):
        output["search"] = result
    return output


def feed_vectors(model: nn.Module, answer: dict[str, Any]) -> None:
    """Turn `latent_embeds` into `inputs_embeds` for a stock model: the cache has all but the last position, which may
    be a thought token."""
    embeds = model.get_input_embeddings()(answer["input_ids"])
    answer["inputs_embeds"] = replace_latents(embeds, answer.pop("latent_embeds"), answer.pop("latent_mask"))


def search_mode(options: dict[str, Any]) -> str:
    """The mode that options ask for."""
    return options.get("mode") or SEARCH_OPTIONS["mode"].paper


def expand_cache(cache: Any, rows: int) -> None:
    """Repeat a cache for beams or returned sequences, as `generate` repeats the ids."""
    if rows > 1:
        cache.batch_repeat_interleave(rows)


def search_decoding(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    mode: str | None = None,
    num_thought_tokens: int | None = None,
    thought_mask: torch.Tensor | None = None,
    thought_token_id: int | None = None,
    max_num_steps: int | None = None,
    lr: float | None = None,
    sigma: float | None = None,
    sigma_decay: float | None = None,
    relative_sigma: bool | None = None,
    reward_threshold: float | None = None,
    reward_top_k: int | None = None,
    reward: Any = None,
    reward_rows: str | None = None,
    num_noise_samples: int | None = None,
    baseline: str | None = None,
    use_auto_grad: bool | None = None,
    num_selected_patches: int | None = None,
    initial_patch_count: int | None = None,
    patch_increment: int | None = None,
    visual_insert_stride: int | None = None,
    visual_injection_start_step: int | None = None,
    visual_injection_interval: int | None = None,
    visual_only: bool | None = None,
    inject_in_decode: bool | None = None,
    seed: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decoding loop for `generate(custom_generate=search_decoding, ...)` of a stock model: the search, then the stock
    loop of greedy decoding and sampling.

    Raises:
        ValueError: beam search, which gives the loop its prompts more than once; use [`generate_with_search`].
    """
    given = locals()
    options = {name: given[name] for name in SEARCH_OPTIONS if given.get(name) is not None}
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams} with custom_generate=search_decoding, which samples or decodes "
            "greedily; call generate_with_search(model, ...) instead"
        )
    prompt = {"input_ids": input_ids}
    for name in ("attention_mask", "mm_token_type_ids", *IMAGE_INPUTS):
        if model_kwargs.get(name) is not None:
            prompt[name] = model_kwargs.pop(name)
    for name in ("position_ids", "past_key_values", "logits_to_keep"):
        model_kwargs.pop(name, None)
    answer, _ = search_prompts_of(model, prompt, options)
    feed_vectors(model, answer)
    ids = answer.pop("input_ids")
    if search_mode(options) == "reference":
        _ignore_prompt(logits_processor, ids.shape[1])
    grown = ids.shape[1] - input_ids.shape[1]  # thought tokens and image tokens take nothing from the budget
    generation_config.max_length += grown
    for criterion in stopping_criteria:
        if isinstance(criterion, MaxLengthCriteria):
            criterion.max_length += grown
    return model._sample(ids, logits_processor, stopping_criteria, generation_config, **answer, **model_kwargs)


__all__ = ["generate_with_search", "lay_out_thoughts", "search_decoding", "search_prompts_of"]
