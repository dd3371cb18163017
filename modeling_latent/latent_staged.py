"""Strategy `staged`: slots laid out behind the prompt, one a reasoning step, then text.

IVT-LR (arXiv 2510.12603) lays out blocks of inserted image embeddings and a slot, Coconut (arXiv 2412.06769) slots
between two markers. The slots are part of the returned sequences, so that every stock loop (cache, sampling, beams,
streamers) goes on behind them; what they are fed is worked out by a plan (`latent_plan.py`) in place of the prefill.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging

from .latent_blocks import PATCH_ORDERS, lay_out_blocks
from .latent_inputs import mask_of_prompts
from .latent_plan_types import PATCH_IMAGES, LatentPlan, LatentPlanOutput, PlanStep
from .latent_state import LatentState
from .latent_strategies import (
    LatentOption,
    LatentOptions,
    LatentStep,
    LatentStrategy,
    int_from,
    is_bool,
    one_of,
    register_latent_option,
    register_latent_strategy,
    token_ids,
)

logger = logging.get_logger(__name__)

for _option in (
    LatentOption("num_latent_patches", None, int_from(0, "0 inserts none", optional=True),
                 "image embeddings inserted at every slot; all that are left where an image has fewer"),
    LatentOption("latent_patch_order", "score", one_of(*PATCH_ORDERS),
                 "order of inserted embeddings: by score, or by column with the lowest score last (published)"),
    LatentOption("latent_patch_images", "all", one_of(*PATCH_IMAGES), "images that are looked at"),
    LatentOption("latent_vision_first", True, is_bool, "inserted embeddings stand before their slot"),
    LatentOption("latent_markers", False, is_bool, "write the start and the end marker around the slots"),
    LatentOption("latent_fed", "state", one_of("state", "token"),
                 "what slots are fed: states, or (control: pause tokens) the slot token's own embedding"),
    LatentOption("latent_suffix_ids", None, token_ids, "ids written behind the slots and their markers"),
    LatentOption("stop_on_first_token", True, is_bool,
                 "an end of turn right behind the slots ends the row; False: it does not, as published"),
):  # fmt: skip
    register_latent_option(_option)


def lay_out(model: nn.Module, model_kwargs: dict, options: LatentOptions) -> dict:
    """Extend the prompts by their blocks. A prompt that holds slots already keeps them; only the inserted embeddings
    are added where it has none.

    Raises:
        ValueError: more slots than `max_latent_steps`, a row without image where embeddings are to be inserted, slots
            in the prompt and `num_latent_steps`, or inputs without ids; names row or option and the remedy.
    """
    ids, values, config = model_kwargs.get("input_ids"), options.values, model.config
    if ids is None or model_kwargs.get("position_ids") is not None:
        raise ValueError(
            f"latent_strategy={options.strategy.name!r} lays slots out behind input_ids; pass input_ids, and leave "
            "inputs_embeds and position_ids out"
        )
    laid_out = bool((ids == config.latent_token_id).any())
    if laid_out and "num_latent_steps" in options.given:
        raise ValueError(
            f"num_latent_steps={values.num_latent_steps!r}: the prompt holds slots (token id "
            f"{config.latent_token_id}) already; leave num_latent_steps out, or the slots"
        )
    mask = mask_of_prompts(model, ids, model_kwargs.get("attention_mask"))
    steps = [0] * len(ids) if laid_out else _steps_of(options, len(ids), config)
    rows = []
    for row, (tokens, kept) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        tokens = [token for token, keep in zip(tokens, kept, strict=True) if keep]
        images = _image_tokens(tokens, config, values)
        if values.num_latent_patches and values.latent_fed == "token":
            raise ValueError(
                f"num_latent_patches={values.num_latent_patches} with latent_fed='token': nothing is inserted before "
                "a pause token; pass num_latent_patches=0"
            )
        if values.num_latent_patches and not images and (laid_out or steps[row]):
            raise ValueError(
                f"row {row} has no image, and num_latent_patches={values.num_latent_patches} image embeddings are to "
                "be inserted at every slot; add the image, or pass num_latent_patches=0"
            )
        rows.append(_laid_out(tokens, steps[row], images, config, values, laid_out))
    pad = model.generation_config.pad_token_id
    return {**model_kwargs, **pad_rows(rows, ids, mask, model_kwargs, 0 if pad is None else pad)}


def _steps_of(options: LatentOptions, num_rows: int, config: Any) -> list[int]:
    """Number of slots of each row."""
    values = options.values
    if values.num_latent_steps is None:
        raise ValueError(
            f"latent_strategy={options.strategy.name!r} needs num_latent_steps; pass num_latent_steps=..., or prompts "
            f"that hold slots (token id {config.latent_token_id})"
        )
    steps, caps = (
        each if isinstance(each, list) else [each] for each in (values.num_latent_steps, values.max_latent_steps)
    )
    steps = steps * num_rows if len(steps) == 1 else steps
    if len(steps) != num_rows:
        raise ValueError(
            f"num_latent_steps has {len(steps)} entries for {num_rows} prompts; give one, or one per prompt"
        )
    if max(steps) > max(caps):
        raise ValueError(
            f"num_latent_steps={max(steps)} is above the limit max_latent_steps={max(caps)}; lay out fewer slots, or "
            "raise max_latent_steps"
        )
    return steps


def _image_tokens(tokens: list[int], config: Any, values: SimpleNamespace) -> int:
    """Number of image tokens of a row that may be copied."""
    image = getattr(config, "image_token_id", None)
    is_image = [token == image for token in tokens]
    if values.latent_patch_images == "all" or True not in is_image:
        return sum(is_image)
    last = len(is_image) - is_image[::-1].index(True)
    first = last
    while first and is_image[first - 1]:
        first -= 1
    return last - first


def _laid_out(
    tokens: list[int], steps: int, images: int, config: Any, values: SimpleNamespace, keeps_slots: bool
) -> list[int]:
    """The ids of one row with its blocks."""
    slot, patch, wanted = config.latent_token_id, config.latent_patch_token_id, values.num_latent_patches or 0
    if wanted and patch is None:
        raise ValueError(
            f"num_latent_patches={wanted}: the model has no token for inserted image embeddings "
            "(latent_patch_token_id is null in config.json); make it for the method 'ivtlr', or pass 0"
        )
    count = tokens.count(slot) if keeps_slots else steps
    if wanted * count > images and not (keeps_slots and patch in tokens):
        logger.warning_once(
            f"num_latent_patches={wanted}: a row has fewer image tokens than its slots ask for; each is inserted "
            "once, and the last slots get fewer"
        )
    if keeps_slots:
        if not wanted or patch in tokens:
            return tokens
        blocks = iter(
            _split(lay_out_blocks(count, wanted, images, slot, patch, values.latent_vision_first), slot, values)
        )
        return [each for token in tokens for each in (next(blocks) if token == slot else [token])]
    blocks = lay_out_blocks(steps, wanted, images, slot, patch, values.latent_vision_first)
    if values.latent_markers:
        blocks = [config.latent_start_token_id, *blocks, config.latent_end_token_id]
    return tokens + blocks + (values.latent_suffix_ids or [])


def _blocks(count: int, images: int, config: Any, values: SimpleNamespace) -> list[int]:
    slot, patch = config.latent_token_id, config.latent_patch_token_id
    return lay_out_blocks(count, values.num_latent_patches or 0, images, slot, patch, values.latent_vision_first)


def _split(blocks: list[int], slot: int, values: SimpleNamespace) -> list[list[int]]:
    """The blocks one by one."""
    parts: list[list[int]] = [[]]
    for token in blocks:
        if not values.latent_vision_first and token == slot and parts[-1]:
            parts.append([])
        parts[-1].append(token)
        if values.latent_vision_first and token == slot:
            parts.append([])
    return [part for part in parts if part]


def pad_rows(rows: list[list[int]], ids: torch.LongTensor, mask: torch.Tensor, model_kwargs: dict, pad: int) -> dict:
    """The rows padded on the left to one length, with what pads the prompts already, else with `pad`."""
    length = max(map(len, rows))
    filler = ids[mask == 0]
    pad = int(filler[0]) if len(filler) else pad
    new = [[pad] * (length - len(row)) + row for row in rows]
    new_mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    changed = {
        "input_ids": torch.tensor(new, dtype=ids.dtype, device=ids.device),
        "attention_mask": torch.tensor(new_mask, dtype=mask.dtype, device=mask.device),
    }
    types = model_kwargs.get("mm_token_type_ids")
    if types is not None:  # of images and text in the prompt; slots and inserted embeddings count as text
        kept = [row[keep.bool()].tolist() for row, keep in zip(types, mask, strict=True)]
        of_token = {
            token: kind
            for row, row_ids, keep in zip(kept, ids, mask, strict=True)
            for token, kind in zip(row_ids[keep.bool()].tolist(), row, strict=True)
            if kind
        }
        changed["mm_token_type_ids"] = torch.tensor(
            [[of_token.get(token, 0) for token in row] for row in new], dtype=types.dtype, device=types.device
        )
    return changed


def prefill(
    model: nn.Module,
    stock_prefill: Callable[..., Any],
    input_ids: torch.LongTensor,
    generation_config: GenerationConfig,
    model_kwargs: dict,
    state: LatentState,
    **stock_options: Any,
) -> Any:
    """The stock prefill of the prompts with their blocks, run as a plan; plainly where slots are pause tokens."""
    values = state.options.values
    if values.latent_fed == "token":
        return _paused(model, stock_prefill, input_ids, generation_config, model_kwargs, state, **stock_options)
    plan = LatentPlan(
        patch_order=values.latent_patch_order,
        patch_images=values.latent_patch_images,
        vision_first=values.latent_vision_first,
        edit=_editor(model, input_ids, state) if values.latent_hook is not None or values.latent_noise > 0 else None,
    )
    chunk, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None  # the plan has its own
    model_kwargs["latent_plan"], state.chunked = plan, False
    try:
        outputs = stock_prefill(input_ids, generation_config, model_kwargs, **stock_options)
    finally:
        generation_config.prefill_chunk_size = chunk
        del model_kwargs["latent_plan"]
    # The beams of a prompt are equal, and those that run on all come from the first.
    rows, plan_output = slice(None, None, generation_config.num_beams or 1), outputs.plan_output
    state.prompt_latents = plan_output.latent_embeds[rows], plan_output.latent_mask[rows]
    if state.keep_trace:
        state.prompt_record = _record(model, plan_output, input_ids, rows, values)
    return outputs


def _paused(
    model: nn.Module,
    stock_prefill: Callable[..., Any],
    input_ids: torch.LongTensor,
    generation_config: GenerationConfig,
    model_kwargs: dict,
    state: LatentState,
    **stock_options: Any,
) -> Any:
    """The stock prefill, in which no position is fed by a vector."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    embeds = torch.zeros(*mask.shape, state.hidden_size, dtype=model.dtype, device=mask.device)
    state.prompt_latents = embeds, mask
    return stock_prefill(input_ids, generation_config, model_kwargs, **stock_options)


def _record(
    model: nn.Module, output: LatentPlanOutput, input_ids: torch.LongTensor, rows: slice, values: SimpleNamespace
) -> dict[str, torch.Tensor]:
    """For the trace, by prompt and position `(G, T, ...)`: states, what slots said, and the image tokens copied."""
    ids, mask, hidden = input_ids[rows], output.latent_mask[rows], output.last_hidden_state[rows]
    said, topk = ids.clone(), values.latent_topk
    best, probs = ids.new_full((*ids.shape, topk), -1), hidden.new_zeros(*ids.shape, topk, dtype=torch.float32)
    slots = (ids == model.config.latent_token_id) & mask
    row, position = slots.nonzero(as_tuple=True)
    if len(row):
        logits = model.lm_head(hidden[row, _before_blocks(slots, mask, values)[row, position]]).float()
        said[row, position] = logits.argmax(-1)
        if topk:
            chosen = logits.softmax(-1).topk(min(topk, logits.shape[-1]), dim=-1)
            best[row, position], probs[row, position] = chosen.indices, chosen.values
    record = {"outputs": hidden, "said": said, "ids": best, "probs": probs}
    if model.config.latent_patch_token_id is not None:
        record["patch_column"] = output.patch_columns[rows]
    return record


def _before_blocks(slots: torch.BoolTensor, mask: torch.BoolTensor, values: SimpleNamespace) -> torch.LongTensor:
    """`(G, T)` at a slot: the last position before its block, whose state it is fed."""
    places = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    if not values.latent_vision_first:
        return places - 1
    text = torch.where(mask, -1, places).cummax(dim=1).values  # the block begins behind text, or behind a slot
    last = torch.nn.functional.pad(torch.where(slots, places, -1)[:, :-1], (1, 0), value=-1).cummax(dim=1).values
    return torch.maximum(last, text)


def _editor(model: nn.Module, input_ids: torch.LongTensor, state: LatentState) -> Callable[[PlanStep], torch.Tensor]:
    """Noise, then the trace hook, on the slots of one step of the plan."""

    def edit(step: PlanStep) -> torch.Tensor:
        values, vectors = state.options.values, step.vectors
        vectors = state.with_noise(vectors, step.active)
        if values.latent_hook is None:
            return vectors
        scores = model.lm_head(vectors)
        for position in sorted({each for each in step.position.tolist() if each >= 0}):
            here = step.position == position
            seen = LatentStep(
                input_ids=input_ids[:, :position],
                prompt_length=state.prompt_length,
                is_open=here,
                count=step.index,
                span=torch.zeros_like(step.index),
                said=scores.argmax(-1),
                recent=input_ids[:, max(0, position - 2) : position],
                scores=scores,
                latent=vectors,
                options=values,
                config=model.config,
                is_slot=here,
            )
            vectors = state.with_hook(seen, vectors)
        return vectors

    return edit


register_latent_strategy(
    LatentStrategy(
        name="staged",
        options=(
            "num_latent_steps",
            "max_latent_steps",
            "num_latent_patches",
            "latent_patch_order",
            "latent_patch_images",
            "latent_vision_first",
            "latent_markers",
            "latent_fed",
            "latent_suffix_ids",
            "stop_on_first_token",
            "latent_ids",
            "latent_topk",
            "latent_hook",
            "latent_noise",
        ),
        opens_span=False,
        layout=lay_out,
        prefill=prefill,
    )
)

__all__ = ["lay_out", "pad_rows", "prefill"]
