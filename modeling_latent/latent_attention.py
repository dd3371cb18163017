"""Attention of a few chosen query rows, beside SDPA or flash kernels, at any layer (contract C4).

Methods that pick image patches by attention, align it to a teacher's, or report it, need the weights of one or a few
queries. The kernels in use return none, and eager attention for all rows would allocate `length x length` weights in
every layer. Here the attention function of the text layers is wrapped, through the public attention interface of
transformers, by one that computes the softmax for the chosen rows only and then calls the kernel in use. The vision
tower keeps its own attention.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass
class AttentionRows:
    """Captured weights.

    Args:
        weights: layer index to `(batch, heads, rows, keys)`, in float32, of the last forward in the context. They are
            part of the autograd graph unless gradients are off.
    """

    weights: dict[int, torch.Tensor] = field(default_factory=dict)

    def mean(self) -> torch.Tensor:
        """Mean over the captured layers and all heads, `(batch, rows, keys)`.

        Raises:
            ValueError: when no forward ran in the context.
        """
        if not self.weights:
            raise ValueError("no attention was captured; run a forward of the model inside the context")
        return torch.stack([weights.mean(dim=1) for weights in self.weights.values()]).mean(dim=0)


def attention_of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: torch.LongTensor,
    scaling: float,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of chosen query rows.

    Args:
        query: `(batch, heads, queries, dim)` after rotary embedding.
        key: `(batch, kv_heads, keys, dim)`; the last key belongs to the last query.
        attention_mask: 4-D mask of the kernel (bool: true may attend; float: added), or `None` for plain causal
        attention.
        rows: `(batch, rows)` indices into the query axis.
        scaling: factor on the dot products.
        padding: 2-D mask `(batch, keys)` for kernels that take one (flash), 0 at padding.

    Returns:
        `(batch, heads, rows, keys)` float32; zeros for a row that may attend to nothing (padding).
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    index = rows.view(batch, 1, -1, 1)
    chosen = query.gather(2, index.expand(-1, heads, -1, dim))
    grouped = chosen.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # query heads that share a key head, side by side
    scores = (grouped.float() @ key.float().transpose(-1, -2)) * scaling
    scores = scores.unflatten(2, (-1, rows.shape[1])).flatten(1, 2)
    if attention_mask is not None:
        mask = attention_mask[..., :keys].expand(batch, -1, -1, -1)
        allowed = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))
        if allowed.dtype != torch.bool:
            scores = scores + allowed.float()
            allowed = allowed > torch.finfo(allowed.dtype).min / 2
    else:
        allowed = torch.arange(keys, device=key.device) <= index + keys - queries
        if padding is not None:
            allowed = allowed & padding[:, None, None, :keys].bool()
    nothing = ~allowed.any(dim=-1, keepdim=True)
    return scores.masked_fill(~(allowed | nothing), -float("inf")).softmax(dim=-1).masked_fill(nothing, 0.0)


@contextmanager
def capture_attention_rows(
    model: PreTrainedModel,
    rows: torch.LongTensor | None = None,
    layers: list[int] | None = None,
    gradients: bool = True,
) -> Iterator[AttentionRows]:
    """Capture attention rows of the text decoder during the forwards run inside the context.

    Args:
        model: any model whose text layers use the attention interface of transformers.
        rows: `(batch, rows)` query indices of the forward, negative ones count from its end; default the last query.
        layers: layer indices; default all.
        gradients: whether the weights are part of the autograd graph, where there is one.

    Yields:
        [`AttentionRows`], filled by each forward (the last one wins).

    Raises:
        ValueError: unknown layers, an attention implementation that is not in the interface, or (from the forward)
            rows that it does not have.

    Example:
    ```python
    with capture_attention_rows(model, layers=[3]) as captured, torch.no_grad():
        model(**inputs)
    captured.weights[3]  # (batch, heads, 1, keys)
    ```
    """
    layer_count = model.config.get_text_config().num_hidden_layers
    unknown = [layer for layer in layers or [] if not 0 <= layer < layer_count]
    if unknown:
        raise ValueError(f"layers {unknown} do not exist; the text decoder has {layer_count} layers")
    decoder, captured = model.get_decoder(), AttentionRows()

    def observe(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float | None) -> None:
        if layers is None or module.layer_idx in layers:
            index = _row_index(rows, query)
            is_dense = mask is not None and mask.dim() == 4
            with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                captured.weights[module.layer_idx] = attention_of_rows(
                    query,
                    key,
                    mask if is_dense else None,
                    index,
                    query.shape[-1] ** -0.5 if scaling is None else scaling,
                    None if is_dense else mask,
                )

    base = decoder.config._attn_implementation
    capture = (set(decoder.modules()), observe)
    decoder.config._attn_implementation = _observed_implementation(base)
    _OPEN.append(capture)
    try:
        yield captured
    finally:
        _OPEN.remove(capture)
        decoder.config._attn_implementation = base


# The captures that are open, each with the modules of its decoder: contexts of two models, or of one, may be nested.
_OPEN: list[tuple[set[nn.Module], Callable[..., None]]] = []
_SUFFIX = f"_rows_{id(_OPEN):x}"  # of this file alone: a process may have code of several repositories


def _observed_implementation(base: str) -> str:
    """Register once, and name, the attention implementation that shows queries and keys to the open captures.

    Raises:
        ValueError: when `base` is not in the attention interface.
    """
    name = base.removesuffix(_SUFFIX) + _SUFFIX
    if name in ALL_ATTENTION_FUNCTIONS:
        return name
    kernel = None if base == "eager" else ALL_ATTENTION_FUNCTIONS.get(base)
    if base != "eager" and kernel is None:
        raise ValueError(f"attention implementation {base!r} is not in the attention interface; use 'sdpa' or 'eager'")

    def observed(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        for modules, observe in _OPEN:
            if module in modules:
                observe(module, query, key, mask, kwargs.get("scaling"))
        function = kernel or eager_attention_of(module)
        return function(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, observed)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _row_index(rows: torch.LongTensor | None, query: torch.Tensor) -> torch.LongTensor:
    """`(batch, rows)` indices from 0 into the query axis.

    Raises:
        ValueError: for another number of sequences, or a row that the forward does not have.
    """
    batch, queries = query.shape[0], query.shape[2]
    if rows is None:
        return torch.full((batch, 1), queries - 1, device=query.device)
    if rows.shape[0] != batch or bool(((rows < -queries) | (rows >= queries)).any()):
        raise ValueError(
            f"rows {rows.tolist()} do not fit a forward of {batch} sequences and {queries} queries; give one list of "
            "indices a sequence, counted within this forward (with a cache only the new positions are queries)"
        )
    return rows.to(query.device) % queries


def eager_attention_of(module: nn.Module) -> Any:
    """The eager attention function of the module's own file."""
    return sys.modules[type(module).__module__].eager_attention_forward
