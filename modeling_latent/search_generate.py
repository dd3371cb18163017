"""The search over latents around `generate`, for any model: as a function and as a decoding loop of `custom_generate`.

A model of this library has it as `generate(latent_strategy="search")`, see `search_strategy.py`; the search itself is
in `search_latent.py`. This file and what it imports make up the folder of [`save_search_folder`].

DMLR: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .latent_inputs import mask_of_prompts, replace_latents
from .search_answer import answer_inputs
from .search_latent import LatentSearch, SearchResult
from .search_options import SEARCH_OPTIONS, search_settings
from .search_prefix import VISION_INPUTS

PROMPT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", *VISION_INPUTS)
_OWN_INPUTS = ("inputs_embeds", "position_ids", "latent_embeds", "latent_mask")  # the search makes them
# What the logits processors and stopping criteria of transformers count from the beginning of the prompt.
_COUNTED = ("prompt_length_to_skip", "min_length", "max_length", "begin_index", "regulation_start")


def search_prompts_of(
    model: nn.Module,
    inputs: dict[str, Any],
    options: dict[str, Any],
    position_ids: torch.LongTensor | None = None,
) -> tuple[dict[str, Any], SearchResult]:
    """Search for thought tokens of a batch of prompts.

    Args:
        model: stock or latent, in evaluation mode.
        inputs: of `generate`: `input_ids` `(B, L)`, `attention_mask`, images.
        options: see `SEARCH_OPTIONS`.
        position_ids: of the prompts, where the images are encoded already.

    Returns:
        Inputs of `generate` for the answer (see [`answer_inputs`]), and what was found.

    Raises:
        ValueError: inputs without ids, inputs that the search does not know, a cache of the caller, a training model,
            or wrong options.
    """
    ids = inputs.get("input_ids")
    others = [name for name in _OWN_INPUTS if inputs.get(name) is not None]
    if ids is None or not ids.shape[1] or others:
        raise ValueError(
            f"the search lays its thought tokens out in input_ids; pass input_ids, and leave {others or 'others'} out"
        )
    unknown = [name for name, value in inputs.items() if torch.is_tensor(value) and name not in PROMPT_INPUTS]
    if unknown:
        raise ValueError(f"the search does not know how to run {unknown}; it takes {list(PROMPT_INPUTS)}")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError("the search makes the cache of the prompt itself; leave past_key_values out")
    if model.training:
        raise ValueError("the search runs on a model in evaluation mode; call model.eval() first")
    settings = search_settings(**options)
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
        if options.get("thought_token_id") is not None:
            raise ValueError(
                f"thought_token_id={settings.thought_token_id} with thought_mask, which marks tokens that are there; "
                "leave one of them out"
            )
    with torch.no_grad():
        search = LatentSearch(model, {**inputs, "position_ids": position_ids}, mask, settings)
        result = search.run()
        return answer_inputs(search, result), result


def lay_out_thoughts(
    model: nn.Module, inputs: dict[str, Any], number: int, token_id: int | None = None
) -> tuple[dict[str, Any], torch.BoolTensor]:
    """Prompts with thought tokens behind them.

    Args:
        inputs: see [`search_prompts_of`].
        number: of thought tokens.
        token_id: their id; default: the latent token of the model, or its padding token.

    Returns:
        The inputs, and `(B, L + number)` where the thought tokens stand.

    Raises:
        ValueError: prompts padded on the right, or no id to take.
    """
    ids, config = inputs["input_ids"], model.config
    if token_id is None:
        token_id = getattr(config, "latent_token_id", None)
        token_id = model.generation_config.pad_token_id if token_id is None else token_id
    if token_id is None:
        raise ValueError("the model has no padding token to lay thought tokens out with; pass thought_token_id=...")
    rows = model.get_input_embeddings().weight.shape[0]
    if token_id >= rows:
        raise ValueError(f"thought_token_id={token_id} is no token of the model, whose embedding has {rows} rows")
    mask = mask_of_prompts(model, ids, inputs.get("attention_mask"))
    short = (mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if short:
        raise ValueError(f"rows {short} are padded on the right; pad prompts on the left, or pass thought_mask")
    changed = {**inputs, "attention_mask": mask}
    for name, value in (("input_ids", token_id), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if changed.get(name) is not None:
            changed[name] = nn.functional.pad(changed[name], (0, number), value=value)
    places = torch.arange(changed["input_ids"].shape[1], device=ids.device) >= ids.shape[1]
    return changed, places.expand(len(ids), -1)


def check_generation(config: GenerationConfig) -> None:
    """Refuse what cannot go on from the cache that the search fills.

    Raises:
        ValueError: no cache, another one than the default, or a prompt in chunks.
    """
    if config.use_cache is False:
        raise ValueError("use_cache=False: the search keeps the prompt in a cache; leave use_cache out")
    if config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}: the answer goes on in the cache of the search, "
            "which grows; leave cache_implementation out"
        )
    if config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size}: the search runs the prompt itself, in one piece; leave "
            "prefill_chunk_size out"
        )


def ignore_prompt(processors: LogitsProcessorList, prompt_length: int) -> None:
    """Let repetition penalties count what is generated alone: the published code decodes from vectors."""
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is None:
            processor.prompt_ignore_length = prompt_length


def search_mode(options: dict[str, Any]) -> str:
    """The mode that options ask for."""
    return options.get("mode") or SEARCH_OPTIONS["mode"].paper


def expand_cache(cache: Any, rows: int) -> None:
    """Repeat a cache for beams or returned sequences, as `generate` repeats the ids."""
    if rows > 1:
        cache.batch_repeat_interleave(rows)


def _check_stock(config: GenerationConfig, assistant: Any = None) -> None:
    """Refuse drafts: with them the loop of transformers feeds the whole prompt, also behind a cache that has it."""
    if config.get_generation_mode(assistant) == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) cannot go on from the cache of the search "
            "in a stock model; leave it out, or convert_stock_checkpoint for latent_strategy='search'"
        )


def _as_stock_inputs(model: nn.Module, answer: dict[str, Any]) -> dict[str, Any]:
    """The inputs for a stock model: the cache has all but the last position, which may be a thought token."""
    embeds = model.get_input_embeddings()(answer["input_ids"])
    answer["inputs_embeds"] = replace_latents(embeds, answer.pop("latent_embeds"), answer.pop("latent_mask"))
    return answer


def generate_with_search(model: nn.Module, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """`generate` of a stock model behind a search over thought tokens. Also the function of a folder for
    `custom_generate` (see [`save_search_folder`]).

    Args:
        model: a causal language or vision-language model of transformers, in evaluation mode.
        inputs: ids, if not in `kwargs`.
        kwargs: of `generate`, and the options of the search (`SEARCH_OPTIONS`).

    Returns:
        What `generate` returns, its `sequences` with the prompt and its thought tokens; with
        `return_dict_in_generate=True` also `search`, a [`SearchResult`].

    Raises:
        ValueError: assisted decoding; see also [`search_prompts_of`] and [`check_generation`].
    """
    if inputs is not None and kwargs.get("input_ids") is None:
        kwargs["input_ids"] = inputs
    generate = type(model).generate  # a repository may have put this function in its place
    if hasattr(model, "replay"):
        return generate(model, latent_strategy="search", **kwargs)
    options = {name: kwargs.pop(name) for name in SEARCH_OPTIONS if name in kwargs}
    taken = (*PROMPT_INPUTS, *_OWN_INPUTS, "past_key_values")
    tensors = {name for name, value in kwargs.items() if torch.is_tensor(value)}
    prompt = {name: kwargs.pop(name) for name in list(kwargs) if name in taken or name in tensors}
    config = _generation_config(model, kwargs)
    check_generation(config)
    _check_stock(config, kwargs.get("assistant_model"))
    answer, result = search_prompts_of(model, prompt, options)
    expand_cache(answer["past_key_values"], max(config.num_beams or 1, config.num_return_sequences or 1))
    penalty = config.repetition_penalty
    if search_mode(options) == "reference" and penalty not in (None, 1.0):
        # the stock list would count the prompt, too
        kwargs["repetition_penalty"] = 1.0
        processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=answer["input_ids"].shape[1])
        kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or [])])
    output = generate(model, **_as_stock_inputs(model, answer), **kwargs)
    if not torch.is_tensor(output):
        output["search"] = result
    return output


def _generation_config(model: nn.Module, kwargs: dict[str, Any]) -> GenerationConfig:
    """The configuration that `generate` will resolve from its arguments."""
    given = {name: value for name, value in kwargs.items() if name != "generation_config"}
    return model._prepare_generation_config(kwargs.get("generation_config"), **given)[0]


def search_decoding(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
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

    transformers hands such a loop no streamer and does not say so; [`generate_with_search`] takes one.

    Raises:
        ValueError: beams and several returned sequences, for which the loop gets its prompts more than once; drafts; a
            model of this library; see also [`search_prompts_of`] and [`check_generation`].
    """
    given = locals()
    options = {name: given[name] for name in SEARCH_OPTIONS if given.get(name) is not None}
    remedy = "with custom_generate=search_decoding, which writes one sequence a prompt; call generate_with_search(...)"
    for name in ("num_beams", "num_return_sequences"):
        value = getattr(generation_config, name)
        if value not in (None, 1):
            raise ValueError(f"{name}={value} {remedy} instead")
    if hasattr(model, "replay"):
        raise ValueError("custom_generate=search_decoding is for stock models; pass latent_strategy='search' instead")
    check_generation(generation_config)
    _check_stock(generation_config)
    positions = model_kwargs.pop("position_ids", None)
    for name in ("past_key_values", "logits_to_keep"):
        model_kwargs.pop(name, None)
    prompt = {name: model_kwargs.pop(name, None) for name in PROMPT_INPUTS if name != "input_ids"}
    kept = {name: model_kwargs.pop(name) for name in list(model_kwargs) if not torch.is_tensor(model_kwargs[name])}
    prompt = {"input_ids": input_ids, **prompt, **model_kwargs}
    answer, result = search_prompts_of(model, prompt, options, positions)
    answer = _as_stock_inputs(model, answer)
    ids = answer.pop("input_ids")
    if search_mode(options) == "reference":
        ignore_prompt(logits_processor, ids.shape[1])
    grown = ids.shape[1] - input_ids.shape[1]  # thought tokens and image tokens take nothing from the budget
    generation_config.max_length += grown
    for counted in (*logits_processor, *stopping_criteria):
        for name in _COUNTED if type(counted).__module__.startswith("transformers.") else ():
            if hasattr(counted, name):
                setattr(counted, name, getattr(counted, name) + grown)
    output = model._sample(ids, logits_processor, stopping_criteria, generation_config, **answer, **kept)
    if not torch.is_tensor(output):
        output["search"] = result
    return output


__all__ = [
    "check_generation",
    "expand_cache",
    "generate_with_search",
    "ignore_prompt",
    "lay_out_thoughts",
    "search_decoding",
    "search_mode",
    "search_prompts_of",
]
