"""Attention of a few chosen query rows, beside SDPA or flash kernels, at any layer (contract C4).

Methods that pick image patches by attention, align it to a teacher's, or report it, need the weights of one or a few
queries. The kernels in use return none, and eager attention for all rows would allocate `length x length` weights in
every layer. Here the attention function of the text layers is wrapped, through the public attention interface of
transformers, by one that computes the softmax for the chosen rows only and then calls the kernel in use. The vision
tower keeps its own attention.
"""

import sys
from collections.abc import Iterator
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
        `(batch, heads, rows, keys)` float32.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    index = rows.view(batch, 1, -1, 1)
    chosen = query.gather(2, index.expand(-1, heads, -1, dim))
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = (chosen.float() @ key.float().transpose(-1, -2)) * scaling
    if attention_mask is not None:
        mask = attention_mask[..., :keys].expand(batch, -1, -1, -1)
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))
        scores = scores.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else scores + mask.float()
    else:
        position = index + keys - queries
        scores = scores.masked_fill(torch.arange(keys, device=key.device) > position, -float("inf"))
        if padding is not None:
            scores = scores.masked_fill(~padding[:, None, None, :keys].bool(), -float("inf"))
    return scores.softmax(dim=-1)


@contextmanager
def capture_attention_rows(
    model: PreTrainedModel, rows: torch.LongTensor | None = None, layers: list[int] | None = None
) -> Iterator[AttentionRows]:
    """Capture attention rows of the text decoder during the forwards run inside the context.

    Args:
        model: any model whose text layers use the attention interface of transformers.
        rows: `(batch, rows)` query indices of the forward, negative ones count from its end; default the last query.
        layers: layer indices; default all.

    Yields:
        [`AttentionRows`], filled by each forward (the last one wins).

    Raises:
        ValueError: unknown layers, or an attention implementation that is not in the interface.

    Example:
    ```python
    with capture_attention_rows(model, layers=[3]) as captured, torch.no_grad():
        model(**inputs)
    captured.weights[3]  # (batch, heads, 1, keys)
    ```
    """
    text = model.config.get_text_config()
    decoder = getattr(model.base_model, "language_model", model.base_model)
    unknown = [layer for layer in layers or [] if not 0 <= layer < text.num_hidden_layers]
    if unknown:
        raise ValueError(f"layers {unknown} do not exist; the text decoder has {text.num_hidden_layers} layers")
    base = decoder.config._attn_implementation
    captured = AttentionRows()
    kernel = None if base == "eager" else ALL_ATTENTION_FUNCTIONS.get(base)
    if base != "eager" and kernel is None:
        raise ValueError(f"attention implementation {base!r} is not in the attention interface; use 'sdpa' or 'eager'")

    def observe(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if layers is None or module.layer_idx in layers:
            index = torch.full((query.shape[0], 1), -1, device=query.device) if rows is None else rows.to(query.device)
            is_dense = mask is not None and mask.dim() == 4
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            captured.weights[module.layer_idx] = attention_of_rows(
                query, key, mask if is_dense else None, index % query.shape[2], scaling, None if is_dense else mask
            )
        function = kernel or _eager_of(module)
        return function(module, query, key, value, mask, **kwargs)

    name = f"{base}_rows"
    AttentionInterface.register(name, observe)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    decoder.config._attn_implementation = name
    try:
        yield captured
    finally:
        decoder.config._attn_implementation = base


def _eager_of(module: nn.Module) -> Any:
    """The eager attention function of the module's own file."""
    return sys.modules[type(module).__module__].eager_attention_forward
