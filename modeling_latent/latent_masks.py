"""Who may attend to whom, beyond causality: rules that hide or damp keys from queries, for any family, cache and loop.

A rule adds a number to the attention logits between some positions and others, in every layer and head: minus infinity
hides, `ln(gamma)` damps by the factor `gamma`. LaViT ("LaViT: Aligning Latent Visual Thoughts for Multi-modal
Reasoning", arXiv 2601.10129) closes the way from the answer to the image so, and opens it in the course of training;
ablations hide learned tokens. The rules are applied where transformers makes the mask of the attention implementation
in use, so they hold in training, prefill and cached decoding, with dynamic and static caches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .latent_attention import eager_attention_of


@dataclass(frozen=True)
class Visibility:
    """One rule: what is added to the attention logits between `queries` and `keys`.

    Args:
        queries: `(batch, length)` bool, positions of the sequence (padding counted) that look.
        keys: `(batch, length)` bool, positions that are looked at.
        bias: added to the logits; `-inf` hides.
        later: whether positions behind `length`, those that are decoded, are queries as well.
        layers: indices of the decoder layers that it holds in, `None` for all.

    A position never loses itself.
    """

    queries: torch.BoolTensor
    keys: torch.BoolTensor
    bias: float = -math.inf
    later: bool = True
    layers: frozenset[int] | None = None

    def pairs(self, rows: int, query_index: torch.LongTensor, key_index: torch.LongTensor) -> torch.BoolTensor:
        """`(rows, queries, keys)` pairs of positions that the rule is for; `rows` is a multiple of its batch."""
        looks = _at(self.queries, query_index, self.later)
        seen = _at(self.keys, key_index, False)
        other = query_index.unsqueeze(1) != key_index
        return _repeated(looks, rows).unsqueeze(2) & _repeated(seen, rows).unsqueeze(1) & other


def _at(marked: torch.BoolTensor, index: torch.LongTensor, beyond: bool) -> torch.BoolTensor:
    """`(batch, n)` entries of `(batch, length)` at positions `(n,)`, `beyond` for those behind the length."""
    index = index.to(marked.device)
    inside = index < marked.shape[1]
    found = marked[:, index.clamp(max=marked.shape[1] - 1)]
    return torch.where(inside, found, torch.full_like(found, beyond))


def _repeated(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of prompts for beams or several returned sequences."""
    return values.repeat_interleave(rows // values.shape[0], dim=0)


def image_visibility(
    images: torch.BoolTensor, latents: torch.BoolTensor, bias: float, block_prompt: bool
) -> Visibility:
    """The edges of LaViT: from the positions behind the latents to the image.

    Args:
        images: `(batch, length)` image tokens.
        latents: `(batch, length)` learned tokens.
        bias: on the logits, `ln(gamma)` for the gate, `-inf` for the bottleneck.
        block_prompt: also from the prompt between image and latents, the marker behind the image included.

    A row without latents, or without an image, has no such edge.
    """
    places = torch.arange(images.shape[1], device=images.device)
    last_image = torch.where(images, places, -1).amax(dim=1, keepdim=True)
    first = torch.where(latents, places, images.shape[1]).amin(dim=1, keepdim=True)
    last = torch.where(latents, places, -1).amax(dim=1, keepdim=True)
    has_latents = last >= 0
    queries = (places > last) & has_latents
    if block_prompt:
        queries = queries | ((places > last_image) & (places < first) & has_latents)
    return Visibility(queries, images & has_latents, bias)  # what is decoded behind a row without latents looks, too


def hidden_positions(positions: torch.BoolTensor) -> Visibility:
    """No other position sees these `(batch, length)`; each still sees itself, and what it saw."""
    return Visibility(torch.ones_like(positions), positions)


def visibility_bias(
    rules: Sequence[Visibility], rows: int, query_index: torch.LongTensor, key_index: torch.LongTensor
) -> torch.Tensor:
    """`(rows, queries, keys)` float32, what the rules add to the logits."""
    total = torch.zeros(rows, len(query_index), len(key_index), device=query_index.device)
    for rule in rules:
        pairs = rule.pairs(rows, query_index, key_index).to(total.device)
        total = total.masked_fill(pairs, -math.inf) if math.isinf(rule.bias) else total + rule.bias * pairs
    return total


def allowed_pairs(rules: Sequence[Visibility], attention_mask: torch.LongTensor) -> torch.BoolTensor:
    """`(batch, 1, length, length)` who may attend to whom: causality, padding and the rules that hide."""
    length = attention_mask.shape[1]
    index = torch.arange(length, device=attention_mask.device)
    causal = (index <= index.unsqueeze(1)) & attention_mask.bool().unsqueeze(1)
    return (causal & ~visibility_bias(rules, len(attention_mask), index, index).isinf()).unsqueeze(1)


@contextmanager
def visible_attention(model: PreTrainedModel, rules: Sequence[Visibility]) -> Iterator[None]:
    """Apply rules to the text decoder during the forwards, or the `generate`, inside the context.

    Args:
        model: any model whose text layers use the attention interface of transformers.
        rules: for sequences that begin at the first position of the cache; none leaves everything as it is.

    Raises:
        ValueError: an attention implementation without dense masks (flash, flex).

    Example:
    ```python
    images = inputs["input_ids"] == model.config.image_token_id
    with visible_attention(model, [hidden_positions(images)]):
        model.generate(**inputs)  # a blind model
    ```
    """
    if not rules:
        yield
        return
    config = model.get_decoder().config
    base = config._attn_implementation
    config._attn_implementation = _implementation(base)
    entry = (config, tuple(rules))
    _OPEN.append(entry)
    try:
        yield
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not entry]
        config._attn_implementation = base


# The contexts that are open, each with the configuration of its decoder.
_OPEN: list[tuple[PreTrainedConfig, tuple[Visibility, ...]]] = []
_SUFFIX = f"_visible_{id(_OPEN):x}"  # of this file alone: a process may have code of several repositories


def check_visibility(implementation: str) -> None:
    """Refuse an attention implementation that takes no dense mask.

    Raises:
        ValueError: names it and the remedy.
    """
    if "flash" in implementation or "flex" in implementation or "paged" in implementation:
        raise ValueError(
            f"attn_implementation={implementation!r} takes no mask by position, which hiding or damping attention "
            "needs; use attn_implementation='sdpa' or 'eager'"
        )


def _implementation(base: str) -> str:
    """Register once, and name, the attention implementation whose masks carry the rules.

    Raises:
        ValueError: an implementation without dense masks, or not in the attention interface.
    """
    check_visibility(base)
    name = base if _SUFFIX in base else base + _SUFFIX  # a capture inside a context keeps its masks
    if name in ALL_ATTENTION_FUNCTIONS:
        return name
    kernel = None if base == "eager" else ALL_ATTENTION_FUNCTIONS.get(base)
    if base not in ALL_MASK_ATTENTION_FUNCTIONS or (base != "eager" and kernel is None):
        raise ValueError(f"attention implementation {base!r} is not in the attention interface; use 'sdpa' or 'eager'")
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        owner = getattr(module, "config", None)
        rules = [rule for config, found in _OPEN if config is owner for rule in found if rule.layers is not None]
        rules = [rule for rule in rules if module.layer_idx in rule.layers]
        if rules:
            keys = torch.arange(key.shape[2], device=key.device)
            mask = _with_rules(mask[..., : len(keys)], rules, len(query), keys[-query.shape[2] :], keys, query.dtype)
        return (kernel or eager_attention_of(module))(module, query, key, value, mask, **kwargs)

    def masked(batch_size: int, q_length: int, kv_length: int, **options: Any) -> torch.Tensor | None:
        config = options.get("config")
        rules = [rule for owner, found in _OPEN if owner is config for rule in found if rule.layers is None]
        options["allow_is_causal_skip"] = False
        mask = make_mask(batch_size, q_length, kv_length, **options)
        device = mask.device
        queries = torch.arange(q_length, device=device) + options.get("q_offset", 0)
        keys = torch.arange(kv_length, device=device) + options.get("kv_offset", 0)
        return _with_rules(mask, rules, batch_size, queries, keys, options.get("dtype", torch.float32))

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, masked)
    return name


def _with_rules(
    mask: torch.Tensor,
    rules: Sequence[Visibility],
    rows: int,
    query_index: torch.LongTensor,
    key_index: torch.LongTensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A dense mask, bool or added to the logits, with the rules in it; in `dtype` where a bool mask cannot damp."""
    bias = visibility_bias(rules, rows, query_index, key_index).unsqueeze(1)
    if mask.dtype == torch.bool:
        if all(math.isinf(rule.bias) for rule in rules):
            return mask & ~bias.isinf()
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest(dtype))
    hidden = bias.isinf()
    # Hidden entries stay as they are: the lowest number and a further one would overflow.
    added = torch.where(mask > lowest(mask.dtype), bias.masked_fill(hidden, 0.0), 0.0).to(mask.dtype)
    return (mask + added).masked_fill(hidden, lowest(mask.dtype))


def lowest(dtype: torch.dtype) -> float:
    """What a dense mask has at hidden pairs: half the least number, which no cast to another type makes infinite."""
    return torch.finfo(dtype).min / 2


__all__ = [
    "Visibility",
    "allowed_pairs",
    "check_visibility",
    "hidden_positions",
    "image_visibility",
    "lowest",
    "visibility_bias",
    "visible_attention",
]
