"""Latent heads: modules between a final-norm hidden state and the vector that is fed next.

A head is chosen by `config.latent_head`; `None` feeds the hidden state as it is (LASER). Further heads are added with
[`register_latent_head`] in the file that travels with the model.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

LATENT_HEADS: dict[str, Callable[[PreTrainedConfig], nn.Module]] = {}


def register_latent_head(name: str) -> Callable:
    """Class decorator that adds a head to the table. The class is built with the text configuration.

    Raises:
        ValueError: when the name is taken by another class.
    """

    def add(factory: Callable[[PreTrainedConfig], nn.Module]) -> Callable:
        known = LATENT_HEADS.get(name)
        if known is not None and known.__qualname__ != factory.__qualname__:
            raise ValueError(
                f"latent head {name!r} is already registered by {known.__qualname__}; choose another name"
            )
        LATENT_HEADS[name] = factory
        return factory

    return add


def build_latent_head(config: PreTrainedConfig) -> nn.Module | None:
    """Build the head named by `config.latent_head`, from the text configuration with `latent_head_size` in it.

    Raises:
        ValueError: for an unknown name, with the names that exist; for a `latent_head_size` that no layer would have.
    """
    size = getattr(config, "latent_head_size", None)
    if size is not None and size < 1:
        raise ValueError(f"latent_head_size={size} must be at least 1; leave it out for the width of the decoder")
    if config.latent_head is None:
        if size is not None:
            raise ValueError(f"latent_head_size={size} without a latent head; give latent_head='glu', or leave it out")
        return None
    if config.latent_head not in LATENT_HEADS:
        raise ValueError(f"unknown latent_head {config.latent_head!r}; choose one of {sorted(LATENT_HEADS)} or None")
    text_config = copy.copy(config.get_text_config())
    text_config.latent_head_size = size
    return LATENT_HEADS[config.latent_head](text_config)


@register_latent_head("simple")
class SimpleLatentHead(nn.Module):
    """LayerNorm, linear, GELU, linear; no residual. Keeps the shape `(..., hidden)`. Source: LVR, type `simple`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if getattr(config, "latent_head_size", None) is not None:
            raise ValueError(
                f"latent_head_size={config.latent_head_size}: the head 'simple' is as wide as the model; leave it "
                "out, or give latent_head='glu'"
            )
        size = config.hidden_size
        self.ln_q = nn.LayerNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(hidden_states))


@register_latent_head("glu")
class GluLatentHead(nn.Module):
    """Gated linear unit with biases and the decoder's activation, `latent_head_size` wide, by default as the decoder.

    Source: LVR, head type `glu`; its code takes the decoder's width, the paper says three times the hidden size.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        size = getattr(config, "latent_head_size", None) or _inner_width(config)
        self.gate_proj = nn.Linear(config.hidden_size, size)
        self.up_proj = nn.Linear(config.hidden_size, size)
        self.down_proj = nn.Linear(size, config.hidden_size)
        self.act_fn = ACT2FN[getattr(config, "hidden_act", None) or config.activation_function]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def _inner_width(config: PreTrainedConfig) -> int:
    """Width of the decoder between two hidden states; GPT-2 has another name for it, and a default."""
    return getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
